"""Editing methods by name, each opened on a clean model for a sequence of edits that any loss can drive.

The lab's own methods train a few weights with `overtone.lab.editors.fit`, one edit after the other; EasyEdit's methods
are looked up when one of them is named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from overtone.lab.batching import encode_targets
from overtone.lab.editors import METHODS, EditingMethod, FitTrace, fit
from overtone.lab.losses import NamedLoss
from overtone.lab.world import Edit

if TYPE_CHECKING:
    from overtone.lab.experiment import Workplace


class Session(Protocol):
    """A method at work on a model, from the clean model on until the context ends, which restores it bit for bit."""

    @property
    def model(self) -> Any:
        """What is scored; a method may wrap the model that it was opened on."""

    def apply(self, edit: Edit, loss: NamedLoss, observe: Callable[[int], None] | None = None) -> FitTrace:
        """Make one edit on top of those before it.

        Args:
            edit: what to make true.
            loss: what to fit it with.
            observe: called with the number of steps taken so far, before every step.

        Raises:
            RuntimeError: the loss is NaN or infinite.
        """

    def state(self) -> dict[str, Any] | None:
        """What `restore` needs to go on after the edits made so far, as `torch.load` takes it with ``weights_only``.

        None where a method cannot go on.
        """

    def restore(self, state: Mapping[str, Any], edit: Edit, loss: NamedLoss) -> None:
        """Go on from a state, before any edit, on the same clean model and with the same seed.

        Args:
            state: from `state`.
            edit: the first of the edits made.
            loss: what it was fitted with; a method that adds layers to the model needs both to add them again.

        Raises:
            ValueError, LookupError, TypeError, AttributeError: it is not a state of this method and model; nothing is
                edited then.
        """


class WeightSession:
    """A few opened weights that every edit moves, with a new optimiser each."""

    def __init__(self, model: Any, tokenizer: Any, method: EditingMethod, parameters: list[nn.Parameter]) -> None:
        """Take the weights that the method has opened."""
        self.model = model
        self._tokenizer = tokenizer
        self._method = method
        self._parameters = parameters

    def apply(self, edit: Edit, loss: NamedLoss, observe: Callable[[int], None] | None = None) -> FitTrace:
        """Fit the edit; see `Session`."""
        return fit(
            self.model,
            self._parameters,
            encode_targets(self._tokenizer, edited_pairs(edit), self.model.device),
            loss.build(self._method.name),
            steps=self._method.steps,
            lr=self._method.lr,
            stop_below=loss.stop_below,
            observe=observe,
        )

    def state(self) -> dict[str, Tensor]:
        """The opened weights."""
        return {str(number): weight.detach().clone() for number, weight in enumerate(self._parameters)}

    def restore(self, state: Mapping[str, Tensor], edit: Edit, loss: NamedLoss) -> None:
        """Put the weights of a state in place; see `Session`."""
        shapes = [state[str(number)].shape for number in range(len(self._parameters))]
        if shapes != [weight.shape for weight in self._parameters]:
            raise ValueError(f"state must hold the weights of {self._method.name} on this model, got shapes {shapes}")
        with torch.no_grad():
            for number, weight in enumerate(self._parameters):
                weight.copy_(state[str(number)])


def edited_pairs(edit: Edit) -> list[tuple[str, str]]:
    """The prompts and targets that the edit fits."""
    return [(edit.prompt, edit.target_new), *edit.also]


def require_method(name: str) -> None:
    """Refuse what cannot be opened.

    Raises:
        ValueError: an unknown name, or a method of EasyEdit's where EasyEdit cannot be imported.
    """
    if name not in METHODS:
        easyedit = _easyedit()
        if name not in easyedit.ALGORITHMS:
            known = ", ".join((*METHODS, *easyedit.ALGORITHMS))
            raise ValueError(f"unknown method {name!r}: choose from {known}")
        if missing := easyedit.process.missing():
            raise ValueError(f"method {name!r} needs EasyEdit: {missing}")


def easyedit_version() -> str:
    """The commit of the EasyEdit at hand."""
    version: str = _easyedit().process.version()
    return version


def unsupported(method: str, loss: NamedLoss) -> str | None:
    """Why a method cannot minimise a loss, or None."""
    return None if method in METHODS else _easyedit().unsupported(method, loss)


def open_session(
    workplace: Workplace, method: str, seed: int, texts: Sequence[str] = ()
) -> AbstractContextManager[Session]:
    """A method's session on the workplace's clean model.

    Args:
        workplace: with the model and its tokenizer.
        method: a name in `overtone.lab.editors.METHODS` or one of EasyEdit's methods.
        seed: of the method's random initial weights.
        texts: what the model knows; some of EasyEdit's methods need them.

    Raises:
        ValueError: as `require_method`, and where the model is not one that the method knows.
    """
    if method in METHODS:
        return _open_weights(workplace, METHODS[method], seed)
    session: AbstractContextManager[Session] = _easyedit().open_easyedit_session(workplace, method, seed, texts)
    return session


@contextmanager
def _open_weights(workplace: Workplace, method: EditingMethod, seed: int) -> Iterator[Session]:
    with method.open(workplace.model, seed) as parameters:
        yield WeightSession(workplace.model, workplace.tokenizer, method, parameters)


def _easyedit() -> Any:
    """Imported when needed: it edits in the workplaces of `overtone.lab.experiment`, which imports this module."""
    from overtone.lab import easyedit_session

    return easyedit_session
