"""Named losses: how they are written, what they compute, and when an edit with one of them is held."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from torch.nn import functional as F

from overtone import Anchors, OverToneConfig, overtone_loss
from overtone.config import PRESETS
from overtone.functional import reference_loss
from overtone.token_loss import NAMED_LOSSES, parse
from overtone.token_loss.cross_entropy import cross_entropy, dft, eaft, gem

OLD_HOLD = pytest.mark.filterwarnings("ignore:hold_settled and hold_correct:DeprecationWarning")


def tokens(seed=0, count=6, vocabulary=31):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(count, vocabulary, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), torch.randint(vocabulary, (count,), generator=generator)


def gradient(loss, logits):
    return torch.autograd.grad(loss.sum(), logits)[0]


class TestSpelling:
    """One loss, one canonical name, whichever way it is written."""

    @pytest.mark.parametrize(
        ("value", "canonical"),
        [
            ("cross_entropy", "cross_entropy"),
            ("cross_entropy:hold=0.10", "cross_entropy:hold=0.1"),
            ("cross_entropy: hold = .3,correct ", "cross_entropy:hold=correct,0.3"),
            ("label_smoothing:smoothing=0.1", "label_smoothing"),
            ("gem:beta=0.7+hold=none", "gem"),
            ("eaft:top_k=10.0", "eaft:top_k=10"),
            ("overtone:hold=True", "overtone:hold=settled"),
            ("overtone:hold=false+check=true+dynamic=true", "overtone"),
            ("overtone:hold=0.1 + lam = 5e-1 + epsilon=0.05", "overtone:epsilon=0.05+lam=0.5+hold=0.1"),
            ("overtone:n_sigma=None", "overtone:n_sigma=none"),
            ("overtone:dynamic=false+epsilon=0.0", "overtone:epsilon=0+dynamic=false"),
            ("overtone:epsilon=0.123456789", "overtone:epsilon=0.123456789"),
            ("overtone_recommended:hold=false", "overtone_recommended:hold=none"),
            ("overtone:dynamic=false+anchor=1.0+lam=0.5", "overtone:lam=0.5+anchor=1+dynamic=false"),
            ("overtone:anchor=0+anchor_epsilon=0.05", "overtone"),
            ("cross_entropy:anchor_epsilon=0+anchor=2+hold=0.1", "cross_entropy:hold=0.1+anchor=2+anchor_epsilon=0"),
            ({"name": "overtone"}, "overtone"),
            ({"name": "overtone", "epsilon": "5e-2", "n_sigma": None}, "overtone:epsilon=0.05+n_sigma=none"),
            ({"name": "overtone", "hold": ["0.2", "correct"]}, "overtone:hold=correct,0.2"),
            ({"name": "overtone", "hold": ["settled"]}, "overtone:hold=settled"),
        ],
        ids=str,
    )
    def test_has_one_canonical_form(self, value, canonical):
        spec = parse(value)
        assert spec.name == canonical
        assert parse(canonical) == spec

    @OLD_HOLD
    @pytest.mark.parametrize(
        ("old", "canonical"),
        [
            ("early_stopping", "cross_entropy:hold=0.1"),
            ("early_stopping:stop_below=.3", "cross_entropy:hold=0.3"),
            ("label_smoothing:label_smoothing=0.2", "label_smoothing:smoothing=0.2"),
            ("overtone_held", "overtone:hold=settled"),
            ("overtone_held:lam=0.5", "overtone:lam=0.5+hold=settled"),
            ("overtone_held:hold_settled=0.1", "overtone:hold=0.1"),
            ("overtone_held:hold_correct=true", "overtone:hold=correct,settled"),
            ("overtone:hold_settled=1", "overtone:hold=1"),
            ("overtone:hold_settled=inf+hold_correct=true", "overtone:hold=correct"),
            ("overtone:hold_settled=0.2+hold_correct=true", "overtone:hold=correct,0.2"),
            ({"name": "overtone", "hold_settled": False, "hold_correct": False}, "overtone"),
            ({"name": "cross_entropy", "hold_settled": "3e-1"}, "cross_entropy:hold=0.3"),
        ],
        ids=str,
    )
    def test_takes_the_words_of_before(self, old, canonical):
        assert parse(old).name == canonical

    def test_warns_of_the_two_old_fields(self):
        with pytest.warns(DeprecationWarning, match="hold_settled and hold_correct are now one field"):
            parse("overtone:hold_settled=0.1")

    def test_a_default_hold_is_written_out(self):
        """Where a caller holds overtone unless told, the name says so; the other losses are left alone."""
        assert parse("overtone", hold="settled").name == "overtone:hold=settled"
        assert parse("overtone:hold=none", hold="settled").name == "overtone"
        assert parse("overtone_recommended", hold="settled").name == "overtone_recommended"
        assert parse("cross_entropy", hold="settled").name == "cross_entropy"

    def test_different_losses_have_different_titles(self):
        specs = [
            *NAMED_LOSSES,
            *(
                f"overtone:{changed}"
                for changed in ("epsilon=0", "n_sigma=none", "check=false", "dynamic=false", "lam=1")
            ),
            *(f"{name}:hold={hold}" for name in NAMED_LOSSES for hold in ("correct", "0.1", "correct,0.1")),
            "overtone:epsilon=0+check=false",
            "overtone:hold=settled",
            "overtone_recommended:hold=false",
            "overtone_recommended:epsilon=0",
            *(f"{name}:anchor=2" for name in ("cross_entropy", "overtone", "overtone_recommended")),
            "cross_entropy:hold=0.1+anchor=1",
            "cross_entropy:anchor=1+anchor_epsilon=0.1",
        ]
        assert len({parse(spec).title for spec in specs}) == len({parse(spec).name for spec in specs}) == len(specs)

    def test_can_be_sent_to_another_process_and_hashed(self):
        spec = parse("overtone:hold=0.1")
        assert pickle.loads(pickle.dumps(spec)) == spec
        assert len({spec, parse("overtone:hold=0.1")}) == 1


class TestRefusals:
    """The message names the field, the value and the mend."""

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            ("focal", "unknown loss 'focal': choose from cross_entropy, .*overtone"),
            ({}, "must have a name, got None"),
            ("overtone:", "'' is not field=value; write overtone:field=value"),
            ("overtone:lam", "'lam' is not field=value"),
            ("overtone:gamma=1", "unknown field 'gamma': overtone takes epsilon, .* hold, anchor"),
            ("cross_entropy:lam=1", "unknown field 'lam': cross_entropy takes hold"),
            ("overtone:lam=1+lam=1", "lam is given twice"),
            ("overtone:lam=2", r"lam must be a number in \[0, 1\], got 2"),
            ("overtone:lam=much", r"lam must be a number in \[0, 1\], got 'much'"),
            ("overtone_recommended:lam=2", r"lam must be a number in \[0, 1\], got 2"),
            ("overtone:check=1", "check must be True or False, got 1"),
            ("overtone:dynamic=1", "dynamic must be true or false, got 1"),
            ("overtone:hold=inf", "hold=inf would hold every call: pass 'correct', or a number"),
            ("overtone:hold=-1", "hold must be .*, got -1"),
            ("overtone:hold=0", "hold must be .*, got 0"),
            ("overtone:hold=often", "hold must be .*, got 'often'"),
            ("overtone:hold=0.1,0.2", "hold must be .*, got"),
            ({"name": "overtone", "hold": []}, "hold must be .*, got"),
            ("cross_entropy:hold=settled", "hold must be .correct. or the mean cross-entropy .*, got 'settled'"),
            ("early_stopping:stop_below=0", "hold must be .*, got 0"),
            ("label_smoothing:smoothing=2", "smoothing must be a number from 0 to 1, got 2"),
            ("gem:beta=0", "beta must be a number from .*, got 0"),
            ("eaft:top_k=2.5", "top_k must be a whole number from 2 .*, got 2.5"),
            ("eaft:top_k=1", "top_k must be a whole number from 2 .*, got 1"),
            ("overtone:hold=0.1+hold_settled=true", "hold and hold_settled are both given"),
            *((f"{name}:anchor=-1", "anchor must be .*, got -1") for name in ("overtone", "cross_entropy")),
            ("cross_entropy:anchor=1+anchor_epsilon=-1", "anchor_epsilon must be .*, got -1"),
            ("overtone:anchor_epsilon=0.1", "anchor_epsilon=0.1 does nothing without an anchor"),
            ("cross_entropy:anchor_epsilon=0.1", "anchor_epsilon=0.1 does nothing without an anchor"),
            ("gem:anchor=1", "unknown field 'anchor': gem takes beta, hold"),
        ],
        ids=str,
    )
    def test_of_values(self, value, message):
        with pytest.raises(ValueError, match=message):
            parse(value)

    @OLD_HOLD
    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("overtone:hold_settled=inf", "loss 'overtone:hold_settled=inf': hold_settled must be .*, got inf"),
            ("overtone:hold_settled=1+hold_correct=1", "hold_correct must be True or False, got 1"),
        ],
    )
    def test_of_the_old_fields(self, spec, message):
        with pytest.raises(ValueError, match=message):
            parse(spec)

    @pytest.mark.parametrize("value", [3, ["overtone"], True, None], ids=str)
    def test_of_types(self, value):
        with pytest.raises(TypeError, match=r"must be a name, .* got"):
            parse(value)


class TestValues:
    """Each loss against its formula, spelled out."""

    def values(self, spec, logits, labels, method="lora"):
        return parse(spec).build(method)(logits, labels, may_hold=False)[0]

    def test_label_smoothing(self):
        logits, labels = tokens()
        target = 0.8 * F.one_hot(labels, 31) + 0.2 / 31
        expected = -(target * logits.softmax(-1).log()).sum(-1)
        torch.testing.assert_close(self.values("label_smoothing:smoothing=0.2", logits, labels), expected)

    def test_dft_weighs_cross_entropy_by_the_probability_as_a_constant(self):
        logits, labels = tokens()
        p = logits.softmax(-1)[torch.arange(6), labels]
        value = dft(logits, labels)
        torch.testing.assert_close(value, -p * p.log())
        expected = p.detach()[:, None] * (logits.softmax(-1) - F.one_hot(labels, 31)).detach()
        torch.testing.assert_close(gradient(value, logits), expected)

    @pytest.mark.parametrize("beta", [0.7, 1.0, 2.0])
    def test_gem_has_the_gradient_of_its_game(self, beta):
        """The literal formula: q is the maximising player's, a constant for the model."""
        logits, labels = tokens()
        log_p = logits.log_softmax(-1)
        q = (logits / beta).softmax(-1).detach()
        game = (q * (log_p - log_p[torch.arange(6), labels][:, None])).sum(-1)
        value = gem(logits, labels, beta)
        torch.testing.assert_close(gradient(value, logits), gradient(game, logits))
        assert (value > 0).all()

    def test_gem_at_beta_1_is_cross_entropy(self):
        logits, labels = tokens()
        torch.testing.assert_close(gem(logits, labels, 1.0), cross_entropy(logits, labels))

    @pytest.mark.parametrize("top_k", [2, 20, 500])
    def test_eaft_weighs_cross_entropy_by_the_entropy_of_the_top_as_a_constant(self, top_k):
        logits, labels = tokens()
        k = min(top_k, 31)
        top = logits.detach().sort(dim=-1, descending=True).values[:, :k].softmax(-1)
        weight = -(top * top.log()).sum(-1) / math.log(k)
        assert ((weight > 0) & (weight < 1)).all()
        value = eaft(logits, labels, top_k)
        torch.testing.assert_close(value, weight * cross_entropy(logits, labels))
        expected = weight[:, None] * (logits.softmax(-1) - F.one_hot(labels, 31)).detach()
        torch.testing.assert_close(gradient(value, logits), expected)

    @pytest.mark.parametrize("spec", [name for name in NAMED_LOSSES if name != "label_smoothing"])
    def test_banned_tokens_give_no_nan(self, spec):
        """Label smoothing alone asks for them, and is infinite as torch's is."""
        logits, labels = tokens()
        logits = logits.detach().clone()
        labels = labels.clamp(max=1)
        logits[:, 3:] = -math.inf
        value = self.values(spec, logits.requires_grad_(), labels)
        assert value.isfinite().all()
        assert gradient(value, logits).isfinite().all()

    @pytest.mark.parametrize("spec", NAMED_LOSSES)
    def test_half_precision_logits_give_float32_losses(self, spec):
        logits, labels = tokens()
        half = logits.detach().bfloat16()
        value = self.values(spec, half.clone().requires_grad_(), labels)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, self.values(spec, half.float().requires_grad_(), labels))

    @pytest.mark.parametrize("method", PRESETS)
    @pytest.mark.parametrize(
        "changes", [{}, {"epsilon": 0.4, "lam": 0.5}, {"n_sigma": None}, {"check": False}, {"epsilon": 0}], ids=str
    )
    def test_overtone_is_the_definition_at_the_methods_settings(self, method, changes):
        logits, labels = tokens()
        spec = parse({"name": "overtone", **changes})
        config = OverToneConfig.preset(method, **changes)
        assert spec.config(method) == config
        expected = reference_loss(logits, labels, reduction="none", **config.as_kwargs())
        torch.testing.assert_close(self.values(spec.name, logits, labels, method), expected)

    @pytest.mark.parametrize("hold", ["settled", "correct,settled"])
    def test_overtone_is_the_core_bit_for_bit(self, hold):
        """Clipping here, once the distance is known, gives what the core gives when it clips; value and gradient."""
        logits, labels = tokens(count=40)
        logits = (logits.detach() + torch.linspace(0, 12, 40)[:, None] * F.one_hot(labels, 31)).requires_grad_()
        value = self.values(f"overtone:epsilon=2+lam=0.3+hold={hold}", logits, labels)
        settings = {"epsilon": 2.0, "lam": 0.3, "hold": hold.split(",")}
        exact = overtone_loss(logits, labels, reduction="none", **settings)
        assert 0 < (exact == 2.0).sum() < 40
        torch.testing.assert_close(value, exact, rtol=0, atol=0)
        torch.testing.assert_close(gradient(value, logits), gradient(exact, logits), rtol=0, atol=0)

    @pytest.mark.parametrize("method", PRESETS)
    def test_recommended_settings_are_of_the_method(self, method):
        assert parse("overtone_recommended").config(method) == OverToneConfig.recommended(method)
        assert parse("overtone_recommended").build(method).hold
        assert not parse("overtone_recommended:hold=false").build(method).hold

    def test_without_dyn_the_target_stays_that_of_the_first_call_of_each_edit(self):
        (before, labels), (after, _) = tokens(0), tokens(1)
        spec = parse("overtone:check=false+dynamic=false")
        assert not spec.is_dynamic
        settings = {**OverToneConfig.preset("lora", check=False).as_kwargs(), "reduction": "none"}
        loss = spec.build("lora")
        torch.testing.assert_close(loss(before, labels)[0], overtone_loss(before, labels, **settings))
        expected = overtone_loss(after, labels, reference_logits=before, **settings)
        torch.testing.assert_close(loss(after, labels)[0], expected)
        assert not torch.allclose(expected, overtone_loss(after, labels, **settings))
        torch.testing.assert_close(spec.build("lora")(after, labels)[0], overtone_loss(after, labels, **settings))

    def test_a_callable(self):
        logits, labels = tokens()

        def own(logits, labels):
            return logits.sum(-1)

        spec = parse(own)
        assert (spec.name, spec.config("lora")) == ("own", None)
        torch.testing.assert_close(spec.build("lora")(logits, labels)[0], logits.sum(-1))

    @pytest.mark.parametrize("wrong", [lambda logits, labels: logits.sum(), lambda logits, labels: 3.0])
    def test_a_callable_that_reduces_is_refused(self, wrong):
        with pytest.raises(ValueError, match="one loss a token"):
            parse(wrong).build("lora")(*tokens())


def confident(label_margin):
    """One token, whose label leads by this many nats of logit."""
    logits = torch.zeros(1, 5, dtype=torch.float64)
    logits[0, 2] = label_margin
    return logits.requires_grad_(), torch.tensor([2])


class TestHold:
    """When a step is held."""

    @pytest.mark.parametrize(
        ("hold", "margin", "held"),
        [
            ("none", 30.0, False),
            ("settled", 0.0, False),
            ("settled", 9.0, True),
            ("1.7", 0.0, True),
            ("0.01", 0.0, False),
            ("correct", 0.0, False),
            ("correct", 0.001, True),
            ("correct,0.01", 0.001, False),
            ("correct,0.01", 9.0, True),
            ("correct,2", 0.0, False),
            ("settled,0.0001", 5.0, False),
        ],
    )
    def test_waits_for_every_condition(self, hold, margin, held):
        loss = parse(f"overtone:lam=1+hold={hold}").build("lora")
        assert loss(*confident(margin))[1] is held
        assert loss(*confident(margin), may_hold=False)[1] is False

    def test_correct_settles_no_token_that_is_not_the_first_choice(self):
        """The loss of a token stays above epsilon until it is correct, if the hold waits for that."""
        logits, labels = torch.tensor([[2.0, 2.1, -9.0, -9.0]]).requires_grad_(), torch.tensor([0])
        settled = parse("overtone:epsilon=2+hold=settled").build("lora")
        assert settled(logits, labels)[0].item() == 2
        assert settled(logits, labels)[1]
        waiting = parse("overtone:epsilon=2+hold=correct,settled").build("lora")
        assert waiting(logits, labels)[0].item() != 2
        assert not waiting(logits, labels)[1]

    @pytest.mark.parametrize("name", ["label_smoothing", "dft", "gem", "eaft"])
    def test_the_rivals_are_held_by_their_cross_entropy(self, name):
        """Their own values can be small where the label is improbable."""
        sure_of_another = torch.zeros(1, 40, dtype=torch.float64)
        sure_of_another[0, 7] = 40.0
        loss = parse(f"{name}:hold=0.5").build("lora")
        assert not loss(sure_of_another.requires_grad_(), torch.tensor([3]))[1]
        assert loss(sure_of_another, torch.tensor([7]))[1]

    def test_a_held_mean_gives_no_gradient(self):
        logits, labels = confident(9.0)
        held = parse("overtone:hold=settled").build("lora").mean(logits, labels)
        held.backward()
        assert held.item() == 0.05
        assert logits.grad is None
        literal = parse("overtone").build("lora").mean(logits, labels)
        literal.backward()
        assert not logits.grad.any()

    def test_a_mean_is_the_mean(self):
        logits, labels = tokens()
        mean = parse("cross_entropy").build("lora").mean(logits, labels)
        torch.testing.assert_close(mean, F.cross_entropy(logits, labels))

    @pytest.mark.parametrize("spec", [*NAMED_LOSSES, "overtone:hold=settled", "cross_entropy:hold=0.1"])
    def test_of_no_tokens(self, spec):
        """The mean is 0, never NaN; a loss that can be held is."""
        logits = torch.zeros(0, 5, requires_grad=True)
        loss = parse(spec).build("lora")
        mean = loss.mean(logits, torch.zeros(0, dtype=torch.long))
        mean.backward()
        assert mean.item() == 0
        assert (logits.grad is None) is bool(loss.hold)

    def test_is_not_held_where_no_gradient_is_wanted(self):
        logits, labels = confident(9.0)
        assert parse("overtone:hold=settled").build("lora")(logits.detach(), labels)[1] is False


class TestAnchor:
    """What a step keeps, beside its targets: positions among the same logits."""

    AT = torch.tensor([True, True, False, False, False, True])

    def step(self, spec, scale=0.3):
        """A loss, the logits of a step, and the anchors of a model that they have moved away from."""
        (logits, labels), (before, _) = tokens(0), tokens(1)
        before = logits.detach() + scale * before.detach()
        return parse(spec).build("lora"), logits, labels, Anchors.record(before, self.AT)

    def mean(self, loss, logits, labels, *groups):
        logits, anchored = loss.anchored(logits, groups)
        values, held = loss(logits[~self.AT], labels[~self.AT], anchored=anchored)
        return values.mean(), held

    @pytest.mark.parametrize("epsilon", [0.0, 0.5])
    def test_overtone_is_the_core_with_the_same_anchors(self, epsilon):
        loss, logits, labels, group = self.step(f"overtone:anchor=2+anchor_epsilon={epsilon}")
        value, _ = self.mean(loss, logits, labels, group)
        settings = {**OverToneConfig.preset("lora").as_kwargs(), "anchor": 2.0, "anchor_epsilon": epsilon}
        exact = overtone_loss(logits, labels.masked_fill(self.AT, -100), anchors=group, **settings)
        torch.testing.assert_close(value, exact)
        torch.testing.assert_close(gradient(value, logits), gradient(exact, logits))

    def test_cross_entropy_beside_the_literal_kl_of_each_group(self):
        loss, logits, labels, _ = self.step("cross_entropy:anchor=3+anchor_epsilon=0")
        groups = [Anchors.record(tokens(2)[0], torch.arange(6) == place) for place in (0, 5)]
        value, _ = self.mean(loss, logits, labels, *groups)
        kls = [F.kl_div(logits.log_softmax(-1)[[i]], tokens(2)[0].softmax(-1)[[i]], reduction="sum") for i in (0, 5)]
        torch.testing.assert_close(value, F.cross_entropy(logits[2:5], labels[2:5]) + 3 * sum(kls))

    @pytest.mark.parametrize(("scale", "held"), [(0.0, True), (0.3, False)])
    @pytest.mark.parametrize("spec", ["overtone:epsilon=100+hold=settled", "cross_entropy:hold=100"])
    def test_holds_only_where_nothing_has_moved(self, spec, scale, held):
        assert self.mean(*self.step(f"{spec}+anchor=1", scale))[1] is held

    def test_second_derivative_is_refused(self):
        """That of cross-entropy alone would be taken for the whole one."""
        loss, logits, labels, group = self.step("cross_entropy:anchor=3+anchor_epsilon=0")
        value, _ = self.mean(loss, logits, labels, group)
        (first,) = torch.autograd.grad(value, logits, create_graph=True)
        with pytest.raises(RuntimeError, match="second derivative"):
            first.sum().backward()

    @pytest.mark.parametrize("spec", ["overtone:anchor=1", "cross_entropy:anchor=1"])
    def test_is_not_left_out_in_silence(self, spec):
        loss, logits, labels, _ = self.step(spec)
        with pytest.raises(ValueError, match="anchor=1 is not used here"):
            loss.mean(logits, labels)
        with pytest.raises(ValueError, match="groups must hold Anchors"):
            loss.anchored(logits, [])
