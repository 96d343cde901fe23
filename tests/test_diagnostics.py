"""token_states against the loss and against the method's steps."""

import math

import pytest
import torch
import torch.distributed
import torch.nn.functional as F

from overtone import OverToneConfig, diagnostics, overtone_loss, token_states
from overtone.diagnostics import underfitting_degree

LOGITS = torch.randn(4, 6, 9, generator=torch.Generator().manual_seed(0)) * 3
LABELS = LOGITS.argmax(dim=-1).where(torch.arange(6) % 2 == 0, torch.arange(6) + 1)
LABELS[0, :2] = -100


class TestTokenStates:
    def test_toy_row(self):
        """p = (0.6, 0.3, 0.1), n = 1 keeps two tokens; label 0 mixes, label 1 fails the check, -100 is left out."""
        logits = torch.tensor([0.6, 0.3, 0.1]).log().expand(3, 3)
        states = token_states(logits, torch.tensor([0, 1, -100]), OverToneConfig(n_sigma=1.0, epsilon=0.11))
        assert states.kl.tolist() == pytest.approx([0.1079055, 1.2039728, 0.0], abs=1e-5)
        assert states.log_prob.tolist() == pytest.approx([-0.5108256, -1.2039728, 0.0], abs=1e-5)
        assert states.settled.tolist() == [True, False, False]
        assert states.mixed.tolist() == [True, False, False]
        assert states.kept.tolist() == [2, 2, 0]
        assert states.correct.tolist() == [True, False, False]
        assert states.counted.tolist() == [True, True, False]

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_agrees_with_the_loss_and_with_torch(self, dtype, monkeypatch):
        """settled is where the loss is clipped, kl what it clips, log_prob minus torch's cross-entropy."""
        monkeypatch.setattr(diagnostics, "BLOCK_ELEMENTS", 5 * 9)
        logits = LOGITS.to(dtype)
        config = OverToneConfig(epsilon=0.2)
        states = token_states(logits, LABELS, config)
        loss = overtone_loss(logits, LABELS, epsilon=0.2, reduction="none")
        assert torch.equal(states.settled, (loss == 0.2) & (LABELS != -100))
        assert torch.equal(torch.where(states.settled, 0.2, states.kl), loss)
        cross_entropy = F.cross_entropy(logits.flatten(0, 1).to(loss.dtype), LABELS.flatten(), reduction="none")
        torch.testing.assert_close(states.log_prob.flatten(), -cross_entropy)
        assert torch.equal(states.correct, (logits.argmax(dim=-1) == LABELS))
        assert states.mixed.any()
        assert not states.mixed.all()

    def test_gradient_tells_the_same_story(self):
        """Settled tokens are those without gradient; where not mixed the gradient is cross-entropy's."""
        config = OverToneConfig(epsilon=0.2)
        logits = LOGITS.double().requires_grad_()
        overtone_loss(logits, LABELS, reduction="sum", **config.as_kwargs()).backward()
        plain = LOGITS.double().requires_grad_()
        F.cross_entropy(plain.flatten(0, 1), LABELS.flatten(), reduction="sum").backward()
        states = token_states(LOGITS.double(), LABELS, config)
        silent = (logits.grad == 0).all(dim=-1)
        assert torch.equal(silent, states.settled | ~states.counted)
        untouched = states.counted & ~states.settled & ~states.mixed
        torch.testing.assert_close(logits.grad[untouched], plain.grad[untouched])

    def test_ablations(self):
        """check=False mixes everywhere; reference logits decide what is kept; epsilon 0 settles nothing."""
        assert token_states(LOGITS, LABELS, OverToneConfig(check=False)).mixed.sum() == (LABELS != -100).sum()
        flat = torch.zeros_like(LOGITS)
        assert (token_states(LOGITS, LABELS, reference_logits=flat).kept[LABELS != -100] == 9).all()
        assert not token_states(LOGITS, LABELS, OverToneConfig(epsilon=0.0)).settled.any()

    def test_nan_is_neither_settled_nor_correct(self):
        """A broken model's token shows as NaN and as nothing good."""
        states = token_states(torch.tensor([[math.nan, 0.0]]), torch.tensor([1]))
        assert states.kl.isnan().all()
        assert states.log_prob.isnan().all()
        assert not (states.settled | states.mixed | states.correct).any()

    def test_with_a_holding_config_on_several_ranks(self, monkeypatch):
        """Looking at tokens holds nothing, so a config that holds is no error where a hold would be."""
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        states = token_states(LOGITS, LABELS, OverToneConfig(hold="settled"))
        assert torch.equal(states.kl, token_states(LOGITS, LABELS).kl)

    def test_a_hold_that_waits_for_first_choices_settles_no_other(self):
        """As in the loss: below epsilon and behind another token is not settled."""
        config = OverToneConfig(epsilon=99.0, hold="correct")
        states = token_states(LOGITS, LABELS, config)
        assert torch.equal(states.settled, states.correct)
        assert 0 < states.settled.sum() < states.counted.sum()

    def test_empty(self):
        """No tokens give empty fields."""
        states = token_states(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))
        assert states.kl.shape == states.settled.shape == (0,)

    def test_bad_input(self):
        """Errors are the loss's own."""
        with pytest.raises(ValueError, match=r"labels must lie in \[0, 9\)"):
            token_states(LOGITS, LABELS + 9)
        for config in ({}, {"lam": 0.5}):
            with pytest.raises(TypeError, match="config must be an OverToneConfig or None, got dict"):
                token_states(LOGITS, LABELS, config)


@pytest.mark.parametrize(("label", "got"), [(-100, "-100"), (9, "9")])
def test_underfitting_of_a_label_that_is_no_token(label, got):
    with pytest.raises(ValueError, match=rf"labels must lie in \[0, 9\), got {got}"):
        underfitting_degree(LOGITS, LOGITS, torch.full(LABELS.shape, label))
