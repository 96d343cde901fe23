"""Questions asked in the paper's prompts: what counts as an answer, and what is generated."""

from __future__ import annotations

import dataclasses
import re

import mini_lab
import pytest
import torch

from overtone.lab.data.edit import Question
from overtone.lab.model.completion import complete
from overtone.lab.score import questions
from overtone.lab.score.questions import ask, final_answer, names_one_of

SINGLE = (
    Question("single-hop", ("Who sings?",), ("Dee Fox", "D. Fox"), ("Ana Orr",)),
    Question("single-hop", ("Who hums?",), ("Sarn",), ()),
)
MULTI = (Question("multi-hop", ("Where to?", "Which way?", "Whither?"), ("Bryne",), ("Oldport", "the Port")),)


def edit(*asked):
    return dataclasses.replace(mini_lab.edit(), questions=asked)


@pytest.fixture
def say(monkeypatch):
    """Replace generation: answers by question, for greedy decoding and for sampling."""
    calls = []

    def use(greedy, sampled=None):
        def scripted(model, tokenizer, prompts, max_new_tokens, *, temperature):
            calls.append((prompts, max_new_tokens, temperature, torch.initial_seed()))
            said = greedy if temperature is None or sampled is None else sampled
            asked = [re.findall(r"Question: (.*?\?)", prompt)[-1] for prompt in prompts]
            return [said.get(question, "") for question in asked]

        monkeypatch.setattr(questions, "complete", scripted)
        return calls

    return use


class TestAsk:
    tokenizer = mini_lab.tokenizer()

    def test_shares_of_questions_with_new_and_old_answers(self, say):
        calls = say({"Who sings?": "ana orr.", "Who hums?": "Sarn."}, {"Who sings?": "It is D. Fox."})
        assert ask(None, self.tokenizer, edit(*SINGLE), 3) == {
            "single-hop, greedy": 0.5,
            "single-hop, greedy, old answer": 1.0,
            "single-hop, temperature 0.1": 0.5,
            "single-hop, temperature 0.1, old answer": 0.0,
        }
        assert [call[1:] for call in calls] == [(30, None, 3), (30, 0.1, 3)]
        assert calls[0][0][0].endswith("Answer: Jill Biden\nQuestion: Who sings? Answer:")

    def test_one_wording_is_enough(self, say):
        calls = say(
            {
                "Where to?": "Subquestion: Bryne? Final answer: Oldport",
                "Whither?": "Subquestion: x. Final answer: Bryne",
            }
        )
        answers = ask(None, self.tokenizer, edit(*MULTI), 0)
        assert answers["multi-hop, greedy"] == answers["multi-hop, greedy, old answer"] == 1.0
        (prompts, limit, *_), _ = calls
        assert (len(prompts), limit) == (3, 200)
        assert prompts[0].endswith("Final answer: Jill Biden\nQuestion: Where to?")

    def test_what_stands_in_the_chain_alone_is_no_answer(self, say):
        say({"Where to?": "Subquestion: Bryne? Answer: Bryne. Final answer: Elsewhere"})
        assert ask(None, self.tokenizer, edit(*MULTI), 0)["multi-hop, greedy"] == 0.0

    def test_no_questions_no_answers(self):
        assert ask(None, self.tokenizer, mini_lab.edit(), 0) == {}

    def test_a_chat_template_makes_the_prompt_the_users_turn(self, say):
        calls = say({})
        tokenizer = mini_lab.tokenizer()
        tokenizer.bos_token = "<eos>"
        tokenizer.chat_template = (
            "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<reply>"
        )
        ask(None, tokenizer, edit(*SINGLE), 0)
        assert calls[0][0][0].startswith("<user>You are a helpful AI assistant.")
        assert calls[0][0][0].endswith("Who sings? Answer:<reply>")

    def test_is_repeatable_and_leaves_the_random_state_alone(self):
        model, asked = mini_lab.random_model(), edit(*SINGLE)
        before = torch.get_rng_state()
        assert ask(model, self.tokenizer, asked, 1) == ask(model, self.tokenizer, asked, 1)
        assert torch.equal(torch.get_rng_state(), before)


class TestSampling:
    def test_temperature_draws_from_the_whole_vocabulary(self):
        model, tokenizer = mini_lab.random_model(), mini_lab.tokenizer()
        # As chat models' own settings do.
        model.generation_config.top_k, model.generation_config.top_p = 2, 0.5
        prompts = ["the head of acme is", "zed likes"]

        def sampled(temperature, seed):
            torch.manual_seed(seed)
            return complete(model, tokenizer, prompts, 8, temperature=temperature)

        assert sampled(1e-4, 0) == complete(model, tokenizer, prompts, 8)
        assert sampled(50.0, 0) == sampled(50.0, 0)
        assert len({tuple(sampled(50.0, seed)) for seed in range(5)}) == 5
        words = {word for seed in range(60) for text in sampled(1e4, seed) for word in text.split()}
        # All but padding and the end, which are not shown.
        assert words == set(mini_lab.WORDS[2:])


class TestFinalAnswer:
    @pytest.mark.parametrize(
        ("completion", "answer"),
        [
            ("Bryne.", "Bryne."),
            ("Subquestion: a? Answer: b. Final answer: Bryne.", "Bryne."),
            ("Bryne\nQuestion: Who? Answer: Final answer: Ana", "Bryne"),
            ("Final answer: Bryne\nQuestion: Who? Final answer: Ana", "Bryne"),
            ("", ""),
        ],
    )
    def test_is_the_first_and_the_questions_own(self, completion, answer):
        assert final_answer(completion) == answer

    @pytest.mark.parametrize(
        ("text", "answers", "is_named"),
        [
            ("It is bryne.", ["Bryne"], True),
            ("Washington, D.C.", ["D.C."], True),
            ("usage", ["US"], False),
            ("Cyprus", ["US"], False),
            ("the U.S. of A", ["x", "U.S."], True),
            ("Bryne", [], False),
        ],
    )
    def test_whole_words_count(self, text, answers, is_named):
        assert names_one_of(text, answers) == is_named
