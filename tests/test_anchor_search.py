"""The example that searches what an anchor may stand on: its loss written out, its draws, and its file."""

from __future__ import annotations

import csv
import importlib
import sys
from pathlib import Path

import mini_lab
import pytest
import torch
from torch.nn import functional as F

from overtone import OverToneConfig
from overtone.huggingface import EditTexts, WrittenTexts, attach
from overtone.lab.model.positions import logits_at
from overtone.token_loss import parse

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
search = importlib.import_module("anchor_search")
sys.path.pop(0)

WRITTEN = WrittenTexts(
    prefixes=("rain likes bo . ", "eve runs . "),
    neighbours=(("the head of zed is", " ana bo cy"), ("the head of dan is", " tea milk rain")),
    about=(("acme", " runs tea"), ("acme", " likes milk by"), ("acme", " is")),
)


def tokenizer():
    """With a BOS, on which no anchor stands."""
    words = mini_lab.tokenizer()
    words.bos_token = "the"
    return words


def edit_texts(draw=None, written=WRITTEN):
    edit = mini_lab.edit()
    return EditTexts(tokenizer(), edit.prompt, edit.target_new, written, draw=draw)


def literal(before, now, pairs, anchor, anchor_epsilon=0.05):
    """The mean over target tokens, and of each group the mean of its clipped KLs, text by text."""
    words = tokenizer()
    targets, groups = [], {}
    for group, (prompt, target) in pairs:
        ids = words(prompt + target, return_tensors="pt").input_ids
        length = len(words(prompt).input_ids)
        with torch.no_grad():
            old, new = (model(ids).logits[0].log_softmax(-1) for model in (before, now))
        kl = F.kl_div(new, old, log_target=True, reduction="none").sum(-1).clamp(min=anchor_epsilon)
        if group in ("target", "prefixes"):
            targets.append(F.nll_loss(new[length - 1 : -1], ids[0, length:], reduction="none"))
            if group == "target":
                groups.setdefault("prompt", []).append(kl[1 : length - 1])
        else:
            groups.setdefault(group, []).append(kl[length - 1 : -1])
    return torch.cat(targets).mean() + anchor * sum(torch.cat(own).mean() for own in groups.values() if anchor)


@pytest.mark.parametrize("draw", [None, 1])
def test_the_loss_is_the_mean_of_the_targets_and_one_of_each_group(draw):
    before, now = (mini_lab.random_model(seed=seed).double() for seed in (0, 1))
    made = search.AnchoredEdit(before, edit_texts(draw))
    edit = mini_lab.edit()
    everything = [("target", (edit.prompt, edit.target_new))]
    everything += [("names", pair) for pair in WRITTEN.neighbours] + [("subject", pair) for pair in WRITTEN.about]
    everything += [("prefixes", (prefix + edit.prompt, edit.target_new)) for prefix in WRITTEN.prefixes]
    rows = made.rows(3)
    with torch.no_grad():
        logits = logits_at(now, [made.texts[row] for row in rows])
    got = made.objective(parse("cross_entropy:anchor=2").build("lora"))(logits, rows)
    torch.testing.assert_close(got, literal(before, now, [everything[row] for row in rows], anchor=2))


def test_without_an_anchor_the_targets_alone_count():
    model = mini_lab.random_model().double()
    made = search.AnchoredEdit(model, edit_texts(written=WrittenTexts(prefixes=WRITTEN.prefixes)))
    with torch.no_grad():
        logits = logits_at(model, made.texts)
    got = made.objective(parse("cross_entropy").build("lora"))(logits, made.rows(0))
    edit = mini_lab.edit()
    pairs = [("prefixes", (prefix + edit.prompt, edit.target_new)) for prefix in ("", *WRITTEN.prefixes)]
    torch.testing.assert_close(got, literal(model, model, pairs, anchor=0))


def test_the_loss_is_that_of_an_attached_model():
    """What is measured is what `EditTexts` does in a loop of one's own."""
    before, now = (mini_lab.random_model(seed=seed).double() for seed in (0, 1))
    texts = edit_texts(draw=1)
    made = search.AnchoredEdit(before, texts)
    rows = made.rows(5)
    with torch.no_grad():
        logits = logits_at(now, [made.texts[row] for row in rows])
    got = made.objective(parse("overtone:anchor=1").build("lora"))(logits, rows)
    with attach(now, OverToneConfig.preset("lora", anchor=1.0), reference=before):
        expected = now(**texts.batch(5)).loss
    torch.testing.assert_close(got, expected.detach())


class TestFile:
    @pytest.fixture
    def call(self, tmp_path):
        mini_lab.random_model().save_pretrained(tmp_path / "model")
        mini_lab.tokenizer().save_pretrained(tmp_path / "model")
        given = ["--model", str(tmp_path / "model"), "--data", "zsre", "--file", str(ROOT / "tests/fixtures/zsre.json")]
        given += ["--size", "3", "--edits", "2", "--steps", "2", "--out", str(tmp_path / "out.csv")]

        def call(*more):
            search.main([*given, *more])
            with (tmp_path / "out.csv").open(newline="") as stream:
                return list(csv.DictReader(stream))

        return call

    def test_goes_on_where_it_was_and_keeps_other_settings_apart(self, call, tmp_path):
        groups = ("--groups", "prompt,names,subject,prefixes", "--draw", "1", "--count", "2")
        rows = call(*groups, "--edits", "1")
        assert [(row["edit"], row["groups"], row["limit"]) for row in rows] == [
            ("0", "prompt+names+subject+prefixes", "2")
        ]
        both = call(*groups)
        assert both[:1] == rows
        assert [row["edit"] for row in both] == ["0", "1"]
        assert call(*groups) == both
        assert len(call(*groups, "--steps", "3")) == 4
        assert len(call("--groups", "prefixes", "--losses", "cross_entropy:hold=0.3")) == 6
        stops = call()
        assert [row["loss"] for row in stops[6:12]] == [f"cross_entropy:hold={stop}" for stop in search.STOPS]
        assert len(stops) == 18

    @pytest.mark.parametrize(
        ("given", "said"),
        [
            (
                ("--groups", "prompt,friends"),
                "prompt and any of names, subject, prefixes, got prompt,friends",
            ),
            (("--groups", "prompt", "--losses", "overtone"), "--losses must have an anchor with --groups prompt"),
            (("--groups", "prefixes"), "--losses must have no anchor with --groups prefixes, got overtone:anchor=1"),
            (("--groups", "prompt", "--losses", "overtne"), "--losses: loss 'overtne'"),
            (("--groups", "prompt", "--draw", "-1"), "--draw must be at least 0, got -1"),
            (("--draw", "1"), "--draw does nothing without --groups"),
            (("--lr", "nan"), "--lr must be a number above 0, got nan"),
            (("--file", "none.json"), "--file must be a file that can be read, got none.json"),
        ],
    )
    def test_names_a_mistake_before_anything_is_loaded(self, call, given, said, capsys, tmp_path):
        with pytest.raises(SystemExit, match="2"):
            call(*given)
        assert said in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / "out.csv").exists()

    def test_refuses_a_file_with_edits_of_other_records(self, call):
        call("--edits", "1")
        with pytest.raises(ValueError, match=r"has edits of .*'size': 3.*, not of .*'size': 4"):
            call("--edits", "1", "--size", "4")

    def test_refuses_half_a_line(self, call, tmp_path):
        call("--edits", "1")
        whole = (tmp_path / "out.csv").read_text()
        (tmp_path / "out.csv").write_text(whole[:-5])
        with pytest.raises(ValueError, match="ends in a line that was cut off: delete that line"):
            call()
        assert (tmp_path / "out.csv").read_text() == whole[:-5]

    def test_refuses_the_file_of_another_program(self, call, tmp_path):
        (tmp_path / "out.csv").write_text("a,b\n1,2\n")
        with pytest.raises(ValueError, match="other columns than data, edit, loss"):
            call()
