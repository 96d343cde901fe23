"""OverToneConfig and OverToneLoss in the place of torch.nn.CrossEntropyLoss."""

import copy
import dataclasses
import pickle

import pytest
import torch

from overtone import OverToneConfig, OverToneLoss, overtone_loss
from overtone.config import RECOMMENDED

LOGITS = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, -100, 3, 4, 2])


class TestConfig:
    @pytest.mark.parametrize(
        ("method", "epsilon", "n_sigma"),
        [("ft-m", 0.01, 0.5), ("lora", 0.05, 0.5), ("melo", 0.05, 1), ("wise", 0.05, 1)],
    )
    def test_presets_are_the_papers(self, method, epsilon, n_sigma):
        """Appendix B.1."""
        assert OverToneConfig.preset(method) == OverToneConfig(epsilon=epsilon, n_sigma=n_sigma, lam=0.1)

    def test_preset_with_changes(self):
        """Any value of a preset can be set otherwise."""
        changed = OverToneConfig.preset("wise", lam=0.3, hold="settled")
        assert changed == OverToneConfig(epsilon=0.05, n_sigma=1.0, lam=0.3, hold="settled")

    @pytest.mark.parametrize(
        ("hold", "value"),
        [
            (False, None),
            (True, "settled"),
            (["correct"], "correct"),
            ((0.2, "correct"), ("correct", 0.2)),
            (["settled", 1, "correct"], ("correct", "settled", 1.0)),
        ],
    )
    def test_a_hold_is_written_in_one_way(self, hold, value):
        """So that equal settings are equal."""
        assert OverToneConfig(hold=hold).hold == value
        assert OverToneConfig(hold=hold) == OverToneConfig(hold=value)

    def test_unknown_preset(self):
        """The message lists the known ones."""
        with pytest.raises(ValueError, match=r"method must be one of \['ft-m', 'lora', 'melo', 'wise'\], got 'rome'"):
            OverToneConfig.preset("rome")
        with pytest.raises(ValueError, match=r"method must be one of .* got \['lora'\]"):
            OverToneConfig.preset(["lora"])

    @pytest.mark.parametrize(("method", "n_sigma"), [("lora", 0.5), ("melo", 1), ("wise", 1)])
    def test_recommended_settings(self, method, n_sigma):
        """Half the true token in every target, until each label is the first choice and near its target."""
        assert OverToneConfig.recommended(method) == OverToneConfig(
            epsilon=0, n_sigma=n_sigma, lam=0.5, check=False, hold=("correct", 0.3)
        )

    def test_recommended_settings_of_ft_m(self):
        """Nearer to the paper's: the clip and the check stay."""
        assert OverToneConfig.recommended("ft-m") == OverToneConfig.preset("ft-m", lam=0.5, hold=("correct", 0.1))

    @pytest.mark.parametrize("method", RECOMMENDED)
    def test_recommended_settings_can_be_changed(self, method):
        """They wait for first choices, unlike the paper's."""
        assert "correct" in OverToneConfig.recommended(method).hold
        assert OverToneConfig.recommended(method, epsilon=0.3).epsilon == 0.3

    def test_nothing_is_recommended_for_an_unknown_method(self):
        with pytest.raises(ValueError, match=r"method must be one of \['ft-m', 'lora', 'melo', 'wise'\], got 'rome'"):
            OverToneConfig.recommended("rome")

    def test_frozen(self):
        """Settings do not change under a running loss."""
        with pytest.raises(dataclasses.FrozenInstanceError):
            OverToneConfig().epsilon = 0.1

    @pytest.mark.parametrize(
        ("values", "error"),
        [
            ({"epsilon": -1}, ValueError),
            ({"n_sigma": 0}, ValueError),
            ({"lam": 2}, ValueError),
            ({"hold": -0.5}, ValueError),
            ({"hold": float("inf")}, ValueError),
            ({"hold": ("correct", float("nan"))}, ValueError),
            ({"hold": "sometimes"}, ValueError),
            ({"epsilon": 10**400}, ValueError),
            ({"hold": ("correct", 10**400)}, ValueError),
            ({"epsilon": "0.1"}, TypeError),
            ({"check": 1}, TypeError),
        ],
    )
    def test_validated(self, values, error):
        """A bad value is refused when the config is made, by its name."""
        with pytest.raises(error, match=next(iter(values))):
            OverToneConfig(**values)


class TestModule:
    @pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
    def test_same_call_as_cross_entropy(self, reduction):
        """Same call, same shapes; with epsilon 0 and lam 1 also the same numbers."""
        expected = torch.nn.CrossEntropyLoss(reduction=reduction)(LOGITS, LABELS)
        module = OverToneLoss(OverToneConfig(epsilon=0, lam=1), reduction=reduction)
        torch.testing.assert_close(module(LOGITS, LABELS), expected)

    def test_settings_reach_the_loss(self):
        """Every field of the config, ignore_index and reduction are used."""
        config = OverToneConfig(epsilon=0.3, n_sigma=None, lam=0.7, check=False)
        module = OverToneLoss(config, ignore_index=3, reduction="sum")
        labels = LABELS.where(LABELS != -100, 3)
        expected = overtone_loss(
            LOGITS, labels, epsilon=0.3, n_sigma=None, lam=0.7, check=False, ignore_index=3, reduction="sum"
        )
        assert torch.equal(module(LOGITS, labels), expected)
        assert not torch.equal(OverToneLoss(ignore_index=3, reduction="sum")(LOGITS, labels), expected)

    def test_reference_logits(self):
        """The unedited model's logits can go through the module too."""
        other = LOGITS.flip(1)
        expected = overtone_loss(LOGITS, LABELS, reference_logits=other)
        assert torch.equal(OverToneLoss()(LOGITS, LABELS, other), expected)

    def test_hold(self):
        """That of the config reaches the graph."""
        logits = LOGITS.clone().requires_grad_()
        OverToneLoss(OverToneConfig(epsilon=99.0, hold="settled"))(logits, LABELS).backward()
        assert logits.grad is None

    def test_repr(self):
        """A log line of the module says everything about it."""
        assert repr(OverToneLoss()) == (
            "OverToneLoss(epsilon=0.05, n_sigma=0.5, lam=0.1, check=True, hold=None, "
            "anchor=0.0, anchor_epsilon=0.05, "
            "ignore_index=-100, reduction='mean')"
        )

    def test_travels(self):
        """It pickles, copies and leaves no trace in a state_dict."""
        module = OverToneLoss(OverToneConfig.preset("ft-m"), reduction="sum")
        for twin in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
            assert torch.equal(twin(LOGITS, LABELS), module(LOGITS, LABELS))
        assert module.state_dict() == {}
        assert list(module.parameters()) == []

    def test_default_arguments_of_cross_entropy_are_accepted(self):
        """A call that spells out CrossEntropyLoss's defaults still works."""
        OverToneLoss(weight=None, label_smoothing=0.0, size_average=None, reduce=None, ignore_index=-100)

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"weight": torch.ones(5)}, ValueError, "weight must be None"),
            ({"label_smoothing": 0.1}, ValueError, "label_smoothing must be 0, got 0.1"),
            ({"size_average": False}, ValueError, "size_average and reduce must be None"),
            ({"reduce": True}, ValueError, "size_average and reduce must be None"),
            ({"reduction": "average"}, ValueError, "reduction must be one of"),
            ({"ignore_index": "x"}, TypeError, "ignore_index must be an integer label, got 'x'"),
            ({"config": torch.ones(5)}, TypeError, "config must be an OverToneConfig or None, got Tensor"),
            ({"config": {"epsilon": 0.1}}, TypeError, "config must be an OverToneConfig or None, got dict"),
            ({"shard": 3}, TypeError, "shard must be a VocabularyShard or None, got 3"),
            ({"hold_group": 3}, TypeError, "hold_group must be a torch.distributed.ProcessGroup or None, got 3"),
            ({"hold_group": torch.zeros(2)}, TypeError, "hold_group must be a torch.distributed.ProcessGroup or None"),
        ],
    )
    def test_what_it_cannot_honour_raises(self, arguments, error, message):
        """Nothing is ignored in silence."""
        with pytest.raises(error, match=message):
            OverToneLoss(**arguments)
