"""`overtone report`: from a results file alone to report.md, CSV files and figures, and what it refuses."""

from __future__ import annotations

import csv
import io
import random
import re
from itertools import pairwise

import pytest
from bench_lines import HEADER, TRACE, outcome, sequence, singles, write
from overtone.lab.bench_document import missing
from overtone.lab.bench_markdown import signed
from overtone.lab.bench_overview import overview
from overtone.lab.bench_report import write_report
from overtone.lab.bench_results import load_results
from rich.console import Console

from overtone import cli

LOSSES = ("cross_entropy", "early_stopping", "early_stopping:stop_below=0.3", "label_smoothing", "overtone")
BOLD = re.compile(r"\*\*([+-][\d.e-]+) \(([+-][\d.e-]+) to ([+-][\d.e-]+)\)\*\*")
DIFFERENCE = re.compile(r"(?<!\*)([+-][\d.e-]+) \(([+-][\d.e-]+) to ([+-][\d.e-]+)\)")


def grid():
    """Every kind of table and figure: two data, T of 1 and 2, two seeds, questions, an ablation, traces, a failure."""
    rng = random.Random(0)
    outcomes = []
    for data in ("zsre", "mquake"):
        for place, loss in enumerate((*LOSSES, "overtone:check=false")):
            for seed in range(2):
                shares = [round(min(1.0, 0.4 + place / 10 + rng.random() / 4), 2) for _ in range(4)]
                answers = {"single-hop, temperature 0.1": shares[0], "multi-hop, temperature 0.1": shares[1]}
                extra = {"answers": answers} if data == "mquake" else {}
                outcomes += singles(
                    shares, data=data, loss=loss, seed=seed, trace=TRACE if data == "zsre" else None, **extra
                )
                outcomes += sequence(shares, data=data, loss=loss, seed=seed, **extra)
    outcomes[0] = outcome(None, data="zsre")
    return outcomes


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    written = write_report(write(folder / "results.jsonl", grid()), folder / "out")
    return folder / "out", written


def text_of(folder):
    return (folder / "report.md").read_text()


class TestWriteReport:
    def test_writes_what_it_says(self, rendered):
        folder, written = rendered
        assert written[0] == folder / "report.md"
        assert sorted(written) == sorted(path for path in folder.rglob("*") if path.is_file())
        names = {path.name for path in written}
        assert names >= {"table1.csv", "table2.csv", "table3.csv", "table4.csv", "forgetting.csv"}
        assert names >= {"overfitting-zsre-lora.png", "lengths-lora.svg", "forgetting-lora.png"}

    def test_sections(self, rendered):
        headings = re.findall(r"^(#{1,4} .*)$", text_of(rendered[0]), flags=re.M)
        assert [heading for heading in headings if not heading.startswith(("###", "####"))] == [
            "# overtone bench",
            "## What was run",
            "## What is missing",
            "## Failed edits: 1 of 192",
            "## How to read the tables",
            "## Table 1: editing",
            "## Table 2: questions that need the edited fact",
            "## Table 3: OverTone without its parts",
            "## Table 4: one setting for everything",
            "## Figures 1 and 2: overfitting",
            "## Figure 3: the average by edits in a row",
            "## Forgetting",
        ]
        assert headings.count("#### ZsRE: Single edits (T = 1)") == 2, "in Table 1 and in Table 3"

    def test_tables_are_whole(self, rendered):
        """Every line of a table has as many cells as its heading, also where an error's text holds a bar."""
        lines = text_of(rendered[0]).splitlines()
        assert any("the loss is nan / after 3 steps" in line for line in lines)
        tables = 0
        for before, line in pairwise(lines):
            if before.startswith("|") and line.startswith("|"):
                assert before.count("|") == line.count("|")
            tables += line.startswith("| ---")
        assert tables >= 8

    def test_links_lead_somewhere(self, rendered):
        folder, _ = rendered
        links = re.findall(r"\]\(([^)]*)\)", text_of(folder))
        assert links
        assert all((folder / link).is_file() for link in links)

    def test_the_papers_rows_stand_under_the_same_rows_alone(self, rendered):
        lines = text_of(rendered[0]).splitlines()
        cited = [place for place, line in enumerate(lines) if "*paper, " in line]
        assert {lines[place].split("|")[1].strip().strip("*").split(",")[1].strip() for place in cited} == {
            "Table 1",
            "Table 2",
            "Table 3",
        }
        for place in cited:
            loss = next(line for line in reversed(lines[:place]) if "*paper" not in line).split("|")[1].strip()
            assert loss == (
                "OverTone"
                if "Ours" in lines[place]
                else "OverTone w/o chk"
                if "w/o" in lines[place]
                else "cross-entropy"
            )
        assert "| *paper, Table 1, LLaMA 2 7B chat, LoRA + Ours, T = 1* | *100.00* | *94.31* | *61.16* |" in "\n".join(
            lines
        )

    def test_of_chosen_losses_and_seeds_alone(self, tmp_path):
        """The tables are those of a file that holds nothing else; the report says what it leaves out."""
        outcomes = grid()
        losses, seed = ("cross_entropy", "early_stopping"), 1
        few = [edit for edit in outcomes if edit.loss in losses and edit.seed == seed]
        write_report(write(tmp_path / "few.jsonl", few), tmp_path / "few")
        results = write(tmp_path / "all.jsonl", outcomes)
        # As somebody writes it, not as the file does.
        chosen = ["--losses", "cross_entropy", "early_stopping:stop_below=0.1", "--seeds", "1"]
        assert cli.main(["report", str(results), *chosen, "--out", str(tmp_path / "all")]) == 0
        for table in ("table1.csv", "table2.csv", "forgetting.csv"):
            assert (tmp_path / "all" / table).read_text() == (tmp_path / "few" / table).read_text()
        (said,) = [line for line in text_of(tmp_path / "all").splitlines() if "not in this report" in line]
        assert said.endswith("loss label_smoothing, loss overtone, loss overtone:check=false, seed 0")
        assert "not in this report" not in text_of(tmp_path / "few")

    @pytest.mark.parametrize(
        ("chosen", "message"),
        [
            (["--losses", "overtone_held"], "unknown loss 'overtone_held': choose from cross_entropy, "),
            (["--losses", "hinge"], "unknown loss 'hinge'"),
            (["--seeds", "0,7"], "unknown seed '7': choose from 0, 1"),
        ],
    )
    def test_what_the_file_does_not_have_is_refused(self, chosen, message, tmp_path, capsys):
        results = write(tmp_path / "results.jsonl", grid())
        assert cli.main(["report", str(results), *chosen, "--out", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_a_choice_does_not_replace_the_report_of_all(self, tmp_path, capsys):
        results = write(tmp_path / "results.jsonl", grid())
        assert cli.main(["report", str(results), "--seeds", "1"]) == 2
        assert "need --out" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            cli.main(["report", str(results), "--seeds", ",", "--out", str(tmp_path / "out")])
        assert [path.name for path in tmp_path.iterdir()] == ["results.jsonl"]

    def test_a_misprinted_average_is_said_to_be_one(self, tmp_path):
        outcomes = [
            edit
            for loss in ("cross_entropy", "overtone")
            for edit in sequence([1.0] * 100, data="wikibio", loss=loss, method="easyedit-melo")
        ]
        write_report(write(tmp_path / "results.jsonl", outcomes), tmp_path)
        (line,) = [line for line in text_of(tmp_path).splitlines() if "as printed" in line]
        assert "MELO, T = 100" in line
        assert "73.2" in line
        assert "*48.88*" in line

    def test_csv_in_full_precision(self, rendered):
        with (rendered[0] / "table1.csv").open() as file:
            lines = list(csv.DictReader(file))
        ours = [line for line in lines if line["source"] == "this file"]
        assert len(ours) == 2 * 2 * 6
        (first,) = [
            line for line in ours if (line["data"], line["length"], line["loss"]) == ("zsre", "1", "cross_entropy")
        ]
        assert (first["edits"], first["failed"], first["resampled"], first["units"]) == ("7", "1", "edits", "8")
        (paper,) = [line for line in lines if line["source"].endswith("LLaMA 2 7B chat, LoRA + Ours, T = 1")]
        assert paper["por"] == "0.6116"

    def test_same_file_same_bytes(self, tmp_path):
        path = write(tmp_path / "results.jsonl", [*singles([1.0, 0.5], trace=TRACE), *sequence([0.5, 1.0])])
        first, second = (write_report(path, tmp_path / name) for name in ("first", "second"))
        assert len(first) == len(second) == 9
        for one, other in zip(first, second, strict=True):
            assert one.read_bytes() == other.read_bytes(), one.name

    def test_says_what_was_run(self, rendered):
        text = text_of(rendered[0])
        assert "- Command: `overtone bench`" in text
        assert "2 cores, x86_64" in text
        assert "| Short targets | 0 | llama | facts 100.0%, two hops 99.0% | 1.40 |" in text

    def test_says_what_several_commands_ran(self, tmp_path):
        """All commands, and the settings of the edits rather than those of the last command."""
        commands = [["overtone", "bench"], ["overtone", "bench", "--seeds", "7"]]
        header = {name: value for name, value in HEADER.items() if name != "command"}
        header |= {"commands": commands, "settings": {"data": ["soft"], "seeds": [7]}}
        outcomes = [*singles([1.0], seed=3), *sequence([1.0, 0.5], data="zsre", method="ft-m", seed=7)]
        write_report(write(tmp_path / "results.jsonl", outcomes, header), tmp_path)
        text = text_of(tmp_path)
        assert "- Command: `overtone bench`\n- Command: `overtone bench --seeds 7`\n" in text
        assert "- Settings: data short, zsre; seeds 3, 7; methods lora, ft-m; lengths 1, 2\n" in text


class TestBold:
    """A difference is bold if its interval excludes 0, and otherwise not."""

    @pytest.mark.parametrize("seed", range(3))
    def test_exactly_where_zero_is_outside(self, tmp_path, seed):
        """Gains around 0, single edits: bold and plain differences both occur."""
        rng = random.Random(seed)
        base = [rng.random() for _ in range(12)]
        outcomes = [*singles(base)]
        for step in range(8):
            shares = [share + rng.gauss((step - 4) / 20, 0.1) for share in base]
            outcomes += singles(shares, loss=f"overtone:lam=0.{step + 2}")
        write_report(write(tmp_path / "results.jsonl", outcomes), tmp_path)
        text = text_of(tmp_path)
        bold, plain = BOLD.findall(text), DIFFERENCE.findall(BOLD.sub("", text))
        assert bold
        assert plain
        assert len(bold) + len(plain) == 8
        for _, low, high in bold:
            assert float(low) * float(high) > 0
        for _, low, high in plain:
            assert float(low) * float(high) <= 0

    def test_equal_losses(self, tmp_path):
        outcomes = [*singles([0.2, 0.9, 0.4]), *singles([0.2, 0.9, 0.4], loss="overtone")]
        write_report(write(tmp_path / "results.jsonl", outcomes), tmp_path)
        assert not BOLD.search(text_of(tmp_path))
        assert "+0.0 (+0.0 to +0.0)" in text_of(tmp_path)

    def test_few_sequences(self, tmp_path):
        outcomes = [
            edit
            for seed in range(3)
            for loss, share in (("cross_entropy", 0.1), ("overtone", 0.9))
            for edit in sequence([share] * 3, seed=seed, loss=loss)
        ]
        write_report(write(tmp_path / "results.jsonl", outcomes), tmp_path)
        assert not BOLD.search(text_of(tmp_path))
        assert "3 sequences of 3 seeds resampled" in text_of(tmp_path)
        assert "so nothing is bold" in text_of(tmp_path)

    def test_an_end_near_zero_does_not_read_as_zero(self):
        assert [signed(share) for share in (0.0, 0.0003, -0.00002, 0.0123)] == ["+0.0", "+0.03", "-0.002", "+1.2"]


class TestMissing:
    def sentences(self, tmp_path, outcomes):
        return " ".join(missing(load_results(write(tmp_path / "results.jsonl", outcomes))))

    def test_one_loss_and_single_edits(self, tmp_path):
        said = self.sentences(tmp_path, singles([1.0, 0.5]))
        for part in ("no T = 10, 100", "Figure 3", "cross-entropy is the only loss", "Table 2", "Table 3", "Seeds: 1"):
            assert part in said
        write_report(tmp_path / "results.jsonl", tmp_path)
        assert "What is missing" in text_of(tmp_path)

    def test_one_loss_without_a_rival(self, tmp_path):
        write_report(write(tmp_path / "results.jsonl", singles([1.0, 0.5], loss="overtone")), tmp_path)
        assert "Difference to" not in text_of(tmp_path)

    def test_unfinished_sequences_count_nowhere(self, tmp_path):
        outcomes = [*singles([1.0]), *sequence([0.0, 0.0, 0.0])[:2]]
        assert "2 edits of sequences that are not finished" in self.sentences(tmp_path, outcomes)
        assert len(load_results(tmp_path / "results.jsonl").outcomes) == 1

    def test_nothing_of_what_is_there(self, tmp_path):
        said = self.sentences(tmp_path, grid())
        for part in ("only loss", "Baselines", "thresholds", "Table 2", "Figures 1", "Figure 3", "not finished"):
            assert part not in said


class TestReport:
    """The command."""

    def run(self, *arguments):
        return cli.main(["report", *map(str, arguments)])

    def test_writes_beside_the_results_by_default(self, tmp_path, capsys):
        path = write(tmp_path / "results.jsonl", singles([1.0, 0.5]))
        assert self.run(path) == 0
        assert (tmp_path / "report.md").is_file()
        assert "cross-entropy" in capsys.readouterr().out

    def test_a_torn_last_line_is_passed_over(self, tmp_path):
        path = write(tmp_path / "results.jsonl", singles([1.0, 0.5]))
        path.write_text(path.read_text()[:-20])
        assert self.run(path, "--out", tmp_path / "out") == 0
        assert "Failed edits: 0 of 1" in text_of(tmp_path / "out")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("", "not a results file"),
            ("{}\n", "not a results file"),
            ("hello\n", "not a record file"),
            ("\x00\xff", "not a results file"),
            ('{"format": "overtone bench 0"}\n', "not a results file"),
            ("{header}\n", "no finished edit"),
            ('{header}\n{"index": 0}\n', "not a record file"),
            ("{header}\nhello\n{line}\n", "not a record file"),
        ],
    )
    def test_refuses_other_files(self, tmp_path, capsys, content, message):
        whole = write(tmp_path / "whole.jsonl", singles([1.0])).read_text().splitlines()
        path = tmp_path / "results.jsonl"
        path.write_text(content.replace("{header}", whole[0]).replace("{line}", whole[1]))
        assert self.run(path, "--out", tmp_path / "out") == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_no_file_and_a_folder(self, tmp_path, capsys):
        assert self.run(tmp_path / "nothing.jsonl") == 2
        assert "nothing.jsonl" in capsys.readouterr().err
        assert self.run(tmp_path) == 2
        assert "irectory" in capsys.readouterr().err

    def test_a_folder_that_cannot_be_made(self, tmp_path, capsys):
        path = write(tmp_path / "results.jsonl", singles([1.0]))
        assert self.run(path, "--out", path / "out") == 2
        assert str(path) in capsys.readouterr().err


class TestOverview:
    def lines(self, tmp_path, outcomes):
        console = Console(width=80, file=io.StringIO())
        console.print(overview(load_results(write(tmp_path / "results.jsonl", outcomes))))
        return console.file.getvalue().splitlines()

    def test_fits_80_columns_with_three_lengths(self, tmp_path):
        outcomes = []
        for loss in (*LOSSES, "overtone:epsilon=0.05+lam=0.5+hold_settled=0.1"):
            for seed in range(3):
                for length in (1, 10, 100):
                    outcomes += sequence([0.5 + len(loss) / 100] * length, loss=loss, seed=seed)
        lines = self.lines(tmp_path, outcomes)
        assert max(map(len, lines)) <= 80
        (line,) = [line for line in lines if "CE stopped at 0.3" in line]
        assert "…" not in "".join(lines)
        assert line.split()[-6:] == ["79.0", "+14.0", "79.0", "+14.0", "79.0", "+14.0"]

    def test_marks_the_baseline_and_failures(self, tmp_path):
        lines = self.lines(tmp_path, [*singles([0.5]), *singles([None], loss="overtone")])
        assert any(line.split() == ["cross-entropy", "50.0", "="] for line in lines)
        assert any(line.split() == ["OverTone", "failed"] for line in lines)
