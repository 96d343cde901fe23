"""overtone: a plug-in token-level loss for editing knowledge in language models (OverTone, ICML 2025).

    loss = overtone.overtone_loss(logits, labels)            # where F.cross_entropy(logits, labels) was
    criterion = overtone.OverToneLoss()                      # where torch.nn.CrossEntropyLoss() was

The adapters `overtone.huggingface` and `overtone.easyedit` and the testbed `overtone.lab` are imported on first use,
since they need more than torch.
"""

import importlib
from types import ModuleType

from overtone import functional
from overtone.anchor import Anchors
from overtone.config import OverToneConfig
from overtone.diagnostics import TokenStates, token_states
from overtone.linear import linear_overtone_loss
from overtone.loss import OverToneLoss, overtone_loss
from overtone.shard import VocabularyShard

__all__ = [
    "Anchors",
    "OverToneConfig",
    "OverToneLoss",
    "TokenStates",
    "VocabularyShard",
    "functional",
    "linear_overtone_loss",
    "overtone_loss",
    "token_states",
]
__version__ = "0.1.0"

ON_FIRST_USE = ("easyedit", "huggingface", "lab")


def __getattr__(name: str) -> ModuleType:
    """Import an adapter or the lab when it is first asked for."""
    if name in ON_FIRST_USE:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
