"""Traps of MELO."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from overtone.easyedit.traps.tokenizer import adds_bos, load_tokenizer
from overtone.easyedit.traps.trap import Config, Trap


def _accumulates(config: Config) -> Iterator[Trap]:
    yield Trap(
        "MELO keeps its wrapper after single edits, so they accumulate; its block mapping belongs to the process",
        "a new editor for every single edit, and one process a run",
        always=True,
    )


def _pads(config: Config) -> Iterator[Trap]:
    tokenizer = load_tokenizer(config)
    if tokenizer is not None and adds_bos(tokenizer) and tokenizer.bos_token_id == tokenizer.pad_token_id:
        yield Trap(
            f"{tokenizer.bos_token} begins every text and is the pad token too, so MELO trains the last prompt token",
            "a pad token of its own",
        )


def _classifier(config: Config) -> Iterator[Trap]:
    name = _section(config, "lora").get("cls_name")
    if name is None or (str(name).startswith((".", "/")) and not Path(str(name)).exists()):
        yield Trap(
            f"lora.cls_name {name!r} must name a tokenizer that can be loaded, though MELO never uses it",
            "set it to model_name",
            fatal=True,
        )


def _layers(config: Config) -> Iterator[Trap]:
    model = _section(config, "model")
    targets, grace_layer = model.get("target_modules") or [], model.get("grace_layer")
    if not targets or not grace_layer:
        yield Trap(
            "model.target_modules or model.grace_layer is missing",
            "name full module paths, as model.layers.30.mlp.down_proj, and a grace_layer before all of them",
            fatal=True,
        )
        return
    late = [target for target in targets if _layer(target) <= _layer(grace_layer)]
    if late:
        yield Trap(
            f"model.grace_layer {grace_layer} does not come before {', '.join(late)}: the block to use is looked up "
            "after it was needed",
            "a grace_layer in an earlier layer than every target module",
        )


def _layer(path: str) -> int:
    return next((int(part) for part in str(path).split(".") if part.isdigit()), -1)


def _nested_floats(config: Config) -> Iterator[Trap]:
    for section in ("grace", "model", "lora"):
        for key, value in _section(config, section).items():
            if isinstance(value, str) and _is_number(value):
                yield Trap(
                    f"{section}.{key} {value!r} stays a string: EasyEdit turns 1e-3 into a float at the top level only",
                    "write it with a point, as 1.0e-3",
                    fatal=True,
                )


def _radius(config: Config) -> Iterator[Trap]:
    radius = _section(config, "grace").get("init_radius")
    if isinstance(radius, (int, float)) and radius < 1 and "llama" in str(config.get("model_name", "")).lower():
        yield Trap(
            f"grace.init_radius {radius} is too small to find the edit again for a rephrased prompt",
            "the paper takes 60 for LLaMA 2 and 30 for LLaMA 3",
        )


def _section(config: Config, name: str) -> Config:
    section = config.get(name)
    return section if isinstance(section, Mapping) else {}


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


CHECKS = (_accumulates, _pads, _classifier, _layers, _nested_floats, _radius)
