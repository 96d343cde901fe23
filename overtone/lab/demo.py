"""`overtone demo`: edit the facts of a small model one by one, and see what each loss does to the rest it knows."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from overtone.config import OverToneConfig
from overtone.lab.editors import METHODS, named_methods
from overtone.lab.experiment import Task, Workplace, fingerprint, perform_all, plan
from overtone.lab.figures import draw_overfitting
from overtone.lab.folders import require_writable
from overtone.lab.losses import LOSSES, named_losses
from overtone.lab.pretrain import ARCHITECTURES, LabModel, load_or_train
from overtone.lab.records import EditRecord, RecordFile, write_atomically
from overtone.lab.registry import look_up
from overtone.lab.summary import SummaryRow, summarise
from overtone.lab.world import Edit, World, build_world

RECORDS, RESULTS, FIGURE = "records.jsonl", "results.json", "overfitting.png"
"""The files in the output folder."""


@dataclass(frozen=True)
class DemoSettings:
    """What the demo's numbers depend on.

    Attributes:
        seed: of the world, its model, the choice of edits and the adapters' initial weights.
        edits: how many facts to edit.
        methods: names in `overtone.lab.editors.METHODS`; the first one's edits are traced for the figure.
        losses: names in `overtone.lab.losses.LOSSES`.
        arch: name in `overtone.lab.pretrain.ARCHITECTURES`.
        target: "short" for a name, "long" for three sentences.
    """

    seed: int = 0
    edits: int = 20
    methods: tuple[str, ...] = tuple(METHODS)
    losses: tuple[str, ...] = tuple(LOSSES)
    arch: str = "llama"
    target: str = "short"


class Demo:
    """One run of the demo in its output folder, which a second run goes on from where the first was interrupted."""

    def __init__(self, settings: DemoSettings, out: Path, *, workers: int = 1) -> None:
        """Check everything that can be checked before anything takes time.

        Args:
            settings: what to do.
            out: the output folder; made if need be, once there is a model.
            workers: processes.

        Raises:
            ValueError: an unknown name, no name, more edits than the world has, or no workers.
            OSError: the folder cannot be made or written to.
        """
        named_methods(settings.methods)
        named_losses(settings.losses)
        look_up(ARCHITECTURES, "architecture", [settings.arch])
        for argument in ("methods", "losses"):
            if not getattr(settings, argument):
                raise ValueError(f"{argument} is empty: name at least one")
        for argument, count in (("edits", settings.edits), ("workers", workers)):
            if count < 1:
                raise ValueError(f"{argument} must be at least 1, got {count}")
        self.settings = settings
        self.workers = workers
        self.world: World = build_world(settings.seed)
        self.edits: list[Edit] = self.world.edits(settings.edits, seed=settings.seed, target=settings.target)
        self.tasks: list[Task] = plan(self.edits, settings.methods, settings.losses, traced_method=settings.methods[0])
        require_writable(out)
        self.out = out

    @property
    def outputs(self) -> list[Path]:
        """What a finished run has written."""
        return [self.out / name for name in (RESULTS, FIGURE)]

    def load_or_train(self, *, show_progress: bool = True) -> LabModel:
        """The model, trained if it is not cached.

        Raises:
            RuntimeError: it does not know its world well enough for edits of it to mean anything.
            OSError: the cache folder cannot be written.
        """
        lab_model = load_or_train(
            self.world, arch=self.settings.arch, seed=self.settings.seed, show_progress=show_progress
        )
        lab_model.knowledge.require()
        return lab_model

    def about(self, lab_model: LabModel) -> str:
        """One sentence on the model and how well it knows its world."""
        return (
            f"A {self.settings.arch} of {lab_model.model.num_parameters():,} parameters that knew "
            f"{lab_model.knowledge} (greedy generation, exact match) before the edits."
        )

    def open_records(self, lab_model: LabModel) -> RecordFile[EditRecord]:
        """The finished edits of an interrupted run, or none.

        Raises:
            ValueError: the folder holds a run with other settings.
            OSError: the folder cannot be made or written to.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        run = {
            "overtone": version("overtone"),
            "model": fingerprint(lab_model.model),
            "seed": self.settings.seed,
            "target": self.settings.target,
            "traced method": self.settings.methods[0],
            "optimisers": _optimisers(METHODS),
            "recommended": {method: repr(OverToneConfig.recommended(method)) for method in METHODS},
        }
        return RecordFile(self.out / RECORDS, EditRecord, run)

    def left(self, records: RecordFile[EditRecord]) -> list[Task]:
        """The tasks without a record."""
        done = {record.key for record in records.records}
        return [task for task in self.tasks if task.key not in done]

    def perform(self, lab_model: LabModel, records: RecordFile[EditRecord]) -> Iterator[EditRecord]:
        """Make the edits that are not on disk yet, and yield each once it is."""
        workplace = Workplace(lab_model.model, lab_model.tokenizer)
        for record in perform_all(workplace, lab_model.path, self.left(records), workers=self.workers):
            records.append(record)
            yield record

    def finish(
        self, lab_model: LabModel, records: RecordFile[EditRecord], *, command: Sequence[str]
    ) -> list[SummaryRow]:
        """Summarise the finished run, and write results.json and the figure."""
        by_key = {record.key: record for record in records.records}
        ordered = [by_key[task.key] for task in self.tasks]
        rows = summarise(ordered, seed=self.settings.seed)
        results = {
            "command": list(command),
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("overtone", "torch", "transformers", "peft")},
            },
            "settings": asdict(self.settings),
            "knowledge": lab_model.knowledge.shares,
            "optimisers": _optimisers(self.settings.methods),
            "summary": [asdict(row) for row in rows],
            "records": [asdict(record) for record in ordered],
        }
        write_atomically(self.out / RESULTS, json.dumps(results, indent=1, allow_nan=False) + "\n")
        method = METHODS[self.settings.methods[0]]
        draw_overfitting(
            [record for record in ordered if record.method == method.name],
            self.out / FIGURE,
            title=f"{method.title}, mean of {len(self.edits)} single edits",
        )
        return rows


def _optimisers(methods: Sequence[str] | dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: {"optimizer": "Adam", "steps": METHODS[name].steps, "lr": METHODS[name].lr} for name in methods}
