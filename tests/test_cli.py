"""The command line, with a random model in place of the trained one: what it writes, refuses, and goes on with."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass

import mini_lab
import pytest

from overtone import cli
from overtone.lab import demo, folders
from overtone.lab.corpora import WorldCorpus
from overtone.lab.editors import METHODS
from overtone.lab.experiment import Workplace
from overtone.lab.knowledge import Knowledge
from overtone.lab.losses import LOSSES
from overtone.lab.pretrain import ARCHITECTURES, LabModel, load_or_train
from overtone.lab.world import build_world


@dataclass(frozen=True)
class MiniWorld:
    """The stand-in for a world: as many edits as asked for, all alike, up to five."""

    def edits(self, count, *, seed=0, target="short"):
        if count > 5:
            raise ValueError(f"count must be at most 5, got {count}")
        if target != "short":
            raise ValueError(f"target must be short, got {target!r}")
        return [mini_lab.edit()] * count


def knowledge(facts, two_hops):
    return Knowledge({"facts": facts, "two hops": two_hops}, dict(WorldCorpus.knowledge_needed))


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """The demo with a random model that claims to know its world; loading it is counted."""
    path = tmp_path / "model"
    model, tokenizer = mini_lab.random_model(), mini_lab.tokenizer()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    lab = LabModel(model=model, tokenizer=tokenizer, knowledge=knowledge(1.0, 0.97), path=path, seconds=0.0)
    loads = []

    def load(*arguments, **settings):
        loads.append(arguments)
        return lab

    monkeypatch.setattr(demo, "build_world", lambda seed: MiniWorld())
    monkeypatch.setattr(demo, "load_or_train", load)
    lab.loads = loads
    return lab


def run(out, *extra):
    return cli.main(["demo", "--out", str(out), "--edits", "2", "--methods", "ft-m", "--workers", "1", *extra])


def results(out):
    return json.loads((out / "results.json").read_text())


def without_times(records):
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


class TestDemo:
    def test_prints_a_table_and_writes_results_and_figure(self, lab, tmp_path, capsys):
        out = tmp_path / "out"
        assert run(out, "--losses", "cross_entropy,overtone_held") == 0
        printed = capsys.readouterr().out
        assert "OverTone, held" in printed
        assert "97.0%" in " ".join(printed.split())
        written = results(out)
        assert written["settings"]["losses"] == ["cross_entropy", "overtone_held"]
        assert written["settings"]["seed"] == 0
        assert written["command"][:2] == ["overtone", "demo"]
        assert written["versions"].keys() >= {"python", "torch", "transformers", "peft", "overtone"}
        assert written["optimisers"] == {"ft-m": {"optimizer": "Adam", "steps": 25, "lr": demo.METHODS["ft-m"].lr}}
        assert written["knowledge"] == {"facts": 1.0, "two hops": 0.97}
        assert [(record["index"], record["loss"]) for record in written["records"]] == [
            (0, "cross_entropy"),
            (0, "overtone_held"),
            (1, "cross_entropy"),
            (1, "overtone_held"),
        ]
        assert {row["loss"] for row in written["summary"]} == {"cross_entropy", "overtone_held"}
        assert (out / "overfitting.png").stat().st_size > 10_000
        assert sorted(path.name for path in out.iterdir()) == ["overfitting.png", "records.jsonl", "results.json"]

    def test_goes_on_where_it_was_interrupted(self, lab, tmp_path, monkeypatch, capsys):
        """Ctrl-C after three edits: they are not made again, and the results are those of a run in one go."""
        made, perform = [], Workplace.perform

        def interrupted(workplace, task):
            if len(made) == 3:
                made.append(None)
                raise KeyboardInterrupt
            made.append(task.key)
            return perform(workplace, task)

        monkeypatch.setattr(Workplace, "perform", interrupted)
        losses = ("--losses", "cross_entropy,overtone_held,early_stopping")
        assert run(tmp_path / "out", *losses) == 130
        assert "interrupted" in capsys.readouterr().err
        assert not (tmp_path / "out" / "results.json").exists()
        assert run(tmp_path / "out", *losses) == 0
        assert len(made) == len({*made}) == 6 + 1
        assert run(tmp_path / "whole", *losses) == 0
        assert without_times(results(tmp_path / "out")["records"]) == without_times(
            results(tmp_path / "whole")["records"]
        )
        assert results(tmp_path / "out")["summary"] == results(tmp_path / "whole")["summary"]

    def test_more_losses_in_the_same_folder_keep_what_is_there(self, lab, tmp_path, monkeypatch):
        assert run(tmp_path, "--losses", "cross_entropy") == 0
        before = without_times(results(tmp_path)["records"])
        assert run(tmp_path, "--losses", "cross_entropy,overtone") == 0
        after = without_times(results(tmp_path)["records"])
        assert [record for record in after if record["loss"] == "cross_entropy"] == before
        assert len(after) == 4

    def test_refuses_a_model_that_does_not_know_its_world(self, lab, tmp_path, capsys):
        lab.knowledge = knowledge(0.98, 0.97)
        assert run(tmp_path / "out") == 1
        assert "98" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_refuses_a_folder_with_another_run(self, lab, tmp_path, capsys):
        assert run(tmp_path, "--losses", "overtone") == 0
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
        assert run(tmp_path, "--losses", "overtone", "--seed", "1") == 2
        assert "another seed" in capsys.readouterr().err
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


class TestMistakes:
    """Exit code 2 and a message, before a model is trained and before a folder is made."""

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--methods", "lora,rome"), "unknown method 'rome': choose from lora, ft-m"),
            (("--losses", "focal"), "unknown loss 'focal': choose from cross_entropy"),
            (("--losses", ","), "losses is empty"),
            (("--arch", "t5"), "'t5'"),
            (("--target", "huge"), "'huge'"),
            (("--edits", "6"), "at most 5, got 6"),
            (("--edits", "0"), "edits must be at least 1, got 0"),
            (("--workers", "0"), "workers must be at least 1, got 0"),
        ],
    )
    def test_names_what_is_wrong(self, lab, tmp_path, capsys, arguments, message):
        assert run(tmp_path / "out", *arguments) == 2
        assert message in capsys.readouterr().err
        assert lab.loads == []
        assert not (tmp_path / "out").exists()

    def test_a_folder_that_cannot_be_made(self, lab, tmp_path, capsys):
        (tmp_path / "file").write_text("")
        assert run(tmp_path / "file" / "out") == 2
        assert str(tmp_path / "file") in capsys.readouterr().err
        assert lab.loads == []

    def test_a_folder_that_cannot_be_written_to(self, lab, tmp_path, capsys, monkeypatch):
        """Permissions do not bind every user that runs tests, so the probe file's failure is played."""

        def refuse(dir):
            raise PermissionError(13, "Permission denied", str(dir))

        monkeypatch.setattr(folders.tempfile, "TemporaryFile", refuse)
        assert run(tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert f"out must be a folder that can be written to, got {str(tmp_path / 'out')!r}" in error
        assert "Permission denied" in error
        assert lab.loads == []

    def test_a_cache_that_cannot_be_made(self, lab, tmp_path, capsys, monkeypatch):
        """The real loading finds it out before it trains; the output folder is not made either."""
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("OVERTONE_CACHE", str(tmp_path / "file" / "cache"))
        monkeypatch.setattr(demo, "build_world", build_world)
        monkeypatch.setattr(demo, "load_or_train", load_or_train)
        assert run(tmp_path / "out") == 2
        assert str(tmp_path / "file" / "cache") in capsys.readouterr().err
        assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "model"]

    def test_a_record_file_that_cannot_be_opened(self, lab, tmp_path, capsys):
        (tmp_path / "out" / "records.jsonl").mkdir(parents=True)
        assert run(tmp_path / "out") == 2
        assert "records.jsonl" in capsys.readouterr().err

    def test_a_result_that_cannot_be_written(self, lab, tmp_path, capsys):
        """The edits are kept: once there is room, the same command has only to summarise them."""
        (tmp_path / "out" / "results.json").mkdir(parents=True)
        assert run(tmp_path / "out", "--losses", "overtone") == 1
        error = capsys.readouterr().err
        assert "results.json" in error
        assert "what was finished is kept" in error
        assert (tmp_path / "out" / "records.jsonl").read_text().count("\n") == 1 + 2

    def test_a_missing_extra_is_named(self, monkeypatch, tmp_path, capsys):
        found = cli.find_spec
        monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "peft" else found(name))
        assert run(tmp_path / "out") == 2
        assert 'missing peft: pip install "overtone[lab]"' in capsys.readouterr().err

    def test_a_missing_extra_of_the_doctor_is_named(self, monkeypatch, capsys):
        monkeypatch.setattr(cli, "find_spec", lambda name: None)
        with pytest.raises(SystemExit) as stopped:
            cli.main(["doctor"])
        assert stopped.value.code == 2
        assert 'pip install "overtone[easyedit]"' in capsys.readouterr().err

    def test_no_command(self, capsys):
        with pytest.raises(SystemExit) as stopped:
            cli.main([])
        assert stopped.value.code == 2


class TestHelp:
    def test_defaults_are_the_registries(self, capsys, monkeypatch):
        """The help spells names out so that it needs no import; they must be the real ones."""
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit):
            cli.main(["demo", "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert f"(default: {','.join(LOSSES)})" in text
        assert f"(default: {','.join(METHODS)})" in text
        assert all(name in text for name in ARCHITECTURES)

    def test_needs_torch_at_most(self):
        heavy = ["transformers", "peft", "matplotlib", "scipy", "rich"]
        code = f"import sys, overtone.cli\nprint([name for name in {heavy} if name in sys.modules])"
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert run.stdout.strip() == "[]"
