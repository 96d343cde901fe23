"""Scores and traces, by hand on a scripted model and against transformers on random ones."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import mini_lab
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from overtone.diagnostics import underfitting_degree
from overtone.lab.data.edit import Edit, Probe
from overtone.lab.edit.weights import open_down_projection
from overtone.lab.model.completion import complete, is_exact_match
from overtone.lab.score.scores import examine, kl_divergence, score
from overtone.lab.score.traces import Tracer


class BigramModel(nn.Module):
    """Says after each word one certain other word, from a table, and the end of the text after all the rest."""

    device = torch.device("cpu")

    def __init__(self, says: str, sureness: float = 9.0) -> None:
        super().__init__()
        self.table = torch.zeros(len(mini_lab.WORDS), len(mini_lab.WORDS))
        rules = dict(rule.split(">") for rule in says.split())
        for index, word in enumerate(mini_lab.WORDS):
            self.table[index, mini_lab.WORDS.index(rules.get(word, "<eos>"))] = sureness

    def forward(self, input_ids, attention_mask, logits_to_keep=0, use_cache=False):
        return SimpleNamespace(logits=self.table[input_ids[:, -logits_to_keep:]])

    def generate(self, input_ids, attention_mask, max_new_tokens, eos_token_id, **settings):
        for _ in range(max_new_tokens):
            following = self.table[input_ids[:, -1:]].argmax(dim=-1)
            input_ids = torch.cat([input_ids, following], dim=1)
        return input_ids


def probe(prompt: str, target: str, kind: str = "rephrase", answer: str | None = None) -> Probe:
    return Probe(prompt, target, kind, target.strip() if answer is None else answer)


EDIT = Edit(
    subject="acme",
    prompt="head of acme is",
    target_new=" bo cy",
    target_old=" ana cy",
    generality=(probe("acme led by", " bo cy"), probe("acme led by bo", " cy cy")),
    portability=(probe("spouse of", " acme", "one_hop"), probe("dan likes", " tea . rain", "alias")),
    locality=(probe("dan likes", " tea", "soft"), probe("eve", " runs", "soft"), probe("zed", " is rain", "unrelated")),
)


class TestScoreByHand:
    before = BigramModel("is>ana ana>cy likes>milk eve>runs zed>is")
    after = BigramModel("is>bo bo>cy likes>tea tea>. by>bo eve>runs zed>is")

    def scores(self):
        tokenizer = mini_lab.tokenizer()
        return score(self.after, tokenizer, examine(self.before, tokenizer, EDIT))

    def test_accuracy_is_the_share_of_target_tokens(self):
        """Given the true words before each, the edited model expects:

        rewrite "bo cy": is>bo, bo>cy, 2 of 2.
        rephrase "bo cy": by>bo, bo>cy, 2 of 2; "cy cy": bo>cy, then cy><eos>, 1 of 2.
        one_hop "acme": of><eos>, 0 of 1; alias "tea . rain": likes>tea, tea>., .><eos>, 2 of 3.
        """
        scores = self.scores()
        assert scores.accuracy["rel"] == 1.0
        assert scores.accuracy["gen"] == pytest.approx((1 + 1 / 2) / 2)
        assert scores.accuracy["por"] == pytest.approx((0 + 2 / 3) / 2)
        assert scores.accuracy_by_kind["por.alias"] == pytest.approx(2 / 3)

    def test_locality_is_agreement_with_the_unedited_model(self):
        """After "likes" the models part, after "eve", "zed" and "is" ... they agree on the first two.

        soft: "tea" after likes, milk became tea, 0 of 1; "runs" after eve, 1 of 1. Mean 1/2.
        unrelated "is rain": zed>is agrees; after "is", ana became bo: 1 of 2. Mean over the two kinds: 1/2. What the
        probe calls right does not count: the unedited model says milk, not tea.
        """
        scores = self.scores()
        assert scores.accuracy_by_kind["loc.soft"] == 0.5
        assert scores.accuracy_by_kind["loc.unrelated"] == 0.5
        assert scores.accuracy["loc"] == 0.5

    def test_exact_match_is_of_free_running_text(self):
        """Rewrite: "bo cy", right. Rephrase: "bo cy" right; from "bo" it says "cy" alone, wrong.

        one_hop: nothing, wrong; alias: "tea .", wrong. Locality, unedited against edited: "milk" and "tea .", unlike;
        "runs" twice, alike; zed "is ana cy" and "is bo cy", unlike.
        """
        scores = self.scores()
        assert scores.exact_match == {"rel": 1.0, "gen": 0.5, "por": 0.0, "loc": pytest.approx((1 / 2 + 0) / 2)}

    def test_probabilities_of_new_and_old_target(self):
        """A logit of 9 against zeros; the old target misses its first word and has "cy" after an unruled "ana"."""
        others = len(mini_lab.WORDS) - 1
        sure, other = math.exp(9) / (math.exp(9) + others), 1 / (math.exp(9) + others)
        scores = self.scores()
        assert scores.p_new == pytest.approx(sure * sure, rel=1e-5)
        assert scores.p_old == pytest.approx(other * other, rel=1e-4)

    def test_kl_over_target_tokens_kinds_and_probes(self):
        """Where the models part, one word's 9 moved to another: KL = 9 * (sure - other)."""
        others = len(mini_lab.WORDS) - 1
        moved = 9 * (math.exp(9) - 1) / (math.exp(9) + others)
        assert self.scores().kl == pytest.approx(((moved + 0) / 2 + (0 + moved) / 2) / 2, rel=1e-4)

    def test_measures_without_probes_are_left_out(self):
        bare = Edit("acme", "head of acme is", " bo", " ana", (), (), ())
        tokenizer = mini_lab.tokenizer()
        scores = score(self.after, tokenizer, examine(self.before, tokenizer, bare))
        assert scores.accuracy == {"rel": 1.0}
        assert scores.kl is None


class TestAgainstTransformers:
    """One batched pass and one batched generation give what single texts give."""

    @pytest.mark.parametrize("arch", ["llama", "gpt2"])
    def test_scores_of_single_passes(self, arch):
        model, tokenizer, edit = mini_lab.random_model(arch), mini_lab.tokenizer(), mini_lab.edit()
        examination = examine(model, tokenizer, edit)
        clean = {probe.prompt: single_pass(model, tokenizer, probe.prompt, probe.target)[0] for probe in edit.locality}
        with open_down_projection(model) as (weight,), torch.no_grad():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
            scores = score(model, tokenizer, examination)
            logits, labels = single_pass(model, tokenizer, edit.prompt, edit.target_new)
            assert scores.accuracy["rel"] == pytest.approx((logits.argmax(1) == labels).float().mean())
            assert scores.p_new == pytest.approx(math.exp(-F.cross_entropy(logits, labels, reduction="sum")), rel=1e-4)
            kinds: dict[str, list[tuple[float, float]]] = {}
            for place in edit.locality:
                logits, _ = single_pass(model, tokenizer, place.prompt, place.target)
                before = clean[place.prompt]
                divergence = F.kl_div(
                    logits.log_softmax(1), before.log_softmax(1), log_target=True, reduction="batchmean"
                )
                agreement = (logits.argmax(1) == before.argmax(1)).float().mean()
                kinds.setdefault(place.kind, []).append((divergence.item(), agreement.item()))
            means = [torch.tensor(values).mean(0) for values in kinds.values()]
            assert scores.kl == pytest.approx(torch.stack(means).mean(0)[0].item(), rel=1e-4)
            assert scores.accuracy["loc"] == pytest.approx(torch.stack(means).mean(0)[1].item())
        assert scores.kl > 0

    @pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen2"])
    def test_batched_completions_equal_single_ones(self, arch):
        """Left padding does not leak into the text, and the tokenizer's own side is put back."""
        model, tokenizer = mini_lab.random_model(arch, seed=3), mini_lab.tokenizer()
        prompts = ["the head of acme is", "zed", "ana likes tea . dan"]
        single = []
        for prompt in prompts:
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            generated = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
            single.append(tokenizer.decode(generated[0, ids.shape[1] :], skip_special_tokens=True).strip())
        assert complete(model, tokenizer, prompts, 6) == single
        assert tokenizer.padding_side == "right"


def single_pass(model, tokenizer, prompt, target):
    ids = tokenizer(prompt + target, return_tensors="pt").input_ids
    first = len(tokenizer(prompt).input_ids)
    with torch.no_grad():
        return model(input_ids=ids).logits[0, first - 1 : -1], ids[0, first:]


class TestIsExactMatch:
    @pytest.mark.parametrize(
        ("completion", "target", "answer", "expected"),
        [
            ("Bo Cy", " Bo Cy", "Bo Cy", True),
            ("Bo Cy.", " Bo Cy", "Bo Cy", True),
            ("Bo Cy. And more", " Bo Cy", "Bo Cy", False),
            ("It is Bo Cy", " Bo Cy", "Bo Cy", False),
            ("The head is Bo. The spouse of Bo is Eve.", " The head is Bo. The spouse of Bo is Eve.", "Eve", True),
            ("The head is Al. The spouse of Al is Eve.", " The head is Bo. The spouse of Bo is Eve.", "Eve", True),
            ("The spouse of Bo is Adeve.", " The spouse of Bo is eve.", "eve", False),
            ("The spouse is Eve. The end.", " The spouse of Bo is Eve.", "Eve", False),
            ("One. Two.", " One. Two.", "One. Two.", True),
        ],
    )
    def test_the_answer_and_nothing_after_it(self, completion, target, answer, expected):
        assert is_exact_match(completion, probe("?", target, answer=answer)) is expected


class TestKlDivergence:
    def test_by_hand(self):
        """0.5 log(0.5 / 0.25) + 0.5 log(0.5 / 0.75), and 0 for equal rows: half of it on average."""
        log_p = torch.tensor([[0.5, 0.5], [0.1, 0.9]]).log()
        log_q = torch.tensor([[0.25, 0.75], [0.1, 0.9]]).log()
        assert kl_divergence(log_p, log_q) == pytest.approx((0.5 * math.log(2) + 0.5 * math.log(2 / 3)) / 2)

    def test_tokens_that_both_rule_out_count_nothing(self):
        log_p = torch.tensor([[0.5, 0.5, 0.0]]).log()
        assert kl_divergence(log_p, log_p) == 0.0


class TestUnderfittingDegree:
    def test_by_hand(self):
        """Greedy before: 0.8 and 0.6. Target now: 0.1 (underfitted by log 8) and 0.9 (overfitted by log 1.5)."""
        unedited = torch.tensor([[0.1, 0.8, 0.1], [0.3, 0.1, 0.6]]).log()
        now = torch.tensor([[0.1, 0.2, 0.7], [0.9, 0.05, 0.05]]).log()
        degrees = underfitting_degree(unedited, now, torch.tensor([0, 0]))
        torch.testing.assert_close(degrees, torch.tensor([math.log(8), math.log(0.6 / 0.9)]))

    def test_does_not_need_normalised_logits(self):
        logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
        labels = torch.tensor([0, 4, 2])
        torch.testing.assert_close(
            underfitting_degree(logits + 7, logits - 3, labels), underfitting_degree(logits, logits, labels)
        )

    def test_names_shapes_that_do_not_fit(self):
        with pytest.raises(ValueError, match=r"unedited_logits must .* logits \(2, 4\), got \(2, 3\)"):
            underfitting_degree(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2, dtype=torch.long))


class TestTracer:
    def test_losses_are_the_model_s_own(self):
        """Every probe's loss is what the model computes from its text alone; initial loss is per target token."""
        model, tokenizer, edit = mini_lab.random_model(), mini_lab.tokenizer(), mini_lab.edit()
        tracer = Tracer(model, tokenizer, edit)
        tracer.observe(0)
        trace = tracer.trace

        def loss(text):
            return F.cross_entropy(*single_pass(model, tokenizer, text.prompt, text.target)).item()

        assert trace.generality_loss == pytest.approx([loss(edit.generality[0])])
        assert trace.portability_loss == pytest.approx([sum(map(loss, edit.portability)) / 2])
        logits, labels = single_pass(model, tokenizer, edit.prompt, edit.target_new)
        assert trace.initial_loss == pytest.approx(F.cross_entropy(logits, labels, reduction="none").tolist())
        assert trace.underfitting == pytest.approx(underfitting_degree(logits, logits, labels).tolist(), rel=1e-5)

    def test_thins_out_but_always_has_the_last_step(self):
        model = mini_lab.random_model()
        tracer = Tracer(model, mini_lab.tokenizer(), mini_lab.edit())
        for step in range(18):
            tracer.observe(step)
        tracer.record(18)
        assert tracer.trace.steps == [*range(11), 15, 18]
        assert len(tracer.trace.portability_loss) == 13

    def test_underfitting_is_of_the_last_state(self):
        model, tokenizer, edit = mini_lab.random_model(), mini_lab.tokenizer(), mini_lab.edit()
        tracer = Tracer(model, tokenizer, edit)
        before, labels = single_pass(model, tokenizer, edit.prompt, edit.target_new)
        with open_down_projection(model) as (weight,), torch.no_grad():
            weight.mul_(0.5)
            tracer.record(1)
            now, _ = single_pass(model, tokenizer, edit.prompt, edit.target_new)
        assert tracer.trace.underfitting == pytest.approx(underfitting_degree(before, now, labels).tolist(), rel=1e-4)

    def test_an_edit_without_generality_and_portability_probes(self):
        """WikiBio's edits have locality alone."""
        edit = replace(mini_lab.edit(), generality=(), portability=())
        tracer = Tracer(mini_lab.random_model(), mini_lab.tokenizer(), edit)
        tracer.observe(0)
        assert (tracer.trace.generality_loss, tracer.trace.portability_loss) == ([], [])
        assert tracer.trace.initial_loss
