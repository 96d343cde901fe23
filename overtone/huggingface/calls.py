"""What a running forward of an attached model has seen so far, for each model and each thread apart."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from overtone.huggingface.reference import Batch


@dataclass(eq=False)
class Call:
    """One forward that is running.

    Attributes:
        outer: the forward of the same model, in the same thread, inside which this one runs; or None.
        has_asked: whether the attached loss was asked for.
        is_held: whether that loss held the step.
        expects_head: whether the output layer, when it is called next, is to be passed by.
        diverted: what the output layer was given in place of making logits, and the layer.
        empty_logits: what the output layer returned then.
        batch: what it was called with, where anchors need to know.
    """

    outer: Call | None
    has_asked: bool = False
    is_held: bool = False
    expects_head: bool = False
    diverted: tuple[Tensor, nn.Linear] | None = None
    empty_logits: Tensor | None = None
    batch: Batch | None = None


class Calls(threading.local):
    """The innermost running forward of one model in this thread; copied and pickled as if nothing were running."""

    def __init__(self) -> None:
        self.current: Call | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """A fresh one."""
        return Calls, ()
