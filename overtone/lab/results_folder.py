"""The output folder of a benchmark: results.jsonl, and a part of it for each rank while several work."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from overtone.lab.outcomes import FORMAT, EditOutcome, SequenceKey, commands, whole_sequences
from overtone.lab.records import RecordFile, read_records
from overtone.lab.sharding import Shard

RESULTS, PARTS, CHECKPOINTS = "results.jsonl", "results.rank*.jsonl", "checkpoints"
"""What stands in the folder beside the report."""

_OF_MODEL = ("fingerprint", "file", "size")
"""What is compared of the models of one corpus and seed."""


class ResultsFolder:
    """The finished sequences of a run, of whichever processes and earlier calls made them."""

    def __init__(self, folder: Path, header: dict[str, Any], shard: Shard) -> None:
        """Read what is there and keep it.

        Args:
            folder: made if need be.
            header: the first line.
            shard: which file this process writes.

        Raises:
            ValueError: the folder holds another run's results, which stay as they are, or something else; or another
                process of this rank is writing to it.
            OSError: the folder cannot be made or written to.
        """
        self.folder = folder
        self.shard = shard
        self.checkpoints = folder / CHECKPOINTS
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(folder, shard)
        self._header = header
        self._file: RecordFile[EditOutcome] | None = None
        try:
            self.done = self._read_all()
            if shard.is_alone:
                self._file = self._open(self.results, self.done)
                self._remove_parts()
        except BaseException:
            self.close()
            raise

    @property
    def results(self) -> Path:
        """The results file."""
        return self.folder / RESULTS

    def append(self, outcomes: Sequence[EditOutcome]) -> None:
        """Add a finished sequence and have it on disk before returning."""
        if self._file is None:
            self._file = self._open_part()
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
        self.close()

    def close(self) -> None:
        """Let another run have the folder; the end of the process does so too."""
        self._lock.release()

    def _open_part(self) -> RecordFile[EditOutcome]:
        """With the first edit: the part of a rank without any could outlive the first rank's clearing away."""
        part = self.folder / PARTS.replace("*", str(self.shard.rank))
        _, mine = read_records(part, EditOutcome)
        return self._open(part, whole_sequences(mine))

    def _open(self, path: Path, sequences: dict[SequenceKey, list[EditOutcome]]) -> RecordFile[EditOutcome]:
        # Earlier files have a single "command", which is among the commands by now.
        file = RecordFile(path, EditOutcome, self._header, may_differ={*self._header, "command"})
        file.rewrite(outcome for outcomes in sequences.values() for outcome in outcomes)
        return file

    def _read_all(self) -> dict[SequenceKey, list[EditOutcome]]:
        outcomes: list[EditOutcome] = []
        paths = (*sorted(self.folder.glob(PARTS)), self.results)
        # The results are read last: a part that has vanished by then is among them.
        *parts, results = [(path, *read_records(path, EditOutcome)) for path in paths]
        for path, header, found in (results, *parts):
            if header is not None:
                self._adopt(path, header)
            outcomes += found
        return whole_sequences(outcomes)

    def _adopt(self, path: Path, header: dict[str, Any]) -> None:
        """Take over an earlier header's commands, and models and versions that this run does not have, or refuse it."""
        if header.get("format") != FORMAT:
            raise ValueError(f"{path} is not a results file of this version of overtone: choose another folder")
        earlier, now = _dependencies(header), _dependencies(self._header)
        different = sorted(key for key in earlier.keys() & now if earlier[key] != now[key])
        if different:
            raise ValueError(
                f"{path} holds the edits of a run with another {', '.join(different)}: "
                "choose another folder, or remove this file"
            )
        earlier_models, models = (
            {(model["data"], model["seed"]): model for model in one["models"]} for one in (header, self._header)
        )
        self._header = {
            **self._header,
            "commands": list(map(list, dict.fromkeys(map(tuple, commands(header) + commands(self._header))))),
            "versions": {**header["versions"], **self._header["versions"]},
            "models": list({**models, **earlier_models, **models}.values()),
        }

    def _remove_parts(self) -> None:
        for part in self.folder.glob(PARTS):
            part.unlink(missing_ok=True)


def _lock(folder: Path, shard: Shard) -> FileLock:
    """So that no second run of this rank writes to the folder; the system takes it back from a process that ends."""
    lock = FileLock(folder / f".rank{shard.rank}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"another run is writing to {folder}: wait for its end, or choose another folder") from None
    return lock


def _dependencies(header: dict[str, Any]) -> dict[str, Any]:
    """What outcomes depend on, by a name; a run may have more methods, corpora and seeds than the one before."""
    return {
        "number of held-out texts": header["held_out_texts"],
        **{f"version of {name}": number for name, number in header["versions"].items()},
        **{f"optimiser of {name}": settings for name, settings in header["optimisers"].items()},
        **{f"recommended setting of {name}": text for name, text in header.get("recommended", {}).items()},
        **{
            f"{key} of {model['data']} with seed {model['seed']}": model[key]
            for model in header["models"]
            for key in _OF_MODEL
        },
    }
