"""EasyEdit's methods on the lab's world, with and without the key, scored by EasyEdit's own evaluation.

    EASYEDIT_ROOT=~/EasyEdit python examples/easyedit/lab.py                     # 40 single edits a method
    EASYEDIT_ROOT=~/EasyEdit python examples/easyedit/lab.py --in-a-row 100     # in a row, scored after the last
    EASYEDIT_ROOT=~/EasyEdit python examples/easyedit/lab.py --methods ROME,MEMIT --losses none overtone

Each method and loss is one job in a process of its own (EasyEdit keeps state in its modules). Finished edits are kept
in --out, so the same command goes on where an interrupted one stopped; a row of edits starts again from its first.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from framework import (
    HPARAMS,
    KEEP_KEYS,
    MEASURES,
    NO_KEY,
    NOT_TAKEN_BACK,
    Config,
    Request,
    average,
    examine,
    finished,
    forget_keys,
    load_config,
    load_hparams,
    open_editor,
    positive,
    quiet,
    scores_of,
    with_changes,
)
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from unke import UnkeEditor
from vector_hparams import METHODS as VECTOR_METHODS
from vector_hparams import vector_config

from overtone.easyedit.methods import BY_NAME
from overtone.lab.data.edit import Edit
from overtone.lab.data.world import build_world
from overtone.lab.data.world_corpus import WorldCorpus
from overtone.lab.edit.easyedit.hparams import SMALL
from overtone.lab.model.pretrain import load_or_train

FILES = {"FT": "ft-m", "LoRA": "lora", "MELO": "melo", "WISE": "wise"}

DEFAULT_LOSSES = ("cross_entropy", "cross_entropy:hold=0.1", "overtone:hold=none", "overtone")


@dataclass(frozen=True)
class Job:
    """One method with one loss, as `token_loss` spells it."""

    method: str
    loss: str
    edits: int
    in_a_row: bool
    seed: int
    changes: str

    @property
    def key(self) -> str:
        """The name of its file of results."""
        regime = "row" if self.in_a_row else "single"
        changes = "".join(c if c.isalnum() else "-" for c in self.changes)
        return f"{self.method}_{self.loss.replace(':', '-')}_{regime}-{self.edits}_seed{self.seed}{changes}"


def request_of(edit: Edit, loc_prompt: str) -> Request:
    """An edit of the lab as EasyEdit's requests are, one key a kind of probe; it puts the space before a target."""
    request: Request = {
        "prompt": edit.prompt,
        "target_new": edit.target_new.strip(),
        "ground_truth": edit.target_old.strip(),
        "subject": edit.subject,
        "rephrase_prompt": edit.generality[0].prompt,
        "loc_prompt": loc_prompt,
        "portability": {},
        "locality": {},
    }
    for number, probe in enumerate(edit.generality[1:], start=2):
        request["portability"][f"rephrase{number}"] = {"prompt": [probe.prompt], "ground_truth": [probe.target.strip()]}
    for name, probes in (("portability", edit.portability), ("locality", edit.locality)):
        for probe in probes:
            kind = request[name].setdefault(probe.kind, {"prompt": [], "ground_truth": []})
            kind["prompt"].append(probe.prompt)
            kind["ground_truth"].append(probe.target.strip())
    return request


def requests_of(count: int, seed: int) -> list[Request]:
    """Requests for edits of the lab's world; WISE's loc_prompts are facts that no edit or probe touches."""
    world = build_world(0)
    edits = world.edits(count, seed=seed)
    used = {probe.prompt for edit in edits for probe in (*edit.generality, *edit.portability, *edit.locality)}
    used |= {edit.prompt for edit in edits}
    subjects = {edit.subject for edit in edits}
    free = [
        probe.prompt
        for probe in world.fact_probes()
        if probe.prompt not in used and not any(subject in probe.prompt for subject in subjects)
    ]
    free.sort(key=len)
    return [request_of(edit, free[number % len(free)]) for number, edit in enumerate(edits)]


def texts() -> list[str]:
    """What the lab's model knows: for the second moments, and for UnKE to keep."""
    return WorldCorpus(build_world(0)).training_texts()


def config_of(job: Job, model: str | None, out: Path) -> Config:
    """The method's yaml file, fitted to the lab's model where one is given.

    Raises:
        ValueError: the job changes what the file does not have.
    """
    if job.method in VECTOR_METHODS:
        config = vector_config(job.method, model, len(texts()), out / "statistics")
    else:
        config = load_config(HPARAMS / f"{FILES[job.method]}-llama-2-7b-chat.yaml", model)
        (config["grace"] if job.method == "MELO" else config).update(SMALL[job.method])
    with_changes(config, job.changes)
    config["token_loss"] = job.loss
    if job.loss == NO_KEY:
        del config["token_loss"]
    return config


def prepare(jobs: list[Job], model: str, out: Path) -> None:
    """Compute the second moments that the jobs will look for."""
    configs = [config_of(job, model, out) for job in jobs]
    layers = sorted({layer for config in configs for layer in config["layers"]})
    folder = configs[0]["stats_dir"]
    with tempfile.TemporaryDirectory() as elsewhere:
        file = Path(elsewhere, "texts.txt")
        file.write_text("\n".join(texts()), encoding="utf-8")
        change = f'layers={layers};stats_dir="{folder}"'
        program = [sys.executable, str(Path(__file__).parent / "local_statistics.py"), str(file)]
        hparams = str(HPARAMS / "memit-llama-3.2-3b-instruct.yaml")
        arguments = ["--hparams", hparams, "--model", model, "--change", change]
        subprocess.run([*program, *arguments], cwd=elsewhere, check=True, stdout=subprocess.DEVNULL)


def editor_of(job: Job, model: str, out: Path) -> Any:
    """EasyEdit's editor of the job's method, or what stands in its place."""
    config = config_of(job, model, out)
    return UnkeEditor(config, texts()) if job.method == "UnKE" else open_editor(config)


def perform(job: Job, model: str, out: Path) -> str:
    """Run one job, appending each finished edit to its file."""
    os.chdir(tempfile.mkdtemp())
    sys.path.insert(0, os.environ["EASYEDIT_ROOT"])
    import torch
    from easyeditor import BaseEditor

    import overtone.easyedit

    torch.set_num_threads(1)
    overtone.easyedit.install([job.method])
    requests = requests_of(job.edits, job.seed)
    file = out / f"{job.key}.jsonl"
    done = {record["case"] for record in finished(file)}
    left = [case for case in range(job.edits) if case not in done]
    if not left:
        return job.key

    def edit(editor: Any, requests: list[Request], *, sequential: bool) -> tuple[list[Any], Any]:
        torch.manual_seed(job.seed)
        metrics, edited, _ = editor.edit_requests(requests, sequential_edit=sequential, verbose=False)
        return metrics, edited

    if not job.in_a_row:
        editor = None
        for case in left:
            start = time.perf_counter()
            with quiet():
                if editor is None or job.method in NOT_TAKEN_BACK:
                    editor = editor_of(job, model, out)
                if job.method in KEEP_KEYS:
                    forget_keys(editor)
                metrics, _ = edit(editor, [requests[case]], sequential=False)
            record = scores_of(metrics[0]["pre"], metrics[0]["post"])
            _append(file, {"case": case, **record, "seconds": time.perf_counter() - start})
        return job.key

    start = time.perf_counter()
    with quiet():
        hparams = load_hparams(config_of(job, model, out))
        if job.method == "WISE":
            hparams.sequential_edit = True  # no field of its hparams; without it earlier edits are dropped
        editor = BaseEditor.from_hparams(hparams)
        metrics, edited = edit(editor, requests, sequential=job.method != "MELO")
        after = [examine(edited, editor, request) for request in requests]
    for case, (request_metrics, found) in enumerate(zip(metrics, after, strict=True)):
        record = scores_of(request_metrics["pre"], found)
        _append(file, {"case": case, **record, "seconds": (time.perf_counter() - start) / len(requests)})
    return job.key


def _append(file: Path, record: dict[str, Any]) -> None:
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(record) + "\n")


def summary(jobs: list[Job], out: Path) -> list[dict[str, Any]]:
    """One row a job, as far as it got."""
    rows = []
    for job in jobs:
        if records := finished(out / f"{job.key}.jsonl"):
            means = average([{m: record[m] for m in MEASURES if m in record} for record in records])
            rounded = {name: round(value, 1) for name, value in means.items()}
            rows.append({**asdict(job), "done": len(records), **rounded})
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a table."""
    lines = [f"| method | loss | {' | '.join((*MEASURES, 'Avg'))} |", "|---|---|" + "---|" * 5]
    for row in rows:
        values = " | ".join(str(row.get(name, "")) for name in (*MEASURES, "Avg"))
        changed = f" ({row['changes']})" if row["changes"] else ""
        lines.append(f"| {row['method']} | {row['loss']}{changed} | {values} |")
    return "\n".join(lines)


def main() -> None:
    """Run the jobs that are left, then print the table and write it beside the records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=positive, default=40, help="single edits a method")
    parser.add_argument(
        "--in-a-row", type=positive, metavar="N", help="instead: N edits in a row, scored after the last"
    )
    parser.add_argument(
        "--methods", default=",".join(FILES), help=f"by commas; for single edits also {', '.join(VECTOR_METHODS)}"
    )
    parser.add_argument(
        "--losses", nargs="+", default=DEFAULT_LOSSES, help=f"by spaces, as token_loss spells them; {NO_KEY}: no key"
    )
    parser.add_argument("--change", default="", help="hparams to change, as act_ratio=0.5;n_iter=30")
    parser.add_argument("--seed", type=int, default=0, help="which facts are edited")
    parser.add_argument("--out", type=Path, default=Path("easyedit-lab"))
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    if "EASYEDIT_ROOT" not in os.environ:
        parser.error("set EASYEDIT_ROOT to a checkout of https://github.com/zjunlp/EasyEdit")
    methods = arguments.methods.split(",")
    vector_methods = [method for method in methods if method in VECTOR_METHODS]
    if unknown := set(methods) - set(FILES) - set(VECTOR_METHODS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; methods: {', '.join((*FILES, *VECTOR_METHODS))}")
    if vector_methods and arguments.in_a_row:
        parser.error(f"--in-a-row is not for {', '.join(vector_methods)}")
    out = arguments.out.resolve()
    row = bool(arguments.in_a_row)
    template = Job("", "", arguments.in_a_row or arguments.edits, row, arguments.seed, arguments.change)
    jobs = [replace(template, method=method, loss=loss) for method in methods for loss in arguments.losses]
    try:
        for job in jobs:
            config_of(job, None, out)
            if job.loss != NO_KEY:
                BY_NAME[job.method].choose(job.loss)
    except ValueError as error:
        parser.error(str(error))
    out.mkdir(parents=True, exist_ok=True)
    lab_model = load_or_train(WorldCorpus(build_world(0)))
    lab_model.knowledge.require()
    model = str(lab_model.path)
    if vector_jobs := [job for job in jobs if job.method in VECTOR_METHODS]:
        prepare(vector_jobs, model, out)
    with (
        Progress(console=Console(stderr=True)) as progress,
        get_context("spawn").Pool(arguments.workers, maxtasksperchild=1) as pool,
    ):
        bar = progress.add_task("jobs", total=len(jobs))
        for finished in pool.imap_unordered(partial(perform, model=model, out=out), jobs):
            progress.update(bar, advance=1, description=finished)
    rows = summary(jobs, out)
    record = {"command": sys.argv, "rows": rows}
    (out / "summary.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (out / "summary.md").write_text(markdown(rows) + "\n", encoding="utf-8")
    columns = (*MEASURES, "Avg")
    table = Table("method", "loss", *columns, title=f"{template.edits} {'edits in a row' if row else 'single edits'}")
    for values in rows:
        table.add_row(values["method"], values["loss"], *(f"{values.get(name, float('nan')):.1f}" for name in columns))
    Console().print(table)


if __name__ == "__main__":
    main()
