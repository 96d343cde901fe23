"""KnowEdit's ZsRE and WikiBio through EasyEdit, with the key and without it: the rows of the paper's Table 1.

    EASYEDIT_ROOT=~/EasyEdit python examples/easyedit/knowedit.py benchmark_ZsRE_ZsRE-test-all.json \\
        --hparams examples/easyedit/hparams/lora-llama-2-7b-chat.yaml --out zsre-lora

The files are those of huggingface.co/datasets/zjunlp/KnowEdit. Every finished edit is appended to --out, so the same
command goes on where an interrupted one stopped. Measures are EasyEdit's, teacher-forced, in percent.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from framework import (
    KEEP_KEYS,
    LAYER_METHODS,
    MEASURES,
    NO_KEY,
    NOT_TAKEN_BACK,
    VECTOR_METHODS,
    Config,
    Request,
    Scores,
    average,
    finished,
    forget_keys,
    load_config,
    open_editor,
    optimise_at_mlp,
    positive,
    quiet,
    read_texts,
    scores_of,
    with_changes,
)
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from unke import UnkeEditor
from vector_hparams import OF_RELATIVE, as_method

import overtone.easyedit
from overtone.easyedit.methods import BY_NAME

LOC_PROMPT = "The sky is"
"""Unrelated and shorter than every edit; WISE needs one."""


def read(path: Path) -> list[Request]:
    """KnowEdit's records as EasyEdit's requests.

    Raises:
        ValueError: for a file that is neither in ZsRE's format nor in WikiBio's.
        OSError: there is no such file.
    """
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    return [_request(record, path) for record in records]


def _request(record: Any, path: Path) -> Request:
    if not isinstance(record, dict):
        raise ValueError(f"{path} must be a list of records, and holds {record!r}")
    wanted = ("text", "labels", "concept") if "text" in record else ("prompt", "target_new", "ground_truth", "subject")
    if missing := [name for name in wanted if name not in record]:
        raise ValueError(
            f"{path} is not in KnowEdit's ZsRE or WikiBio format: a record has {', '.join(record)}, and no "
            f"{', '.join(missing)}"
        )
    if "text" in record:  # WikiBio: a sentence that should follow a passage
        prompt, target, truth, subject = record["text"], record["labels"], record["labels"], record["concept"]
    else:
        truth = record["ground_truth"]
        prompt, target, subject = record["prompt"], record["target_new"], record["subject"]
        truth = truth[0] if isinstance(truth, list) else truth
    request: Request = {
        "prompt": prompt,
        "target_new": target,
        "ground_truth": truth,
        "subject": subject,
        "loc_prompt": LOC_PROMPT,
        "portability": _probes(record.get("portability") or {}),
        "locality": _probes(record.get("locality") or {}),
    }
    if record.get("rephrase_prompt"):
        request["rephrase_prompt"] = record["rephrase_prompt"]
    return request


def _probes(groups: dict[str, Any]) -> dict[str, dict[str, list[str]]]:
    """Each group's prompts and first answers; a group without usable ones is left out."""
    found = {}
    for name, probes in groups.items():
        pairs = [(probe["prompt"], answer) for probe in probes for answer in [_first(probe["ground_truth"])] if answer]
        if pairs:
            prompts, answers = zip(*pairs, strict=True)
            found[name] = {"prompt": list(prompts), "ground_truth": list(answers)}
    return found


def _first(answer: Any) -> str:
    while isinstance(answer, list):
        answer = answer[0] if answer else ""
    return str(answer)


def edits(
    config: Config, requests: list[Request], cases: list[int], open_new: Callable[[Config], Any]
) -> Iterator[tuple[int, Scores]]:
    """Edit each case from the unedited model, and score it."""
    method = config["alg_name"]
    editor = None
    for case in cases:
        with quiet():
            if editor is None or method in NOT_TAKEN_BACK:
                editor = open_new(config)
            if method in KEEP_KEYS:
                forget_keys(editor)
            metrics, _, _ = editor.edit_requests([requests[case]], sequential_edit=False, verbose=False)
        yield case, scores_of(metrics[0]["pre"], metrics[0]["post"])


def require_same_settings(file: Path, settings: dict[str, Any]) -> None:
    """Note beside a file of edits what they are made with.

    Raises:
        ValueError: they were made with something else, or nobody knows with what.
    """
    note = file.with_suffix(".settings.json")
    settings = json.loads(json.dumps(settings))
    has_edits = file.exists() and file.stat().st_size > 0
    if has_edits and not note.exists():
        raise ValueError(f"--out {file.parent} has edits of {file.stem} without {note.name}: give another folder")
    known = json.loads(note.read_text(encoding="utf-8")) if has_edits else settings
    names = sorted(name for name in {*known, *settings} if known.get(name) != settings.get(name))
    if names:
        before, now = (", ".join(f"{name}={one.get(name)}" for name in names) for one in (known, settings))
        raise ValueError(
            f"--out {file.parent} has edits of {file.stem} made with {before}, not with {now}: give another folder"
        )
    note.write_text(json.dumps(settings), encoding="utf-8")


def parse_arguments() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="KnowEdit's ZsRE or WikiBio, or records of that format")
    parser.add_argument("--hparams", type=Path, required=True, help="an hparams file of EasyEdit, as those beside this")
    parser.add_argument("--model", help="folder of another model")
    parser.add_argument("--limit", type=positive, help="the first so many records")
    parser.add_argument(
        "--losses",
        nargs="+",
        metavar="LOSS",
        help=f"beside EasyEdit's own; else the file's token_loss; {NO_KEY}: no other",
    )
    parser.add_argument("--change", default="", help="hparams to change, as lr=0.001;layers=[2,3]")
    parser.add_argument(
        "--no-prefixes", action="store_true", help=f"{', '.join(VECTOR_METHODS)}: the bare prompt alone; faster"
    )
    parser.add_argument("--method", choices=OF_RELATIVE, help="this one, with the values of its relative's file")
    parser.add_argument(
        "--at-mlp",
        action="store_true",
        help=f"{', '.join(LAYER_METHODS)}: one layer's vector before the norm that Gemma 2 and 3 put after an MLP",
    )
    parser.add_argument("--keep", type=Path, metavar="TEXTS", help="UnKE: the texts to keep, one a line")
    parser.add_argument("--out", type=Path, required=True, help="folder of finished edits, each kept")
    return parser, parser.parse_args()


def base_config(arguments: argparse.Namespace) -> Config:
    """The file's config with what the command line changes of it.

    Raises:
        ValueError: it asks for what the method does not have.
        OSError: a file is missing.
    """
    config = load_config(arguments.hparams, arguments.model)
    method = arguments.method or config["alg_name"]
    config = with_changes(as_method(config, method), arguments.change)
    if arguments.no_prefixes and method not in VECTOR_METHODS:
        raise ValueError(f"--no-prefixes is for {', '.join(VECTOR_METHODS)}, not for {method}")
    if arguments.at_mlp and method not in LAYER_METHODS:
        raise ValueError(f"--at-mlp is for {', '.join(LAYER_METHODS)}, not for {method}")
    if arguments.at_mlp:
        optimise_at_mlp(SimpleNamespace(**config))
    if (method == "UnKE") != (arguments.keep is not None):
        raise ValueError(f"--keep is for UnKE, and needed there; the method is {method}")
    for loss in set(arguments.losses or ()) - {NO_KEY}:
        BY_NAME[method].choose(loss)
    return config


def jobs_of(arguments: argparse.Namespace, config: Config) -> dict[str, tuple[Config, Path]]:
    """The config and the file of edits of each loss, in the folder, which notes what they are made with.

    Raises:
        ValueError: the folder has edits that are made with something else.
    """
    in_file = config.get("token_loss", "overtone")
    losses = {in_file if isinstance(in_file, str) else "overtone": in_file}
    if arguments.losses:
        losses = {loss: loss for loss in arguments.losses if loss != NO_KEY}
    made_with: Config = {"data": _with_digest(arguments.data)}
    if arguments.at_mlp:
        made_with["at_mlp"] = True
    if arguments.keep:
        made_with["keep"] = _with_digest(arguments.keep)
    arguments.out.mkdir(parents=True, exist_ok=True)
    jobs = {}
    for name, token_loss in {"cross-entropy": None, **losses}.items():
        own = {key: value for key, value in config.items() if key != "token_loss"}
        if token_loss is not None:
            own["token_loss"] = token_loss
        jobs[name] = own, arguments.out / f"{name.replace(':', '-')}{'-no-prefixes' * arguments.no_prefixes}.jsonl"
    for own, file in jobs.values():
        require_same_settings(file, {**made_with, **own})
    return jobs


def _with_digest(file: Path) -> str:
    return f"{file.name} {zlib.crc32(file.read_bytes()):08x}"


def main() -> int:
    """Run what is left, then print the table."""
    parser, arguments = parse_arguments()
    try:
        config = base_config(arguments)
        requests = read(arguments.data)[: arguments.limit]
        open_new = partial(open_editor, prefixes=not arguments.no_prefixes, at_mlp=arguments.at_mlp)
        if arguments.keep:
            open_new = partial(UnkeEditor, texts=read_texts(arguments.keep, config["ex_data_num"]))
        jobs = jobs_of(arguments, config)
    except (OSError, TypeError, ValueError) as error:
        parser.error(str(error))
    if "EASYEDIT_ROOT" in os.environ:
        sys.path.insert(0, os.environ["EASYEDIT_ROOT"])
    overtone.easyedit.install()
    console = Console(stderr=True)
    title = f"{arguments.data.stem}, {config['alg_name']}{' at the MLP' * arguments.at_mlp}"
    table = Table("loss", "edits", *MEASURES, "Avg", title=title)
    for name, (own, file) in jobs.items():
        records = finished(file)
        done = {record["case"] for record in records}
        left = [case for case in range(len(requests)) if case not in done]
        with Progress(console=console) as progress, file.open("a", encoding="utf-8") as stream:
            bar = progress.add_task(name, total=len(requests), completed=len(requests) - len(left))
            for case, scores in edits(own, requests, left, open_new):
                records.append({"case": case, **scores})
                stream.write(json.dumps(records[-1]) + "\n")
                stream.flush()
                progress.advance(bar)
        records = [record for record in records if record["case"] < len(requests)]
        if records:
            means = average(records)
            cells = (f"{means[m]:.1f}" if m in means else "-" for m in (*MEASURES, "Avg"))
            table.add_row(name, str(len(records)), *cells)
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
