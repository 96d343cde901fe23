"""Probes scored in one pass: the scores of `metrics`, which scores one edited model after the other."""

from __future__ import annotations

import dataclasses

import mini_lab
import pytest
import torch

from overtone.lab.edit.batched_lora import BatchedLora
from overtone.lab.edit.cached_ft import CachedDownProjection
from overtone.lab.edit.weights import open_down_projection, open_lora
from overtone.lab.model.answers import begins_with, is_decided, normalised
from overtone.lab.model.completion import complete
from overtone.lab.score.batched import examine_many, score_many
from overtone.lab.score.completions import say_many
from overtone.lab.score.scores import examine, score

METHODS = {"lora": (open_lora, BatchedLora), "ft-m": (open_down_projection, CachedDownProjection)}


def edits():
    first = mini_lab.edit()
    return [first, dataclasses.replace(first, prompt="dan is led by", portability=(), locality=first.locality[:1])]


def speaking_model():
    """A random model whose first two words after the edited prompt are words, and these words."""
    for seed in range(20):
        model = mini_lab.random_model(seed=seed)
        words = complete(model, mini_lab.tokenizer(), [mini_lab.edit().prompt], 2)[0].split()
        if len(words) == 2:
            return model, words
    raise AssertionError("no random model says two words")


def random_weights(opened, count):
    start = opened.start(0)
    generator = torch.Generator().manual_seed(0)
    return [start + 0.3 * torch.randn(start.shape, generator=generator, dtype=start.dtype) for _ in range(count)]


def with_weights(model, method, flat):
    """A context in which the model has the flat weights, in the way of the plain editors."""

    class Edited:
        def __enter__(self):
            self.context = METHODS[method][0](model)
            parameters = self.context.__enter__()
            parts = flat.split([parameter.numel() for parameter in parameters])
            for parameter, part in zip(parameters, parts, strict=True):
                parameter.data.copy_(part.view_as(parameter))

        def __exit__(self, *error):
            self.context.__exit__(*error)

    return Edited()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("arch", ["llama", "gemma3", "gpt2"])
def test_scores_are_those_of_one_edited_model_after_the_other(arch, method):
    model, tokenizer = mini_lab.random_model(arch).double(), mini_lab.tokenizer()
    opened = METHODS[method][1](model)
    exams = examine_many(model, tokenizer, opened, edits())
    weights = random_weights(opened, 2)
    together = score_many(model, opened, list(zip(exams, weights, strict=True)))
    for edit, flat, scores in zip(edits(), weights, together, strict=True):
        plain = examine(model, tokenizer, edit)
        with with_weights(model, method, flat):
            expected = score(model, tokenizer, plain)
        assert scores.accuracy() == pytest.approx(expected.accuracy)
        assert scores.kl == pytest.approx(expected.kl, rel=1e-5)
        assert (scores.p_new, scores.p_old) == pytest.approx((expected.p_new, expected.p_old), rel=1e-4)


@pytest.mark.parametrize("tokens_at_once", [1, 10**6])
def test_how_many_share_a_pass_changes_nothing(tokens_at_once):
    model = mini_lab.random_model().double()
    opened = BatchedLora(model)
    exams = examine_many(model, mini_lab.tokenizer(), opened, edits())
    examined = [(exam, flat) for exam in exams for flat in random_weights(opened, 2)]
    scores = score_many(model, opened, examined, tokens_at_once=tokens_at_once)
    alone = [score_many(model, opened, [item])[0] for item in examined]
    assert [s.accuracy() for s in scores] == [s.accuracy() for s in alone]
    assert [s.kl for s in scores] == pytest.approx([s.kl for s in alone])


def test_the_unedited_model_changes_nothing():
    model = mini_lab.random_model()
    opened = BatchedLora(model)
    exams = examine_many(model, mini_lab.tokenizer(), opened, edits())
    scores = score_many(model, opened, [(exam, opened.start(0)) for exam in exams])
    assert all(s.accuracy()["loc"] == 1 and s.kl == pytest.approx(0, abs=1e-6) for s in scores)


def test_begins_is_what_generation_begins_with():
    """Token match under teacher forcing and free generation agree on every probe whose target they can compare."""
    (model, said), tokenizer, edit = speaking_model(), mini_lab.tokenizer(), mini_lab.edit()
    edit = dataclasses.replace(edit, target_new=" " + " ".join(said))
    opened = CachedDownProjection(model)
    exams = examine_many(model, tokenizer, opened, [edit])
    (scores,) = score_many(model, opened, [(exams[0], opened.start(0))])
    for probe, scored in zip(exams[0].probes, scores.probes, strict=True):
        if scored.measure != "loc":
            said = complete(model, tokenizer, [probe.prompt], 20)[0] + " "
            assert scored.begins == said.startswith(probe.target.strip() + " ")
    assert scores.begins()["rel"] == 1


def test_portability_can_leave_out_probes_that_ask_for_the_target_itself():
    edit = mini_lab.edit()
    model = mini_lab.random_model()
    opened = BatchedLora(model)
    exams = examine_many(model, mini_lab.tokenizer(), opened, [edit])
    (scores,) = score_many(model, opened, [(exams[0], opened.start(0))])
    of_kind = {probe.kind: probe for probe in scores.probes if probe.measure == "por"}
    assert of_kind["alias"].is_new_target
    assert not of_kind["one_hop"].is_new_target
    assert scores.accuracy(without_new_target=True)["por"] == of_kind["one_hop"].accuracy


@pytest.mark.parametrize("tokens_at_once", [1, 10**6])
@pytest.mark.parametrize("method", METHODS)
def test_what_edited_models_say_comes_from_each_edits_own_weights(method, tokens_at_once):
    model, tokenizer = mini_lab.random_model(), mini_lab.tokenizer()
    opened = METHODS[method][1](model)
    weights = random_weights(opened, 2)
    said = []
    for edit, flat in zip(edits(), weights, strict=True):
        with with_weights(model, method, flat):
            said.append(complete(model, tokenizer, [edit.prompt, *(probe.prompt for probe in edit.generality)], 2))
    # Each rephrasing is answered in that edit's own words, and in no other edit's.
    asked = [
        dataclasses.replace(
            edit, generality=(dataclasses.replace(edit.generality[0], aliases=(own[1].upper() + "!",)),)
        )
        for edit, own in zip(edits(), said, strict=True)
    ]
    assert said[0] != said[1]
    for order in (weights, weights[::-1]):
        exams = examine_many(model, tokenizer, opened, asked)
        shares = say_many(model, tokenizer, opened, list(zip(exams, order, strict=True)), tokens_at_once=tokens_at_once)
        assert [share["gen"] for share in shares] == ([1.0, 1.0] if order is weights else [0.0, 0.0])
        assert all("loc" not in share for share in shares)


@pytest.mark.parametrize(
    ("completion", "answers", "expected"),
    [
        ("The United Kingdom, which", ("United Kingdom",), True),
        ("united kingdom", ("The United Kingdom",), True),
        ("Zürich is", ("Zurich",), True),
        ("Kings", ("King",), False),
        ("In Paris", ("Paris",), False),
        ("N.Y. and", ("New York", "NY", "n y"), True),
        ("", ("Paris",), False),
    ],
)
def test_a_completion_begins_with_an_answer_as_whole_words(completion, answers, expected):
    assert begins_with(completion, answers) is expected


@pytest.mark.parametrize("answers", [("the Paris Commune", "Lyon"), ("New York", "New York City"), ("A B", "an")])
def test_a_completion_is_decided_once_nothing_that_follows_can_change_the_verdict(answers):
    texts = [
        "The Paris, commune!",
        "paris communes",
        "the LYON and",
        "An apple",
        "New Yorker",
        "new york, city of",
        "a b",
    ]
    for text in texts:
        for end in range(len(text) + 1):
            if is_decided(text[:end], answers):
                verdict = begins_with(text[:end], answers)
                assert all(begins_with(text[:end] + rest, answers) is verdict for rest in (text[end:], "", "x", " x"))
    assert not is_decided("", answers)
    assert is_decided("Rome", answers)


def test_a_batch_is_completed_only_until_its_verdicts_are_decided():
    (model, said), tokenizer, edit = speaking_model(), mini_lab.tokenizer(), mini_lab.edit()
    prompts, passes = [edit.prompt] * 2, []
    model.register_forward_pre_hook(lambda *_: passes.append(None))
    wrong, right = ["milk milk milk"], [said[0]]
    assert complete(model, tokenizer, prompts, 9, answers=[wrong, wrong]) == [said[0]] * 2
    assert len(passes) == 1
    assert complete(model, tokenizer, prompts, 9, answers=[wrong, right]) == [said[0], " ".join(said)]
    assert len(passes) == 1 + 2


def test_an_answer_without_words_is_refused():
    with pytest.raises(ValueError, match=r"answers must have a word .* got \['...'\]"):
        begins_with("Paris", ("...",))


@pytest.mark.parametrize("said", ["India", "Bharat"])
def test_an_alias_without_words_is_no_way_to_answer(said):
    """Wikidata's aliases of countries have their flags among them."""
    answers = ("India", "\U0001f1ee\U0001f1f3", "Bharat")
    assert begins_with(f"{said}, since 1947", answers)
    assert not begins_with("\U0001f1ee\U0001f1f3", answers)
    assert is_decided("Nepal", answers)


def test_normalised_text_keeps_words_alone():
    assert normalised(" Émile  ZOLA's (novel) ") == "emile zola s novel"
