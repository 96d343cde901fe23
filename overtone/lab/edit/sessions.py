"""Editing methods by name, each opened on a clean model for a sequence of edits that any loss can drive."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from itertools import count
from typing import Any, Protocol

from torch import Tensor, nn

from overtone.lab.data.edit import Edit
from overtone.lab.edit.anchored import AnchoredTexts
from overtone.lab.edit.breadth_first import Rounds
from overtone.lab.edit.easyedit import process
from overtone.lab.edit.easyedit.algorithms import ALGORITHMS, easyedit_cannot_minimise, require_easyedit
from overtone.lab.edit.easyedit.session import open_easyedit_session
from overtone.lab.edit.fit import FitTrace, fit, target_loss
from overtone.lab.edit.methods import METHODS, EditingMethod, MethodSettings
from overtone.lab.model.positions import logits_at
from overtone.lab.model.targets import encode_targets
from overtone.lab.model.workplace import Workplace
from overtone.token_loss import EditLoss, LossSpec


class Session(Protocol):
    """A method at work on a model, from the clean model on until the context ends, which restores it bit for bit."""

    @property
    def model(self) -> Any:
        """What is scored; a method may wrap the model that it was opened on."""

    def apply(self, edit: Edit, loss: LossSpec, observe: Callable[[int], None] | None = None) -> FitTrace:
        """Make one edit on top of those before it.

        Args:
            edit: what to make true.
            loss: what to fit it with.
            observe: called with the number of steps taken so far, before every step.

        Raises:
            RuntimeError: the loss is NaN or infinite.
        """


class WeightSession:
    """A few opened weights that every edit moves, with a new optimiser each, or all of a row with one."""

    def __init__(
        self, workplace: Workplace, method: EditingMethod, settings: MethodSettings, parameters: list[nn.Parameter]
    ) -> None:
        """Take the weights that the method has opened."""
        self.model = workplace.model
        self._tokenizer = workplace.tokenizer
        self._method = method
        self._settings = settings
        self._parameters = parameters

    def apply(self, edit: Edit, loss: LossSpec, observe: Callable[[int], None] | None = None) -> FitTrace:
        """Fit the edit; see `Session`."""
        return fit(
            self._parameters,
            self._loss_of(edit, loss.build(self._method.name)),
            steps=self._settings.steps,
            lr=self._settings.lr,
            observe=observe,
        )

    def apply_in_rounds(self, edits: Sequence[Edit], loss: LossSpec, *, edits_a_step: int, seed: int) -> list[FitTrace]:
        """Fit several edits with one optimiser, in rounds over all of them.

        Args:
            edits: what to make true.
            loss: what to fit each with.
            edits_a_step: how many edits share a step.
            seed: of the shuffles.

        Returns:
            For each edit the steps in which it was not held; losses, end and an equal share of the time are of all.

        Raises:
            RuntimeError: the loss is NaN or infinite.
        """
        rounds = Rounds(
            self.model,
            self._tokenizer,
            edits,
            lambda: loss.build(self._method.name),
            edits_a_step=edits_a_step,
            seed=seed,
        )
        place = count()

        def loss_of() -> Tensor:
            rows = rounds.rows(next(place))
            return rounds.mean(logits_at(self.model, [rounds.texts[row] for row in rows]), rows)

        trace = fit(
            self._parameters,
            loss_of,
            steps=self._settings.steps,
            lr=self._settings.lr,
            steps_a_round=rounds.steps_a_round,
        )
        return [replace(trace, steps=steps, seconds=trace.seconds / len(edits)) for steps in rounds.steps]

    def _loss_of(self, edit: Edit, loss: EditLoss) -> Callable[[], Tensor]:
        batch = encode_targets(self._tokenizer, edit.pairs, self.model.device)
        if loss.anchor == 0:
            return target_loss(self.model, batch, loss.mean)
        texts = AnchoredTexts(batch, self._tokenizer.bos_token_id)
        return lambda: texts.mean(loss, logits_at(self.model, texts.texts))


def require_method(name: str) -> None:
    """Refuse what cannot be opened.

    Raises:
        ValueError: an unknown name, or a method of EasyEdit's where EasyEdit cannot be imported.
    """
    if name in METHODS:
        return
    if name not in ALGORITHMS:
        raise ValueError(f"unknown method {name!r}: choose from {', '.join((*METHODS, *ALGORITHMS))}")
    require_easyedit(name)


def easyedit_version() -> str:
    """The commit of the EasyEdit at hand."""
    return process.version()


def unsupported(method: str, loss: LossSpec) -> str | None:
    """Why a method cannot minimise a loss, or None."""
    return None if method in METHODS else easyedit_cannot_minimise(method, loss)


def open_session(
    workplace: Workplace, method: str, settings: MethodSettings | None, seed: int, texts: Sequence[str] = ()
) -> AbstractContextManager[Session]:
    """A method's session on the workplace's clean model.

    Args:
        workplace: with the model and its tokenizer.
        method: a key of `overtone.lab.edit.methods.METHODS` or of
            `overtone.lab.edit.easyedit.algorithms.ALGORITHMS`.
        settings: of the optimiser and the weights; EasyEdit's methods take those of its own files.
        seed: of the method's random initial weights.
        texts: what the model knows; some of EasyEdit's methods need them.

    Raises:
        ValueError: as `require_method`, and where the model is not one that the method knows.
    """
    if method in METHODS:
        return _open_weights(workplace, METHODS[method], settings or METHODS[method].settings, seed)
    return open_easyedit_session(workplace, method, seed, texts)


@contextmanager
def _open_weights(
    workplace: Workplace, method: EditingMethod, settings: MethodSettings, seed: int
) -> Iterator[WeightSession]:
    with method.open(workplace.model, settings, seed) as parameters:
        yield WeightSession(workplace, method, settings, parameters)
