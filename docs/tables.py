"""The tables of README.md and docs/*.md, written from the CSV files of examples/results.

    python docs/tables.py

A table stands between <!-- table NAME --> and <!-- end of table -->; whatever is between is replaced by the table that
the function of that name returns. tests/test_docs.py fails while a page and its files differ.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from overtone.config import PRESETS, RECOMMENDED, OverToneConfig
from overtone.lab.edit.compared import ABLATIONS, COMPARED
from overtone.lab.report.statistics import bootstrap_difference
from overtone.lab.report.titles import data_title
from overtone.token_loss import parse

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "examples" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?<=^<!-- table )([\w-]+) -->\n.*?(?=^<!-- end of table -->$)", re.MULTILINE | re.DOTALL)

MEASURES = {"rel": "Rel", "gen": "Gen", "por": "Por", "loc": "Loc", "average": "average"}
METHODS = {"lora": "LoRA", "ft-m": "FT-M", "easyedit-ft": "EasyEdit's FT-M", "easyedit-lora": "EasyEdit's LoRA"}
METHODS |= {"easyedit-melo": "EasyEdit's MELO", "easyedit-wise": "EasyEdit's WISE"}
STOPS = ("0.3", "0.5", "1", "correct")
EARLIER = "earlier_recommended"
"""What was recommended when a file was made; examples/results/README.md has the settings."""
LOSSES = (*COMPARED[:2], *(f"cross_entropy:hold={stop}" for stop in STOPS), *COMPARED[2:], EARLIER)
"""The losses that a table shows, in its order: those that the lab compares, and cross-entropy stopped elsewhere."""

KEY, DIFFERENCE = "`token_loss`", "difference an edit (standard error)"
"""Titles of columns."""

Builder = Callable[[], pd.DataFrame]
TABLES: dict[str, Builder] = {}


def table(build: Builder) -> Builder:
    """Register a table under its function's name, with hyphens."""
    TABLES[build.__name__.replace("_", "-")] = build
    return build


def read(name: str) -> pd.DataFrame:
    """A committed CSV file."""
    return pd.read_csv(RESULTS / f"{name}.csv")


def read_edits(name: str) -> pd.DataFrame:
    """A committed CSV file with a row an edit, and the average of the measures that it has."""
    edits = read(name)
    return edits.assign(average=edits[["rel", "gen", "por", "loc"]].mean(axis=1))


def number(value: float, digits: int = 1, sign: str = "") -> str:
    """Empty where there is none."""
    return "" if pd.isna(value) else f"{value:{sign}.{digits}f}"


def with_interval(row: pd.Series[float], name: str, digits: int = 1, sign: str = "") -> str:
    """The value with its 95% interval."""
    if pd.isna(row[name]):
        return ""
    low, high = (number(row[f"{name} {end}"], digits, sign) for end in ("low", "high"))
    return f"{number(row[name], digits, sign)} [{low}, {high}]"


def mean_gain(gains: pd.Series[float], units: Any) -> dict[str, Any]:
    """The mean of paired differences with its interval over the units, as `difference` reads it."""
    gain = bootstrap_difference(gains.to_numpy()[:, None], units)
    values = {"difference": gain.mean, "difference low": gain.low, "difference high": gain.high}
    return values | {"clear": bool(gain.excludes_zero)}


def difference(row: pd.Series[float], name: str = "difference", clear: str = "clear") -> str:
    """In bold if it is clear."""
    text = with_interval(row, name, sign="+")
    return f"**{text}**" if row[clear] is True else text


def shown(frame: pd.DataFrame, losses: Sequence[str] = LOSSES) -> pd.DataFrame:
    """The rows of these losses, in their order, with the titles that the lab's reports have."""
    kept = frame[frame.loss.isin(losses)].sort_values(
        "loss", key=lambda column: column.map(losses.index), kind="stable"
    )
    return with_titles(kept)


def with_titles(frame: pd.DataFrame) -> pd.DataFrame:
    """The titles of the losses in a column of their own."""
    return frame.assign(title=[title_of(loss) for loss in frame.loss])


def title_of(loss: str) -> str:
    """As the lab's reports have it."""
    return "OverTone, recommended earlier" if loss == EARLIER else parse(loss).title


def columns(titled: dict[str, list[str]]) -> pd.DataFrame:
    """A table by its columns."""
    return pd.DataFrame(titled)


def by_measure(frame: pd.DataFrame) -> dict[str, list[str]]:
    """The columns Rel to average, those that the file has."""
    return {title: frame[name].map(number).tolist() for name, title in MEASURES.items() if name in frame}


@table
def demo() -> pd.DataFrame:
    """The demo's table."""
    parts = []
    for method in ("lora", "ft-m"):
        rows = shown(read("demo").query(f"method == {method!r}"))
        measures = by_measure(rows) | {"average": [with_interval(row, "average") for _, row in rows.iterrows()]}
        steps = {"steps": rows.steps.map(number).tolist()}
        parts.append(columns({"method": [METHODS[method]] * len(rows), "loss": rows.title.tolist()} | measures | steps))
    return pd.concat(parts)


def against_best_stop(rows: pd.DataFrame) -> dict[str, list[str]]:
    """Of rows of one method and one set of columns: plain, stopped, what was recommended earlier."""
    loss = rows.set_index("loss")
    ours = loss.loc[EARLIER]
    stop = f"{ours['best single stop']:g}"
    return {
        "cross-entropy": [number(loss.average["cross_entropy"])],
        "held at its best single threshold": [f"{number(loss.average[f'cross_entropy:hold={stop}'])} (at {stop})"],
        "recommended earlier": [number(ours.average)],
        "minus that": [difference(ours)],
    }


def at_first_choice(rows: pd.DataFrame) -> dict[str, list[str]]:
    """The same rows' cross-entropy stopped at the first choice."""
    found = rows.average[rows.loss == "cross_entropy:hold=correct"]
    return {"held at the first choice": [number(found.iloc[0]) if len(found) else ""]}


@table
def what_to_expect() -> pd.DataFrame:
    """A real model: the recommended settings, and minus the threshold that is best for a method over all its cells."""
    cells = held_cells()
    cells["case"] = [
        f"{data_title(row.data)}, {METHODS[row.method]} (held at {row.threshold})" for row in cells.itertuples()
    ]
    cells["contender"] = [f"lr {row.lr:g}" + (f", {row.T} in a row" if row.T > 1 else "") for row in cells.itertuples()]
    cells["cell"] = [f"{number(row.ours)}: {difference(row)}" for _, row in cells.iterrows()]
    return wide(cells.sort_values(["T", "lr"], kind="stable"))


def held_cells() -> pd.DataFrame:
    """Of each data, method, learning rate and T: averages by loss, and the recommended settings minus the threshold."""
    edits = read_edits("real/gemma-3-270m-held")
    cell, edit = ["data", "method", "lr", "T"], ["sequence", "position"]
    wide_edits = edits.pivot(index=[*cell, *edit], columns="loss", values="average")
    means = wide_edits.groupby(level=cell, sort=False).mean()
    is_stop = means.columns.str.match(r"cross_entropy:hold=[\d.]+$")
    # Of the thresholds that every cell of the method has.
    best = means.loc[:, is_stop].groupby(level="method").agg(lambda cells: cells.mean(skipna=False)).idxmax(axis=1)
    found = []
    for key, own in wide_edits.groupby(level=cell, sort=False):
        place = dict(zip(cell, key, strict=True))
        stop = best[place["method"]]
        gain = mean_gain(own["overtone_recommended"] - own[stop], own.index.get_level_values("sequence"))
        place |= {"threshold": stop.partition("=")[2], "edits": len(own), "ours": own["overtone_recommended"].mean()}
        found.append(place | gain | dict(means.loc[key]))
    return pd.DataFrame(found)


@table
def gemma_held() -> pd.DataFrame:
    """A real model: the averages of each cell, by loss."""
    cells = held_cells()
    losses = sorted(read("real/gemma-3-270m-held").loss.unique(), key=lambda loss: loss == "overtone_recommended")
    names = [
        f"{data_title(row.data)}, {METHODS[row.method]}, {row.lr:g}, T={row['T']} ({row.edits} edits)"
        for _, row in cells.iterrows()
    ]
    gains = [difference(row) for _, row in cells.iterrows()]
    # A loss that some cells lack has no mean over all.
    means = cells.groupby("method", sort=False)[losses].agg(lambda own: own.mean(skipna=False))
    for method, row in means.iterrows():
        names.append(f"{METHODS[str(method)]}, all {(cells.method == method).sum()}")
        gains.append("")
        cells = pd.concat([cells, row.to_frame().T])
    shown_losses = {title_of(loss): cells[loss].map(number).tolist() for loss in losses}
    return columns(
        {"data, method, lr, edits in a row": names} | shown_losses | {"recommended minus a threshold": gains}
    )


@table
def gemma_breadth() -> pd.DataFrame:
    """Rows of ten on a real model: each measure with each edit to its end, then in rounds over all of them."""
    place = ["data", "method", "lr", "loss"]
    edit = [*place, "sequence", "position"]
    one_by_one = read_edits("real/gemma-3-270m-held").query("T == 10").set_index(edit).add_suffix(" before")
    both = read_edits("real/gemma-3-270m-breadth").join(one_by_one, on=edit)
    found = []
    for (data, method, lr, loss), own in both.groupby(place, sort=False):
        gain = mean_gain(own.average - own["average before"], own.sequence)
        titles = {"data, method, lr": f"{data_title(data)}, {METHODS[method]}, {lr:g}", "loss": title_of(loss)}
        measures = {
            title: ""
            if own[name].isna().all()
            else f"{number(own[f'{name} before'].mean())} → {number(own[name].mean())}"
            for name, title in MEASURES.items()
        }
        found.append(titles | measures | {"difference": difference(pd.Series(gain))})
    return pd.DataFrame(found)


@table
def anchor_search() -> pd.DataFrame:
    """Edits with written texts and without, and minus cross-entropy held at 0.3 and at the data set's best stop."""
    edits = read_edits("real/gemma-3-270m-anchor-search").fillna({"groups": ""})
    found = []
    for data, own in edits.groupby("data", sort=False):
        averages = own.pivot(index="edit", columns=["loss", "groups"], values="average").dropna()
        shared = own[own.edit.isin(averages.index)]
        means = shared.groupby(["loss", "groups"], sort=False)[[*MEASURES, "kl", "steps"]].mean()
        best = max((key for key in means.index if not key[1]), key=lambda key: means.average[key])
        for key, row in means.iterrows():
            titles = {"data": data_title(data), "loss": title_of(key[0]), "texts": key[1].replace("+", ", ")}
            measures = {title: number(row[name]) for name, title in MEASURES.items()}
            others = {"KL on locality": number(row.kl, 2), "steps": number(row.steps), "edits": str(len(averages))}
            minus_fixed = {"minus held at 0.3": minus(averages, key, ("cross_entropy:hold=0.3", ""))}
            minus_best = {"minus the best stop": minus(averages, key, best)}
            found.append(titles | measures | others | minus_fixed | minus_best)
    return pd.DataFrame(found)


def minus(values: pd.DataFrame, column: Any, rival: Any) -> str:
    """A column minus another, edit by edit; empty where it is the rival itself."""
    if column == rival:
        return ""
    return difference(pd.Series(mean_gain(values[column] - values[rival], values.index)))


@table
def gemma_choice() -> pd.DataFrame:
    """How the number in each method's hold was chosen: averages by loss."""
    edits = read_edits("real/gemma-3-270m-choice")
    edits["loss"] = edits.loss.str.replace("earlier_recommended", "overtone_recommended:hold=correct")
    means = edits.pivot_table(index="loss", columns=["method", "lr", "data"], values="average")
    places = [("lora", 5e-4), ("ft-m", 5e-4), ("ft-m", 1e-4)]
    cells = [(method, lr, data) for method, lr in places for data in ("zsre", "counterfact")]
    texts = {
        f"{METHODS[method]}, {lr:g}, {data_title(data)}": means[method, lr, data].map(number).tolist()
        for method, lr, data in cells
        if (method, lr, data) in means
    }
    return columns({"loss": [f"`{loss}`" for loss in means.index]} | texts)


@table
def one_setting() -> pd.DataFrame:
    """Every method and set of columns."""
    parts = []
    one = read("one-setting").sort_values("method", key=lambda column: column.map([*METHODS].index), kind="stable")
    for (method, where), rows in one.groupby(["method", "columns"], sort=False):
        ours = rows[rows.loss == EARLIER].iloc[0]
        each = "difference to best of each column"
        row = {"method": [METHODS[method]], "averaged over": [where.replace(";", ",")]} | against_best_stop(rows)
        row |= at_first_choice(rows)
        parts.append(
            columns(row | {"minus the best threshold of each column": [difference(ours, each, f"{each} clear")]})
        )
    return pd.concat(parts)


def averages(name: str, method: str, cells: list[tuple[str, int]]) -> pd.DataFrame:
    """Losses by data and T, then the best stop of each column and the distance to it."""
    rows = read(name).query(f"method == {method!r}")
    losses = [loss for loss in LOSSES if loss in set(rows.loss)]
    titles = [title_of(loss) for loss in losses]
    found = {
        METHODS[method]: [*titles, "*cross-entropy at this column's best threshold*", "*recommended earlier, minus it*"]
    }
    for data, length in cells:
        loss = rows[(rows.data == data) & (rows["T"] == length)].set_index("loss")
        ours = loss.loc[EARLIER]
        stop = f"{ours['best stop']:g}"
        best = f"{number(loss.average[f'cross_entropy:hold={stop}'])} (at {stop})"
        averages = [number(loss.average.get(name, float("nan"))) for name in losses]
        found[f"{data}, T={length}"] = [*averages, best, difference(ours)]
    return columns(found)


WORLD_CELLS = [("short", 1), ("short", 10), ("short", 100), ("long", 1), ("long", 10), ("soft", 1), ("soft", 10)]
PUBLISHED_CELLS = [("zsre", 1), ("zsre", 10), ("wikibio", 1), ("wikibio", 10)]


@table
def worlds_lora() -> pd.DataFrame:
    """Invented facts, the lab's LoRA."""
    return averages("worlds", "lora", WORLD_CELLS)


@table
def worlds_ft_m() -> pd.DataFrame:
    """Invented facts, the lab's FT-M."""
    return averages("worlds", "ft-m", WORLD_CELLS)


@table
def published_lora() -> pd.DataFrame:
    """ZsRE and WikiBio, the lab's LoRA."""
    return averages("published", "lora", PUBLISHED_CELLS)


@table
def published_ft_m() -> pd.DataFrame:
    """ZsRE and WikiBio, the lab's FT-M."""
    return averages("published", "ft-m", PUBLISHED_CELLS)


@table
def gemma_zsre() -> pd.DataFrame:
    """A real model, KnowEdit's ZsRE."""
    return of_gemma(read("real/gemma-3-270m-lora").query("data == 'zsre'"))


@table
def gemma_counterfact() -> pd.DataFrame:
    """A real model, CounterFact."""
    return of_gemma(read("real/gemma-3-270m-lora").query("data == 'counterfact'"))


@table
def gemma_rates() -> pd.DataFrame:
    """A real model at several learning rates, singly and in rows: the average, and locality in brackets."""
    rows = read("real/gemma-3-270m-rates")
    cells: dict[str, list[str]] = {}
    for (data, method, lr, length), own in rows.groupby(["data", "method", "lr", "T"], sort=False):
        own = own.set_index("loss").loc[rows.loss.unique()]
        title = f"{data_title(data)}, {METHODS[method]}, {lr:g}, T={length}"
        cells[title] = [f"{row.average:.1f} ({row['loc']:.1f})" for _, row in own.iterrows()]
    losses = [parse(loss).title for loss in rows.loss.unique()]
    averages = {loss: list(own) for loss, own in zip(losses, zip(*cells.values(), strict=True), strict=True)}
    return columns({"data, method, lr, edits in a row": list(cells), **averages})


@table
def easyedit_gemma() -> pd.DataFrame:
    """EasyEdit's own trainers on a real model, with the key and without it."""
    return against_no_key("real/easyedit-gemma")


@table
def easyedit_gemma_vstar() -> pd.DataFrame:
    """The same of methods that optimise one vector."""
    found = against_no_key("real/easyedit-gemma-vstar")
    edits = read("real/easyedit-gemma-vstar").groupby("method").case.nunique()
    found.insert(1, "edits", found.method.map(edits).astype(str))
    return found


@table
def easyedit_lab_vstar() -> pd.DataFrame:
    """The same on the lab's model: the average and in brackets the reliability, then the difference."""
    found = against_no_key("easyedit-lab-vstar")
    gains = found[DIFFERENCE].map(lambda text: text and f": {text}")
    cells = [f"{row.average} ({row.Rel})" for row in found.itertuples()]
    return wide(found.assign(case=found.method, contender=found[KEY], cell=cells + gains))


@table
def easyedit_lab_vstar_measures() -> pd.DataFrame:
    """The mean over the methods with EasyEdit's number of steps, as if it were one method."""
    edits = read_edits("easyedit-lab-vstar")
    edits = edits[~edits.method.str.contains("steps")]
    return against_no_key_of(edits.assign(method="all")).drop(columns="method")


def against_no_key(name: str) -> pd.DataFrame:
    """Measures by method and key, and the difference to the same edits without the key."""
    return against_no_key_of(read_edits(name))


def against_no_key_of(edits: pd.DataFrame) -> pd.DataFrame:
    """`against_no_key`, of edits that were read; several of one method, key and case count as their mean."""
    means = edits.groupby(["method", "token_loss"], sort=False)[[*MEASURES]].mean().reset_index()
    by_case = edits.pivot_table(index=["method", "token_loss"], columns="case", values="average")
    differences = []
    for method, token_loss in zip(means.method, means.token_loss, strict=True):
        gains = by_case.loc[(method, token_loss)] - by_case.loc[(method, "no key")]
        differences.append("" if token_loss == "no key" else f"{gains.mean():+.1f} ({gains.sem():.1f})")
    keys = means.token_loss.replace({EARLIER: "recommended earlier"})
    named = {"method": means.method.tolist(), KEY: keys.tolist()}
    return columns(named | by_measure(means) | {DIFFERENCE: differences})


@table
def anchor_zsre_lora() -> pd.DataFrame:
    """A real model, the second half of ZsRE, with what must stay."""
    return anchored("zsre", "lora")


@table
def anchor_counterfact_lora() -> pd.DataFrame:
    """The second half of CounterFact."""
    return anchored("counterfact", "lora")


@table
def anchor_zsre_ft_m() -> pd.DataFrame:
    """ZsRE with FT-M."""
    return anchored("zsre", "ft-m")


def anchored(data: str, method: str) -> pd.DataFrame:
    """`of_gemma`, with the differences to the best threshold and to anchored cross-entropy."""
    rows = read("real/gemma-3-270m-anchor").query(f"data == {data!r} and method == {method!r}")
    to_stop = [difference(row) for _, row in rows.iterrows()]
    to_anchored = [difference(row, "to anchored", "to anchored clear") for _, row in rows.iterrows()]
    is_anchored = rows.loss.str.contains("anchor").tolist()
    return of_gemma(rows).assign(
        **{
            "minus the best threshold": to_stop,
            "minus anchored cross-entropy": [
                text if own else "" for text, own in zip(to_anchored, is_anchored, strict=True)
            ],
        }
    )


def of_gemma(rows: pd.DataFrame) -> pd.DataFrame:
    """Measures, the average with its interval, KL and steps."""
    rows = with_titles(rows).rename(columns={"low": "average low", "high": "average high"})
    kl = {"KL on locality": rows.kl.map(lambda value: number(value, 2)).tolist()}
    measures = by_measure(rows.dropna(axis=1, how="all"))
    measures["average"] = [with_interval(row, "average") for _, row in rows.iterrows()]
    return columns({"loss": rows.title.tolist()} | measures | kl | {"steps": rows.steps.map(number).tolist()})


@table
def mquake() -> pd.DataFrame:
    """Table 2 of the paper, the token accuracy of the same edits beside it."""
    parts = []
    for method in ("ft-m", "lora"):
        rows = shown(read("mquake").query(f"method == {method!r}"))
        parts.append(
            columns(
                {
                    "method": [METHODS[method]] * len(rows),
                    "loss": rows.title.tolist(),
                    "Rel": rows.rel.map(number).tolist(),
                    "one hop": rows["single-hop, greedy"].map(number).tolist(),
                    "several hops": rows["multi-hop, greedy"].map(number).tolist(),
                    "average": [with_interval(row, "average") for _, row in rows.iterrows()],
                    "token accuracy": rows["token accuracy"].map(number).tolist(),
                    "recommended earlier, minus the best baseline": [
                        difference(row, "difference to best baseline", "difference to best baseline clear")
                        if row.loss == EARLIER
                        else ""
                        for _, row in rows.iterrows()
                    ],
                }
            )
        )
    return pd.concat(parts)


@table
def ablations() -> pd.DataFrame:
    """Table 3 of the paper."""
    all_rows = read("ablations").query("T == 1")
    parts = []
    for method in ("lora", "ft-m"):
        rows = shown(all_rows[all_rows.method == method], ("cross_entropy", "overtone", *ABLATIONS))
        parts.append(columns({"method": [METHODS[method]] * len(rows), "loss": rows.title.tolist()} | by_measure(rows)))
    return pd.concat(parts)


@table
def sweep() -> pd.DataFrame:
    """What was tried, best first."""
    rows = read("sweep")
    return columns(
        {
            "method": rows.method.map(METHODS).tolist(),
            "loss": [f"`{loss}`" for loss in rows.loss],
            "average": rows.average.map(lambda value: number(value, 2)).tolist(),
        }
    )


@table
def easyedit_flag() -> pd.DataFrame:
    """What the key does in EasyEdit: the average, and in brackets the reliability."""
    flags = {
        "": "plain cross-entropy",
        "overtone:hold=false": "",
        "overtone": "",
        "overtone:hold=0.1": "",
        "cross_entropy:hold=0.1": "",
    }
    rows = read("easyedit-flag").fillna({"token_loss": "", "changes": "", "context_templates": ""})
    rows = rows[rows.changes.isin(["", "lr=0.001"])]
    rows.loc[rows.token_loss == "cross_entropy", "token_loss"] = ""  # the key changes nothing of the loss
    templates = rows.context_templates.astype(str).str.lower().map({"true": ", templates", "false": ", no templates"})
    in_a_row = rows["T"].map(lambda length: f", {length} in a row" if length > 1 else "")
    lr = rows.changes.map(lambda changes: changes and f", {changes}")
    rows = rows.assign(
        case=rows.method + templates.fillna("") + in_a_row + lr,
        contender=rows.token_loss.map(lambda flag: flags.get(flag) or f"`{flag}`"),
        cell=[f"{average} ({rel})" for average, rel in rows[["average", "rel"]].values],
    )
    return wide(rows[rows.token_loss.isin(list(flags))])


@table
def easyedit_wise() -> pd.DataFrame:
    """Rel to average of the single edits, with the templates and without."""
    rows = read("easyedit-flag").query("method == 'WISE' and T == 1 and changes.isna()")
    keys = [f"`{key}`" if isinstance(key, str) else "no key" for key in rows.token_loss]
    templates = ["templates" if kept else "no templates" for kept in rows.context_templates]
    return columns({"": templates, "key": keys} | by_measure(rows))


@table
def finetune() -> pd.DataFrame:
    """Means over the sets of texts with t-intervals, perplexities geometrically."""
    rows = read("finetune")
    titles = {"learned": "new texts, tokens", "rephrased": "rephrased, exact", "reasoned": "reasoning, exact"}
    found: dict[str, list[str]] = {"loss": list(dict.fromkeys(rows.loss))}
    groups = [rows[rows.loss == loss] for loss in found["loss"]]
    for name, title in titles.items():
        found[title] = [mean_with_interval(100 * group[name]) for group in groups]
    logs = [np.log(group.perplexity) for group in groups]
    found["untouched knowledge, perplexity"] = [
        "{:.3f} [{:.3f}, {:.3f}]".format(*np.exp([values.mean(), *t_interval(values)])) for values in logs
    ]
    found["steps"] = [number(group.steps.mean(), 0) for group in groups]
    return columns(found)


def mean_with_interval(values: pd.Series[float]) -> str:
    """In %, cut at 0 and 100."""
    if values.nunique() == 1:
        return number(values.iloc[0])
    low, high = t_interval(values)
    return f"{number(values.mean())} [{number(max(low, 0))}, {number(min(high, 100))}]"


def t_interval(values: pd.Series[float]) -> tuple[float, float]:
    """95%, by Student's t: the sets are few."""
    low, high = stats.t.interval(0.95, len(values) - 1, loc=values.mean(), scale=stats.sem(values))
    return low, high


def benchmark(name: str) -> pd.DataFrame:
    """One of the tables of examples/benchmark.py, its times to three digits."""
    rows = read("benchmark").query(f"table == {name!r}")
    return rows.assign(ms=rows.ms.map(three_digits))


def three_digits(ms: str) -> str:
    """Words, such as "needs a GPU", as they are."""
    if not ms[0].isdigit():
        return ms
    return f"{float(ms):.3g}" if float(ms) < 100 else f"{float(ms):.0f}"


def settings_of(configs: dict[str, OverToneConfig]) -> pd.DataFrame:
    """Fields as they are written in Python, a row a method."""
    fields = {
        method: {name: f"`{value!r}`" for name, value in asdict(config).items()} for method, config in configs.items()
    }
    return pd.DataFrame(fields).T.rename_axis("method").reset_index()


@table
def presets() -> pd.DataFrame:
    """The paper's values, from the code."""
    return settings_of({method: OverToneConfig.preset(method) for method in PRESETS})[["method", *PRESETS["lora"]]]


@table
def recommended() -> pd.DataFrame:
    """Ours, from the code."""
    return settings_of({method: OverToneConfig.recommended(method) for method in RECOMMENDED})


@table
def cost() -> pd.DataFrame:
    """The README's three rows."""
    logits = benchmark("logits").set_index(["case", "contender"])
    hidden = benchmark("hidden").set_index(["case", "contender"])
    edits = benchmark("edits").set_index(["case", "contender"])
    large, head = "2048x32000 float32", "4096x32000x128 float32, frozen weight"
    return columns(
        {
            "what": [
                "from logits, 2048x32000 float32",
                "from hidden states, 4096x128 to 32000 float32",
                "one LoRA edit of a small model",
            ],
            "cross-entropy": [
                f"{logits.ms[large, 'F.cross_entropy']} ms",
                f"{hidden.ms[head, 'F.linear, F.cross_entropy']} ms",
                f"{edits.ms['lora', 'cross-entropy']} ms, {edits.steps['lora', 'cross-entropy']:g} steps",
            ],
            "OverTone": [
                f"{logits.ms[large, 'overtone_loss']} ms",
                f"{hidden.ms[head, 'linear_overtone_loss']} ms",
                f"{edits.ms['lora', 'OverTone, held']} ms held, {edits.steps['lora', 'OverTone, held']:g} steps",
            ],
            "times": [
                logits.ratio[large, "overtone_loss"],
                hidden.ratio[head, "linear_overtone_loss"],
                edits.ratio["lora", "OverTone, held"],
            ],
            "memory, cross-entropy and OverTone": [
                f"{logits.memory[large, 'F.cross_entropy']} and {logits.memory[large, 'overtone_loss']}"
                " times the logits",
                f"{hidden.memory[head, 'F.linear, F.cross_entropy']} and {hidden.memory[head, 'linear_overtone_loss']}"
                " of the logits",
                "",
            ],
        }
    )


@table
def cost_logits() -> pd.DataFrame:
    """Milliseconds with ratios, then memory."""
    return spread(benchmark("logits"))


@table
def cost_hidden() -> pd.DataFrame:
    """The same from hidden states."""
    return spread(benchmark("hidden"))


@table
def cost_edits() -> pd.DataFrame:
    """Milliseconds with steps."""
    rows = benchmark("edits")
    cells = [f"{ms} ({steps:g})" for ms, steps in rows[["ms", "steps"]].values]
    return wide(rows.assign(cell=cells, case=rows.case.map(METHODS)))


@table
def cost_sharded() -> pd.DataFrame:
    """The vocabulary spread over two and four ranks."""
    rows = pd.read_csv(RESULTS / "sharded.csv", dtype=str)
    case = rows["ranks"] + " ranks, " + rows["size"] + " " + rows["dtype"]
    return spread(rows.assign(case=case, ms=rows.ms.map(three_digits)))


RANKS = (8, 32, 128, 512)
TOKENS, VOCABULARY = 8192, 262_144
HOP, BANDWIDTH = 10e-6, 50e9
"""Of the model on paper: seconds to begin a message, and bytes a second that a rank receives."""


@table
def cost_model() -> pd.DataFrame:
    """Three collectives of a few float32 numbers a token, against gathering bfloat16 logits."""
    found: dict[str, list[str]] = {
        name: [] for name in ("ranks", "ours, ms", "gathered, ms", "times", "a rank's logits, GB")
    }
    for ranks in RANKS:
        hops, others = math.log2(ranks) * HOP, (ranks - 1) / ranks
        reduced, gathered = 4 * TOKENS * 2 * others, 4 * TOKENS * 6 * (ranks - 1)
        ours = 3 * hops + (2 * reduced + gathered) / BANDWIDTH
        whole = hops + 2 * TOKENS * VOCABULARY * others / BANDWIDTH
        logits = 2e-9 * TOKENS * VOCABULARY
        memory = f"{logits / ranks:.2g} and {logits:.1f}"
        cells = (str(ranks), f"{1000 * ours:.2f}", f"{1000 * whole:.1f}", f"{whole / ours:.0f}", memory)
        for column, cell in zip(found.values(), cells, strict=True):
            column.append(cell)
    return columns(found)


def spread(rows: pd.DataFrame) -> pd.DataFrame:
    """Cases down, contenders across."""
    cells = [
        str(ms) if ratio == "-" else f"{ms} ({ratio})" + (f", {memory}" if memory != "-" else "")
        for ms, ratio, memory in rows[["ms", "ratio", "memory"]].astype(str).values
    ]
    return wide(rows.assign(cell=cells))


def wide(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a case, one column a contender, both in the order of the file."""
    pivoted = rows.pivot(index="case", columns="contender", values="cell").fillna("")
    return pivoted.loc[rows.case.unique(), rows.contender.unique()].rename_axis(None, axis=1).reset_index(names="")


def markdown(frame: pd.DataFrame) -> str:
    """A table of GitHub's Markdown."""
    lines = [list(frame.columns), ["---"] * frame.shape[1], *frame.to_numpy().tolist()]
    return "".join("| " + " | ".join(cells).replace("| |", "|  |") + " |\n" for cells in lines)


def rendered(text: str) -> str:
    """A page with every table as the files have it."""
    return BLOCK.sub(lambda block: f"{block[1]} -->\n\n{markdown(TABLES[block[1]]())}\n", text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(rendered(page.read_text()))
