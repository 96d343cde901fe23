"""From a results folder to a report folder."""

from __future__ import annotations

from collections.abc import Collection
from itertools import islice
from pathlib import Path

from overtone.lab.report.blocks import editing_blocks, overall_blocks, question_blocks
from overtone.lab.report.document import document
from overtone.lab.report.drawing import save_figure
from overtone.lab.report.figures import draw_figures, overfitting_figures
from overtone.lab.report.forgetting import forgetting_table
from overtone.lab.report.frame import load_results
from overtone.lab.report.overall import overall_table
from overtone.lab.report.tables import ablation_table, editing_table, question_table
from overtone.lab.results.files import write_whole

REPORT, FIGURES = "report.md", "figures"
"""The file to begin with and the folder for images."""


def write_report(
    results_folder: Path, out: Path, *, losses: Collection[str] = (), seeds: Collection[int] = ()
) -> list[Path]:
    """Write report.md, CSV files and figures.

    Args:
        results_folder: the output folder of a run, finished or not.
        out: made if need be; files of an earlier report are replaced.
        losses, seeds: of those alone; none for all.

    Returns:
        What was written, report.md first.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: it is no results folder, has no finished edit, or lacks a loss or seed that is asked for.
    """
    results = load_results(results_folder, losses=losses, seeds=seeds)
    editing = editing_table(results.edits)
    questions = question_table(results.edits, results.questions)
    ablations = ablation_table(results.edits)
    overall = overall_table(results.edits)
    forgetting = forgetting_table(results.edits)
    named = {
        "table1.csv": editing,
        "table2.csv": questions,
        "table3.csv": ablations,
        "table4.csv": overall,
        "forgetting.csv": forgetting,
    }
    tables = {name: table for name, table in named.items() if len(table)}

    (out / FIGURES).mkdir(parents=True, exist_ok=True)
    figures = draw_figures(results.edits, editing, forgetting, out / FIGURES)
    text = document(
        results,
        {
            "editing": editing_blocks(editing),
            "questions": question_blocks(questions, results.questions),
            "ablations": editing_blocks(ablations),
            "overall": overall_blocks(overall),
        },
        {kind: [f"{FIGURES}/{path.name}" for path in paths] for kind, paths in figures.items()},
        folder=results_folder.name,
        files=list(tables),
    )
    write_whole(out / REPORT, text)
    for name, table in tables.items():
        write_whole(out / name, table.to_csv(index=False, lineterminator="\n"))
    return [out / REPORT, *(out / name for name in tables), *(path for paths in figures.values() for path in paths)]


def write_short_report(results_folder: Path, out: Path) -> list[Path]:
    """Write Table 1 as CSV and, where edits were watched step by step, the figure of the first method's overfitting.

    Args, Returns and Raises as `write_report`.
    """
    edits = load_results(results_folder).edits
    write_whole(out / "table1.csv", editing_table(edits).to_csv(index=False, lineterminator="\n"))
    written = [out / "table1.csv"]
    for _, figure in islice(overfitting_figures(edits), 1):
        save_figure(figure, out / "overfitting.png")
        written.append(out / "overfitting.png")
    return written
