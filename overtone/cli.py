"""The `overtone` command: demo, bench, report and doctor.

Only argparse is imported here; what a command needs is imported when it runs, so that `overtone --help` works, and is
quick, where torch alone is installed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    Subcommands = argparse._SubParsersAction[argparse.ArgumentParser]

_EXTRAS = {
    "lab": ("transformers", "peft", "jinja2", "matplotlib", "pandas", "platformdirs", "rich", "scipy"),
    "easyedit": ("yaml", "rich"),
}
"""What the commands need beyond torch, by the extra that brings it."""

_FILES = {
    "zsre": "KnowEdit's ZsRE",
    "wikibio": "KnowEdit's WikiBio",
    "mquake": "MQuAKE",
    "counterfact": "CounterFact",
    "wikidata_recent": "KnowEdit's WikiData recent",
    "wikidata_counterfact": "KnowEdit's WikiData counterfact",
}
"""The corpora that are read from a published file."""

_RESUMABLE = "what was finished is kept, and the same command goes on from there"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments after the program's name; None: those of this process.

    Returns:
        The exit code: 0 done, 1 refused or found wanting, 2 a mistake in the call, 130 interrupted.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = parse_arguments(argv)
    try:
        exit_code: int = arguments.run(arguments, argv)
    except KeyboardInterrupt:
        return _fail(f"interrupted; {_RESUMABLE}", exit_code=130)
    return exit_code


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments after the program's name, read; a mistake among them ends the program with exit code 2."""
    parser = argparse.ArgumentParser(
        prog="overtone", description="Edit language models' knowledge with a loss that does not overfit it."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_demo(commands)
    _add_bench(commands)
    _add_report(commands)
    _add_doctor(commands, is_wanted=argv[:1] == ["doctor"])
    return parser.parse_args(argv)


def _add_demo(commands: Subcommands) -> None:
    parser = commands.add_parser(
        "demo",
        help="edit a small model's facts with several losses and compare",
        description="Train (once) a small model on an invented world, edit its facts singly with each method and loss, "
        "and print what each loss does to the edit and to everything else that the model knows: the bench's preset "
        "demo, with a short report.",
    )
    parser.add_argument("--seed", type=int, dest="seeds", help="of the world, its model and the edits (default: 0)")
    parser.add_argument("--target", type=_names, dest="data", help="of the edits: short, long or soft (default: short)")
    _add_grid(parser, out="demo-out")
    parser.set_defaults(run=_bench, preset="demo", lengths=None, size=None, breadth_first=None, **dict.fromkeys(_FILES))


def _add_bench(commands: Subcommands) -> None:
    parser = commands.add_parser(
        "bench",
        help="compare losses over methods, data and sequences of edits, and write a report",
        description="Edit the facts of a model with each method and each loss, singly and in sequences, score every "
        "edit, and write results and a report with intervals. Every finished sequence is on disk at once: the same "
        "command goes on where it was interrupted, and more losses, methods, data or seeds can be added in the same "
        "folder. Under torchrun or accelerate launch the ranks share the work.",
        epilog="A loss is name or name:field=value+field=value, for example cross_entropy:hold=0.3 (early stopping), "
        "cross_entropy:hold=correct, label_smoothing, overtone:hold=settled, overtone_recommended (our settings for "
        "each method), overtone:hold=0.1+lam=0.5, overtone:n_sigma=none, overtone:check=false, overtone:epsilon=0, "
        "overtone:lam=1, overtone:dynamic=false (the target of the model before the edit), overtone:anchor=1 (the "
        "edit's prompt stays as the model continued it; cross_entropy:anchor=1 too), dft, gem, eaft.",
    )
    parser.add_argument(
        "--preset",
        default="quick",
        help="quick: two methods, three losses, one seed; paper-small: every kind of loss on three worlds, "
        "three seeds, T = 1, 10, 100; demo: single edits with six losses. The options "
        "below change it (default: quick)",
    )
    parser.add_argument("--data", type=_names, help=f"by commas: short, long, soft, {', '.join(_FILES)}")
    for name, title in _FILES.items():
        parser.add_argument(_option(name), metavar="PATH", help=f"{title}, the published file; adds {name} to the data")
    parser.add_argument("--size", type=int, help="records of a published file that the small model is to know")
    parser.add_argument("--lengths", type=_numbers, help="by commas: edits in a sequence, 1 for single edits")
    parser.add_argument(
        "--breadth-first",
        type=int,
        metavar="N",
        help="train the edits of a sequence in rounds over all of them, N a step, as LocFT does; --steps then limits "
        "the rounds, and N edits share a forward pass whatever --at-once says (default: each to its end before the "
        "next)",
    )
    parser.add_argument("--seeds", type=_numbers, help="by commas: of the worlds, models and edits")
    _add_grid(parser, out="bench-out")
    parser.set_defaults(run=_bench)


def _add_grid(parser: argparse.ArgumentParser, *, out: str) -> None:
    parser.add_argument(
        "--model",
        help="causal LM to edit: a name on the hub, a folder or a .gguf file, which is dequantised (default: a small "
        "one trained on each corpus)",
    )
    parser.add_argument("--dtype", help="of a named model's weights, such as bfloat16 (default on the CPU: float32)")
    parser.add_argument("--arch", help="of the small model: llama, qwen2, mistral or gpt2 (default: llama)")
    parser.add_argument(
        "--methods",
        type=_names,
        help="by commas: lora, ft-m; with EasyEdit also easyedit-ft, easyedit-lora, easyedit-melo, easyedit-wise, "
        "rome, memit (default: lora,ft-m)",
    )
    parser.add_argument(
        "--lr",
        type=_rates,
        dest="lrs",
        help="by commas: learning rates to compare (default: 5e-3; for ft-m with --model 5e-4)",
    )
    parser.add_argument("--steps", type=int, help="optimiser steps of an edit at most (default: lora 50, ft-m 25)")
    parser.add_argument("--layer", type=int, help="which block ft-m edits (default: two thirds up)")
    parser.add_argument("--rank", type=int, help="of lora's adapters (default: 8)")
    parser.add_argument("--alpha", type=int, help="lora's output is scaled by alpha / rank (default: 32)")
    parser.add_argument("--target-modules", type=_names, help="by commas: where lora adapts (default: q_proj,v_proj)")
    parser.add_argument(
        "--at-once",
        type=int,
        help="edits of lora and ft-m that share a pass; from 2 on nothing is generated, so that exact match and "
        "perplexity are left out (default: 8 for a named model, else 1)",
    )
    parser.add_argument(
        "--generate",
        action="store_true",
        default=None,
        help="where edits share a pass, also count the answers that the edited model says in its own words",
    )
    parser.add_argument(
        "--only-known", action="store_true", default=None, help="edit only facts that the named model knows"
    )
    parser.add_argument(
        "--losses",
        nargs="+",
        type=_loss,
        help="by spaces; the last lines of overtone bench --help say how a loss is written",
    )
    parser.add_argument(
        "--edits",
        type=int,
        help="of each corpus and seed, cut into sequences; a longer sequence takes what it needs (default: 20)",
    )
    parser.add_argument("--out", type=_folder, default=Path(out), help=f"folder (default: {out})")
    parser.add_argument("--workers", type=int, help="processes (default: 2 on the CPU, 1 on a GPU or under torchrun)")


def _add_report(commands: Subcommands) -> None:
    parser = commands.add_parser(
        "report",
        help="render the results of a bench",
        description="Write report.md, CSV files and figures from a results folder alone, finished or not.",
    )
    parser.add_argument("results", type=_folder, help="output folder of overtone bench")
    parser.add_argument("--losses", nargs="+", type=_loss, default=(), help="by spaces: of these alone (default: all)")
    parser.add_argument("--seeds", type=_numbers, default=(), help="by commas: of these alone (default: all)")
    parser.add_argument("--out", type=_folder, help="folder (default: that of the results, for a report of all)")
    parser.set_defaults(run=_report)


def _add_doctor(commands: Subcommands, *, is_wanted: bool) -> None:
    parser = commands.add_parser("doctor", help="check the EasyEdit installation that overtone plugs into")
    if is_wanted:
        problem = _missing("easyedit")
        if problem:
            parser.error(problem)
        from overtone.easyedit import doctor

        doctor.add_arguments(parser)
        parser.set_defaults(run=lambda arguments, argv: doctor.run(arguments))


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _loss(text: str) -> str:
    """A loss, which the run reads; a comma in it may stand between the values of a field, but not beside a name."""
    if "," in text:
        _, *others = (piece.strip() for piece in text.split(","))
        if "," in text.partition(":")[0] or any(not piece or ":" in piece or _is_loss(piece) for piece in others):
            raise argparse.ArgumentTypeError(f"losses are separated by spaces, not by commas, got {text!r}")
    return text


def _is_loss(text: str) -> bool:
    from overtone.token_loss import parse

    try:
        parse(text)
    except ValueError:
        return False
    return True


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("a folder is expected, got '': name one, . for the current one")
    return Path(text)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(map(int, _names(text)))
    except ValueError:
        numbers = ()
    if not numbers:
        raise argparse.ArgumentTypeError(f"whole numbers by commas are expected, got {text!r}")
    return numbers


def _rates(text: str) -> tuple[float, ...]:
    try:
        rates = tuple(map(float, _names(text)))
    except ValueError:
        rates = ()
    if not rates:
        raise argparse.ArgumentTypeError(f"numbers by commas are expected, got {text!r}")
    return rates


def _bench(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    problem = _missing("lab") or _unreadable_file(arguments)
    if problem:
        return _fail(problem)
    from rich.console import Console
    from transformers.utils.logging import disable_progress_bar

    from overtone.lab.report.frame import load_results
    from overtone.lab.report.terminal import averages_by_length, measures_of_single_edits
    from overtone.lab.report.write import Report, write_report, write_short_report
    from overtone.lab.run.progress import perform_with_progress
    from overtone.lab.run.run import Run, default_workers
    from overtone.lab.run.settings import preset

    disable_progress_bar()  # a bar of its own for every model file that is read
    is_demo = arguments.command == "demo"
    try:
        settings = preset(arguments.preset, **_chosen(arguments))
        workers = default_workers(settings) if arguments.workers is None else arguments.workers
        run = Run(settings, arguments.out, workers=workers)
        run.begin(run.open_models(), command=["overtone", *argv])
    except (ValueError, OSError) as error:
        return _fail(_said(error))
    except RuntimeError as error:
        return _fail(str(error), exit_code=1)
    try:
        perform_with_progress(run)
        if run.shard.rank != 0:
            return 0
        results = load_results(arguments.out)
        report = Report.of(results)
        written = (write_short_report if is_demo else write_report)(report, arguments.out)
    except (OSError, RuntimeError, ValueError, MemoryError) as error:
        return _fail(f"{_said(error)}; {_RESUMABLE}", exit_code=1)
    console = Console()
    for model in results.header["models"]:
        known = ", ".join(f"{share:.1%} of the {group}" for group, share in model["knowledge"].items())
        console.print(f"{model['data']}, seed {model['seed']}: {model['title']}; it knew {known} before the edits")
    console.print((measures_of_single_edits if is_demo else averages_by_length)(report.editing))
    failed = results.edits["error"].notna().sum()
    if failed:
        console.print(f"{failed} of {len(results.edits)} edits failed: their errors stand in the results")
    for reason in run.plan.left_out:
        console.print(f"Left out: {reason}")
    console.print(f"Written: {', '.join(map(str, written[:2]))}{' and what it names' if not is_demo else ''}")
    return 0


def _chosen(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the command line changes of a preset."""
    names = (
        *("data", "size", "model", "dtype", "arch", "methods", "losses", "lengths", "edits", "seeds"),
        *("lrs", "at_once", "generate", "only_known"),
    )
    changes = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if isinstance(changes.get("seeds"), int):
        changes["seeds"] = (changes["seeds"],)
    files = {name: getattr(arguments, name) for name in _FILES if getattr(arguments, name) is not None}
    method = ("steps", "layer", "rank", "alpha", "target_modules", "breadth_first")
    of_methods = {name: getattr(arguments, name) for name in method if getattr(arguments, name) is not None}
    return {**changes, "paths": files, "changes": of_methods}


def _report(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    problem = _missing("lab")
    if problem:
        return _fail(problem)
    from rich.console import Console

    from overtone.lab.report.frame import load_results
    from overtone.lab.report.terminal import averages_by_length
    from overtone.lab.report.write import Report, write_report
    from overtone.lab.results.files import require_writable

    folder: Path = arguments.results
    if (arguments.losses or arguments.seeds) and arguments.out is None:
        return _fail("--losses and --seeds need --out: their report would replace that of all results")
    try:
        if arguments.out is not None:
            require_writable(arguments.out)
        report = Report.of(load_results(folder, losses=arguments.losses, seeds=arguments.seeds))
        written = write_report(report, arguments.out or folder)
    except (ValueError, OSError) as error:
        return _fail(_said(error))
    console = Console()
    console.print(averages_by_length(report.editing))
    console.print(f"Written: {written[0]} and what it names")
    return 0


def _missing(extra: str) -> str | None:
    missing = [module for module in _EXTRAS[extra] if find_spec(module) is None]
    return f'missing {", ".join(missing)}: pip install "overtone[{extra}]"' if missing else None


def _unreadable_file(arguments: argparse.Namespace) -> str | None:
    """What is wrong with the first published file that cannot be opened."""
    for name in _FILES:
        path = getattr(arguments, name)
        if path == "":
            return f"{_option(name)} must be a file that can be read, got '': name one, or leave it out"
        try:
            if path is not None:
                Path(path).open("rb").close()
        except OSError as error:
            return f"{_option(name)} must be a file that can be read, got {path!r} ({error.strerror})"
    return None


def _said(error: Exception) -> str:
    """An error in words: the system's without its number, and one that says nothing by its name."""
    if isinstance(error, OSError) and error.strerror:
        # Of two names the second is the file that was to be written, the first a partial one.
        name = error.filename2 or error.filename
        return f"{name}: {error.strerror}" if name else error.strerror
    return str(error) or type(error).__name__


def _fail(message: str, *, exit_code: int = 2) -> int:
    sys.stderr.write(f"overtone: error: {message}\n")
    return exit_code
