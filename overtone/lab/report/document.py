"""The text of a report, from report.md.jinja."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import pandas as pd

from overtone.lab.report.blocks import Block
from overtone.lab.report.frame import Results
from overtone.lab.report.missing import missing
from overtone.lab.report.statistics import RESAMPLES
from overtone.lab.report.tables import ENOUGH_UNITS, FEWEST_SEQUENCES
from overtone.lab.report.titles import data_title, length_title, loss_title, method_title


def document(
    results: Results,
    tables: Mapping[str, Sequence[Block]],
    images: Mapping[str, Sequence[str]],
    *,
    files: Sequence[str],
) -> str:
    """The whole of report.md.

    Args:
        results: what was read.
        tables: "editing", "questions", "ablations" and "overall".
        images: kind of figure to its files, relative to the report.
        files: names of the CSV files.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__, "."),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # Markdown, not HTML
    )
    edits = results.edits
    failed = edits[edits["error"].notna()]
    settings = edits[["method", "settings"]].drop_duplicates()
    blocks = [block for kind in tables.values() for block in kind]
    headings = {heading for block in blocks for heading in block.head}
    return environment.get_template("report.md.jinja").render(
        header=results.header,
        files=files,
        data=list(map(data_title, edits["data"].cat.categories)),
        seeds=sorted(edits["seed"].unique()),
        lengths=sorted(edits["length"].unique()),
        methods=[
            f"{method_title(method)} ({said or 'as in its files'})" for method, said in settings.itertuples(False)
        ],
        losses=[f"{loss_title(loss)} (`{loss}`)" for loss in edits["loss"].cat.categories],
        left_out=results.left_out,
        models=[_model(model) for model in results.header["models"] if model["seed"] in set(edits["seed"])],
        missing=list(missing(results)),
        edits=len(edits),
        failed=len(failed),
        failures=list(_failures(failed)),
        resamples=RESAMPLES,
        fewest_sequences=FEWEST_SEQUENCES,
        enough_units=ENOUGH_UNITS,
        headings=headings,
        has_differences=any(heading.startswith("Difference to ") for heading in headings),
        has_paper=any(row[0].startswith("*paper") for block in blocks for row in block.rows),
        tables=tables,
        images=images,
    )


def _model(model: Mapping[str, Any]) -> list[str]:
    known = ", ".join(f"{group} {share:.1%}" for group, share in model["knowledge"].items())
    perplexity = "-" if model["perplexity"] is None else f"{model['perplexity']:.2f}"
    return [data_title(model["data"]), str(model["seed"]), model["title"], known, perplexity]


def _failures(failed: pd.DataFrame) -> Any:
    for (data, method, loss, length, error), group in failed.groupby(
        ["data", "method", "loss", "length", "error"], observed=True
    ):
        where = data_title(data), method_title(method), loss_title(loss), length_title(length)
        yield [*where, error.splitlines()[0], str(len(group))]
