"""Traps of WISE."""

from __future__ import annotations

from collections.abc import Iterator

from overtone.easyedit.traps.trap import Config, Trap


def _sequential(config: Config) -> Iterator[Trap]:
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


def _state(config: Config) -> Iterator[Trap]:
    yield Trap(
        "WISE's edit_history, merge_group_edit_history, CONTEXT_TEMPLATES_CACHE and WISEload belong to the process and "
        "are never reset",
        "one process a run",
        always=True,
    )


def _labels(config: Config) -> Iterator[Trap]:
    yield Trap(
        "WISE's label mask starts one position early, and a loc_prompt longer than the edit lets prompt tokens into "
        "the loss",
        "keep loc_prompts shorter than prompt and target together",
        always=True,
    )


CHECKS = (_sequential, _state, _labels)
