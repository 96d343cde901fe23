"""Finished edits, one JSON line each, on disk as soon as they are done; files that are whole or not there."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from overtone.lab.metrics import Scores
from overtone.lab.traces import EditTrace


@dataclass(frozen=True)
class EditRecord:
    """One edit with one method and one loss.

    Attributes:
        index: of the edit in the run's list.
        method: name in `overtone.lab.editors.METHODS`.
        loss: name in `overtone.lab.losses.LOSSES`.
        prompt: the edited prompt.
        target_new: what it shall say.
        target_old: what it said.
        scores: how good the edit is.
        steps: optimiser steps taken.
        ended: why it took no more (see `overtone.lab.editors.FitTrace`).
        seconds: wall-clock time of the editing steps, probes watched at every step included where there is a trace.
        trace: what happened step by step, where it was watched.
    """

    index: int
    method: str
    loss: str
    prompt: str
    target_new: str
    target_old: str
    scores: Scores
    steps: int
    ended: str
    seconds: float
    trace: EditTrace | None

    @property
    def key(self) -> tuple[int, str, str]:
        """What makes the record one of its run."""
        return self.index, self.method, self.loss

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> EditRecord:
        """The record that `dataclasses.asdict` took apart."""
        return cls(**read_scores_and_trace(values))


class Record(Protocol):
    """A dataclass that one JSON line holds."""

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes the record one of its run."""

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Any:
        """The record that `dataclasses.asdict` took apart."""


AnyRecord = TypeVar("AnyRecord", bound=Record)


class RecordFile(Generic[AnyRecord]):
    """The finished edits of one run, in a file that a killed run leaves in a state to go on from.

    The first line says what every record depends on; a file of another run is refused rather than mixed in.
    """

    def __init__(self, path: Path, kind: type[AnyRecord], run: dict[str, Any], *, may_differ: Collection[str] = ()):
        """Open or begin the file.

        Args:
            path: the file.
            kind: of record.
            run: JSON values; the first line from now on.
            may_differ: the keys of the values on which no record depends.

        Raises:
            ValueError: the file belongs to a run with other values, or is no record file; it stays as it is.
        """
        self.path = path
        run = json.loads(json.dumps(run))
        earlier, records = read_records(path, kind)
        if earlier is not None:
            different = sorted(key for key in earlier | run if earlier.get(key) != run.get(key))
            different = [key for key in different if key not in may_differ]
            if different:
                raise ValueError(
                    f"{path} holds the edits of a run with another {', '.join(different)}: "
                    "choose another folder, or remove this file"
                )
        self._run = run
        self.rewrite(records)

    def append(self, *records: AnyRecord) -> None:
        """Add records and have them on disk before returning."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(map(_line, records)))
            file.flush()
            os.fsync(file.fileno())
        self.records += records

    def rewrite(self, records: Iterable[AnyRecord]) -> None:
        """Put these records in the place of those that the file has."""
        self.records = list(records)
        write_atomically(self.path, json.dumps(self._run) + "\n" + "".join(map(_line, self.records)))


def read_records(path: Path, kind: type[AnyRecord]) -> tuple[dict[str, Any] | None, list[AnyRecord]]:
    """The first line of a record file, also of one that gzip has compressed, and its records.

    Where there is no whole first line it is None.

    A torn last line is what was being written when the run was killed: it counts as not done.

    Raises:
        ValueError: this is no file of such records.
    """
    with _refusing_other_files(path):
        lines = [line for line in _lines(path) if line.endswith("\n")]
        run = dict(json.loads(lines[0])) if lines else None
        return run, [kind.from_json(json.loads(line)) for line in lines[1:]]


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader, or a run killed here, sees the old text or the new text, never a part."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def read_scores_and_trace(values: dict[str, Any]) -> dict[str, Any]:
    """The values with the dataclasses that `scores` and `trace` were made from."""
    scores, trace = values["scores"], values["trace"]
    return {
        **values,
        "scores": None if scores is None else Scores(**scores),
        "trace": None if trace is None else EditTrace(**trace),
    }


def _line(record: Any) -> str:
    return json.dumps(asdict(record), allow_nan=False) + "\n"


@contextmanager
def _refusing_other_files(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} is not a record file of overtone ({type(error).__name__}: {error}): "
            "choose another folder, or remove this file"
        ) from error


def _lines(path: Path) -> Iterator[str]:
    # Long results are kept compressed; parts of them vanish when another process has put them together.
    with (
        suppress(FileNotFoundError),
        gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file,
    ):
        yield from file
