"""EasyEdit inside a process that is not its own: imported without side effects, its process-wide state kept apart.

EasyEdit configures logging and seeds every generator when it is imported, prints at every step, and keeps edit
histories, context templates and block mappings in its modules. Here each of these ends with the context that began it.
"""

from __future__ import annotations

import importlib
import io
import logging
import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from overtone.easyedit import install, uninstall
from overtone.easyedit.doctor import find_easyedit
from overtone.easyedit.installation import import_easyeditor, installed
from overtone.easyedit.patching import Patches

ROOT_VARIABLE = "EASYEDIT_ROOT"
"""The environment variable that names a checkout of EasyEdit."""

_STATE: dict[str, dict[str, Callable[[], Any]]] = {
    "models.wise.WISE": {"edit_history": list, "merge_group_edit_history": list},
    "models.wise.wise_main": {"WISEload": lambda: True},
    "models.wise.utils": {"CONTEXT_TEMPLATES_CACHE": lambda: None},
    "models.melo.peft_egg.src.peft.tuners.melo": {"LORA_BLOCK_MAPPING": list},
    "models.rome.rome_main": {"CONTEXT_TEMPLATES_CACHE": lambda: None},
    "models.memit.memit_main": {"CONTEXT_TEMPLATES_CACHE": lambda: None},
}
"""What EasyEdit's modules keep from edit to edit, and how it begins."""


def missing() -> str | None:
    """Why EasyEdit cannot be used, without importing it; None where it is there."""
    with _on_search_path():
        if find_spec("easyeditor") is not None:
            return None
    root = os.environ.get(ROOT_VARIABLE)
    found = "is not set" if root is None else f"is {root}, which holds no folder easyeditor"
    return (
        f"easyeditor cannot be imported and {ROOT_VARIABLE} {found}: set it to a checkout of "
        "https://github.com/zjunlp/EasyEdit"
    )


def version() -> str:
    """The commit and date of the checkout; "-" where EasyEdit is not there."""
    with _on_search_path():
        found = find_easyedit()
    return "-" if found is None else found[1]


def import_quietly() -> None:
    """Import EasyEdit; logging, random states and the search path are afterwards as before.

    Raises:
        ImportError: it is not there, or its requirements are not.
    """
    if "easyeditor.util.alg_dict" in sys.modules:
        return
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        with _on_search_path(), seeded(0), silenced():
            import_easyeditor()
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


@contextmanager
def _on_search_path() -> Iterator[None]:
    path = list(sys.path)
    if root := os.environ.get(ROOT_VARIABLE):
        sys.path.insert(0, root)
    try:
        yield
    finally:
        sys.path[:] = path


def module(name: str) -> ModuleType:
    """One of EasyEdit's modules; attributes of its packages may be something else of the same name."""
    return importlib.import_module(f"easyeditor.{name}")


@contextmanager
def apart(trainer: str | None) -> Iterator[Patches]:
    """EasyEdit's process-wide state as after its import, and one trainer open to other losses; then all as before.

    Args:
        trainer: whose loss is to be replaceable; None for none.

    Yields:
        Where further replacements are kept until the end.
    """
    patches = Patches()
    is_ours = trainer is not None and trainer not in installed()
    before = installed()
    try:
        for name, kept in _STATE.items():
            for attribute, fresh in kept.items():
                patches.attribute(module(name), attribute, fresh())
        if is_ours:
            install([trainer])  # type: ignore[list-item]
        yield patches
    finally:
        patches.undo()
        if is_ours:
            uninstall()
            if before:
                install(before)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Python's, NumPy's and torch's generators begin at a seed, and go on afterwards where they were."""
    import numpy

    python, numeric = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng():
            random.seed(seed)
            numpy.random.seed(seed)
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(numeric)


@contextmanager
def silenced() -> Iterator[None]:
    """Without what EasyEdit prints at every step."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


@contextmanager
def counted_steps() -> Iterator[list[int]]:
    """The optimiser steps of any optimiser that found a gradient: the others change nothing.

    Yields:
        A list of one number, which grows.
    """
    count = [0]

    def count_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
        count[0] += any(parameter.grad is not None for parameter in parameters)

    hook = register_optimizer_step_pre_hook(count_step)
    try:
        yield count
    finally:
        hook.remove()
