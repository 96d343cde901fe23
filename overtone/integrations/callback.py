"""The loss in a Trainer that is reached only through its callbacks: LLaMA-Factory's, axolotl's, one's own."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from overtone.huggingface import Attachment, attach
from overtone.integrations.settings import Settings, read_settings

__all__ = ["OverToneCallback"]


class OverToneCallback(TrainerCallback):  # type: ignore[misc]
    """Attaches the loss to the model when training begins, and detaches it when training ends.

    A Trainer tells its callbacks nothing of an error: the loss is then detached when the next training begins.

    Args:
        settings: as `read_settings` takes them.
        **arguments: those of `overtone.huggingface.attach`, by name.

    Raises:
        ValueError, TypeError: for settings that cannot be; when training begins, as `attach`; in the first step, for a
            Trainer that computes another loss.
    """

    def __init__(self, settings: Settings = None, **arguments: Any) -> None:
        self.config = read_settings(settings, takes_anchor=True)
        self.arguments = arguments
        self._attachment: Attachment | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Attach, once, also where an earlier training has ended in an error."""
        self.on_train_end(args, state, control)
        self._attachment = attach(model, self.config, **self.arguments)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Detach."""
        if self._attachment is not None:
            self._attachment.detach()
            self._attachment = None
