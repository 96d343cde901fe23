"""The state of a sequence of edits under way, on disk after every edit and gone once the sequence is scored."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from overtone.lab.editors import FitTrace
from overtone.lab.losses import NamedLoss
from overtone.lab.sessions import Session
from overtone.lab.world import Edit

logger = logging.getLogger(__name__)

_BROKEN = (OSError, EOFError, RuntimeError, pickle.UnpicklingError)
_MALFORMED = (AttributeError, LookupError, TypeError, ValueError)
"""What a file that is not whole raises, and one that holds something else than `save` writes."""


class SequenceCheckpoint:
    """The edits of one sequence that were made so far."""

    def __init__(self, path: Path | None, of: str) -> None:
        """Name the file.

        Args:
            path: the file; None keeps no checkpoint.
            of: what the state depends on; a file of something else is passed over.
        """
        self.path = path
        self._of = of

    def resume(self, session: Session, edit: Edit, loss: NamedLoss) -> list[FitTrace]:
        """Put a session where the file says.

        Args:
            session: without an edit.
            edit: the first of the sequence.
            loss: that the sequence is fitted with.

        Returns:
            How the edits made so far went; none without a sound file.
        """
        if self.path is None:
            return []
        try:
            saved = torch.load(self.path, weights_only=True, map_location=session.model.device)
        except FileNotFoundError:
            return []
        except _BROKEN as error:
            return self._passed_over(error)
        try:
            if saved["of"] != self._of:
                return []
            fitted = [FitTrace(**{**fit, "losses": tuple(fit["losses"])}) for fit in saved["fitted"]]
            session.restore(saved["state"], edit, loss)
        except _MALFORMED as error:
            return self._passed_over(error)
        return fitted

    def _passed_over(self, error: Exception) -> list[FitTrace]:
        logger.warning("%s is broken and its sequence starts anew: %s: %s", self.path, type(error).__name__, error)
        return []

    def save(self, session: Session, fitted: Sequence[FitTrace]) -> None:
        """Keep the session's state, in place of the one before."""
        state = None if self.path is None else session.state()
        if self.path is None or state is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Written beside its place and moved there, so that a kill in the middle leaves the state before.
        unfinished = self.path.with_suffix(".unfinished")
        torch.save({"of": self._of, "state": state, "fitted": [asdict(fit) for fit in fitted]}, unfinished)
        os.replace(unfinished, self.path)
