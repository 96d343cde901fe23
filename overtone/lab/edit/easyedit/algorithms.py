"""EasyEdit's methods by the lab's names, and what is particular to each; EasyEdit need not be there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from overtone.lab.edit.easyedit import process
from overtone.lab.edit.easyedit.losses import hparams_token_loss
from overtone.token_loss import LossSpec


@dataclass(frozen=True)
class Algorithm:
    """What is particular to one of EasyEdit's methods.

    Attributes:
        name: the key in `ALGORITHMS`.
        alg_name: EasyEdit's name.
        edits_in_place: it changes weights of the model, rather than adding modules to it.
        takes_batches: several prompts of one edit go into one call.
        decides_by_batch: at inference it treats all texts of a batch alike.
        needs_texts: it needs texts that the model knows.
    """

    name: str
    alg_name: str
    edits_in_place: bool = False
    takes_batches: bool = False
    decides_by_batch: bool = False
    needs_texts: bool = False


ALGORITHMS: Mapping[str, Algorithm] = {
    algorithm.name: algorithm
    for algorithm in (
        Algorithm("easyedit-ft", "FT", edits_in_place=True, takes_batches=True),
        Algorithm("easyedit-lora", "LoRA", takes_batches=True),
        Algorithm("easyedit-melo", "MELO", decides_by_batch=True),
        Algorithm("easyedit-wise", "WISE", decides_by_batch=True, needs_texts=True),
        Algorithm("rome", "ROME", edits_in_place=True, needs_texts=True),
        Algorithm("memit", "MEMIT", edits_in_place=True, takes_batches=True, needs_texts=True),
    )
}


def require_easyedit(method: str) -> None:
    """Refuse a method where EasyEdit cannot be imported.

    Raises:
        ValueError: it cannot; the message says what to set.
    """
    if missing := process.missing():
        raise ValueError(f"method {method!r} needs EasyEdit: {missing}")


def easyedit_cannot_minimise(method: str, loss: LossSpec) -> str | None:
    """Why a method of `ALGORITHMS` cannot minimise a loss, or None; EasyEdit need not be there."""
    try:
        hparams_token_loss(ALGORITHMS[method].alg_name, loss)
    except ValueError as error:
        return str(error)
    return None
