"""What `token_loss` may say."""

from __future__ import annotations

import pytest
import torch

from overtone import OverToneConfig, overtone_loss
from overtone.easyedit.hparams import DEFAULT_HOLD, choose, floats_from_strings

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 3.0, 1.0, 0.5]], requires_grad=True)
LABELS = torch.tensor([0, 2])


class TestOvertone:
    """The paper's values for the method, any of them overridden."""

    @pytest.mark.parametrize("method", ["ft-m", "lora", "melo", "wise"])
    def test_is_the_cores_loss_at_the_presets(self, method):
        values, _ = choose("overtone", method).loss(LOGITS, LABELS)
        expected = overtone_loss(LOGITS, LABELS, reduction="none", **OverToneConfig.preset(method).as_kwargs())
        torch.testing.assert_close(values, expected)
        assert choose({"name": "overtone"}, method).loss.hold == DEFAULT_HOLD[method]

    def test_overrides(self):
        choice = choose({"name": "overtone", "epsilon": "2e-1", "n_sigma": None, "check": False, "lam": 0.5}, "lora")
        values, _ = choice.loss(LOGITS, LABELS)
        expected = overtone_loss(LOGITS, LABELS, epsilon=0.2, n_sigma=None, check=False, lam=0.5, reduction="none")
        torch.testing.assert_close(values, expected)

    def test_describes_itself(self):
        assert "epsilon=0.05, n_sigma=1.0, lam=0.1" in choose("overtone", "melo").loss.description


class TestHold:
    """When a step is held."""

    @pytest.mark.parametrize(("hold", "held"), [(False, False), (True, False), (0.001, False), (100.0, True)], ids=str)
    def test_decides_on_the_label_tokens(self, hold, held):
        loss = choose({"name": "overtone", "hold_settled": hold}, "lora").loss
        assert loss(LOGITS, LABELS)[1] is held
        assert loss(LOGITS, LABELS, may_hold=False)[1] is False

    def test_settled(self):
        loss = choose({"name": "overtone", "epsilon": 50, "hold_settled": True}, "lora").loss
        assert loss(LOGITS, LABELS)[1] is True

    def test_correct(self):
        """A hold that waits for correct tokens holds when greedy decoding says them, not before."""
        loss = choose({"name": "overtone", "hold_settled": 100.0, "hold_correct": True}, "lora").loss
        assert loss(LOGITS, LABELS)[1] is False
        assert loss(LOGITS, LOGITS.argmax(dim=-1))[1] is True

    def test_recommended(self):
        """LoRA's waits for first choices alone, however far their distributions are."""
        loss = choose("overtone_recommended", "lora").loss
        assert loss(LOGITS, LABELS)[1] is False
        assert loss(LOGITS, LOGITS.argmax(dim=-1))[1] is True

    def test_cross_entropy_at_a_mean(self):
        loss = choose({"name": "cross_entropy", "hold_settled": 100}, "lora").loss
        values, held = loss(LOGITS, LABELS)
        torch.testing.assert_close(values, torch.nn.functional.cross_entropy(LOGITS, LABELS, reduction="none"))
        assert held

    def test_is_refused_when_distributed(self, monkeypatch):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        with pytest.raises(ValueError, match="distributed"):
            choose("overtone", "lora").loss(LOGITS, LABELS)


class TestBaselines:
    """The losses that it is compared with."""

    def test_cross_entropy_is_the_trainers_own(self):
        assert choose("cross_entropy", "lora").loss is None

    def test_label_smoothing(self):
        values, held = choose({"name": "label_smoothing", "smoothing": 0.2}, "lora").loss(LOGITS, LABELS)
        expected = torch.nn.functional.cross_entropy(LOGITS, LABELS, reduction="none", label_smoothing=0.2)
        torch.testing.assert_close(values, expected)
        assert not held


class TestWise:
    """Its two options."""

    def test_defaults(self):
        flagged, baseline = choose("overtone", "wise"), choose("cross_entropy", "wise")
        assert (flagged.activation_scale, flagged.context_templates) == (0.6, False)
        assert (baseline.activation_scale, baseline.context_templates) == (1.0, True)
        recommended = choose("overtone_recommended", "wise")
        assert (recommended.activation_scale, recommended.context_templates) == (0.6, True)

    def test_can_be_set_for_any_loss(self):
        choice = choose({"name": "cross_entropy", "activation_scale": "5e-1", "context_templates": False}, "wise")
        assert (choice.activation_scale, choice.context_templates) == (0.5, False)

    @pytest.mark.parametrize("scale", [0, -1, True, "much", float("inf")])
    def test_bad_scales(self, scale):
        with pytest.raises(ValueError, match="activation_scale"):
            choose({"name": "overtone", "activation_scale": scale}, "wise")

    def test_bad_templates(self):
        with pytest.raises(ValueError, match="context_templates"):
            choose({"name": "overtone", "context_templates": 1}, "wise")


class TestErrors:
    """Each names the key, the value and what was expected."""

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            ("overtune", "one of .*got 'overtune'"),
            ({}, "got None"),
            ({"name": "overtone", "epsilon": -1}, "epsilon.*-1"),
            ({"name": "overtone", "sigma": 1}, "no option 'sigma'"),
            ({"name": "overtone", "smoothing": 0.1}, "no option 'smoothing'"),
            ({"name": "cross_entropy", "epsilon": 0.1}, "no option 'epsilon'"),
            ({"name": "cross_entropy", "hold_settled": True}, "no threshold"),
            ({"name": "cross_entropy", "hold_settled": -1}, "hold_settled.*-1"),
            (
                {"name": "cross_entropy", "hold_settled": "inf"},
                "cross_entropy: hold_settled must be false or the mean",
            ),
            ({"name": "overtone", "hold_settled": "inf"}, "hold_settled=inf would hold every call"),
            ({"name": "label_smoothing", "smoothing": 2}, "smoothing.*2"),
            ({"name": "overtone", "activation_scale": 0.6}, "WISE alone"),
        ],
        ids=str,
    )
    def test_values(self, value, message):
        with pytest.raises(ValueError, match=message):
            choose(value, "lora")

    @pytest.mark.parametrize("value", [3, ["overtone"], True])
    def test_types(self, value):
        with pytest.raises(TypeError, match="token_loss"):
            choose(value, "lora")

    def test_shape_of_a_callables_values(self):
        for wrong in (lambda logits, labels: logits.sum(), lambda logits, labels: 3.0):
            with pytest.raises(ValueError, match="one loss a token"):
                choose(wrong, "lora").loss(LOGITS, LABELS)


def test_floats_from_strings():
    assert floats_from_strings({"a": "5e-2", "b": "name", "c": 1}) == {"a": 0.05, "b": "name", "c": 1}
