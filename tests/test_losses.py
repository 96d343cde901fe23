"""Loss specs: what they mean, their one canonical form, and what they refuse."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch.nn import functional as F

from overtone import OverToneConfig, overtone_loss
from overtone.config import PRESETS, RECOMMENDED
from overtone.functional import reference_loss
from overtone.lab.losses import ABLATIONS, EARLY_STOPPING_THRESHOLDS, LOSSES, parse_loss


def tokens(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(6, 11, generator=generator), torch.randint(11, (6,), generator=generator)


class TestParseLoss:
    @pytest.mark.parametrize(
        ("spec", "canonical"),
        [
            ("cross_entropy", "cross_entropy"),
            ("early_stopping:stop_below=0.10", "early_stopping"),
            ("early_stopping:stop_below=.3", "early_stopping:stop_below=0.3"),
            ("label_smoothing:label_smoothing=0.1", "label_smoothing"),
            ("overtone:hold_settled=true", "overtone_held"),
            ("overtone:hold_settled=False+check=true+dynamic=true", "overtone"),
            ("overtone_held:lam=0.5", "overtone_held:lam=0.5"),
            ("overtone_held:hold_settled=0.1", "overtone:hold_settled=0.1"),
            (
                "overtone: hold_settled = 0.1 + lam = 5e-1 + epsilon = 0.05 ",
                "overtone:epsilon=0.05+lam=0.5+hold_settled=0.1",
            ),
            ("overtone:hold_settled=1", "overtone:hold_settled=1"),
            ("overtone:hold_settled=inf+hold_correct=true", "overtone:hold_settled=inf+hold_correct=true"),
            ("overtone:n_sigma=None", "overtone:n_sigma=none"),
            ("overtone:dynamic=false+epsilon=0.0", "overtone:epsilon=0+dynamic=false"),
            ("overtone:epsilon=0.123456789", "overtone:epsilon=0.123456789"),
        ],
    )
    def test_one_canonical_name_per_loss(self, spec, canonical):
        loss = parse_loss(spec)
        assert loss.name == canonical
        assert parse_loss(canonical) == loss

    @pytest.mark.parametrize("method", PRESETS)
    def test_fields_that_are_not_given_come_from_the_method_s_preset(self, method):
        assert parse_loss("overtone:lam=0.5").config(method) == OverToneConfig.preset(method, lam=0.5)
        assert parse_loss("cross_entropy").config(method) is None

    @pytest.mark.parametrize("method", RECOMMENDED)
    def test_recommended_settings_are_of_the_method_too(self, method):
        assert parse_loss("overtone_recommended").config(method) == OverToneConfig.recommended(method)

    def test_losses_have_titles_of_their_own(self):
        specs = [*LOSSES, *ABLATIONS, *(f"early_stopping:stop_below={value}" for value in EARLY_STOPPING_THRESHOLDS)]
        losses = {parse_loss(spec).name: parse_loss(spec).title for spec in specs}
        assert len(set(losses.values())) == len(losses) == 6 + 6 + 4

    def test_ablations_leave_out_a_part_of_overtone_each(self):
        """Canonical specs, so that they meet the rows of results; neither OverTone itself nor its hold is one."""
        assert [parse_loss(spec).name for spec in ABLATIONS] == list(ABLATIONS)
        assert not {"cross_entropy", "overtone", "overtone_held"} & set(ABLATIONS)
        assert all(title.startswith("OverTone w/o") for title in [parse_loss(spec).title for spec in ABLATIONS[:4]])

    def test_can_be_sent_to_another_process(self):
        loss = parse_loss("overtone:hold_settled=0.1")
        assert pickle.loads(pickle.dumps(loss)) == loss

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("focal", "unknown loss 'focal': choose from cross_entropy"),
            ("overtone:", "'' is not field=value"),
            ("overtone:lam", "'lam' is not field=value"),
            ("overtone:gamma=1", "unknown field 'gamma': overtone takes epsilon, n_sigma, lam"),
            ("cross_entropy:lam=1", "unknown field 'lam': cross_entropy takes no settings"),
            ("overtone:lam=1+lam=1", "lam is given twice"),
            ("overtone:lam=2", "lam must be a number in .0, 1., got 2"),
            ("overtone:lam=much", "lam must be a number in .0, 1., got 'much'"),
            ("overtone:check=1", "check must be True or False, got 1"),
            ("overtone_recommended:lam=1", "unknown field 'lam': overtone_recommended takes no settings"),
            ("overtone:hold_settled=inf", "hold_settled=inf would hold every call: pass hold_correct=True"),
            ("overtone:hold_settled=-1", "hold_settled must be .*, got -1"),
            ("overtone:dynamic=1", "dynamic must be true or false, got 1"),
            ("early_stopping:stop_below=0", "stop_below must be a finite number above 0, got 0"),
            ("early_stopping:stop_below=inf", "stop_below must be a finite number above 0, got inf"),
            ("early_stopping:stop_below=none", "stop_below must be a finite number above 0, got None"),
            ("label_smoothing:label_smoothing=1", "label_smoothing must be a finite number between 0 and 1, got 1"),
        ],
    )
    def test_names_what_is_wrong(self, spec, message):
        with pytest.raises(ValueError, match=message):
            parse_loss(spec)


class TestValues:
    """Each ablation against the definition of the loss, and against torch where it is a known loss."""

    @pytest.mark.parametrize("spec", ["overtone", *(spec for spec in ABLATIONS if "dynamic" not in spec)])
    def test_is_the_definition_with_these_settings(self, spec):
        logits, labels = tokens()
        loss = parse_loss(spec)
        value = loss.build("lora")(logits.double(), labels)
        expected = reference_loss(logits.double(), labels, **loss.config("lora").as_kwargs())
        torch.testing.assert_close(value, expected)

    def test_clipping_only_is_cross_entropy_that_lets_go_of_fitted_tokens(self):
        logits, labels = tokens()
        logits[0, labels[0]] += 30.0
        token_losses = F.cross_entropy(logits, labels, reduction="none")
        expected = token_losses.clamp(min=0.05).mean()
        torch.testing.assert_close(parse_loss("overtone:lam=1").build("lora")(logits, labels), expected)

    def test_without_dyn_the_target_stays_that_of_the_first_call(self):
        (before, labels), (after, _) = tokens(0), tokens(1)
        loss = parse_loss("overtone:dynamic=false").build("lora")
        loss(before, labels)
        expected = overtone_loss(after, labels, reference_logits=before, **OverToneConfig.preset("lora").as_kwargs())
        assert loss(after, labels) == expected
        assert loss(after, labels) != parse_loss("overtone").build("lora")(after, labels)

    def test_without_dyn_every_edit_has_a_target_of_its_own(self):
        (first, labels), (second, _) = tokens(0), tokens(1)
        loss = parse_loss("overtone:dynamic=false")
        loss.build("lora")(first, labels)
        torch.testing.assert_close(
            loss.build("lora")(second, labels), parse_loss("overtone").build("lora")(second, labels)
        )
