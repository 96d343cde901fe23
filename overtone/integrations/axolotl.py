"""axolotl: `plugins: [overtone.integrations.axolotl.OverTonePlugin]`, and the key `overtone` that switches it on."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from overtone.integrations.callback import OverToneCallback
from overtone.integrations.settings import read_settings, require

__all__ = ["OverToneArgs", "OverTonePlugin"]

_NEEDED = {
    **dict.fromkeys(("cut_cross_entropy", "chunked_cross_entropy", "flash_attn_cross_entropy"), False),
    **dict.fromkeys(("liger_cross_entropy", "liger_fused_linear_cross_entropy"), False),
    **dict.fromkeys(("use_dft", "use_eaft", "kd_trainer", "reward_model", "process_reward_model"), False),
    **dict.fromkeys(("context_parallel_size", "sequence_parallel_degree"), 1),
    "rl": None,
}


class OverToneArgs(BaseModel):
    """The key: `overtone:lam=0.5+hold=settled`, a mapping with the fields, or nothing for axolotl's own loss."""

    overtone: str | dict[str, Any] | None = None


class OverTonePlugin(BasePlugin):  # type: ignore[misc]
    """Attaches the loss to the model when training begins."""

    def get_input_args(self) -> str:
        """Where axolotl finds the plugin's keys."""
        return "overtone.integrations.axolotl.OverToneArgs"

    def register(self, cfg: dict[str, Any]) -> None:
        """Refuse what would compute another loss, before anything is loaded."""
        if cfg.get("overtone") is None:
            return
        try:
            read_settings(cfg["overtone"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"the key overtone: {error}; leave it out for axolotl's own loss") from error
        require({name: value for name, value in cfg.items() if value is not None}, **_NEEDED)

    def pre_model_load(self, cfg: dict[str, Any]) -> None:
        """Again with the defaults, which the keys do not have before: cut cross-entropy's is on."""
        self.register(cfg)

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        """The callback that attaches the loss, if the key is there; refuses a trainer with a loss of its own."""
        if cfg.overtone is None:
            return []
        from axolotl.core.trainers import AxolotlTrainer

        if type(trainer).compute_loss is not AxolotlTrainer.compute_loss:
            name = type(trainer).__name__
            raise ValueError(f"the trainer must have AxolotlTrainer's compute_loss, got {name}, which has another")
        return [OverToneCallback(cfg.overtone)]
