"""The README's code and commands run as printed, and its numbers are those of the committed results."""

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


class TestNumbers:
    def test_demo_table_is_the_committed_run(self):
        """Every mean of the demo's table stands in examples/results/demo.json, and the other way round."""
        summary = json.loads((ROOT / "examples/results/demo.json").read_text())["summary"]
        section = README[README.index("<!-- demo table -->") : README.index("<!-- end of demo table -->")]
        printed = [re.findall(r"-?\d+\.\d+(?= \[)", line) for line in section.splitlines() if " [" in line]
        measures = ("rel", "gen", "por", "loc", "average", "exact_match_average")
        expected = [[f"{100 * row['measures'][name]['mean']:.1f}" for name in measures] for row in summary]
        assert printed == expected
