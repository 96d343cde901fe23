"""When a token is settled, and held steps: a batch that needs nothing more gives no gradient at all.

Zeros are not enough. Adam and momentum go on moving every weight on zero gradients, drift away from the fit and
un-settle the tokens. A held loss is cut off from the model instead: `backward` still works on it, but every
`param.grad` stays as it was (None after `zero_grad`), so the optimiser skips its step. Cutting the graph, rather than
sending an undefined gradient into it, also holds where a function on the way would turn "undefined" into zeros:
reentrant checkpointing, compiled models, custom kernels.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeAlias, TypeVar

import torch
from torch import Tensor

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
        self, token_kl: Tensor, epsilon: float, correct: Tensor | None, group: ProcessGroup | None = None
    ) -> bool:
        """Whether a call is held: the same on every rank, of whose tokens together it is asked; none need nothing.

        Args:
            token_kl: ``(M,)``, of this rank's counted tokens, unclipped, in nats.
            epsilon: a token is settled below it.
            correct: ``(M,)``, bool; needed where the hold waits for it.
            group: the ranks that decide together, each of which has to ask; None for all.
        """
        if not self:
            return False
        summary = self._summary(token_kl, epsilon, correct)
        if are_several_ranks(group):
            torch.distributed.all_reduce(summary, group=group)
        return self._allows(summary)

    def is_met_here(self, token_kl: Tensor, epsilon: float, correct: Tensor | None) -> bool:
        """As `is_met`, of this process' tokens alone: of an edit, say, of which other processes have others."""
        return bool(self) and self._allows(self._summary(token_kl, epsilon, correct))

    def _summary(self, token_kl: Tensor, epsilon: float, correct: Tensor | None) -> Tensor:
        """What can be summed over ranks: tokens, their KL, how many are not settled, how many not correct."""
        sums = [torch.ones_like(token_kl), token_kl, ~is_settled(token_kl, epsilon, None)]
        sums += [] if correct is None else [~correct]
        return torch.stack([values.sum().to(token_kl.dtype) for values in sums])

    def _allows(self, summary: Tensor) -> bool:
        count, total, unsettled, *wrong = summary.tolist()
        return (
            not (self.settled and unsettled)
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
    numbers = [float(part) for part in parts if isinstance(part, (int, float))]
    if math.inf in numbers:
        raise ValueError(f"hold={value!r} would hold every call: pass 'correct', or a number of nats")
    is_known = all(word in ("correct", "settled") for word in words) and all(number > 0 for number in numbers)
    if not parts or not is_known or len(set(words)) < len(words) or len(numbers) > 1:
        raise ValueError(f"hold must be {EXPECTED}, got {value!r}")
    return Hold("correct" in words, "settled" in words, numbers[0] if numbers else None)


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
) -> Tensor:
    """The loss, without an effect on the model if the call is held.

    Args:
        loss: of any shape, with its graph.
        token_kl, epsilon, correct, group: as in `Hold.is_met`.
        hold: when to.

    Returns:
        loss itself, or its values as `without_effect` has them.
    """
    if not loss.requires_grad or not hold.is_met(token_kl, epsilon, correct, group):
        return loss
    return without_effect(loss)


def without_effect(loss: Tensor) -> Tensor:
    """The same values, whose `backward` works and changes no gradient.

    As a rule they have a graph of their own, which ends at once. On several ranks, gradients that earlier micro-batches
    have left wait for a backward pass of the last one to be exchanged (DistributedDataParallel's `no_sync`): then it
    goes through the model with zeros, which add nothing to them.
    """
    if are_several_ranks(None):
        nodes = list(_nodes_below(loss))
        if not RESHARDS_BY_ITSELF.get() and any(node.name().startswith(_FSDP2_NODE) for node in nodes):
            warnings.warn(
                "a held step has no backward pass, before which FSDP2 keeps the root's weights as they are: where it "
                "is one of several micro-batches, call model.reshard() after it, or use overtone.huggingface",
                stacklevel=4,
            )
        weights = (getattr(node, "variable", None) for node in nodes)
        if any(weight is not None and weight.grad is not None for weight in weights):
            zeroed: Tensor = _ZeroGradient.apply(loss)  # type: ignore[no-untyped-call]
            return zeroed
    return loss.detach().requires_grad_().clone()


RESHARDS_BY_ITSELF: ContextVar[bool] = ContextVar("overtone_reshards_by_itself", default=False)
"""Whether who asks for a loss sees to FSDP2's weights after a held step."""

_FSDP2_NODE = "RegisterPostBackwardFunction"


def sends_nothing(node: torch.autograd.graph.Node) -> bool:
    """Whether it is the place in a graph where `without_effect` has put zeros."""
    return node.name() == "_ZeroGradientBackward"


class _ZeroGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.zeros_like(grad)


def are_several_ranks(group: ProcessGroup | None) -> bool:
    """Whether there is anybody to agree with."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size(group) > 1


def _nodes_below(loss: Tensor) -> Iterator[torch.autograd.graph.Node]:
    """Every node of the graph that the loss has come from."""
    waiting, seen = [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [below for below, _ in node.next_functions]
            yield node


Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
OLD_NAMES = ("hold_settled", "hold_correct")


def old_values(value: HoldValue) -> dict[str, bool | float]:
    """What hold was called when it was two arguments."""
    hold = read_hold(value)
    if not hold:
        return {"hold_settled": False, "hold_correct": False}
    first = True if hold.settled else math.inf if hold.mean is None else hold.mean
    return {"hold_settled": first, "hold_correct": hold.correct}


def replace_old_names(hold: HoldValue, old: dict[str, object]) -> HoldValue:
    """What the arguments hold_settled and hold_correct say, in their places in hold.

    Args:
        hold: what they do not say.
        old: those of the two that were given. hold_settled is True, False, a number, or math.inf to leave it to
            hold_correct; hold_correct is True or False.

    Raises:
        ValueError, TypeError: for values that they did not take.
    """
    first, correct = {**old_values(hold), **old}.values()
    if not isinstance(correct, bool):
        raise TypeError(f"hold_correct must be True or False, got {correct!r} of type {type(correct).__name__}")
    if not isinstance(first, (bool, int, float)):
        raise TypeError(f"hold_settled must be True, False or a number, got {first!r} of type {type(first).__name__}")
    if first is False:
        if old.get("hold_correct"):
            warnings.warn("hold_correct=True does nothing without a hold: pass hold='correct'", stacklevel=3)
        return None
    if first == math.inf and correct:
        return "correct"
    if first is not True and not 0 < first < math.inf:
        raise ValueError(f"hold_settled must be True, False or a number of nats above 0, got {first!r}")
    word = "settled" if first is True else first
    return ("correct", word) if correct else word


def accepts_old_names(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A function with an argument hold that still takes hold_settled and hold_correct, with a DeprecationWarning."""

    names = inspect.signature(function).parameters

    @wraps(function)
    def wrapped(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if "hold_settled" in kwargs or "hold_correct" in kwargs:
            old = {name: kwargs.pop(name) for name in OLD_NAMES if name in kwargs}
            # Settings of which a part is changed (a preset, dataclasses.replace) come with both.
            if kwargs.get("hold") is not None and "self" not in names:
                raise ValueError(f"hold and {next(iter(old))} are both given: keep hold alone, got {kwargs['hold']!r}")
            hold = replace_old_names(kwargs.get("hold"), old)  # type: ignore[arg-type]
            said = ", ".join(f"{name}={value!r}" for name, value in old.items())
            warnings.warn(f"{said} is now called hold={hold!r}", DeprecationWarning, stacklevel=2)
            kwargs["hold"] = hold
        return function(*args, **kwargs)

    return wrapped
