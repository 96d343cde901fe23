"""The known ways in which an EasyEdit hparams file spoils an edit or a comparison, each with its mend.

Found by running and reading EasyEdit; every check reads the file alone, and the installed versions where they matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from overtone.easyedit.hparams import KEY, choose
from overtone.easyedit.methods import BY_NAME
from overtone.easyedit.vstar import VSTAR
from overtone.token_loss.grammar import read

Config = Mapping[str, Any]

MODEL_FAMILIES = ("t5", "gpt", "llama", "baichuan", "chatglm", "internlm", "qwen", "mistral")


@dataclass(frozen=True)
class Trap:
    """One finding.

    Attributes:
        finding: what is wrong with the file.
        mend: what to do about it.
        fatal: the edit would not run at all.
        always: it holds for every file of the method, whatever the file says.
    """

    finding: str
    mend: str
    fatal: bool = False
    always: bool = False

    def __str__(self) -> str:
        """One line."""
        return f"{self.finding}: {self.mend}"


def traps(config: Config, hparams_class: type | None = None) -> list[Trap]:
    """The traps that a file would fall into.

    Args:
        config: the file's content.
        hparams_class: the class that will load it, where known; its fields are checked then.
    """
    method = str(config.get("alg_name"))
    if method not in BY_NAME:
        return [Trap(f"alg_name is {method!r}", f"the adapters know {', '.join(BY_NAME)}", fatal=KEY in config)]
    found = [*_model(config), *_token_loss(config), *_single_edits(config)]
    for check in _CHECKS.get(method, ()):
        found.extend(check(config))
    if hparams_class is not None:
        found.extend(_fields(config, hparams_class))
    return [*found, *_evaluation(config)]


def _model(config: Config) -> Iterator[Trap]:
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


def _token_loss(config: Config) -> Iterator[Trap]:
    if config.get(KEY) is None:
        return
    method = config["alg_name"]
    try:
        loss = choose(config[KEY], BY_NAME[method].preset).loss
    except (TypeError, ValueError) as error:
        yield Trap(str(error), f"mend {KEY}", fatal=True)
        return
    if loss is None:
        return
    if method == "FT" and not callable(config[KEY]) and (name := read(config[KEY])[0]) in ("dft", "eaft"):
        yield Trap(
            f"{name} is near 0 where the target is improbable, and FT-M takes no step below a mean loss of 1e-2",
            "another method for it, or another loss",
        )
    if loss.hold:
        return
    if method != "WISE" and loss.epsilon > 0:
        yield Trap(
            "hold is false: Adam goes on moving every weight on the zero gradients of settled tokens",
            "leave hold out, or give a mean loss at which to hold",
        )
    if method == "FT" and loss.epsilon >= 1e-2:
        yield Trap(
            f"FT-M stops below a mean loss of 1e-2, at or below the floor epsilon={loss.epsilon:g}, so all steps run",
            "leave hold out: a held step reports 0, which ends the edit",
        )
    if BY_NAME[method] in VSTAR and loss.epsilon >= 0.05:
        yield Trap(
            f"{method} stops below a total of 0.05, at or below the floor epsilon={loss.epsilon:g}, so all steps run",
            "leave hold out: a held step ends the edit",
        )
    if method == "WISE" and loss.epsilon > 0.02:
        yield Trap(
            f"WISE stops at a total loss of 0.02, below the floor epsilon={loss.epsilon:g}, so all n_iter run",
            "leave hold out: a held step reports 0, which lets the stop fire",
        )


def _single_edits(config: Config) -> Iterator[Trap]:
    if config["alg_name"] in ("FT", "LoRA") and config.get("batch_size") != 1:
        yield Trap(
            f"batch_size is {config.get('batch_size', 'left to its default')}: BaseEditor.edit refuses all but 1",
            "batch_size: 1 for single and sequential edits; other sizes are for batch_edit",
        )


def _ft_objective(config: Config) -> Iterator[Trap]:
    objective = config.get("objective_optimization")
    if objective != "target_new":
        yield Trap(
            f"objective_optimization {objective!r} is FT-L, whose loss sees the last prompt token alone",
            "objective_optimization: target_new, which is FT-M",
            fatal=KEY in config,
        )
        if (tokenizer := _tokenizer(config)) is not None and _adds_bos(tokenizer):
            yield Trap(
                f"the tokenizer puts {tokenizer.bos_token} before every text: FT-L trains it as the first target token",
                "objective_optimization: target_new, which leaves it out",
            )


def _tokenizer(config: Config) -> Any:
    """The model's tokenizer; None where it is not on this machine."""
    try:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(str(config.get("model_name")), local_files_only=True)
    except (ImportError, OSError, ValueError):
        return None


def _adds_bos(tokenizer: Any) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


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


def _lora_dropout(config: Config) -> Iterator[Trap]:
    if config.get("lora_dropout", 0.1 if config["alg_name"] == "QLoRA" else 0):
        yield Trap(
            f"lora_dropout {config.get('lora_dropout', 0.1)}: EasyEdit's LoRA stays in training mode, so dropout is on "
            "while the edit is evaluated",
            "lora_dropout: 0, or edited_model.eval() before scoring",
        )


def _lora_freezes(config: Config) -> Iterator[Trap]:
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


def _melo_accumulates(config: Config) -> Iterator[Trap]:
    yield Trap(
        "MELO keeps its wrapper after single edits, so they accumulate; its block mapping belongs to the process",
        "a new editor for every single edit, and one process a run",
        always=True,
    )


def _melo_pads(config: Config) -> Iterator[Trap]:
    tokenizer = _tokenizer(config)
    if tokenizer is not None and _adds_bos(tokenizer) and tokenizer.bos_token_id == tokenizer.pad_token_id:
        yield Trap(
            f"{tokenizer.bos_token} begins every text and is the pad token too, so MELO trains the last prompt token",
            "a pad token of its own",
        )


def _melo_classifier(config: Config) -> Iterator[Trap]:
    name = _section(config, "lora").get("cls_name")
    if name is None or (str(name).startswith((".", "/")) and not Path(str(name)).exists()):
        yield Trap(
            f"lora.cls_name {name!r} must name a tokenizer that can be loaded, though MELO never uses it",
            "set it to model_name",
            fatal=True,
        )


def _melo_layers(config: Config) -> Iterator[Trap]:
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


def _melo_nested_floats(config: Config) -> Iterator[Trap]:
    for section in ("grace", "model", "lora"):
        for key, value in _section(config, section).items():
            if isinstance(value, str) and _is_number(value):
                yield Trap(
                    f"{section}.{key} {value!r} stays a string: EasyEdit turns 1e-3 into a float at the top level only",
                    "write it with a point, as 1.0e-3",
                    fatal=True,
                )


def _melo_radius(config: Config) -> Iterator[Trap]:
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


def _wise_sequential(config: Config) -> Iterator[Trap]:
    if "sequential_edit" in config:
        yield Trap(
            "sequential_edit is no field of WISE's hparams, so the file does not load",
            "take it out, and set hparams.sequential_edit = True after loading",
            fatal=True,
        )
    else:
        yield Trap(
            "sequential runs drop earlier edits, since sequential_edit is no field of WISE's hparams",
            "set hparams.sequential_edit = True after loading, for edit(..., sequential_edit=True)",
            always=True,
        )


def _wise_state(config: Config) -> Iterator[Trap]:
    yield Trap(
        "WISE's edit_history, merge_group_edit_history, CONTEXT_TEMPLATES_CACHE and WISEload belong to the process and "
        "are never reset",
        "one process a run",
        always=True,
    )


def _wise_labels(config: Config) -> Iterator[Trap]:
    yield Trap(
        "WISE's label mask starts one position early, and a loc_prompt longer than the edit lets prompt tokens into "
        "the loss",
        "keep loc_prompts shorter than prompt and target together",
        always=True,
    )


def _fields(config: Config, hparams_class: type) -> Iterator[Trap]:
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


def _evaluation(config: Config) -> Iterator[Trap]:
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


_CHECKS: dict[str, tuple[Callable[[Config], Iterator[Trap]], ...]] = {
    "FT": (_ft_objective,),
    "LoRA": (_adalora, _lora_dropout, _lora_freezes),
    "QLoRA": (_lora_dropout, _lora_freezes, _qlora),
    "MELO": (_melo_accumulates, _melo_pads, _melo_classifier, _melo_layers, _melo_nested_floats, _melo_radius),
    "WISE": (_wise_sequential, _wise_state, _wise_labels),
}
