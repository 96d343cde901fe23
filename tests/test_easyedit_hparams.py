"""What `token_loss` may say beyond the grammar of losses: defaults of EasyEdit's trainers, and WISE's two options."""

from __future__ import annotations

import pytest
import torch

from overtone.easyedit.hparams import choose
from overtone.easyedit.methods import BY_NAME
from overtone.easyedit.vstar import VSTAR

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 3.0, 1.0, 0.5]], requires_grad=True)
LABELS = torch.tensor([0, 2])


class TestLoss:
    """The grammar's losses, with a hold by default."""

    @pytest.mark.parametrize("method", ["ft-m", "lora", "melo", "wise"])
    def test_overtone_is_held_once_settled_unless_told(self, method):
        assert choose("overtone", method).loss.hold.value == "settled"
        assert choose({"name": "overtone", "hold": False}, method).loss.hold.value is None
        assert choose("overtone:hold=0.2", method).loss.hold.value == 0.2

    def test_the_papers_values_are_the_methods(self):
        assert choose("overtone", "ft-m").loss.epsilon == 0.01
        assert choose("overtone", "lora").loss.epsilon == 0.05
        assert "epsilon=0.05, n_sigma=1.0, lam=0.1" in choose("overtone", "melo").loss.description

    @pytest.mark.parametrize("value", ["cross_entropy", {"name": "cross_entropy", "hold": False}], ids=str)
    def test_cross_entropy_is_the_trainers_own(self, value):
        assert choose(value, "lora").loss is None

    def test_cross_entropy_that_is_held_is_ours(self):
        values, held = choose("cross_entropy:hold=100", "lora").loss(LOGITS, LABELS)
        torch.testing.assert_close(values, torch.nn.functional.cross_entropy(LOGITS, LABELS, reduction="none"))
        assert held

    @pytest.mark.filterwarnings("ignore:hold_settled and hold_correct:DeprecationWarning")
    def test_the_old_fields(self):
        old = {"name": "overtone", "hold_settled": 0.2, "hold_correct": True}
        assert choose(old, "lora").loss.hold.value == ("correct", 0.2)
        assert choose({"name": "overtone", "hold_settled": False}, "lora").loss.hold.value is None
        assert choose({"name": "overtone", "hold_correct": True}, "lora").loss.hold.value == ("correct", "settled")


class TestWise:
    """Its two options, beside any loss and in either spelling."""

    def test_defaults(self):
        """The thresholds follow the paper with OverTone; the templates stay, since edits without them lose."""
        for value, scale in (("overtone", 0.6), ("overtone_recommended", 0.6), ("cross_entropy", 1.0), ("gem", 1.0)):
            choice = choose(value, "wise")
            assert (choice.activation_scale, choice.context_templates) == (scale, True), value

    @pytest.mark.parametrize(
        "value",
        [
            {"name": "cross_entropy", "activation_scale": "5e-1", "context_templates": False},
            "cross_entropy:activation_scale=0.5+context_templates=false",
        ],
        ids=str,
    )
    def test_can_be_set_for_any_loss(self, value):
        choice = choose(value, "wise")
        assert (choice.activation_scale, choice.context_templates) == (0.5, False)

    @pytest.mark.parametrize("scale", [0, -1, True, "much", float("inf")])
    def test_bad_scales(self, scale):
        with pytest.raises(ValueError, match="activation_scale must be a number above 0, got"):
            choose({"name": "overtone", "activation_scale": scale}, "wise")

    def test_bad_templates(self):
        with pytest.raises(ValueError, match="context_templates must be true or false, got 1"):
            choose({"name": "overtone", "context_templates": 1}, "wise")


class TestAnchor:
    """What must stay, where a prompt leads to the target."""

    @pytest.mark.parametrize("name", ["overtone", "overtone_recommended", "cross_entropy"])
    @pytest.mark.parametrize("method", ["FT", "LoRA", "MELO", "WISE", "FT_uns", "LoRA_uns"])
    def test_is_kept(self, method, name):
        loss = BY_NAME[method].choose({"name": name, "anchor": "1", "anchor_epsilon": "1e-1"}).loss
        assert (loss.anchor, loss.anchor_epsilon) == (1, 0.1)

    def test_is_refused_by_every_other_method(self):
        others = [name for name, trainer in BY_NAME.items() if not trainer.takes_anchor]
        assert {"QLoRA", "GRACE", "DEFER", *(trainer.name for trainer in VSTAR)} == set(others)
        for name in others:
            with pytest.raises(ValueError, match=r"token_loss: anchor=1 is for trainers .* leave it out"):
                BY_NAME[name].choose("cross_entropy:anchor=1")


class TestErrors:
    """Each names the key, the value and what was expected."""

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            ("overtune", "token_loss: .*unknown loss 'overtune': choose from"),
            ({}, "token_loss: .*got None"),
            ({"name": "overtone", "epsilon": -1}, "token_loss: .*epsilon.*-1"),
            ("overtone:sigma=1", "token_loss: .*unknown field 'sigma'"),
            ({"name": "overtone", "activation_scale": 0.6}, "activation_scale is an option of WISE alone"),
            ("overtone:dynamic=false", "keep no logits from before the edit"),
        ],
        ids=str,
    )
    def test_values(self, value, message):
        with pytest.raises(ValueError, match=message):
            choose(value, "lora")

    @pytest.mark.parametrize("value", [3, ["overtone"], True])
    def test_types(self, value):
        with pytest.raises(TypeError, match="token_loss: a loss must be a name"):
            choose(value, "lora")
