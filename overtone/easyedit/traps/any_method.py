"""Traps of every method: the model, the fields of the file, the evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass

from overtone.easyedit.hparams import KEY
from overtone.easyedit.traps.trap import Config, Trap

MODEL_FAMILIES = ("t5", "gpt", "llama", "baichuan", "chatglm", "internlm", "qwen", "mistral")


def model(config: Config) -> Iterator[Trap]:
    """A model that EasyEdit or the adapters cannot take, and a key without a value."""
    name = str(config.get("model_name", ""))
    family = next((family for family in MODEL_FAMILIES if family in name.lower()), None)
    if family is None:
        yield Trap(
            f"model_name {name!r} contains no family name that EasyEdit knows",
            f"put the model in a folder whose path contains one of {', '.join(MODEL_FAMILIES)}",
            fatal=True,
        )
    if family == "t5" and KEY in config:
        yield Trap("T5's trainers compute their loss on a path of their own", f"leave {KEY} out", fatal=True)
    if "token_loss" in config and config[KEY] is None:
        yield Trap(f"{KEY} is empty, so the trainer's own loss is used", f"write {KEY}: overtone, or take the line out")


def single_edits(config: Config) -> Iterator[Trap]:
    """A batch size that single edits refuse."""
    if config["alg_name"] in ("FT", "LoRA") and config.get("batch_size") != 1:
        yield Trap(
            f"batch_size is {config.get('batch_size', 'left to its default')}: BaseEditor.edit refuses all but 1",
            "batch_size: 1 for single and sequential edits; other sizes are for batch_edit",
        )


def hparams_fields(config: Config, hparams_class: type) -> Iterator[Trap]:
    """Fields that the class does not have, or that the file lacks."""
    if not is_dataclass(hparams_class):
        return
    known = {field.name: field for field in fields(hparams_class)}
    given = {KEY, *config}
    if "act_margin" in given:
        given = given - {"act_margin"} | {"alpha", "beta", "gamma"}
    for name in sorted(given - set(known) - {KEY, "sequential_edit", "evaluation_type"}):
        yield Trap(f"{name} is no field of {hparams_class.__name__}", "take it out", fatal=True)
    for name, field in known.items():
        if name not in given and field.default is MISSING and field.default_factory is MISSING:
            yield Trap(f"{name} is missing, and {hparams_class.__name__} has no default for it", "add it", fatal=True)


def evaluation(config: Config) -> Iterator[Trap]:
    """What EasyEdit's scores do not say."""
    if "evaluation_type" in config:
        yield Trap(
            "evaluation_type is no field of these hparams, so the file does not load",
            "take it out, and set hparams.evaluation_type = 'generate-text' after loading",
            fatal=True,
        )
    else:
        yield Trap(
            "scores are teacher-forced, which leaks length and content of the answer",
            "hparams.evaluation_type = 'generate-text' after loading, for free generation",
            always=True,
        )
    yield Trap(
        "edit(..., sequential_edit=True) scores each edit at once, so forgetting is not measured",
        "score all edits again after the last one",
        always=True,
    )
