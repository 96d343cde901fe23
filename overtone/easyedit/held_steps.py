"""A held step holds everything: no term beside the tokens' loss moves a weight either.

A tuner or a model may add terms of its own to the loss after ours was computed: AdaLoRA its orthogonality, a mixture of
experts its router loss. Where the tokens need nothing more these must not go on moving the weights, or the step is not
held.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook


@contextmanager
def held_steps() -> Iterator[Callable[[bool], None]]:
    """Let optimisers skip their step where every loss since their last one was held; in this thread, inside the block.

    Yields:
        To be called once a loss, with whether it is held.
    """
    thread = threading.get_ident()
    since_last_step: list[bool] = []

    def before_step(optimizer: Optimizer, *_: Any) -> None:
        if threading.get_ident() != thread:
            return
        if since_last_step and all(since_last_step):
            optimizer.zero_grad(set_to_none=True)
        since_last_step.clear()

    handle = register_optimizer_step_pre_hook(before_step)
    try:
        yield since_last_step.append
    finally:
        handle.remove()
