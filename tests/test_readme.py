"""The README's code and commands run as printed, and its numbers are those of the committed results."""

import csv
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def fenced(marker):
    """The fenced blocks that follow <!-- marker --> lines."""
    return re.findall(rf"^<!-- {marker} -->\n```\w+\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def recipe_commands():
    lines = [line.split("#")[0].strip() for block in fenced("recipe") for line in block.splitlines()]
    return [line for line in lines if line]


class TestCode:
    @pytest.mark.parametrize("code", fenced("run"))
    def test_stands_alone(self, code):
        """A block marked to run needs nothing but itself."""
        exec(compile(code, "README.md", "exec"), {})

    def test_runs_with_a_model(self, tmp_path, monkeypatch):
        """The recipes run as printed, one after the other, given a model and something to train it on."""
        from datasets import Dataset
        from tiny_models import build
        from transformers import Trainer, TrainingArguments

        monkeypatch.chdir(tmp_path)
        torch.manual_seed(0)
        model = build("llama")
        ids = torch.randint(0, model.config.vocab_size, (2, 8))
        trained = list(model.parameters())
        names = {
            "model": model,
            "trained": trained,
            "optimizer": torch.optim.AdamW(trained, lr=1e-3),
            "ids": ids,
            "mask": torch.ones_like(ids),
            "labels": ids,
            "weights": torch.ones(ids.shape),
            "dataset": Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()}),
            "Trainer": Trainer,
            "TrainingArguments": TrainingArguments,
        }
        recipes = fenced("run with a model")
        assert len(recipes) == 3
        for code in recipes:
            exec(compile(code, "README.md", "exec"), names)


class TestCommands:
    @pytest.mark.parametrize("command", recipe_commands())
    def test_recipe_runs_as_printed(self, command):
        """An example's command exits with 0 and says what was before and after."""
        words = shlex.split(command)
        assert words[0] == "python"
        result = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        assert "before" in result.stdout
        assert "after" in result.stdout


BENCH_LOSSES = {
    "cross-entropy": "cross_entropy",
    "CE stopped at 0.1": "early_stopping",
    "CE stopped at 0.3": "early_stopping:stop_below=0.3",
    "CE stopped at 1": "early_stopping:stop_below=1",
    "label smoothing 0.1": "label_smoothing",
    "OverTone (the paper's)": "overtone",
    "OverTone, held": "overtone_held",
    "OverTone, recommended": "overtone_recommended",
}


def committed_rows(path):
    with (ROOT / "examples/results" / path).open() as file:
        return list(csv.DictReader(file))


def percent(row, name):
    return f"{100 * float(row[name]):.1f}"


def threshold(loss):
    return loss.partition("=")[2] or "0.1"


def printed_difference(row, rival):
    name = f"difference to {rival}"
    mean, low, high = (f"{100 * float(row[name + end]):+.1f}" for end in ("", " low", " high"))
    text = f"{mean} [{low}, {high}]"
    return f"**{text}**" if row[f"{name} clear"] == "True" else text


def printed_best_threshold(committed, data, length, method):
    default = committed[data, length, method, "early_stopping"]
    best = committed[data, length, method, default["best early stopping"]]
    return f"{percent(best, 'average')} (at {threshold(best['loss'])})"


def table_cells(table):
    head, _, *lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.splitlines()]
    return head, lines


def section(marker):
    return README[README.index(f"<!-- {marker} -->") : README.index(f"<!-- end of {marker} -->")]


class TestNumbers:
    def test_bench_table_is_the_committed_run(self):
        """Every average, best threshold and difference of the bench's tables stands in the committed CSV file."""
        rows = [row for row in committed_rows("bench-defaults/table1.csv") if row["source"] == "this file"]
        committed = {(row["data"], row["length"], row["method"], row["loss"]): row for row in rows}
        checked = 0
        for table in section("bench table").split("\n\n")[1:3]:
            head, lines = table_cells(table)
            method = head[0].lower()
            for title, *cells in lines:
                for column, cell in zip(head[1:], cells, strict=True):
                    data, length = re.fullmatch(r"(\w+), T=(\d+)", column).groups()
                    if title in BENCH_LOSSES:
                        row = committed.get((data, length, method, BENCH_LOSSES[title]))
                        expected = "" if row is None else percent(row, "average")
                    elif "best threshold" in title:
                        expected = printed_best_threshold(committed, data, length, method)
                    else:
                        recommended = committed[data, length, method, "overtone_recommended"]
                        expected = printed_difference(recommended, "best early stopping")
                    assert cell == expected, (title, column)
                    checked += 1
        assert checked == 2 * 10 * 7

    def test_one_setting_table_is_the_committed_runs(self):
        """Every average and difference over several columns stands in a committed table4.csv."""
        _, lines = table_cells(section("one setting table").split("\n\n")[1])
        assert len(lines) == 9
        for where, *cells in lines:
            title, columns = where.split(": ")
            if title in ("LoRA", "FT-M"):
                folder, method = "defaults", title.lower()
            else:
                folder = "easyedit-data" if "wikibio" in columns else "easyedit"
                method = f"easyedit-{title.split()[-1].lower().removesuffix('-m')}"
            found = {
                row["loss"]: row
                for row in committed_rows(f"bench-{folder}/table4.csv")
                if row["method"] == method and row["columns"] == columns.replace(", ", "; ")
            }
            recommended = found["overtone_recommended"]
            best = found[recommended["best single threshold"]]
            assert cells == [
                percent(found["cross_entropy"], "average"),
                f"{percent(best, 'average')} (at {threshold(best['loss'])})",
                percent(recommended, "average"),
                printed_difference(recommended, "best single threshold"),
                printed_difference(recommended, "best threshold of each column"),
            ]

    def test_files_table_is_the_committed_run(self):
        """Every average on published data stands in the committed CSV file."""
        rows = [row for row in committed_rows("bench-files/table1.csv") if row["source"] == "this file"]
        committed = {(row["data"], row["length"], row["method"], row["loss"]): row for row in rows}
        head, lines = table_cells(section("files table").split("\n\n")[1])
        columns = [re.fullmatch(r"(\w+), t=(\d+), (.+)", column.lower()).groups() for column in head[1:]]
        assert (len(lines), len(columns)) == (7, 8)
        for title, *cells in lines:
            for column, cell in zip(columns, cells, strict=True):
                if title in BENCH_LOSSES:
                    expected = percent(committed[(*column, BENCH_LOSSES[title])], "average")
                else:
                    expected = printed_best_threshold(committed, *column)
                assert cell == expected, (title, column)

    def test_demo_table_is_the_committed_run(self):
        """Every mean of the demo's table stands in examples/results/demo.json, and the other way round."""
        summary = json.loads((ROOT / "examples/results/demo.json").read_text())["summary"]
        printed = [
            re.findall(r"-?\d+\.\d+(?= \[)", line) for line in section("demo table").splitlines() if " [" in line
        ]
        measures = ("rel", "gen", "por", "loc", "average", "exact_match_average")
        expected = [[f"{100 * row['measures'][name]['mean']:.1f}" for name in measures] for row in summary]
        assert printed == expected
