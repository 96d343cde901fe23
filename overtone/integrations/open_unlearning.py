"""open-unlearning: a trainer that teaches refusals, beside its loss on what is to be retained.

It has to be registered, in src/trainer/__init__.py: `_register_trainer(OverTone)`.
"""

from __future__ import annotations

from typing import Any

from torch.nn.functional import pad
from trainer.unlearn.grad_diff import GradDiff

from overtone.integrations.settings import Settings, read_settings, require
from overtone.loss import overtone_loss

__all__ = ["OverTone"]


class OverTone(GradDiff):  # type: ignore[misc]
    """``gamma * OverTone(refusals) + alpha * retain loss``, for the data sets that DPO takes (QAwithIdkDataset).

    Args:
        settings: as `read_settings` takes them, without a hold: the retain loss has always something to do.
        **arguments: GradDiff's, by name: gamma, alpha, retain_loss_type and the Trainer's.
    """

    def __init__(self, settings: Settings = None, **arguments: Any) -> None:
        self.config = read_settings(settings)
        require(self.config.as_kwargs(), hold=None)
        super().__init__(**arguments)
        # Newer Trainers divide by the accumulated micro-batches only then; both losses here are means of one of them.
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        """The loss of a batch of the forget set's "alternate" answers and of the retain set."""
        forget, retain = (
            {key: part[key] for key in ("input_ids", "attention_mask", "labels")}
            for part in (_refusals(inputs["forget"]), inputs["retain"])
        )
        labels = forget.pop("labels")
        outputs = model(**forget)
        next_tokens = pad(labels[:, 1:], (0, 1), value=-100)
        forget_loss = overtone_loss(outputs.logits, next_tokens, **self.config.as_kwargs())
        loss = self.gamma * forget_loss + self.alpha * self.compute_retain_loss(model=model, retain_inputs=retain)
        return (loss, outputs) if return_outputs else loss


def _refusals(forget: Any) -> Any:
    if "alternate" not in forget:
        raise ValueError(
            "the forget set must have alternate answers, as QAwithIdkDataset gives them, got "
            f"{', '.join(forget)}: this loss would teach what is to be forgotten"
        )
    return forget["alternate"]
