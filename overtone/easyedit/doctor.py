"""`overtone doctor`: which EasyEdit is there, where its trainers compute their loss, what a file would fall into."""

from __future__ import annotations

import argparse
import importlib
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from overtone.easyedit.installation import import_easyeditor, installed
from overtone.easyedit.loading import read_yaml
from overtone.easyedit.methods import BY_NAME, TRAINERS
from overtone.easyedit.trainers import Trainer
from overtone.easyedit.traps import Trap, traps

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


@dataclass(frozen=True)
class Seam:
    """One trainer's row of the table.

    Attributes:
        name: the trainer.
        found: whether it can be hooked.
        detail: how it is hooked, or what is wrong.
        required: whether `install()` needs it.
    """

    name: str
    found: bool
    detail: str
    required: bool


def find_easyedit() -> tuple[Path, str] | None:
    """The folder that holds the `easyeditor` package, and its commit; None if Python cannot see it."""
    spec = find_spec("easyeditor")
    if spec is None or not spec.submodule_search_locations:
        return None
    root = Path(next(iter(spec.submodule_search_locations))).parent
    described = subprocess.run(
        ["git", "-C", str(root), "log", "-1", "--format=%h %cs"], capture_output=True, text=True, check=False
    )
    return root, described.stdout.strip() or "not a git checkout"


def seams() -> list[Seam]:
    """Every trainer's seam in the EasyEdit at hand.

    Raises:
        ImportError: if EasyEdit cannot be imported.
    """
    import_easyeditor()
    return [_seam(trainer) for trainer in TRAINERS]


def _seam(trainer: Trainer) -> Seam:
    if trainer.name in installed():
        return Seam(trainer.name, True, f"installed: {trainer.way_in}", not trainer.optional)
    problem = trainer.seam_problem()
    return Seam(trainer.name, problem is None, problem or trainer.way_in, not trainer.optional)


def examine(path: Path, *, with_easyedit: bool) -> list[Trap]:
    """The traps of one hparams file.

    Args:
        path: the file, with or without ``.yaml``.
        with_easyedit: whether EasyEdit can be imported, so that its classes' fields are checked too.

    Raises:
        OSError, ValueError: if the file cannot be read.
    """
    from yaml import YAMLError

    try:
        config = read_yaml(str(path))
    except YAMLError as error:
        raise ValueError(f"this cannot be read as YAML of plain values: {error}") from error
    return traps(config, _hparams_class(str(config.get("alg_name"))) if with_easyedit else None)


def _hparams_class(alg_name: str) -> type | None:
    trainer = BY_NAME.get(alg_name)
    if trainer is None or trainer.seam_problem() is not None:
        return None
    package = importlib.import_module(trainer.load().__package__ or "")
    found: type | None = getattr(package, trainer.hparams_class, None)
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="EasyEdit hparams files to examine")


def run(arguments: argparse.Namespace) -> int:
    """Print the tables.

    Returns:
        0; 1 where EasyEdit or a seam that `install()` needs is missing, or a file would not run.
    """
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=False)
    code = 0
    place = find_easyedit()
    about = Table("what", "found", title="EasyEdit")
    about.add_row("easyeditor", "not on PYTHONPATH" if place is None else str(place[0]))
    about.add_row("commit", "-" if place is None else place[1])
    for package in PACKAGES:
        about.add_row(package, _version(package))
    about.add_row("a model's own loss", _model_loss_seam())
    console.print(about)

    importable = False
    try:
        rows = seams()
        importable = True
    except ImportError as error:
        console.print(str(error), markup=False)
        code = 1
    else:
        table = Table("trainer", "seam", "how it is hooked, or what is wrong", title="Seams")
        for row in rows:
            table.add_row(row.name, "found" if row.found else "missing", row.detail)
            if row.required and not row.found:
                code = 1
        console.print(table)

    for path in arguments.files:
        try:
            found = examine(path, with_easyedit=importable)
        except (OSError, ValueError) as error:
            console.print(_unreadable(path, error), markup=False)
            code = 1
            continue
        table = Table("", "finding", "mend", title=str(path))
        for trap in found:
            table.add_row("stops the edit" if trap.fatal else "warning", trap.finding, trap.mend)
            code = 1 if trap.fatal else code
        console.print(table)
    return code


def _unreadable(path: Path, error: OSError | ValueError) -> str:
    """Why a file cannot be examined."""
    if not isinstance(error, OSError):
        return f"{path}: {error}"
    if error.filename != str(path) and path.is_file():
        return (
            f"{path}: EasyEdit adds .yaml to a name without it, and there is no {Path(error.filename).name}; give the "
            "file a name that ends in .yaml"
        )
    if path.is_dir():
        return f"FILE must be an hparams file, got the folder {str(path)!r}: name a file in it"
    return f"FILE must be an hparams file that can be read, got {str(path)!r} ({error.strerror})"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "-"


def _model_loss_seam() -> str:
    if find_spec("transformers") is None:
        return "-"
    import transformers

    from overtone.easyedit.model_loss import takes_loss_function

    if takes_loss_function(transformers.LlamaForCausalLM):
        return "model.loss_function"
    return "computed inside forward: labels are taken away, the loss is added afterwards"
