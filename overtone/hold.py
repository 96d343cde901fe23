"""When a token is settled, and when a step needs nothing more, so that it is held."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from overtone.cut_off import are_several_ranks, without_effect
from overtone.torch_state import is_transformed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

HoldValue: TypeAlias = bool | str | float | Sequence[str | float] | None
"""What an argument `hold` takes; see `read_hold`."""


def is_settled(token_kl: Tensor, epsilon: float, correct: Tensor | None) -> Tensor:
    """Whether each token ``(M,)`` is let go: its KL below epsilon and, where correct ``(M,)`` is given, correct."""
    settled = token_kl < epsilon
    return settled if correct is None else settled & correct


@dataclass(frozen=True)
class Hold:
    """What must be true of a call's counted tokens for it to be held; with nothing of it, no call is.

    Attributes:
        correct: every label is strictly the model's first choice; then no other token is settled either.
        settled: every token is settled.
        mean: in nats; the mean KL is at or below it. None for no such bound.
    """

    correct: bool = False
    settled: bool = False
    mean: float | None = None

    def __bool__(self) -> bool:
        """Whether there is any condition."""
        return self.correct or self.settled or self.mean is not None

    @property
    def value(self) -> str | float | tuple[str | float, ...] | None:
        """The argument that says the same, written in one way."""
        words = ["correct"] * self.correct + ["settled"] * self.settled
        parts: tuple[str | float, ...] = (*words, *([] if self.mean is None else [self.mean]))
        return parts if len(parts) > 1 else parts[0] if parts else None

    def is_met(
        self,
        token_kl: Tensor,
        epsilon: float,
        correct: Tensor | None,
        group: ProcessGroup | None = None,
        moved: Tensor | None = None,
    ) -> bool:
        """Whether a call is held: the same on every rank, of whose tokens together it is asked; none need nothing.

        Args:
            token_kl: ``(M,)``, of this rank's counted tokens, unclipped, in nats.
            epsilon: a token is settled below it.
            correct: ``(M,)``, bool; needed where the hold waits for it.
            group: the ranks that decide together, each of which has to ask; None for all.
            moved: ``()``, how many groups of this rank's anchors have a mean KL above their epsilon; None for none.
        """
        if not self:
            return False
        summary = self._summary(token_kl, epsilon, correct, moved)
        if are_several_ranks(group):
            torch.distributed.all_reduce(summary, group=group)
        return self._allows(summary)

    def is_met_here(
        self, token_kl: Tensor, epsilon: float, correct: Tensor | None, moved: Tensor | None = None
    ) -> bool:
        """As `is_met`, of this process' tokens alone: of an edit, say, of which other processes have others."""
        return bool(self) and self._allows(self._summary(token_kl, epsilon, correct, moved))

    def _summary(self, token_kl: Tensor, epsilon: float, correct: Tensor | None, moved: Tensor | None = None) -> Tensor:
        """What can be summed over ranks: tokens, their KL, and how many are unsettled, have moved, are not correct."""
        moved = torch.zeros_like(token_kl[:0]) if moved is None else moved
        sums = [torch.ones_like(token_kl), token_kl, ~is_settled(token_kl, epsilon, None), moved]
        sums += [] if correct is None else [~correct]
        return torch.stack([values.sum().to(token_kl.dtype) for values in sums])

    def _allows(self, summary: Tensor) -> bool:
        count, total, unsettled, moved, *wrong = summary.tolist()
        return (
            not moved
            and not (self.settled and unsettled)
            and not (self.correct and wrong[0])
            and (self.mean is None or count == 0 or total / count <= self.mean)
        )


NEVER = Hold()

EXPECTED = (
    "None, 'settled', 'correct', a mean KL in nats above 0 at which to hold, or a tuple of these that must all be true"
)


def read_hold(value: HoldValue) -> Hold:
    """The conditions that an argument `hold` names.

    Args:
        value: None or False; "settled" or True; "correct"; a number of nats; or several of these in a tuple or list.

    Raises:
        ValueError, TypeError: for anything else, with what was expected.
    """
    if value is None or value is False:
        return NEVER
    parts: list[object] = list(value) if isinstance(value, (tuple, list)) else ["settled" if value is True else value]
    for part in parts:
        if isinstance(part, bool) or not isinstance(part, (str, int, float)):
            raise TypeError(f"hold must be {EXPECTED}, got {value!r} of type {type(value).__name__}")
    words = [part for part in parts if isinstance(part, str)]
    numbers = [part for part in parts if isinstance(part, (int, float))]
    if any(number > sys.float_info.max for number in numbers):
        raise ValueError(f"hold={value!r} would hold every call: pass 'correct', or a number of nats")
    is_known = all(word in ("correct", "settled") for word in words) and all(number > 0 for number in numbers)
    if not parts or not is_known or len(set(words)) < len(words) or len(numbers) > 1:
        raise ValueError(f"hold must be {EXPECTED}, got {value!r}")
    return Hold("correct" in words, "settled" in words, float(numbers[0]) if numbers else None)


def check_hold_group(group: object) -> None:
    """Raise a TypeError for anything but ranks of torch.distributed, which may be without this one, or None."""
    if group is None:
        return
    if torch.distributed.is_available():
        from torch.distributed import GroupMember, ProcessGroup

        no_member = GroupMember.NON_GROUP_MEMBER
        if isinstance(group, ProcessGroup) or (isinstance(group, type(no_member)) and group == no_member):
            return
    raise TypeError(
        f"hold_group must be a torch.distributed.ProcessGroup or None, got {group!r} of type {type(group).__name__}: "
        "leave it out for all ranks"
    )


def refuse_hold_in_graph(hold: Hold) -> None:
    """Raise a ValueError where a function is traced: which gradients there are cannot depend on values in a graph.

    That is in torch.compile (where a graph may break, ``fullgraph=False``, it then runs the function outside of it)
    and in torch.func's transforms.
    """
    if hold and torch.compiler.is_compiling():
        raise ValueError(
            f"hold={hold.value!r} cannot be used inside torch.compile(fullgraph=True), since whether a step is held "
            "depends on its values: compile the model alone and call the loss outside, or pass hold=None"
        )
    if hold and is_transformed():
        raise ValueError(
            f"hold={hold.value!r} cannot be used inside torch.func's grad and vmap, which return a gradient "
            "whatever the values are: pass hold=None"
        )


def release_when_held(
    loss: Tensor,
    token_kl: Tensor,
    epsilon: float,
    hold: Hold,
    correct: Tensor | None,
    group: ProcessGroup | None = None,
    moved: Tensor | None = None,
) -> Tensor:
    """The loss, without an effect on the model if the call is held.

    Args:
        loss: of any shape, with its graph.
        token_kl, epsilon, correct, group, moved: as in `Hold.is_met`.
        hold: when to.

    Returns:
        loss itself, or its values as `without_effect` has them.
    """
    if not loss.requires_grad or not hold.is_met(token_kl, epsilon, correct, group, moved):
        return loss
    return without_effect(loss)
