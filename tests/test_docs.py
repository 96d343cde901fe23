"""The pages' code and commands run as printed, their tables are those of the committed results, their links lead on."""

import re
import runpy
import shlex
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import mini_lab
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from overtone.cli import parse_arguments
from overtone.easyedit.hparams import WISE_OPTIONS, choose
from overtone.lab.model import pretrain
from overtone.lab.model.pretrain import LabModel
from overtone.token_loss import NAMED_LOSSES, parse

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES.append(ROOT / "examples" / "results" / "README.md")
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

spec = spec_from_file_location("tables", ROOT / "docs" / "tables.py")
tables = module_from_spec(spec)
spec.loader.exec_module(tables)


def fenced(marker):
    """The fenced blocks that follow <!-- marker --> lines, with the name of their page."""
    pattern = rf"^<!-- {marker} -->\n```\w+\n(.*?)^```$"
    pages = zip(NAMES, PAGES, strict=True)
    return [
        (name, code) for name, page in pages for code in re.findall(pattern, page.read_text(), re.MULTILINE | re.DOTALL)
    ]


def recipe_commands():
    lines = [line.split("#")[0].strip() for _, block in fenced("recipe") for line in block.splitlines()]
    return [line for line in lines if line]


class TestCode:
    @pytest.mark.parametrize(("name", "code"), fenced("run"))
    def test_stands_alone(self, name, code):
        """A block marked to run needs nothing but itself."""
        exec(compile(code, name, "exec"), {})

    def test_runs_with_a_model(self, tmp_path, monkeypatch):
        """The recipes run as printed, one after the other, given a model and something to train it on."""
        from datasets import Dataset
        from tiny_models import build
        from tiny_trainer import word_tokenizer
        from transformers import Trainer, TrainingArguments

        monkeypatch.chdir(tmp_path)
        torch.manual_seed(0)
        model = build("llama")
        ids = torch.randint(0, model.config.vocab_size, (2, 8))
        trained = list(model.parameters())
        names = {
            "model": model,
            "tokenizer": word_tokenizer(),
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
        assert len(recipes) == 4
        for name, code in recipes:
            exec(compile(code, name, "exec"), names)


@pytest.fixture(scope="module")
def world_model(tmp_path_factory):
    """A small random model in the place of the lab's, with its tokenizer."""
    path = tmp_path_factory.mktemp("model")
    mini_lab.save_world_model(path)
    return path


def printed_commands():
    """The lines of the pages' shell blocks that start the command, without what stands before it."""
    blocks = [block for page in PAGES for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.M | re.S)]
    lines = [line.split(" #")[0].strip() for block in blocks for line in block.replace("\\\n", "").splitlines()]
    found = [re.search(r"(?:^|^\S+=\S+ | -m )overtone (.*)$", line) for line in lines]
    return [match[1] for match in found if match]


class TestCommands:
    @pytest.mark.parametrize("command", recipe_commands())
    def test_recipe_runs_as_printed(self, command, world_model, monkeypatch, capsys):
        """An example says what was before and after, with a random model in the place of the lab's."""
        python, script, *arguments = shlex.split(command)
        assert python == "python"

        def load(corpus):
            model = AutoModelForCausalLM.from_pretrained(world_model).eval()
            tokenizer = AutoTokenizer.from_pretrained(world_model)
            return LabModel(model=model, tokenizer=tokenizer, knowledge=None, path=world_model, seconds=0.0)

        verbosity = logging.get_verbosity()
        monkeypatch.setattr(pretrain, "load_or_train", load)
        monkeypatch.syspath_prepend(ROOT / "examples")
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        finally:
            logging.set_verbosity(verbosity)
            sys.modules.pop("facts", None)
        printed = capsys.readouterr().out
        assert "before" in printed
        assert "after" in printed

    def test_printed_commands_are_understood(self):
        """Every call of `overtone` on a page has options that there are, and losses that can be read."""
        commands = printed_commands()
        assert {command.split()[0] for command in commands if command} == {"demo", "bench", "report", "doctor"}
        for command in commands:
            arguments = parse_arguments(shlex.split(command))
            for loss in getattr(arguments, "losses", None) or ():
                parse(loss)


class TestNames:
    def test_every_named_loss_and_field_is_in_the_settings(self):
        """The table of the names has the code's names, and of each its fields."""
        text = (ROOT / "docs" / "settings.md").read_text()
        for name, loss in NAMED_LOSSES.items():
            (row,) = re.findall(rf"^\| .*`{name}`.*$", text[text.index("## A loss by name") :], re.MULTILINE)
            if "the same" not in row:
                assert {f"`{field}`" for field in loss.defaults} <= set(re.findall(r"`\w+`", row)), name

    def test_every_printed_loss_can_be_read(self):
        """Whatever a page writes as name:field=value is a loss, or one with WISE's own options."""
        printed = re.findall(
            rf"\b(?:{'|'.join(NAMED_LOSSES)}):\w+=[^`\s|\"')}}]*", "".join(page.read_text() for page in PAGES)
        )
        assert len(printed) > 20
        for text in printed:
            if any(option in text for option in WISE_OPTIONS):
                choose(text, "wise")
            else:
                assert parse(parse(text).name) == parse(text)


def without_tables_and_code(text):
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^\|.*$", "", text, flags=re.MULTILINE))


def sections_with_tables():
    """Of all pages, by their headings."""
    sections = [part for page in tables.PAGES for part in re.split(r"^#+ ", page.read_text(), flags=re.MULTILINE)]
    return {part.splitlines()[0]: part for part in sections if "<!-- table " in part}


class TestNumbers:
    @pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
    def test_tables_are_those_of_the_committed_files(self, page):
        """`python docs/tables.py` would change nothing."""
        text = page.read_text()
        assert tables.rendered(text) == text

    def test_every_table_is_shown(self):
        """No table is built for nobody."""
        shown = {name for page in tables.PAGES for name in tables.BLOCK.findall(page.read_text())}
        assert shown == set(tables.TABLES)

    @pytest.mark.parametrize("heading", sections_with_tables())
    def test_results_in_the_text_stand_in_the_sections_tables(self, heading):
        """What the text says with a decimal is in a table of the same section."""
        section = sections_with_tables()[heading]
        shown = re.findall(r"\d+\.\d+", "\n".join(re.findall(r"^\|.*$", section, flags=re.MULTILINE)))
        said = re.findall(r"(?<![\w.-])\d+\.\d+(?![\w.])", without_tables_and_code(section))
        assert [number for number in said if number not in shown] == []


def anchors(page):
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


class TestPages:
    @pytest.mark.parametrize("page", PAGES, ids=NAMES)
    def test_links_lead_somewhere(self, page):
        """Every file and heading that a page links to is there."""
        for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", page.read_text()):
            path, _, anchor = target.partition("#")
            linked = (page.parent / path).resolve() if path else page
            assert linked.exists(), target
            assert not anchor or anchor in anchors(linked), target

    def test_readme_is_short(self):
        """It is read to the end."""
        assert len((ROOT / "README.md").read_text().splitlines()) <= 180

    def test_committed_results_are_small(self):
        """CSV files, not raw runs."""
        assert sum(path.stat().st_size for path in (ROOT / "examples/results").iterdir()) < 2_000_000
