"""The output folder of a benchmark: results.jsonl, and a part of it for each rank while several work."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from overtone.lab.outcomes import EditOutcome, SequenceKey, whole_sequences
from overtone.lab.records import RecordFile, read_records
from overtone.lab.sharding import Shard

RESULTS, PARTS, CHECKPOINTS = "results.jsonl", "results.rank*.jsonl", "checkpoints"
"""What stands in the folder beside the report."""

_MAY_DIFFER = ("command", "settings", "machine", "models")
"""The values of the first line on which no outcome depends, or of which a part is compared."""

_OF_MODEL = ("fingerprint", "file", "size")
"""What must agree of the model of one corpus and seed."""


class ResultsFolder:
    """The finished sequences of a run, of whichever processes and earlier calls made them."""

    def __init__(self, folder: Path, header: dict[str, Any], shard: Shard) -> None:
        """Read what is there and keep it.

        Args:
            folder: made if need be.
            header: the first line.
            shard: which file this process writes.

        Raises:
            ValueError: the folder holds another run's results, which stay as they are, or something else.
            OSError: the folder cannot be made or written to.
        """
        self.folder = folder
        self.shard = shard
        self.checkpoints = folder / CHECKPOINTS
        folder.mkdir(parents=True, exist_ok=True)
        self._header = header
        self.done = self._read_all()
        if shard.is_alone:
            self._file = self._open(self.results, self.done)
            self._remove_parts()
        else:
            part = folder / PARTS.replace("*", str(shard.rank))
            _, mine = read_records(part, EditOutcome)
            self._file = self._open(part, whole_sequences(mine))

    @property
    def results(self) -> Path:
        """The results file."""
        return self.folder / RESULTS

    def append(self, outcomes: Sequence[EditOutcome]) -> None:
        """Add a finished sequence and have it on disk before returning."""
        self._file.append(*outcomes)
        self.done[outcomes[0].sequence_key] = list(outcomes)

    def refresh(self) -> None:
        """Read what the other ranks have finished by now."""
        self.done = self._read_all()

    def finish(self, order: Iterable[SequenceKey]) -> None:
        """Write the results file anew, in an order that no number of processes changes, and remove the parts.

        Args:
            order: of the sequences; those of earlier calls that it does not have come last.
        """
        ordered = {key: self.done[key] for key in dict.fromkeys((*order, *self.done))}
        self._open(self.results, ordered)
        self._remove_parts()
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def _open(self, path: Path, sequences: dict[SequenceKey, list[EditOutcome]]) -> RecordFile[EditOutcome]:
        file = RecordFile(path, EditOutcome, self._header, may_differ=_MAY_DIFFER)
        file.rewrite(outcome for outcomes in sequences.values() for outcome in outcomes)
        return file

    def _read_all(self) -> dict[SequenceKey, list[EditOutcome]]:
        outcomes: list[EditOutcome] = []
        for path in (self.results, *sorted(self.folder.glob(PARTS))):
            header, found = read_records(path, EditOutcome)
            if header is not None:
                self._adopt(path, header)
            outcomes += found
        return whole_sequences(outcomes)

    def _adopt(self, path: Path, header: dict[str, Any]) -> None:
        """Take over the models of an earlier header, or refuse it."""
        different = {key for key in header | self._header if header.get(key) != self._header.get(key)}
        different -= set(_MAY_DIFFER)
        earlier, now = (
            {(model["data"], model["seed"]): model for model in one["models"]} for one in (header, self._header)
        )
        for data, seed in earlier.keys() & now:
            one, other = earlier[data, seed], now[data, seed]
            different |= {f"{key} of {data} with seed {seed}" for key in _OF_MODEL if one.get(key) != other.get(key)}
        if different:
            raise ValueError(
                f"{path} holds the edits of a run with another {', '.join(sorted(different))}: "
                "choose another folder, or remove this file"
            )
        self._header = {**self._header, "models": list({**now, **earlier, **now}.values())}

    def _remove_parts(self) -> None:
        for part in self.folder.glob(PARTS):
            part.unlink(missing_ok=True)
