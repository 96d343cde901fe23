"""The command line: the demo, with a random model in place of the trained one, and what it refuses."""

from __future__ import annotations

import subprocess
import sys

import mini_lab
import pandas as pd
import pytest

from overtone import cli
from overtone.lab import log_lines
from overtone.lab.data.edit import Probe
from overtone.lab.data.world_corpus import WorldCorpus
from overtone.lab.model import sources
from overtone.lab.model.knowledge import Knowledge
from overtone.lab.model.pretrain import LabModel
from overtone.lab.results import files
from overtone.lab.results.folder import EDITS, HEADER, ResultsFolder
from overtone.lab.run import plan


class MiniWorld(WorldCorpus):
    """As many edits as asked for, all alike, up to five."""

    def __init__(self):
        pass

    def training_texts(self):
        return ["zed likes tea milk ."]

    def held_out_texts(self):
        return ["dan likes milk"]

    def knowledge_probes(self):
        return {"facts": [Probe("zed likes", " tea", "fact", "tea")]}

    def edits(self, count, *, seed):
        if count > 5:
            raise ValueError(f"count must be at most 5, got {count}")
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
    lab.loads = []

    def load(*arguments, **settings):
        lab.loads.append(arguments)
        return lab

    monkeypatch.setattr(plan, "open_corpus", lambda name, **settings: MiniWorld())
    monkeypatch.setattr(sources, "load_or_train", load)
    return lab


def demo(out, *extra):
    return cli.main(["demo", "--out", str(out), "--edits", "2", "--methods", "ft-m", "--workers", "1", *extra])


class TestDemo:
    def test_prints_a_table_and_writes_it_and_the_figure(self, lab, tmp_path, capsys):
        assert demo(tmp_path / "out", "--losses", "cross_entropy", "overtone_held") == 0
        printed = " ".join(capsys.readouterr().out.split())
        for part in ("OverTone, held", "97.0% of the two hops", "lr=0.005, steps=25"):
            assert part in printed
        assert {path.name for path in (tmp_path / "out").iterdir()} == {HEADER, EDITS, "table1.csv", "overfitting.png"}
        table = pd.read_csv(tmp_path / "out" / "table1.csv")
        assert table["loss"].tolist() == ["cross_entropy", "overtone:hold=settled"]
        assert table["edits"].tolist() == [2, 2]
        assert {made.perplexity for made in ResultsFolder(tmp_path / "out").read_all()[1]} == {None}
        assert (tmp_path / "out" / "overfitting.png").stat().st_size > 10_000

    def test_a_log_gets_lines_where_no_bar_can_move(self, lab, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(log_lines, "SECONDS_A_LINE", 0.0)
        assert demo(tmp_path / "out", "--losses", "cross_entropy", "overtone_held") == 0
        said = capsys.readouterr().err
        assert [f"{made} of the 4 edits left to make" in said for made in (1, 2, 3, 4)] == [True] * 4
        assert "about 0:00:00 to go" in said

    def test_refuses_a_model_that_does_not_know_its_world(self, lab, tmp_path, capsys):
        lab.knowledge = knowledge(0.98, 0.97)
        assert demo(tmp_path / "out") == 1
        assert "98" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


class TestMistakes:
    """Exit code 2 and a message, before a model is trained and before a folder is made."""

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--methods", "lora,rosa"), "unknown method 'rosa': choose from lora, ft-m"),
            (("--losses", "focal"), "unknown loss 'focal': choose from cross_entropy"),
            (("--methods", ","), "methods is empty"),
            (("--target", "huge"), "unknown corpus 'huge'"),
            (("--arch", "t5"), "arch must be one of llama, qwen2, mistral, gpt2, got 't5'"),
            (("--edits", "6"), "at most 5, got 6"),
            (("--edits", "0"), "edits must be at least 1, got 0"),
            (("--workers", "0"), "workers must be at least 1, got 0"),
            (("--layer", "99"), "layer is 99, but LlamaForCausalLM has layers 0 to 2"),
            (("--layer", "-1"), "layer is -1, but LlamaForCausalLM has layers 0 to 2"),
            (("--methods", "lora", "--target-modules", "q_proj,foo"), "'foo': choose --target-modules from "),
            (("--methods", "lora", "--target-modules", "mlp"), "'mlp': choose --target-modules from "),
            (("--methods", "lora", "--target-modules", ""), "got none: choose --target-modules from "),
            (("--methods", "lora", "--target-modules", "lm_head", "--at-once", "2"), "or make the edits one by one"),
            (("--methods", "lora", "--rank", "129"), "rank must be at most 128"),
            (("--methods", "lora", "--rank", "9" * 20), f"rank must be below 2147483648, got {'9' * 20}"),
            (("--methods", "lora", "--alpha", "9" * 400), "alpha must be below 2147483648, got 999"),
        ],
    )
    def test_names_what_is_wrong(self, lab, tmp_path, capsys, arguments, message):
        assert demo(tmp_path / "out", *arguments) == 2
        assert message in capsys.readouterr().err
        assert lab.loads == []
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("arch", ["qwen2", "mistral", "gpt2"])
    def test_a_setting_is_held_against_the_architecture_that_is_asked_for(self, lab, tmp_path, capsys, arch):
        assert demo(tmp_path / "out", "--arch", arch, "--layer", "3") == 2
        assert "has layers 0 to 2" in capsys.readouterr().err
        assert lab.loads == []

    @pytest.mark.parametrize("command", [["demo", "--out"], ["bench", "--out"], ["report", "r", "--out"], ["report"]])
    def test_a_folder_without_a_name(self, capsys, command):
        with pytest.raises(SystemExit) as stopped:
            cli.main([*command, ""])
        assert stopped.value.code == 2
        assert "a folder is expected, got '': name one, . for the current one" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "losses",
        [
            "cross_entropy,overtone",
            "cross_entropy,",
            "cross_entropy:hold=0.1,",
            "overtone:hold=settled,overtone_held",
            "overtone:hold=0.1,dft:",
        ],
    )
    @pytest.mark.parametrize("command", ["demo", "report results"])
    def test_losses_with_commas(self, capsys, command, losses):
        with pytest.raises(SystemExit) as stopped:
            cli.main([*command.split(), "--losses", losses])
        assert stopped.value.code == 2
        assert f"--losses: losses are separated by spaces, not by commas, got '{losses}'" in capsys.readouterr().err

    def test_a_comma_within_a_loss(self):
        loss = "overtone:lam=0.5+hold=correct,0.1"
        assert cli.parse_arguments(["bench", "--losses", loss, "dft"]).losses == [loss, "dft"]

    @pytest.mark.parametrize(("option", "name"), [("--zsre", "none.json"), ("--wikidata-recent", "")])
    def test_a_published_file_that_cannot_be_read(self, tmp_path, capsys, option, name):
        """Missing, or a folder."""
        path = str(tmp_path / name)
        assert cli.main(["bench", option, path, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert f"{option} must be a file that can be read, got {path!r}" in error
        assert "Errno" not in error

    def test_a_folder_that_cannot_be_made(self, lab, tmp_path, capsys):
        (tmp_path / "file").write_text("")
        assert demo(tmp_path / "file" / "out") == 2
        assert str(tmp_path / "file") in capsys.readouterr().err
        assert lab.loads == []

    def test_a_folder_that_cannot_be_written_to(self, lab, tmp_path, capsys, monkeypatch):
        """Permissions do not bind every user that runs tests, so the probe file's failure is played."""

        def refuse(dir):
            raise PermissionError(13, "Permission denied", str(dir))

        monkeypatch.setattr(files.tempfile, "TemporaryFile", refuse)
        assert demo(tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert f"out must be a folder that can be written to, got {str(tmp_path / 'out')!r}" in error
        assert "Permission denied" in error
        assert lab.loads == []

    def test_a_table_that_cannot_be_written(self, lab, tmp_path, capsys):
        """The edits are kept: once there is room, the same command has only to summarise them."""
        (tmp_path / "out" / "table1.csv").mkdir(parents=True)
        assert demo(tmp_path / "out", "--losses", "overtone") == 1
        error = capsys.readouterr().err
        assert "table1.csv: " in error
        assert "Errno" not in error
        assert "what was finished is kept" in error
        assert len(list((tmp_path / "out" / EDITS).iterdir())) == 2

    def test_a_missing_extra_is_named(self, monkeypatch, tmp_path, capsys):
        found = cli.find_spec
        monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "peft" else found(name))
        assert demo(tmp_path / "out") == 2
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
    def test_needs_torch_at_most(self):
        heavy = ["transformers", "peft", "matplotlib", "pandas", "scipy", "rich"]
        code = f"import sys, overtone.cli\nprint([name for name in {heavy} if name in sys.modules])"
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert run.stdout.strip() == "[]"
