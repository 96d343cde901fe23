"""`overtone report`: from a results folder alone to report.md, CSV files and figures, and what it refuses."""

from __future__ import annotations

import csv
import io
import random
import re
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise

import pytest
from result_records import TRACE, record, results_of, scores, sequence, singles, write
from rich.console import Console

from overtone import cli
from overtone.lab.report import figures
from overtone.lab.report.cells import signed
from overtone.lab.report.missing import missing
from overtone.lab.report.terminal import averages_by_length, measures_of_single_edits
from overtone.lab.report.write import Report, write_report
from overtone.lab.results.folder import EDITS

LOSSES = ("cross_entropy", "cross_entropy:hold=0.1", "cross_entropy:hold=0.3", "label_smoothing", "overtone")
BOLD = re.compile(r"\*\*([+-][\d.e-]+) \(([+-][\d.e-]+) to ([+-][\d.e-]+)\)\*\*")
DIFFERENCE = re.compile(r"(?<!\*)([+-][\d.e-]+) \(([+-][\d.e-]+) to ([+-][\d.e-]+)\)")


def grid():
    """Every kind of table and figure: two data, T of 1 and 2, two seeds, questions, an ablation, traces, a failure."""
    rng = random.Random(0)
    records = []
    for data in ("zsre", "mquake"):
        for place, loss in enumerate((*LOSSES, "overtone:check=false")):
            for seed in range(2):
                shares = [round(min(1.0, 0.4 + place / 10 + rng.random() / 4), 2) for _ in range(8)]
                answers = {"single-hop, temperature 0.1": shares[0], "multi-hop, temperature 0.1": shares[1]}
                extra = {"answers": answers} if data == "mquake" else {}
                trace = TRACE if data == "zsre" else None
                records += singles(shares, data=data, loss=loss, seed=seed, trace=trace, **extra)
                for number in range(4):
                    records += sequence(shares[:2], data=data, loss=loss, seed=seed, number=number, **extra)
    records[0] = record(None, data="zsre")
    return records


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return write(tmp_path_factory.mktemp("results"), grid())


@pytest.fixture(scope="module")
def rendered(results, tmp_path_factory):
    """The report's folder, and what the command printed of it."""
    out = tmp_path_factory.mktemp("report")
    assert cli.main(["report", str(results), "--out", str(out)]) == 0
    return out


def text_of(folder):
    return (folder / "report.md").read_text()


@contextmanager
def figures_are_empty():
    """Drawing them takes most of the time of a report."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "save_figure", lambda figure, path: path.touch())
        yield


def report_of(records, out):
    """The text of the report of some records."""
    with figures_are_empty():
        write_report(Report.of(results_of(records)), out)
    return text_of(out)


class TestDocument:
    def test_writes_what_it_names(self, rendered):
        names = {path.name for path in rendered.rglob("*") if path.is_file()}
        assert names >= {"table1.csv", "table2.csv", "table3.csv", "table4.csv", "forgetting.csv"}
        assert names >= {"overfitting-zsre-lora.png", "lengths-lora.png", "forgetting-lora.png"}
        links = re.findall(r"\]\(([^)]*)\)", text_of(rendered))
        assert {path.relative_to(rendered).as_posix() for path in rendered.rglob("*.png")} == set(links)

    def test_sections(self, rendered):
        headings = re.findall(r"^(#{1,4} .*)$", text_of(rendered), flags=re.M)
        sections = [heading.split(":")[0] for heading in headings if heading.startswith("## ")]
        assert sections == [
            *("## What was run", "## What is missing", "## Failed edits", "## How to read the tables"),
            *("## Table 1", "## Table 2", "## Table 3", "## Table 4"),
            *("## Figures 1 and 2", "## Figure 3", "## Forgetting"),
        ]
        assert headings.count("#### ZsRE: Single edits (T = 1)") == 2, "in Table 1 and in Table 3"
        assert f"## Failed edits: 1 of {len(grid())}" in headings

    def test_tables_are_whole(self, rendered):
        """Every line of a table has as many cells as its heading, also where an error's text holds a bar."""
        lines = text_of(rendered).splitlines()
        assert any("the loss is nan / after 3 steps" in line for line in lines)
        tables = 0
        for before, line in pairwise(lines):
            if before.startswith("|") and line.startswith("|"):
                assert before.count("|") == line.count("|")
            tables += line.startswith("| ---")
        assert tables >= 10

    def test_the_papers_rows_stand_under_the_same_rows_alone(self, rendered):
        lines = text_of(rendered).splitlines()
        cited = [place for place, line in enumerate(lines) if "*paper, " in line]
        assert {re.search(r"paper, (Table \d)", lines[place])[1] for place in cited} == {
            "Table 1",
            "Table 2",
            "Table 3",
        }
        for place in cited:
            loss = next(line for line in reversed(lines[:place]) if "*paper" not in line).split("|")[1].strip()
            is_ours, is_ablation = "Ours" in lines[place], "w/o" in lines[place]
            assert loss == ("OverTone" if is_ours else "OverTone w/o chk" if is_ablation else "cross-entropy")
        assert "| *paper, Table 1, LLaMA 2 7B chat, LoRA + Ours, T = 1* | *100.0* | *94.3* | *61.2* |" in "\n".join(
            lines
        )

    def test_explains_the_columns_that_are_there(self, rendered, tmp_path):
        """And no others."""
        bare = [replace(made, perplexity=None, scores=replace(made.scores, kl=None)) for made in singles([1.0, 0.5])]
        texts = [text_of(rendered), report_of(bare, tmp_path)]
        for text in texts:
            legend, tables = text.split("## How to read the tables")[1].split("## Table 1", 1)
            headings = {
                cell.strip() for line in tables.splitlines() if line.startswith("| Loss") for cell in line.split("|")
            }
            for name in ("Por, other answers", "Gen begins", "Gen said", "KL", "Perplexity"):
                assert (f"{name}: " in legend) == (name in headings), name
            assert ("Differences are" in legend) == any(name.startswith("Difference to") for name in headings)
            assert ("In italics" in legend) == ("*paper, " in tables)
        assert "KL: " in texts[0]
        assert "KL: " not in texts[1]

    def test_csv_in_full_precision(self, rendered):
        with (rendered / "table1.csv").open() as file:
            lines = list(csv.DictReader(file))
        ours = [line for line in lines if line["source"] == "this run"]
        assert len(ours) == 2 * 2 * 6
        (first,) = [
            line for line in ours if (line["data"], line["length"], line["loss"]) == ("zsre", "1", "cross_entropy")
        ]
        assert (first["edits"], first["failed"], first["resampled"], first["units"]) == ("15", "1", "edits", "16")
        (paper,) = [line for line in lines if line["source"].endswith("LLaMA 2 7B chat, LoRA + Ours, T = 1")]
        assert float(paper["por"]) == pytest.approx(0.6116)

    def test_says_what_was_run(self, tmp_path):
        """All commands, and the data, seeds, methods with settings and lengths of the edits that are there."""
        records = [*singles([1.0], seed=3), *sequence([1.0, 0.5], data="zsre", method="ft-m", seed=0)]
        folder = write(tmp_path, records, commands=[["overtone", "bench"], ["overtone", "bench", "--seeds", "7"]])
        assert cli.main(["report", str(folder)]) == 0
        text = text_of(tmp_path)
        assert "- Command: `overtone bench`\n- Command: `overtone bench --seeds 7`\n" in text
        assert "- Data: Short targets, ZsRE; seeds 0, 3; edits in a row: 1, 2\n" in text
        assert "- Methods: LoRA (lr=0.005, steps=50); FT-M (lr=0.005, steps=50)\n" in text
        assert "2 cores, x86_64" in text
        assert "| Short targets | 0 | llama | facts 100.0%, two hops 99.0% | 1.40 |" in text

    def test_a_folder_whose_edits_all_failed_has_a_report_that_says_so(self, tmp_path):
        """Of single edits and sequences; the losses and the ablation that Tables 1, 3 and 4 look for are there."""
        losses = ("cross_entropy", "cross_entropy:hold=0.1", "overtone", "overtone:check=false")
        records = [
            made for loss in losses for made in (*singles([None] * 2, loss=loss), *sequence([None] * 2, loss=loss))
        ]
        text = report_of(records, tmp_path)
        assert "## Failed edits: 16 of 16" in text
        assert "the loss is nan / after 3 steps" in text
        assert "| OverTone | 0 (2 failed) |" in text

    def test_same_results_same_bytes(self, tmp_path):
        report = Report.of(results_of([*singles([1.0, 0.5], trace=TRACE), *sequence([0.5, 1.0])]))
        first, second = (write_report(report, tmp_path / name) for name in ("first", "second"))
        assert len(first) == len(second) > 3
        for one, other in zip(first, second, strict=True):
            assert one.read_bytes() == other.read_bytes(), one.name


class TestChoice:
    def test_of_chosen_losses_and_seeds_alone(self, results, tmp_path):
        """The tables are those of results that hold nothing else; the report says what it leaves out."""
        few = [made for made in grid() if made.loss in LOSSES[:2] and made.seed == 1]
        report_of(few, tmp_path / "few")
        # As somebody writes it, not as the results do.
        chosen = ["--losses", "cross_entropy", "early_stopping:stop_below=0.1", "--seeds", "1"]
        with figures_are_empty():
            assert cli.main(["report", str(results), *chosen, "--out", str(tmp_path / "all")]) == 0
        for table in ("table1.csv", "table2.csv", "forgetting.csv"):
            assert (tmp_path / "all" / table).read_text() == (tmp_path / "few" / table).read_text()
        (said,) = [line for line in text_of(tmp_path / "all").splitlines() if "not in this report" in line]
        left_out = ", ".join(f"loss {loss}" for loss in (*LOSSES[2:], "overtone:check=false"))
        assert sorted(said.partition(": ")[2].split(", ")) == sorted(f"{left_out}, seed 0".split(", "))
        assert "not in this report" not in text_of(tmp_path / "few")

    @pytest.mark.parametrize(
        ("chosen", "message"),
        [
            (["--losses", "overtone:hold=settled"], "unknown loss 'overtone:hold=settled': choose from cross_entropy"),
            (["--losses", "hinge"], "unknown loss 'hinge'"),
            (["--seeds", "0,7"], "unknown seed '7': choose from 0, 1"),
        ],
    )
    def test_what_the_results_do_not_have_is_refused(self, results, chosen, message, tmp_path, capsys):
        assert cli.main(["report", str(results), *chosen, "--out", str(tmp_path / "out")]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / "out").exists()

    def test_a_choice_does_not_replace_the_report_of_all(self, results, capsys):
        assert cli.main(["report", str(results), "--seeds", "1"]) == 2
        assert "need --out" in capsys.readouterr().err
        assert not (results / "report.md").exists()


class TestRefusals:
    def test_no_results_and_no_edit(self, tmp_path, capsys):
        assert cli.main(["report", str(tmp_path / "nothing")]) == 2
        assert "there are no results in" in capsys.readouterr().err
        write(tmp_path, [])
        assert cli.main(["report", str(tmp_path)]) == 2
        assert "no finished edit" in capsys.readouterr().err

    def test_a_folder_that_cannot_be_made(self, results, tmp_path, capsys):
        (tmp_path / "file").write_text("")
        assert cli.main(["report", str(results), "--out", str(tmp_path / "file" / "out")]) == 2
        assert str(tmp_path / "file") in capsys.readouterr().err

    def test_a_broken_file_is_named(self, tmp_path, capsys):
        write(tmp_path, singles([1.0]))
        (file,) = (tmp_path / EDITS).iterdir()
        file.write_text("[")
        assert cli.main(["report", str(tmp_path)]) == 2
        assert file.name in capsys.readouterr().err


class TestBold:
    """A difference is bold if its interval excludes 0, and otherwise not."""

    @pytest.mark.parametrize("seed", range(2))
    def test_exactly_where_zero_is_outside(self, tmp_path, seed):
        """Gains around 0, single edits: bold and plain differences both occur."""
        rng = random.Random(seed)
        base = [rng.random() for _ in range(12)]
        records = [*singles(base)]
        for step in range(8):
            shares = [share + rng.gauss((step - 4) / 20, 0.1) for share in base]
            records += singles(shares, loss=f"overtone:lam=0.{step + 2}")
        text = report_of(records, tmp_path)
        bold, plain = BOLD.findall(text), DIFFERENCE.findall(BOLD.sub("", text))
        assert bold
        assert plain
        assert len(bold) + len(plain) == 8
        assert all(float(low) * float(high) > 0 for _, low, high in bold)
        assert all(float(low) * float(high) <= 0 for _, low, high in plain)

    def test_equal_losses(self, tmp_path):
        text = report_of([*singles([0.2, 0.9, 0.4]), *singles([0.2, 0.9, 0.4], loss="overtone")], tmp_path)
        assert not BOLD.search(text)
        assert "+0.0 (+0.0 to +0.0)" in text

    def test_small_differences_keep_their_sign(self):
        assert [signed(share) for share in (0.0, 0.0003, -0.00002, 0.0123)] == ["+0.0", "+0.03", "-0.002", "+1.2"]


class TestMissing:
    def test_one_loss_and_single_edits(self):
        said = " ".join(missing(results_of(singles([1.0, 0.5]))))
        for part in ("no T = 10, 100", "Figure 3", "cross-entropy is the only loss", "Table 2", "Table 3", "Seeds: 1"):
            assert part in said

    def test_nothing_of_what_is_there(self):
        said = " ".join(missing(results_of(grid())))
        for part in ("only loss", "Baselines", "thresholds", "Table 2", "Figures 1", "Figure 3"):
            assert part not in said


class TestTerminal:
    def lines(self, render, records):
        console = Console(width=80, file=io.StringIO())
        console.print(render(Report.of(results_of(records)).editing))
        return console.file.getvalue().splitlines()

    def test_averages_fit_80_columns_with_three_lengths(self):
        records = []
        for loss in (*LOSSES, "overtone:epsilon=0.05+lam=0.5+hold=0.1"):
            for length in (1, 10, 100):
                records += sequence([0.5 + len(loss) / 100] * length, loss=loss)
        lines = self.lines(averages_by_length, records)
        assert max(map(len, lines)) <= 80
        assert "…" not in "".join(lines)
        (line,) = [line for line in lines if "held at 0.3" in line]
        assert line.split()[-6:] == ["72.0", "=", "72.0", "=", "72.0", "="] or "+" in line

    def test_averages_are_compared_with_the_best_early_stop(self):
        losses = {"cross_entropy": 0.9, "cross_entropy:hold=0.1": 0.5, "cross_entropy:hold=0.3": 0.8, "overtone": 0.7}
        records = [made for loss, share in losses.items() for made in singles([share] * 7, loss=loss)]
        lines = [line.split()[-2:] for line in self.lines(averages_by_length, records)]
        assert [line for line in lines if line and line[0].endswith(".0")] == [
            ["90.0", "+10.0"],
            ["50.0", "-30.0"],
            ["80.0", "="],
            ["70.0", "-10.0"],
        ]

    def test_averages_mark_the_baseline_and_failures(self):
        lines = self.lines(averages_by_length, [*singles([0.5]), *singles([None], loss="overtone")])
        assert any(line.split() == ["cross-entropy", "50.0", "="] for line in lines)
        assert any(line.split() == ["OverTone", "failed"] for line in lines)

    def test_measures_with_their_intervals_fit_80_columns(self):
        shares = [index / 6 for index in range(7)]
        records = [made for method in ("lora", "ft-m") for made in singles(shares, method=method)]
        lines = self.lines(measures_of_single_edits, records)
        text = "\n".join(lines)
        assert max(map(len, lines)) <= 80
        assert "…" not in text
        assert all(heading in text for heading in ("Rel", "Gen", "Por", "Loc", "Avg", "Exact", "KL", "Steps"))
        assert re.search(r"cross-entropy +50\.0 +50\.0", text)
        assert re.search(r"\d+-\d+", text)
        assert "lr=0.005, steps=50" in text

    @pytest.mark.parametrize("share", [None, 0.5])
    def test_the_caption_explains_the_columns_that_are_there(self, share):
        """A run that generates nothing after its prompts has no such column, and is told nothing of it."""
        begins = {} if share is None else {"gen": share}
        records = singles([0.5, 0.5], scores=replace(scores(0.5), begins=begins))
        said = " ".join(self.lines(measures_of_single_edits, records))
        assert said.lower().count("gen begins") == (0 if share is None else 1)
