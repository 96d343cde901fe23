"""overtone: a plug-in token-level loss for editing knowledge in language models (OverTone, ICML 2025).

    loss = overtone.overtone_loss(logits, labels)            # where F.cross_entropy(logits, labels) was
    criterion = overtone.OverToneLoss()                      # where torch.nn.CrossEntropyLoss() was

Adapters live in `overtone.huggingface` and `overtone.easyedit`, the testbed in `overtone.lab`.
"""

from overtone import functional
from overtone.diagnostics import TokenStates, token_states
from overtone.fused import overtone_loss
from overtone.loss import OverToneConfig, OverToneLoss

__all__ = ["OverToneConfig", "OverToneLoss", "TokenStates", "functional", "overtone_loss", "token_states"]
__version__ = "0.1.0"
