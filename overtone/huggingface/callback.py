"""What the loss does to the tokens, in the Trainer's logs; and the end of a training run that needs nothing more."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from overtone.config import OverToneConfig, checked_config
from overtone.diagnostics import TokenStates, token_states
from overtone.hold import read_hold

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["TokenStatesCallback"]

_SUMS = ("share_settled", "share_mixed", "mean_kl", "accuracy")
_FIELDS = 2 + len(_SUMS)
"""Of a step: its tokens, its micro-batches that needed a gradient, and the sums over its tokens."""


class TokenStatesCallback(TrainerCallback):  # type: ignore[misc]
    """Logs the state of the training tokens where Trainer logs its loss, averaged over the same steps.

    Added to the logs: ``share_settled``, ``share_mixed`` and ``accuracy`` in [0, 1], ``mean_kl`` in nats (before the
    clip). The loss has to show the callback its tokens:

        callback = TokenStatesCallback(config)
        loss = compute_loss_func(config, observer=callback.observe)     # or attach(model, config, observer=...)
        Trainer(..., compute_loss_func=loss, callbacks=[callback])

    This costs about one more evaluation of the loss a step. Under torch.distributed the numbers are those of all
    ranks. Reporters that Trainer puts before its users' callbacks (TensorBoard and the like) see the numbers if the
    callback goes first: ``trainer.callback_handler.callbacks.insert(0, callback)`` in the place of ``callbacks=``.

    Args:
        config: the settings of the loss; None for the defaults.
        stop_after_held: stop training after this many steps in a row in which nothing was left to learn: every token
            of the step settled or, where config.hold says otherwise, every micro-batch held, as the loss decides. None
            never stops. With several batches an epoch, give at least their number.
        hold_group: as of the loss that the callback is shown.

    Raises:
        ValueError, TypeError: for a stop_after_held that is not a whole number of steps, 1 or more, or that is given
            with an anchor, of which the callback sees nothing; when training begins, for a hold with fp16=True, whose
            gradient scaler fails on a step without gradients.
    """

    def __init__(
        self,
        config: OverToneConfig | None = None,
        *,
        stop_after_held: int | None = None,
        hold_group: ProcessGroup | None = None,
    ) -> None:
        config = checked_config(config)
        if stop_after_held is not None:
            if isinstance(stop_after_held, bool) or not isinstance(stop_after_held, int):
                raise TypeError(f"stop_after_held must be a whole number of steps or None, got {stop_after_held!r}")
            if config.anchor:
                raise ValueError(
                    "stop_after_held must be None with an anchor: the callback is shown the targets, and cannot tell "
                    "whether what must stay has"
                )
            if stop_after_held < 1:
                raise ValueError(f"stop_after_held must be 1 or more, or None, got {stop_after_held}")
        self.config = config
        self.hold_group = hold_group
        self.stop_after_held = stop_after_held
        self._step: Tensor | None = None
        self._logged = torch.zeros(_FIELDS, dtype=torch.float64)
        self._is_observing = False
        self._held_steps = 0

    def observe(self, logits: Tensor, labels: Tensor) -> None:
        """Count the tokens of a micro-batch: logits ``(..., V)``, labels ``(...)`` aligned with them."""
        states = token_states(logits, labels, self.config)
        fields = (states.counted, self._needs_gradient(states), states.settled, states.mixed, states.kl, states.correct)
        sums = torch.stack([values.sum().double() for values in fields])
        self._step = sums if self._step is None else self._step + sums
        self._is_observing = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget an earlier run; refuse a hold under fp16, whose gradient scaler fails on a step without gradients."""
        # On a CPU accelerate has no scaler, and computes in float32.
        if args.fp16 and args.device.type != "cpu" and self.config.hold is not None:
            raise ValueError(
                f"hold={self.config.hold!r} cannot be used with fp16=True: torch's gradient scaler raises in a step "
                "without gradients; train with bf16=True, or pass hold=None"
            )
        self._step = None
        self._logged = torch.zeros_like(self._logged)
        self._held_steps = 0
        self._is_observing = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the step: add it to what is logged next, and count it if it was held."""
        step = torch.zeros(_FIELDS, dtype=torch.float64, device=args.device) if self._step is None else self._step
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(step)
        self._step = None
        self._logged = self._logged + step.cpu()
        tokens, in_need = step[:2].tolist()
        self._held_steps = self._held_steps + 1 if tokens and not in_need else 0
        if self.stop_after_held is not None and self._held_steps >= self.stop_after_held:
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Add the averages to the logs that hold the training loss, and to the trainer's history of them."""
        if logs is None or "loss" not in logs:
            return
        if not self._is_observing:
            self._is_observing = True
            warnings.warn(
                "TokenStatesCallback has seen no tokens, so it logs nothing and stops nothing; show it the loss's: "
                "compute_loss_func(config, observer=callback.observe) or attach(model, config, "
                "observer=callback.observe)",
                stacklevel=2,
            )
        tokens, _, *sums = self._logged.tolist()
        if not tokens:
            return
        averages = {name: total / tokens for name, total in zip(_SUMS, sums, strict=True)}
        logs.update(averages)
        state.log_history[-1].update(averages)
        self._logged = torch.zeros_like(self._logged)

    def _needs_gradient(self, states: TokenStates) -> Tensor:
        """Whether a micro-batch would not be held, as the loss decides it, one by one."""
        hold, counted = read_hold(self.config.hold), states.counted
        if not hold:
            return (counted & ~states.settled).any()
        is_held = hold.is_met(states.kl[counted], self.config.epsilon, states.correct[counted], self.hold_group)
        return torch.tensor(not is_held, device=counted.device)
