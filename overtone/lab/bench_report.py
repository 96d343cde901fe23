"""`overtone report`: a results file alone, rendered as report.md with tables, CSV files and figures."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from overtone.lab.bench_csv import forgetting_csv, overall_csv, table_csv
from overtone.lab.bench_document import ablation_paper, document, editing_paper, question_paper
from overtone.lab.bench_figures import draw_figures, forgetting
from overtone.lab.bench_overall import overall
from overtone.lab.bench_results import load_results
from overtone.lab.bench_tables import ablation_blocks, editing_blocks, question_blocks
from overtone.lab.records import write_atomically

REPORT, FIGURES = "report.md", "figures"
"""The file to begin with and the folder for images, both in the output folder."""


def write_report(
    results_path: Path, out_folder: Path, *, losses: Collection[str] = (), seeds: Collection[int] = ()
) -> list[Path]:
    """Write report.md, CSV files and figures from a results file.

    Args:
        results_path: results.jsonl of `overtone bench`.
        out_folder: made if need be; files of an earlier report are replaced.
        losses, seeds: of those alone; none for all.

    Returns:
        What was written, report.md first.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: it is not a results file, has no finished edit, or lacks a loss or seed that is asked for.
        ImportError: SciPy, rich or matplotlib is not there.
    """
    results = load_results(results_path, losses=losses, seeds=seeds)
    editing = editing_blocks(results.outcomes)
    questions = question_blocks(results.outcomes)
    ablations = ablation_blocks(results.outcomes)
    one_setting = overall(results.outcomes)
    points = forgetting(results.outcomes)

    (out_folder / FIGURES).mkdir(parents=True, exist_ok=True)
    figures = draw_figures(results.outcomes, editing, points, out_folder / FIGURES)
    tables = {"table1.csv": table_csv(editing, editing_paper)}
    if questions:
        tables["table2.csv"] = table_csv(questions, question_paper)
    if ablations:
        tables["table3.csv"] = table_csv(ablations, ablation_paper)
    if one_setting:
        tables["table4.csv"] = overall_csv(one_setting)
    if points:
        tables["forgetting.csv"] = forgetting_csv(points)
    images = {kind: [f"{FIGURES}/{path.name}" for path in paths] for kind, paths in figures.items()}
    report = document(
        results, editing, questions, ablations, one_setting, images, source=results_path.name, tables=list(tables)
    )
    for name, text in {REPORT: report, **tables}.items():
        write_atomically(out_folder / name, text)
    return [
        *(out_folder / name for name in (REPORT, *tables)),
        *(path.with_suffix(suffix) for paths in figures.values() for path in paths for suffix in (".png", ".svg")),
    ]
