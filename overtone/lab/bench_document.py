"""The text of a bench's report: what was run, what is missing or failed, the tables and figures with their captions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from overtone.lab.bench_markdown import (
    EDITING_COLUMNS,
    markdown_line,
    overall_tables,
    question_columns,
    tables_by_data,
)
from overtone.lab.bench_overall import Overall
from overtone.lab.bench_results import Results
from overtone.lab.bench_tables import BASELINES, ENOUGH_UNITS, FEWEST_SEQUENCES, Block, is_early_stopping
from overtone.lab.comparison import RESAMPLES
from overtone.lab.losses import ABLATIONS
from overtone.lab.outcomes import EditOutcome, commands
from overtone.lab.paper import PaperRow, ablation_rows, editing_rows, mquake_rows
from overtone.lab.titles import data_title, length_title, loss_title, method_title

_PAPER_LENGTHS = (1, 10, 100)


def editing_paper(block: Block, loss: str) -> list[PaperRow]:
    """The paper's rows beside a row of Table 1."""
    return editing_rows(block.data, block.method, loss, block.length)


def question_paper(block: Block, loss: str) -> list[PaperRow]:
    """The paper's rows beside a row of Table 2, which is of single edits."""
    return mquake_rows(block.method, loss) if block.data == "mquake" and block.length == 1 else []


def ablation_paper(block: Block, loss: str) -> list[PaperRow]:
    """The paper's rows beside a row of Table 3."""
    return ablation_rows(block.data, block.method, loss, block.length)


def document(
    results: Results,
    editing: Sequence[Block],
    questions: Sequence[Block],
    ablations: Sequence[Block],
    one_setting: Sequence[Overall],
    images: Mapping[str, Sequence[str]],
    *,
    source: str,
    tables: Sequence[str],
) -> str:
    """The whole of report.md.

    Args:
        results: what was read.
        editing: the blocks of Table 1.
        questions: of Table 2.
        ablations: of Table 3.
        one_setting: of Table 4.
        images: kind of figure to its files, relative to the report.
        source: name of the results file.
        tables: names of the CSV files.
    """
    lines = [
        "# overtone bench",
        "",
        f"Rendered by `overtone report` from {source} alone. In full precision: {', '.join(tables)}.",
        "",
        *_what_was_run(results),
        *_bullets(f"What is missing{' here' if results.left_out else ''}", list(missing(results))),
        *_failures(results.outcomes),
        "## How to read the tables",
        "",
        _HOW_TO_READ,
        "",
        "## Table 1: editing",
        "",
        *tables_by_data(editing, EDITING_COLUMNS, editing_paper),
    ]
    if questions:
        lines += ["## Table 2: questions that need the edited fact", "", _QUESTIONS, ""]
        lines += tables_by_data(questions, question_columns(questions), question_paper)
    if ablations:
        lines += ["## Table 3: OverTone without its parts", "", _ABLATIONS, ""]
        lines += tables_by_data(ablations, EDITING_COLUMNS, ablation_paper)
    if one_setting:
        lines += ["## Table 4: one setting for everything", "", _ONE_SETTING, ""]
        lines += overall_tables(one_setting)
    for kind, (title, caption) in _FIGURES.items():
        if images[kind]:
            lines += [f"## {title}", "", caption, ""]
            lines += [f"![{title}: {name.rpartition('/')[2]}]({name})" for name in images[kind]]
            lines.append("")
    return "\n".join(lines)


def missing(results: Results) -> Iterator[str]:
    """One sentence for each thing that the paper's tables and figures need and the file does not have."""
    outcomes = results.outcomes
    losses = list(dict.fromkeys(outcome.loss for outcome in outcomes))
    lengths = {outcome.length for outcome in outcomes}
    seeds = {outcome.seed for outcome in outcomes}
    if results.unfinished:
        yield f"{results.unfinished} edits of sequences that are not finished: they count nowhere."
    absent = [f"{length}" for length in _PAPER_LENGTHS if length not in lengths]
    if absent:
        yield f"Edits in a row: no T = {', '.join(absent)}."
    if lengths == {1}:
        yield "Figure 3 and the curve of forgetting: they need sequences of several edits."
    if len(losses) == 1:
        yield f"Differences: {loss_title(losses[0])} is the only loss."
    absent = [loss_title(loss) for loss in BASELINES if loss not in losses]
    if absent:
        yield f"Baselines: {', '.join(absent)}. The best baseline is the best of those that were run."
    if sum(map(is_early_stopping, losses)) < 2:
        yield "Early stopping at several thresholds: without it the best one is not known."
    if not any(outcome.answers for outcome in outcomes):
        yield "Table 2: no data with questions."
    absent = [loss_title(loss) for loss in ABLATIONS if loss not in losses]
    if len(absent) == len(ABLATIONS):
        yield "Table 3: no ablation."
    elif absent:
        yield f"Table 3: {', '.join(absent)}."
    if all(outcome.trace is None for outcome in outcomes):
        yield "Figures 1 and 2: no edit was watched step by step."
    if len(seeds) < 3:
        yield f"Seeds: {len(seeds)} of at least 3; intervals do not say how much another seed would change."


_HOW_TO_READ = f"""\
Rel, Gen, Por, Loc: teacher-forced token accuracy in % on the edited, rephrased, reasoning and unrelated prompts, after
the last edit of the sequence; average: their mean per edit, over those that the data has. Perplexity: of the edited
model on held-out texts, geometric mean. Steps: optimiser steps per edit. In brackets: 95% percentile-bootstrap
intervals ({RESAMPLES} resamples, fixed seed) over edits pooled over seeds.

Edits of one sequence are not independent: for T > 1 whole sequences are resampled where there are at least
{FEWEST_SEQUENCES}, and edits otherwise, which makes intervals too narrow; each table says which.

Differences are of the average, in points, over the edits that both losses have (same data, seed, sequence and edit), by
a paired bootstrap. Percentile intervals over few units are too narrow: over 6, one excludes 0 in about 13% of cases
without a difference. Both ends of a difference's interval are therefore stretched about the mean by
sqrt(n / (n - 1)) * t / 1.96, where n is the number of edits or sequences resampled and t the 97.5% quantile of
Student's t with n - 1 degrees of freedom; the intervals of the other columns are not. The best baseline is the best of
cross-entropy, label smoothing and early stopping at its default threshold, 0.1. The best early stopping is the best of
all thresholds. Both are chosen by their average on the same edits of the same table, which favours them. **Bold**: the
interval excludes 0, whichever way, and rests on at least {ENOUGH_UNITS} single edits or sequences: fewer all agree in
sign by chance in over 5% of cases, whatever an interval over them says. Nothing else is ever bold, and no interval is
corrected for the number of rows.

*In italics*: the paper's own numbers, copied from the table named there. They are of another, much larger model and of
other settings: the direction compares, the height does not. Differences to them are not taken.

Edits that ended with an error count in no mean; their number is in the last column. A perplexity that is not finite
counts in no mean either, which favours the loss that made it."""

_QUESTIONS = """\
Rel as in Table 1; the share of an edit's questions whose answer the model's completion contains, and of those with the
answer from before the edit. Average: of Rel, single-hop and multi-hop at temperature 0.1, as in the paper (greedy where
nothing was sampled)."""

_ABLATIONS = """\
w/o clip: epsilon = 0; w/o dyn: the target is mixed from the model before the edit; w/o chk: the mixture is used
whatever token it favours; w/o flt: no filter of the tail; mixing only: neither clipping nor check; clipping only:
lam = 1. Differences are to OverTone as in the paper."""

_ONE_SETTING = f"""\
Each loss with one setting over several data and lengths: the mean of its averages in Table 1's columns, which weigh
alike. It is compared to the early stop that is best on that mean, and to the one that is best in each column, as if it
were known beforehand; both are chosen on the same edits, which favours them. The same facts are edited singly and in
rows, so groups that hold whole sequences of every length are resampled, the same in every column, and the intervals
stretched as in Table 1; edits outside of groups that every loss has in every column do not count. Columns of fewer than
{ENOUGH_UNITS} sequences are left out, and so are losses that a column does not have."""

_FIGURES: Mapping[str, tuple[str, str]] = {
    "overfitting": (
        "Figures 1 and 2: overfitting",
        "Losses of the true answers step by step (a, b), of each target token before the edit (c), and how far each is "
        "from overfitted after it (d).",
    ),
    "lengths": (
        "Figure 3: the average by edits in a row",
        "Mean after the last edit, with the intervals of Table 1 as bands.",
    ),
    "forgetting": (
        "Forgetting",
        "Reliability after the last edit of a sequence by how many edits were made since, in up to ten bins, with 95% "
        "intervals as bands.",
    ),
}


def _what_was_run(results: Results) -> Iterator[str]:
    header = results.header
    yield from ("## What was run", "")
    for command in commands(header):
        yield f"- Command: `{' '.join(map(str, command))}`"
    for key in ("machine", "versions"):
        if key in header:
            yield f"- {key.capitalize()}: {_said(header[key])}"
    # Of the edits themselves: the header has the settings of the last command alone.
    found: dict[str, list[Any]] = {
        "data": [outcome.data for outcome in results.outcomes],
        "seeds": sorted({outcome.seed for outcome in results.outcomes}),
        "methods": [outcome.method for outcome in results.outcomes],
        "lengths": sorted({outcome.length for outcome in results.outcomes}),
    }
    yield f"- Settings: {_said({name: list(dict.fromkeys(values)) for name, values in found.items()})}"
    losses = dict.fromkeys(outcome.loss for outcome in results.outcomes)
    yield f"- Losses: {', '.join(f'{loss_title(loss)} (`{loss}`)' for loss in losses)}"
    if results.left_out:
        yield f"- In the file, but not in this report: {', '.join(results.left_out)}"
    for key in ("optimisers", "traced"):
        if key in header:
            yield f"- {key.capitalize()}: {_said(header[key])}"
    yield ""
    models = [model for model in header.get("models", []) if model["seed"] in found["seeds"]]
    if models:
        yield markdown_line(["Data", "Seed", "Model", "Knew before the edits", "Perplexity"])
        yield markdown_line(["---", "---:", "---", "---", "---:"])
        for model in models:
            known = ", ".join(f"{group} {share:.1%}" for group, share in model.get("knowledge", {}).items())
            perplexity = model.get("perplexity")
            yield markdown_line(
                [
                    data_title(model["data"]),
                    str(model["seed"]),
                    model.get("title", ""),
                    known,
                    "-" if perplexity is None else f"{perplexity:.2f}",
                ]
            )
        yield ""


def _failures(outcomes: Sequence[EditOutcome]) -> Iterator[str]:
    failed = [outcome for outcome in outcomes if outcome.scores is None]
    yield from (f"## Failed edits: {len(failed)} of {len(outcomes)}", "")
    if failed:
        yield markdown_line(["Data", "Method", "Loss", "Edits in a row", "Failed", "Error"])
        yield markdown_line(["---", "---", "---", "---", "---:", "---"])
        counts = Counter((o.data, o.method, o.loss, o.length, o.error or "unknown") for o in failed)
        for (data, method, loss, length, error), count in counts.items():
            shown = error.splitlines()[0]
            cells = [data_title(data), method_title(method), loss_title(loss), length_title(length), str(count), shown]
            yield markdown_line(cells)
        yield ""


def _bullets(title: str, items: Sequence[str]) -> Iterator[str]:
    if items:
        yield from (f"## {title}", "", *(f"- {item}" for item in items), "")


def _said(value: Any) -> str:
    """JSON as text, without what is not set."""
    if isinstance(value, Mapping):
        given = {key: inner for key, inner in value.items() if inner not in (None, {}, [])}
        return "; ".join(
            f"{key} ({_said(inner)})" if isinstance(inner, Mapping) else f"{key} {_said(inner)}"
            for key, inner in given.items()
        )
    if isinstance(value, list):
        return ", ".join(map(_said, value))
    return str(value)
