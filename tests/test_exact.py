"""What a pass over the wanted answers says of greedy generation, against generation itself."""

from __future__ import annotations

import mini_lab
import pytest
import torch

from overtone.lab.data.edit import Probe
from overtone.lab.edit.weights import open_down_projection
from overtone.lab.model.completion import complete
from overtone.lab.score import exact
from overtone.lab.score.exact import is_plain, says, want
from overtone.lab.score.scores import examine, score

PROMPTS = ("head of acme is", "zed", "dan likes", "spouse of ana is", "Question eve", "bo runs the")
LENGTH = 5


def probe(prompt: str, target: str, answer: str | None = None) -> Probe:
    return Probe(prompt, " " + target, "kind", target if answer is None else answer)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_verdicts_are_those_of_generation(arch, seed):
    """Wanted are what the model says, what it nearly says, what it says at first, more than it says, and the end of
    what it says as the answer of a chain of thought."""
    model, tokenizer = mini_lab.random_model(arch, seed), mini_lab.tokenizer()
    wanted, expected = [], []
    for prompt, said in zip(PROMPTS, complete(model, tokenizer, PROMPTS, LENGTH), strict=True):
        words = said.split()
        nearly = [" ".join(["rain", *words[1:]]), " ".join([*words[:-1], "tea"])]
        own = [want(tokenizer, prompt, text, LENGTH) for text in (said, said[:3], f"{said} rain", *nearly)]
        chains = [
            probe(prompt, "milk tea bo", (words or ["bo"])[-1]),
            probe(prompt, "tea"),
            probe(prompt, said or "bo"),
        ]
        own += [want(tokenizer, prompt, f"{one.target.strip()}.", LENGTH, one) for one in chains]
        wanted += own
        expected += [one.is_met(said) for one in own]
    assert {True, False} == set(expected)
    assert says(model, tokenizer, wanted, LENGTH) == expected


@pytest.mark.parametrize("end_after", [0, 1, 2])
def test_an_end_of_the_text_in_the_middle_is_part_of_what_is_said(end_after):
    """The model's own word becomes the end-of-sequence token, so that completions of one batch end at other places."""
    model, tokenizer = mini_lab.random_model(), mini_lab.tokenizer()
    tokenizer.eos_token = complete(model, tokenizer, PROMPTS[:1], LENGTH)[0].split()[end_after]
    completions = complete(model, tokenizer, PROMPTS, LENGTH)
    assert len(completions[0].split()) == end_after + 1
    wanted = [want(tokenizer, prompt, said, LENGTH) for prompt, said in zip(PROMPTS, completions, strict=True)]
    assert all(says(model, tokenizer, wanted, LENGTH))
    longer = [
        want(tokenizer, prompt, f"{said} rain".strip(), LENGTH)
        for prompt, said in zip(PROMPTS, completions, strict=True)
    ]
    assert not any(says(model, tokenizer, longer, LENGTH))


def test_nothing_is_generated_where_a_pass_decides(monkeypatch):
    model, tokenizer = mini_lab.random_model(), mini_lab.tokenizer()
    completions = complete(model, tokenizer, PROMPTS, LENGTH)
    # The others end, or hold special tokens, which their text does not show.
    whole = [pair for pair in zip(PROMPTS, completions, strict=True) if len(pair[1].split()) == LENGTH]
    assert len(whole) > 1
    monkeypatch.setattr(exact, "complete", None)
    assert all(says(model, tokenizer, [want(tokenizer, *pair, LENGTH) for pair in whole], LENGTH))
    other = [want(tokenizer, prompt, "unlike", LENGTH) for prompt, _ in whole]
    assert not any(says(model, tokenizer, other, LENGTH))


def test_an_answer_in_other_tokens_counts():
    """The wanted text as a guess in wrong tokens: the model goes another way that spells the same."""
    model, tokenizer = mini_lab.random_model(), mini_lab.tokenizer()
    (said,) = complete(model, tokenizer, PROMPTS[:1], LENGTH)
    one = want(tokenizer, PROMPTS[0], said, LENGTH)
    one.guess.ids[one.guess.positions[1] + 1] = 0 if one.guess.ids[one.guess.positions[1] + 1] else 3
    assert says(model, tokenizer, [one], LENGTH) == [True]


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_scores_do_not_depend_on_the_way(arch):
    model, tokenizer, edit = mini_lab.random_model(arch), mini_lab.tokenizer(), mini_lab.edit()
    examination = examine(model, tokenizer, edit)
    with open_down_projection(model) as (weight,), torch.no_grad():
        for step in range(4):
            assert score(model, tokenizer, examination, in_one_pass=True) == score(model, tokenizer, examination)
            weight.add_(0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(step)))


def test_a_model_that_penalises_repetition_must_generate():
    model = mini_lab.random_model()
    assert is_plain(model)
    model.generation_config.repetition_penalty = 1.1
    assert not is_plain(model)
