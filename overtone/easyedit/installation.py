"""Hooking the adapters into EasyEdit, all or nothing, and taking them out again."""

from __future__ import annotations

import functools
import importlib
import threading
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from overtone.easyedit.hparams import KEY, logger
from overtone.easyedit.loading import loader
from overtone.easyedit.methods import BY_NAME, TRAINERS
from overtone.easyedit.patching import Patches
from overtone.easyedit.trainers import MODELS, SeamError, Trainer
from overtone.easyedit.traps import traps

_patches = Patches()
_installed: list[Trainer] = []
_lock = threading.Lock()


def install(methods: Iterable[str] | None = None) -> None:
    """Let EasyEdit's trainers use the loss that their hparams name; hparams without `token_loss` run as before.

    Installing again, with the same methods or fewer, changes nothing.

    Args:
        methods: names as in hparams' alg_name, which `overtone doctor` lists; None for all that this EasyEdit has, of
            which FT, LoRA, MELO and WISE must be there.

    Raises:
        ImportError: if easyeditor cannot be imported.
        TypeError: for methods that are no list of names.
        ValueError: for an unknown method.
        SeamError: if a trainer's loss is not computed where the adapter expects it; nothing is changed then.
    """
    wanted = _wanted(methods)
    import_easyeditor()
    with _lock:
        new = [trainer for trainer in wanted if trainer not in _installed]
        if not new:
            return
        problems = {trainer.name: problem for trainer in new if (problem := trainer.seam_problem())}
        if methods is None:
            missing = [trainer for trainer in new if trainer.optional and trainer.name in problems]
            new = [trainer for trainer in new if trainer not in missing]
            for trainer in missing:
                del problems[trainer.name]
        if problems:
            lines = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
            raise SeamError(
                f"no way into {lines}. Nothing was changed. `overtone doctor` shows every seam; "
                "overtone.easyedit.install(methods=[...]) leaves methods out"
            )
        try:
            for trainer in new:
                trainer.hook(trainer, trainer.load(), _patches)
            _installed.extend(new)
            if len(_installed) == len(new):
                _hook_loaders(_patches)
                _refuse_elsewhere(_patches)
        except BaseException:
            _uninstall()
            raise


def uninstall() -> None:
    """Put back everything that `install` replaced, identical; harmless when nothing is installed."""
    with _lock:
        _uninstall()


def installed() -> tuple[str, ...]:
    """The names of the trainers that are hooked."""
    return tuple(trainer.name for trainer in _installed)


def _uninstall() -> None:
    _patches.undo()
    _installed.clear()


def _wanted(methods: Iterable[str] | None) -> list[Trainer]:
    if methods is None:
        return list(TRAINERS)
    if isinstance(methods, str) or not isinstance(methods, Iterable):
        raise TypeError(f"methods must be a list of names or None, got {methods!r} of type {type(methods).__name__}")
    for name in (methods := list(methods)):
        if not isinstance(name, str) or name not in BY_NAME:
            raise ValueError(f"methods must be among {', '.join(BY_NAME)}, got {name!r}")
    return [BY_NAME[name] for name in methods]


HOW_TO_GET_IT = (
    "clone https://github.com/zjunlp/EasyEdit, pip install -r its requirements.txt, and put the clone on PYTHONPATH"
)


def import_easyeditor() -> None:
    """Import the framework with all its trainers, or raise an ImportError that says how to get it."""
    if _is_old_package():
        raise ImportError(
            f"this is the package easyeditor {version('easyeditor')}, which PyPI has from October 2023: it has no MELO "
            f"and no WISE, and wants other versions of everything. pip uninstall easyeditor, then {HOW_TO_GET_IT}"
        )
    try:
        importlib.import_module("easyeditor.util.alg_dict")
    except ImportError as error:
        raise ImportError(f"EasyEdit cannot be imported ({error}): {HOW_TO_GET_IT}") from error


def _is_old_package() -> bool:
    """Whether easyeditor comes from a package index; a clone has no version, and since 2024 it has MELO."""
    spec = find_spec("easyeditor")
    folders = (spec and spec.submodule_search_locations) or ()
    try:
        version("easyeditor")
    except PackageNotFoundError:
        return False
    return not any(Path(folder, "models", "melo").exists() for folder in folders)


def _trainer_of(cls: type) -> Trainer | None:
    """The installed trainer whose yaml files this class loads."""
    for trainer in _installed:
        package = f"{MODELS}.{trainer.module.split('.')[0]}."
        if cls.__name__ == trainer.hparams_class and cls.__module__.startswith(package):
            return trainer
    return None


def _hook_loaders(patches: Patches) -> None:
    base = importlib.import_module("easyeditor.util.hparams").HyperParams
    pending = list(base.__subclasses__())
    while pending:
        cls = pending.pop()
        pending.extend(cls.__subclasses__())
        stock = vars(cls).get("from_hparams")
        if isinstance(stock, classmethod):
            hooked = loader(stock.__func__, functools.partial(_check_file, cls))
            patches.attribute(cls, "from_hparams", classmethod(functools.wraps(stock.__func__)(hooked)))


def _check_file(cls: type, config: dict[str, Any]) -> None:
    trainer = _trainer_of(cls)
    if trainer is None:
        raise ValueError(_not_supported(str(config.get("alg_name", cls.__name__))))
    if config[KEY] is not None:
        trainer.choose(config[KEY])
    for trap in traps(config):
        if not trap.always:
            logger.warning("%s hparams: %s", trainer.name, trap)


def _refuse_elsewhere(patches: Patches) -> None:
    """Every editor that is not hooked refuses hparams that ask for a token loss, instead of ignoring them."""
    algorithms = importlib.import_module("easyeditor.util.alg_dict")
    for table_name in ("ALG_DICT", "ALG_MULTIMODAL_DICT", "PER_ALG_DICT"):
        table: dict[str, Callable[..., Any]] = getattr(algorithms, table_name, {})
        for name, apply in list(table.items()):
            is_other = table_name != "ALG_DICT"
            patches.item(table, name, _refusing(apply, f"{name} ({table_name})" if is_other else name))


def _refusing(apply: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(apply)
    def refusing(*args: Any, **kwargs: Any) -> Any:
        asked = any(getattr(value, KEY, None) is not None for value in (*args, *kwargs.values()))
        if asked and name not in installed():
            raise ValueError(_not_supported(name))
        return apply(*args, **kwargs)

    return refusing


def _not_supported(name: str) -> str:
    return f"{KEY} is not used by {name}: leave it out, or edit with one of {', '.join(installed())}"
