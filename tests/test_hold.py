"""Held steps on real models with real optimisers: no gradient, so no weight moves."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.distributed
from peft import LoraConfig, get_peft_model
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from overtone import OverToneConfig, OverToneLoss, linear_overtone_loss, overtone_loss
from overtone.functional import reference_loss

OPTIMISERS = {
    "Adam": lambda params: torch.optim.Adam(params, lr=0.01),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1),
    "SGD with momentum": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9),
}
TOKENS = torch.tensor([[5, 9, 2, 7, 7, 1]])
LABELS = torch.tensor([[-100, -100, 2, 7, 7, 1]])


def tiny_llama(layers=2):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    return LlamaForCausalLM(config)


def tiny_lora():
    model = get_peft_model(tiny_llama(), LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "v_proj", "lm_head"]))
    return model.train()


def model_loss(model, loss=overtone_loss, labels=LABELS, **arguments):
    shifted = torch.cat([labels[:, 1:], labels.new_full((1, 1), -100)], dim=1)
    return loss(model(TOKENS).logits, shifted, **arguments)


def weights(model):
    return copy.deepcopy(model.state_dict())


def equal(before, after):
    return all(torch.equal(before[name], after[name]) for name in before)


def train_until_held(model, optimiser, limit=300, **arguments):
    """Steps until a backward leaves every gradient None; the optimiser has momentum by then."""
    for step in range(limit):
        optimiser.zero_grad()
        model_loss(model, **arguments).backward()
        if all(parameter.grad is None for parameter in model.parameters()):
            return step
        optimiser.step()
    raise AssertionError(f"not held after {limit} steps")


class TestHeldStep:
    @pytest.mark.parametrize("name", OPTIMISERS)
    @pytest.mark.parametrize("build", [tiny_llama, tiny_lora])
    def test_weights_stay_and_move_again(self, build, name):
        """Once every token is settled no optimiser moves a bit; a new label moves the weights again."""
        model = build()
        optimiser = OPTIMISERS[name]([p for p in model.parameters() if p.requires_grad])
        assert train_until_held(model, optimiser, hold="settled") > 1
        before = weights(model)
        for _ in range(3):
            optimiser.zero_grad()
            model_loss(model, hold="settled").backward()
            optimiser.step()
        assert equal(before, weights(model))

        new_labels = LABELS.clone()
        new_labels[0, -1] = 30
        optimiser.zero_grad()
        model_loss(model, labels=new_labels, hold="settled").backward()
        optimiser.step()
        assert not equal(before, weights(model))

    def test_without_the_hold_adam_drifts(self):
        """The reason for it: on exact zeros Adam's momentum moves the weights on."""
        model = tiny_llama()
        optimiser = OPTIMISERS["Adam"](model.parameters())
        train_until_held(model, optimiser, hold="settled")
        before = weights(model)
        optimiser.zero_grad()
        model_loss(model).backward()
        assert all((parameter.grad == 0).all() for parameter in model.parameters() if parameter.grad is not None)
        optimiser.step()
        assert not equal(before, weights(model))

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_gradient_checkpointing(self, reentrant):
        """Both kinds of checkpointing keep the hold, also the reentrant one, which turns missing gradients to zeros."""
        model = tiny_llama().train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        optimiser = OPTIMISERS["AdamW"](model.parameters())
        train_until_held(model, optimiser, hold="settled")
        before = weights(model)
        optimiser.step()
        assert equal(before, weights(model))

    def test_reentrant_checkpoint_around_the_head(self):
        """Also where the logits themselves come out of a function that would make zeros of a missing gradient."""
        head = torch.nn.Linear(4, 3)
        inputs = torch.randn(2, 4, requires_grad=True)
        logits = checkpoint(head, inputs, use_reentrant=True)
        overtone_loss(logits, logits.argmax(dim=1), epsilon=50.0, hold="settled").backward()
        assert head.weight.grad is None
        assert inputs.grad is None

    def test_compiled_model(self):
        """A compiled model in front of the loss keeps the hold."""
        model = tiny_llama(layers=1)
        optimiser = OPTIMISERS["Adam"](model.parameters())
        train_until_held(model, optimiser, hold="settled")
        compiled = torch.compile(model, backend="aot_eager")
        optimiser.zero_grad()
        model_loss(compiled, hold="settled").backward()
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_another_loss_beside_it_still_counts(self):
        """Only this loss lets go: a regulariser added to it still sends its gradient."""
        logits = torch.zeros(2, 3, requires_grad=True)
        held = overtone_loss(logits, torch.tensor([0, 1]), epsilon=9.0, hold="settled")
        (held + logits.sum()).backward()
        assert torch.equal(logits.grad, torch.ones(2, 3))


class TestDecision:
    """p = (0.96, 0.04) and (0.9, 0.1): KL 0.0408 and 0.1054 with epsilon 0.05, mean 0.0731."""

    logits = torch.tensor([[0.96, 0.04], [0.9, 0.1], [0.5, 0.5]]).log()
    labels = torch.tensor([0, 0, -100])

    @pytest.mark.parametrize("loss", [overtone_loss, reference_loss])
    @pytest.mark.parametrize(
        ("epsilon", "hold", "held"),
        [
            (0.05, False, False),
            (0.05, True, False),
            (0.2, True, True),
            (0.2, False, False),
            (0.05, 0.073, False),
            (0.05, 0.0732, True),
            (0.0, 0.0732, True),
            (0.0, True, False),
        ],
    )
    @pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
    def test_whole_call(self, loss, epsilon, hold, held, reduction):
        """True waits for every counted token, a number for their mean KL; the value is the same either way."""
        logits = self.logits.clone().requires_grad_()
        arguments = {"epsilon": epsilon, "reduction": reduction}
        value = loss(logits, self.labels, hold=hold, **arguments)
        value.sum().backward()
        assert (logits.grad is None) is held
        assert torch.equal(value, loss(self.logits, self.labels, **arguments))

    def test_epsilon_that_is_the_kl(self):
        """All decisions are made with the KL as it is returned, so that zeros are never sent where a hold is due."""
        for seed in range(50):
            generator = torch.Generator().manual_seed(seed)
            logits = torch.randn(1, 30, generator=generator).requires_grad_()
            epsilon = overtone_loss(logits.detach(), torch.tensor([3]), epsilon=0.0).item()
            for reduction in ("none", "mean"):
                logits.grad = None
                loss = overtone_loss(logits, torch.tensor([3]), epsilon=epsilon, hold="settled", reduction=reduction)
                loss.sum().backward()
                assert logits.grad is not None
                assert logits.grad.any()

    def test_no_counted_token_needs_nothing(self):
        """A micro-batch without labels is held: zeros from it would move Adam."""
        logits = torch.zeros(2, 3, requires_grad=True)
        loss = overtone_loss(logits, torch.tensor([-100, -100]), hold="settled")
        loss.backward()
        assert loss == 0
        assert logits.grad is None

    def test_nan_is_never_settled(self):
        """A broken model is not declared finished."""
        for hold in (True, 0.5):
            logits = torch.tensor([[math.nan, 0.0]], requires_grad=True)
            overtone_loss(logits, torch.tensor([0]), hold=hold).backward()
            assert logits.grad is not None

    def test_without_grad(self):
        """Evaluation with a held loss has no graph to cut and stays without one."""
        assert not overtone_loss(self.logits, self.labels, epsilon=9.0, hold="settled").requires_grad


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
class TestDistributed:
    def test_one_rank_waits_for_nobody(self):
        """A world of one, as launchers make it on one device, holds."""
        logits = torch.zeros(1, 3, requires_grad=True)
        overtone_loss(logits, torch.tensor([0]), epsilon=9.0, hold="settled").backward()
        assert logits.grad is None

    def test_ddp_without_hold_gets_every_gradient(self):
        """Settled tokens send zeros, which DDP reduces as usual."""
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 3))
        criterion = OverToneLoss()
        for _ in range(2):
            criterion(model(torch.ones(2, 4)), torch.tensor([0, 1])).backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


class TestFirstChoices:
    """A hold that waits until greedy decoding says the labels."""

    LOGITS = torch.tensor([[2.0, 2.1, -9.0], [6.0, -9.0, -9.0]])
    """Both rows are close to the label 0; in the first another token is a little ahead."""

    @pytest.mark.parametrize("hold", ["settled", 5.0])
    @pytest.mark.parametrize("variant", ["overtone", "reference", "linear"])
    def test_waits_for_every_token(self, variant, hold):
        """A step in which each hold would hold goes on while one label is second; without the word it is held."""
        for winner, is_free in ((2.1, True), (1.9, False)):
            logits = self.LOGITS.clone()
            logits[0, 1] = winner
            for own, waits in ((("correct", hold), True), (hold, False)):
                leaf = logits.clone().requires_grad_()
                labels = torch.tensor([0, 0])
                if variant == "linear":
                    loss = linear_overtone_loss(leaf, torch.eye(3), labels, chunk_size=1, epsilon=5.0, hold=own)
                else:
                    function = {"overtone": overtone_loss, "reference": reference_loss}[variant]
                    loss = function(leaf, labels, epsilon=5.0, hold=own)
                loss.backward()
                assert (leaf.grad is not None) == (is_free and waits)

    def test_alone(self):
        """No distance counts, only whether every label is the first choice."""
        for winner, is_held in ((2.1, False), (1.9, True)):
            leaf = torch.tensor([[2.0, winner, 0.0]], requires_grad=True)
            overtone_loss(leaf, torch.tensor([0]), epsilon=0.0, hold="correct").backward()
            assert (leaf.grad is None) == is_held

    def test_several_conditions_must_all_be_true(self):
        """Settled and a mean of 0.01, say; each alone would hold."""
        logits = torch.tensor([[2.0, 1.0, 0.0]])
        kl = overtone_loss(logits, torch.tensor([0]), epsilon=0.0).item()
        for mean, is_held in ((kl / 2, False), (kl * 2, True)):
            leaf = logits.clone().requires_grad_()
            overtone_loss(leaf, torch.tensor([0]), epsilon=9.0, hold=("settled", mean)).backward()
            assert (leaf.grad is None) == is_held

    @pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
    @pytest.mark.parametrize("hold", ["settled", "correct", 0.2, 2.3, ("correct", "settled"), ("correct", 2.3)])
    def test_with_another_models_logits(self, hold, reduction):
        """The loss with reference_logits holds and clips where the literal one does."""
        generator, labels = torch.Generator().manual_seed(0), torch.tensor([2, -100, 0])
        outcomes = set()
        for label_logit in (0.0, 1.0, 4.0):
            logits, unedited = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
            logits[[0, 2], labels[[0, 2]]] += label_logit
            settings = {"epsilon": 0.4, "hold": hold, "reduction": reduction, "reference_logits": unedited, "lam": 0.9}
            leaves = [logits.clone().requires_grad_() for _ in range(2)]
            values = [overtone_loss(leaves[0], labels, **settings), reference_loss(leaves[1], labels, **settings)]
            torch.testing.assert_close(*values)
            for value in values:
                value.sum().backward()
            outcomes.add(leaves[0].grad is None)
            assert (leaves[0].grad is None) == (leaves[1].grad is None)
            if leaves[0].grad is not None:
                torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
        assert outcomes == {True, False}

    def test_ignored_tokens_are_not_waited_for(self):
        """What is no label need not be right."""
        leaf = self.LOGITS.clone().requires_grad_()
        overtone_loss(leaf, torch.tensor([-100, 0]), epsilon=5.0, hold=("settled", "correct")).backward()
        assert leaf.grad is None

    @pytest.mark.parametrize("name", OPTIMISERS)
    def test_a_token_that_is_close_but_second_is_pushed_on(self, name):
        """Below epsilon and behind another token it is not settled: it goes on until it leads, and is held there."""
        logits = self.LOGITS.clone().requires_grad_()
        optimiser = OPTIMISERS[name]([logits])
        for _ in range(200):
            optimiser.zero_grad()
            overtone_loss(logits, torch.tensor([0, 0]), epsilon=5.0, hold=("settled", "correct")).backward()
            optimiser.step()
        assert logits.grad is None
        assert logits[0].argmax() == 0

    @pytest.mark.parametrize("loss", [overtone_loss, reference_loss])
    def test_clips_only_what_is_correct(self, loss):
        """The word says too which tokens are let go, held or not; a tie is not a win."""
        logits = torch.cat([self.LOGITS, torch.tensor([[2.0, 2.0, -9.0]])]).requires_grad_()
        settings, labels = {"epsilon": 5.0, "hold": "correct"}, torch.tensor([0, 0, 0])
        values = loss(logits, labels, reduction="none", **settings)
        values.sum().backward()
        unclipped = loss(logits.detach(), labels, epsilon=0.0, reduction="none")
        torch.testing.assert_close(values.detach(), torch.stack([unclipped[0], torch.tensor(5.0), unclipped[2]]))
        assert logits.grad.any(dim=1).tolist() == [True, False, True]
        leaf = logits.detach().clone().requires_grad_()
        total = loss(leaf, labels, reduction="sum", **settings)
        total.backward()
        torch.testing.assert_close(total.detach(), values.detach().sum())
        torch.testing.assert_close(leaf.grad, logits.grad)


class TestOldNames:
    """hold_settled and hold_correct, with a DeprecationWarning."""

    def test_beside_the_new_name_they_are_refused(self):
        """Which of the two is meant, nobody can say."""
        with pytest.raises(ValueError, match="hold and hold_settled are both given: keep hold alone, got 'correct'"):
            overtone_loss(torch.zeros(1, 3), torch.tensor([0]), hold="correct", hold_settled=False)

    VALUES = [  # noqa: RUF012
        ({"hold_settled": False}, None),
        ({"hold_settled": True}, "settled"),
        ({"hold_settled": 0.2}, 0.2),
        ({"hold_settled": 0.2, "hold_correct": True}, ("correct", 0.2)),
        ({"hold_settled": True, "hold_correct": True}, ("correct", "settled")),
        ({"hold_settled": math.inf, "hold_correct": True}, "correct"),
        ({"hold_settled": False, "hold_correct": False}, None),
    ]

    @pytest.mark.parametrize(("old", "hold"), VALUES)
    def test_of_a_config(self, old, hold):
        with pytest.warns(DeprecationWarning, match=r"is now called hold="):
            config = OverToneConfig(**old)
        assert config == OverToneConfig(hold=hold)
        with pytest.warns(DeprecationWarning, match="is now a part of hold"):
            read = {"hold_settled": config.hold_settled, "hold_correct": config.hold_correct}
        assert read == {"hold_settled": False, "hold_correct": False, **old}

    @pytest.mark.parametrize(
        ("old", "hold"),
        [({"hold_settled": 0.3}, ("correct", 0.3)), ({"hold_settled": False}, None), ({"hold_correct": False}, 0.1)],
    )
    def test_of_a_preset_they_change_their_part(self, old, hold):
        for make in (
            OverToneConfig.recommended,
            lambda method, **old: dataclasses.replace(OverToneConfig.recommended(method), **old),
        ):
            with pytest.warns(DeprecationWarning, match="is now called hold="):
                assert make("ft-m", **old).hold == hold

    def test_of_the_losses(self):
        logits, labels = torch.tensor([[9.0, 0.0]]), torch.tensor([0])
        for loss in (
            overtone_loss,
            reference_loss,
            lambda s, y, **old: linear_overtone_loss(s, torch.eye(2), y, **old),
        ):
            leaf = logits.clone().requires_grad_()
            with pytest.warns(DeprecationWarning, match="hold_settled=True is now called hold='settled'"):
                loss(leaf, labels, hold_settled=True).backward()
            assert leaf.grad is None

    def test_a_wait_for_first_choices_without_a_hold_says_that_it_does_nothing(self):
        with pytest.warns(UserWarning, match="hold_correct=True does nothing without a hold"):
            overtone_loss(torch.zeros(1, 3), torch.tensor([0]), hold_correct=True)

    @pytest.mark.parametrize(
        ("old", "error", "message"),
        [
            ({"hold_settled": -1.0}, ValueError, "hold_settled must be .* got -1.0"),
            ({"hold_settled": math.inf}, ValueError, "hold_settled must be .* got inf"),
            ({"hold_settled": math.nan, "hold_correct": True}, ValueError, "hold_settled must be .* got nan"),
            ({"hold_settled": None}, TypeError, "hold_settled must be .* of type NoneType"),
            ({"hold_correct": 1}, TypeError, "hold_correct must be True or False, got 1"),
        ],
    )
    def test_bad_values(self, old, error, message):
        with pytest.raises(error, match=message):
            overtone_loss(torch.zeros(1, 3), torch.tensor([0]), **old)
