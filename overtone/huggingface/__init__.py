"""The loss inside Hugging Face models and trainers.

    handle = attach(model)                                              # model(..., labels=labels).loss is OverTone's
    Trainer(..., compute_loss_func=compute_loss_func(config))           # the model's own loss stays as it is

`causal_lm_loss` is what both compute: shifted labels, transformers' normalisation, an optional weight per token.
"""

try:
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError('overtone.huggingface needs transformers: pip install "overtone[hf]"') from error

from overtone.huggingface.attachment import Attachment, attach, detach
from overtone.huggingface.callback import TokenStatesCallback
from overtone.huggingface.collator import DataCollatorWithLossMask
from overtone.huggingface.edit_texts import EditTexts
from overtone.huggingface.loss import causal_lm_loss
from overtone.huggingface.outputs import compute_loss_func
from overtone.huggingface.written_texts import WrittenTexts, write_texts

__all__ = [
    "Attachment",
    "DataCollatorWithLossMask",
    "EditTexts",
    "TokenStatesCallback",
    "WrittenTexts",
    "attach",
    "causal_lm_loss",
    "compute_loss_func",
    "detach",
    "write_texts",
]
