"""From results to a report folder."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pandas as pd

from overtone.lab.report.blocks import editing_blocks, overall_blocks, question_blocks
from overtone.lab.report.document import document
from overtone.lab.report.drawing import save_figure
from overtone.lab.report.figures import draw_figures, overfitting_figures
from overtone.lab.report.forgetting import forgetting_table
from overtone.lab.report.frame import Results
from overtone.lab.report.overall import overall_table
from overtone.lab.report.tables import ablation_table, editing_table, question_table
from overtone.lab.results.files import write_whole

REPORT, FIGURES = "report.md", "figures"
"""The file to begin with and the folder for images."""


@dataclass(frozen=True)
class Report:
    """The tables of a report, each empty where the results have nothing for it.

    Attributes:
        results: what they are made of.
        editing: Table 1.
        questions: Table 2.
        ablations: Table 3.
        overall: Table 4.
        forgetting: the curve of forgetting.
    """

    results: Results
    editing: pd.DataFrame
    questions: pd.DataFrame
    ablations: pd.DataFrame
    overall: pd.DataFrame
    forgetting: pd.DataFrame

    @classmethod
    def of(cls, results: Results) -> Report:
        """All tables of some results."""
        edits = results.edits
        return cls(
            results,
            editing_table(edits),
            question_table(edits, results.questions),
            ablation_table(edits),
            overall_table(edits),
            forgetting_table(edits),
        )


def write_report(report: Report, out: Path) -> list[Path]:
    """Write report.md, CSV files and figures.

    Args:
        report: from `Report.of`.
        out: made if need be; files of an earlier report are replaced.

    Returns:
        What was written, report.md first.

    Raises:
        OSError: a file cannot be written.
    """
    named = {
        "table1.csv": report.editing,
        "table2.csv": report.questions,
        "table3.csv": report.ablations,
        "table4.csv": report.overall,
        "forgetting.csv": report.forgetting,
    }
    tables = {name: table for name, table in named.items() if len(table)}
    (out / FIGURES).mkdir(parents=True, exist_ok=True)
    figures = draw_figures(report.results.edits, report.editing, report.forgetting, out / FIGURES)
    text = document(
        report.results,
        {
            "editing": editing_blocks(report.editing),
            "questions": question_blocks(report.questions, report.results.questions),
            "ablations": editing_blocks(report.ablations),
            "overall": overall_blocks(report.overall),
        },
        {kind: [f"{FIGURES}/{path.name}" for path in paths] for kind, paths in figures.items()},
        files=list(tables),
    )
    write_whole(out / REPORT, text)
    for name, table in tables.items():
        _write_csv(table, out / name)
    return [out / REPORT, *(out / name for name in tables), *(path for paths in figures.values() for path in paths)]


def write_short_report(report: Report, out: Path) -> list[Path]:
    """Write Table 1 as CSV and, where edits were watched step by step, the figure of the first method's overfitting.

    Args, Returns and Raises as `write_report`.
    """
    out.mkdir(parents=True, exist_ok=True)
    written = [out / "table1.csv"]
    _write_csv(report.editing, written[0])
    for _, figure in islice(overfitting_figures(report.results.edits), 1):
        written.append(out / "overfitting.png")
        save_figure(figure, written[-1])
    return written


def _write_csv(table: pd.DataFrame, path: Path) -> None:
    write_whole(path, table.to_csv(index=False, lineterminator="\n"))
