"""A held step holds everything: no term beside the tokens' loss moves a weight either.

A tuner or a model may add terms of its own to the loss after ours was computed: AdaLoRA its orthogonality, a mixture of
experts its router loss. Where the tokens need nothing more these must not go on moving the weights, or the step is not
held.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook


@contextmanager
def held_steps() -> Iterator[list[bool]]:
    """Let optimisers skip their step where every loss since their last one was held; in this thread, inside the block.

    Yields:
        Whether each loss since the last step was held, for the caller to fill in.
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
        yield since_last_step
    finally:
        handle.remove()
