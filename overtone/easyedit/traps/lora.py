"""Traps of LoRA and QLoRA."""

from __future__ import annotations

from collections.abc import Iterator

from overtone.easyedit.hparams import KEY
from overtone.easyedit.traps.trap import Config, Trap


def _adalora(config: Config) -> Iterator[Trap]:
    if config.get("lora_type") == "adalora" and _adalora_needs_total_step():
        yield Trap(
            "lora_type adalora cannot be built by EasyEdit with this peft: AdaLoRA wants a total_step",
            "lora_type: lora",
            fatal=True,
        )


def _adalora_needs_total_step() -> bool:
    try:
        from peft import AdaLoraConfig
    except ImportError:
        return False
    try:
        AdaLoraConfig()
    except ValueError:
        return True
    return False


def _dropout(config: Config) -> Iterator[Trap]:
    if config.get("lora_dropout", 0.1 if config["alg_name"] == "QLoRA" else 0):
        yield Trap(
            f"lora_dropout {config.get('lora_dropout', 0.1)}: EasyEdit's LoRA stays in training mode, so dropout is on "
            "while the edit is evaluated",
            "lora_dropout: 0, or edited_model.eval() before scoring",
        )


def _freezes(config: Config) -> Iterator[Trap]:
    if config.get(KEY) is None:
        yield Trap(
            f"after a {config['alg_name']} edit was taken back every weight of the model stays frozen, its cache off",
            f"model.requires_grad_(True) and model.config.use_cache = True; with {KEY} both come back of themselves",
            always=True,
        )


def _qlora(config: Config) -> Iterator[Trap]:
    yield Trap(
        "QLoRA's trainer pads prompt and target to one length and scores pad tokens too, so its labels do not follow "
        "the prompt",
        "prefer LoRA for comparisons",
        always=True,
    )


CHECKS = (_adalora, _dropout, _freezes)
QLORA_CHECKS = (_dropout, _freezes, _qlora)
