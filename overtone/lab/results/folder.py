"""The output folder of a run: a header, and one file for each finished sequence of edits.

A file appears whole, by renaming, so that any number of processes can work in one folder without speaking to each
other, and a killed run leaves its finished sequences alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from overtone.lab.results.files import write_whole
from overtone.lab.results.header import merged, require_header
from overtone.lab.results.misfits import misfits
from overtone.lab.results.record import EditRecord, SequenceKey

HEADER, EDITS = "run.json", "edits"
"""The header, and the folder of the finished sequences."""


class ResultsFolder:
    """The finished sequences of a run, of whichever processes and earlier commands made them."""

    def __init__(self, folder: Path) -> None:
        """Name the folder; nothing is made yet."""
        self.folder = folder
        self._edits = folder / EDITS

    def begin(self, header: dict[str, Any], *, is_writer: bool = True) -> None:
        """Make the folder, or go on in it.

        Args:
            header: of this run, in JSON values.
            is_writer: this process writes the header; of several processes of one run one does.

        Raises:
            ValueError: the folder holds another run's results, which stay as they are, or something else.
            OSError: the folder cannot be made or written to.
        """
        path = self.folder / HEADER
        now = json.loads(json.dumps(header))
        wanted = merged(_read(path, dict), now, path) if path.exists() else now
        self._edits.mkdir(parents=True, exist_ok=True)
        if not is_writer:
            return
        # Another command may have written meanwhile, in place of this: then both are merged once more.
        while not path.exists() or _read(path, dict) != wanted:
            write_whole(path, json.dumps(wanted, indent=1) + "\n")
            wanted = merged(_read(path, dict), now, path)

    def has(self, key: SequenceKey) -> bool:
        """Whether a sequence is finished."""
        return self._path(key).exists()

    def write(self, records: Sequence[EditRecord]) -> None:
        """Have the records of a finished sequence on disk before returning."""
        lines = ",\n".join(json.dumps(record.as_json(), allow_nan=False) for record in records)
        write_whole(self._path(records[0].key), f"[{lines}]\n")

    def read(self, key: SequenceKey) -> list[EditRecord]:
        """The records of a finished sequence, in the order of its edits."""
        return _records(self._path(key))

    def read_all(self) -> tuple[dict[str, Any], list[EditRecord]]:
        """The header, and every finished edit.

        Raises:
            FileNotFoundError: there is no results folder.
            ValueError: it is not one of this version, or a file in it is broken.
        """
        path = self.folder / HEADER
        if not path.exists():
            raise FileNotFoundError(f"there are no results in {str(self.folder)!r}: {HEADER} is missing")
        header = _read(path, dict)
        require_header(header, path)
        return header, [record for file in sorted(self._edits.glob("*.json")) for record in _records(file)]

    def _path(self, key: SequenceKey) -> Path:
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]
        return self._edits / f"{key.data}-seed{key.seed}-{key.method}-T{key.length}-{key.sequence:04}-{digest}.json"


def _records(path: Path) -> list[EditRecord]:
    values = _read(path, list)
    wrong = misfits(values, list[EditRecord])
    if wrong:
        raise _broken(path, TypeError(f"missing or of the wrong type: {', '.join(wrong)}"))
    try:
        records = [EditRecord.from_json(own) for own in values]
    except TypeError as error:
        raise _broken(path, error) from error
    if {record.length for record in records} != {len(records)}:
        raise _broken(path, ValueError(f"{len(records)} edits are not a whole sequence"))
    return records


def _read(path: Path, kind: type) -> Any:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _broken(path, error) from error
    if not isinstance(value, kind):
        raise _broken(path, TypeError(f"expected a {kind.__name__}, got a {type(value).__name__}"))
    return value


def _broken(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path} is not a results file of overtone ({type(error).__name__}: {error}): "
        "choose another folder, or remove this file"
    )
