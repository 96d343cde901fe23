"""The loss of a causal language model against transformers' own normalisation and the literal formulas."""

from __future__ import annotations

import inspect
import pickle

import numpy as np
import pytest
import tiny_models
import torch
import transformers
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutput, MoeCausalLMOutputWithPast

from overtone import OverToneConfig
from overtone.functional import reference_loss
from overtone.huggingface import causal_lm_loss, compute_loss_func

CROSS_ENTROPY = OverToneConfig(epsilon=0, lam=1)
VOCABULARY = 11


def logits_and_labels(batch: int = 3, length: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, length, VOCABULARY, generator=generator, dtype=torch.float64) * 3
    labels = torch.randint(0, VOCABULARY, (batch, length), generator=generator)
    labels[0, :3] = -100
    return logits.requires_grad_(), labels


class TestNormalisation:
    """With epsilon 0 and lam 1 the loss is cross-entropy, so transformers' own function is the reference."""

    @pytest.mark.parametrize(
        "num_items",
        [None, 7, np.int64(7), torch.tensor(7), torch.tensor([7]), torch.tensor([7, 5]), torch.tensor(3.5)],
        ids=["none", "int", "numpy", "0-d", "1-d", "1-d of two", "fraction"],
    )
    @pytest.mark.parametrize("shifted", [False, True])
    def test_value_gradient_and_shape_are_those_of_transformers(self, num_items, shifted):
        """Every kind of num_items_in_batch, with labels and with shift_labels."""
        if shifted and "shift_labels" not in inspect.signature(ForCausalLMLoss).parameters:
            pytest.skip(f"transformers {transformers.__version__} knows no shift_labels")
        logits, labels = logits_and_labels()
        given = {"labels": None, "shift_labels": labels} if shifted else {"labels": labels}
        ours = causal_lm_loss(logits, config=CROSS_ENTROPY, num_items_in_batch=num_items, **given)
        (gradient,) = torch.autograd.grad(ours.sum(), logits)
        theirs = ForCausalLMLoss(logits, vocab_size=VOCABULARY, num_items_in_batch=num_items, **given)
        (expected,) = torch.autograd.grad(theirs.sum(), logits)
        assert ours.shape == theirs.shape
        # transformers computes in float32.
        torch.testing.assert_close(ours.float(), theirs, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)

    def test_matches_the_literal_loss_on_the_shifted_tokens(self):
        """Position t is judged by the logits at t - 1, the last logits by nothing."""
        logits, labels = logits_and_labels()
        expected = reference_loss(logits[:, :-1], labels[:, 1:])
        torch.testing.assert_close(causal_lm_loss(logits, labels), expected)

    @pytest.mark.parametrize("num_items", [None, 0, torch.tensor(0), torch.tensor([0])])
    def test_no_token_is_zero_with_its_graph(self, num_items):
        """A batch in which everything is ignored gives 0 and a zero gradient, where transformers gives NaN."""
        logits, labels = logits_and_labels()
        loss = causal_lm_loss(logits, torch.full_like(labels, -100), num_items_in_batch=num_items)
        loss.sum().backward()
        assert loss.sum() == 0
        assert (logits.grad == 0).all()

    @pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), 10**400, "3", True])
    def test_a_number_of_tokens_that_makes_no_sense_is_refused(self, value):
        """A negative one would be gradient ascent."""
        with pytest.raises((ValueError, TypeError), match="num_items_in_batch must be"):
            causal_lm_loss(*logits_and_labels(), num_items_in_batch=value)

    def test_a_compiled_loss_takes_any_number_of_tokens(self):
        """Its value is no part of the graph, which an accumulating Trainer would compile anew in every step."""
        logits, labels = logits_and_labels()
        graphs = []

        def compiler(graph, _):
            graphs.append(graph)
            return graph.forward

        loss = torch.compile(causal_lm_loss, backend=compiler)
        counts = []
        for num_items in (5, 7, 9, 11):
            loss(logits, labels, num_items_in_batch=num_items)
            counts.append(len(graphs))
        assert counts[0] > 0
        assert counts[1] == counts[-1]

    def test_micro_batches_add_up_to_the_batch(self):
        """Ragged micro-batches, one of them all ignored, divided by the whole batch's tokens, give its gradient."""
        logits, labels = logits_and_labels(batch=4)
        labels[2] = -100
        (expected,) = torch.autograd.grad(causal_lm_loss(logits, labels), logits)
        items = labels[:, 1:].ne(-100).sum()
        for row in range(4):
            part = slice(row, row + 1)
            causal_lm_loss(logits[part], labels[part], num_items_in_batch=items).backward()
        torch.testing.assert_close(logits.grad, expected, rtol=1e-12, atol=1e-12)

    def test_held_loss_can_be_scaled_in_place(self):
        """Trainer multiplies the loss in place by the number of processes, a held one as well."""
        logits, labels = logits_and_labels()
        config = OverToneConfig(epsilon=100, hold="settled")
        for items in (None, 7):
            loss = causal_lm_loss(logits, labels, config, num_items_in_batch=items)
            loss *= 2
            loss.backward()
        assert logits.grad is None

    def test_observer_sees_training_steps_alone(self):
        """The logits and the next tokens, masked ones ignored; evaluation is not counted among the training tokens."""
        logits, labels = logits_and_labels()
        seen = []
        observer = lambda *tensors: seen.append(tensors)  # noqa: E731
        mask = torch.ones_like(labels)
        mask[1] = 0
        with torch.no_grad():
            causal_lm_loss(logits, labels, observer=observer)
        assert not seen
        causal_lm_loss(logits, labels, loss_mask=mask, observer=observer)
        ((seen_logits, next_tokens),) = seen
        assert torch.equal(seen_logits, logits)
        assert not seen_logits.requires_grad
        expected = torch.nn.functional.pad(labels.masked_fill(mask == 0, -100)[:, 1:], (0, 1), value=-100)
        assert torch.equal(next_tokens, expected)

    def test_logits_are_not_copied(self):
        """The labels are shifted, not the logits: what the loss keeps for its backward is the caller's own tensor."""
        logits, labels = logits_and_labels()
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda x: x):
            causal_lm_loss(logits, labels)
        large = [tensor for tensor in saved if tensor.numel() >= logits.numel() // 2]
        assert large
        assert all(tensor.data_ptr() == logits.data_ptr() for tensor in large)


class TestLabels:
    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
    @pytest.mark.parametrize("name", ["labels", "shift_labels"])
    def test_any_integers_are_token_ids(self, dtype, name):
        """Also those that ignore_index, which the shift and the mask fill in, does not fit into."""
        logits, labels = logits_and_labels()
        labels = labels.clamp(min=0)
        given = {"labels": None, "loss_mask": torch.rand(labels.shape) > 0.5}
        expected = causal_lm_loss(logits, **{**given, name: labels})
        assert causal_lm_loss(logits, **{**given, name: labels.to(dtype)}) == expected

    @pytest.mark.parametrize("name", ["labels", "shift_labels", "loss_mask"])
    def test_lists_are_refused(self, name):
        """By name; the shape and the device of a list are a guess."""
        logits, labels = logits_and_labels()
        given = {"labels": labels, name: labels.tolist()}
        with pytest.raises(TypeError, match=rf"{name.removeprefix('shift_')} must be a torch.Tensor.*got list"):
            causal_lm_loss(logits, **given)

    def test_class_probabilities_are_refused(self):
        """They are not rounded to token ids."""
        logits, labels = logits_and_labels()
        with pytest.raises(ValueError, match=r"labels must be integer token ids, got torch.float32"):
            causal_lm_loss(logits, labels.float())

    def test_a_batch_without_positions_is_zero(self):
        logits, labels = logits_and_labels()
        assert causal_lm_loss(logits[:, :0], labels[:, :0]) == 0

    def test_labels_without_a_sequence_are_refused(self):
        with pytest.raises(ValueError, match=r"labels must be \(batch, sequence\)"):
            causal_lm_loss(torch.zeros(VOCABULARY), torch.tensor(3))


class TestLossMask:
    def test_a_mask_of_zeros_and_ones_is_ignoring(self):
        """Weight 0 is the same as ignore_index, in value, gradient and normalisation."""
        logits, labels = logits_and_labels()
        mask = torch.rand(labels.shape, generator=torch.Generator().manual_seed(2)) > 0.5
        (expected,) = torch.autograd.grad(causal_lm_loss(logits, labels.masked_fill(~mask, -100)), logits)
        for kind in (torch.bool, torch.int64, torch.float32):
            (gradient,) = torch.autograd.grad(causal_lm_loss(logits, labels, loss_mask=mask.to(kind)), logits)
            torch.testing.assert_close(gradient, expected)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_masks_count_every_token(self, dtype):
        """The 1017 tokens of a mask of ones are divided by 1017, which bfloat16 cannot hold."""
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(1, 1018, VOCABULARY, generator=generator)
        labels = torch.randint(0, VOCABULARY, (1, 1018), generator=generator)
        mask = torch.ones(labels.shape)
        expected = causal_lm_loss(logits, labels, loss_mask=mask)
        torch.testing.assert_close(causal_lm_loss(logits, labels, loss_mask=mask.to(dtype)), expected)

    def test_weights_weigh_each_token(self):
        """The weighted mean of the token losses, or their weighted sum over num_items_in_batch."""
        logits, labels = logits_and_labels()
        weights = torch.rand(labels.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        tokens = reference_loss(logits[:, :-1], labels[:, 1:], reduction="none")
        total = (tokens * weights[:, 1:]).sum()
        counted = weights[:, 1:][labels[:, 1:] != -100].sum()
        torch.testing.assert_close(causal_lm_loss(logits, labels, loss_mask=weights), total / counted)
        torch.testing.assert_close(causal_lm_loss(logits, labels, loss_mask=weights, num_items_in_batch=5), total / 5)

    def test_shift_labels_take_a_mask_aligned_with_them(self):
        """The mask is shifted exactly when the labels are."""
        logits, labels = logits_and_labels()
        weights = torch.rand(labels.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        shift = lambda values, fill: torch.nn.functional.pad(values[:, 1:], (0, 1), value=fill)  # noqa: E731
        torch.testing.assert_close(
            causal_lm_loss(logits, None, shift_labels=shift(labels, -100), loss_mask=shift(weights, 0)),
            causal_lm_loss(logits, labels, loss_mask=weights),
        )

    def test_masked_tokens_do_not_keep_a_step_from_being_held(self):
        """Only the tokens that count decide on the hold."""
        logits, labels = logits_and_labels()
        best = logits.argmax(dim=-1)
        labels = torch.nn.functional.pad(best[:, :-1], (1, 0), value=-100)
        labels[:, 3] = (labels[:, 3] + 1) % VOCABULARY
        mask = torch.ones_like(labels)
        mask[:, 3] = 0
        config = OverToneConfig(epsilon=1.5, hold="settled")
        causal_lm_loss(logits, labels, config, loss_mask=mask).backward()
        assert logits.grad is None

    @pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
    def test_weights_that_make_no_sense_are_refused(self, weight):
        """Ascent on a clipped loss does nothing, so a negative weight is a mistake."""
        logits, labels = logits_and_labels()
        with pytest.raises(ValueError, match="loss_mask"):
            causal_lm_loss(logits, labels, loss_mask=torch.full(labels.shape, weight))

    def test_another_shape_is_refused(self):
        """No broadcasting: a mask for each sequence is not a mask for each token."""
        logits, labels = logits_and_labels()
        with pytest.raises(ValueError, match=r"loss_mask must have the shape of the labels \(3, 6\), got \(3, 1\)"):
            causal_lm_loss(logits, labels, loss_mask=torch.ones(3, 1))


class TestComputeLossFunc:
    def test_takes_model_outputs_dicts_and_tuples(self):
        """Whatever a model returns, the loss is that of its logits."""
        model = tiny_models.build()
        logits, labels = logits_and_labels()
        expected = causal_lm_loss(logits, labels, num_items_in_batch=7)
        compute = compute_loss_func(model=model)
        for outputs in (CausalLMOutput(logits=logits), {"logits": logits}, (logits,)):
            assert compute(outputs, labels, num_items_in_batch=7) == expected

    def test_can_be_pickled(self):
        """For the processes that a launcher spawns."""
        logits, labels = logits_and_labels()
        compute = compute_loss_func(OverToneConfig(epsilon=0.5))
        sent = pickle.loads(pickle.dumps(compute))
        outputs = CausalLMOutput(logits=logits)
        assert sent(outputs, labels) == compute(outputs, labels)

    def test_outputs_without_logits_are_refused_by_name(self):
        """A fused loss that never builds the logits cannot be replaced afterwards."""
        with pytest.raises(ValueError, match=r"Liger's fused_linear_cross_entropy, TRL's loss_type='chunked_nll'"):
            compute_loss_func()(CausalLMOutput(loss=torch.tensor(1.0)), torch.zeros(1, 2, dtype=torch.long))

    @pytest.mark.parametrize(
        ("outputs", "error"), [(None, TypeError), ((), ValueError), (torch.zeros(1, 2, 3), TypeError)]
    )
    def test_what_is_no_output_is_refused(self, outputs, error):
        with pytest.raises(error, match="outputs must"):
            compute_loss_func()(outputs, torch.zeros(1, 2, dtype=torch.long))

    @pytest.mark.parametrize(
        ("name", "value"),
        [("model", 5), ("router_aux_loss_coef", "x"), ("router_aux_loss_coef", float("nan")), ("observer", 3)],
    )
    def test_arguments_that_make_no_sense_are_refused(self, name, value):
        with pytest.raises((ValueError, TypeError), match=f"{name} must be"):
            compute_loss_func(**{name: value})

    def test_missing_labels_are_refused(self):
        """Trainer calls the function with labels=None when the batch has none."""
        logits, _ = logits_and_labels()
        with pytest.raises(ValueError, match="labels must be given"):
            compute_loss_func()(CausalLMOutput(logits=logits), None)

    def test_auxiliary_loss_is_added_and_never_dropped(self):
        """A mixture of experts keeps its load balancing; without its weight the call is refused."""
        logits, labels = logits_and_labels()
        outputs = MoeCausalLMOutputWithPast(logits=logits, aux_loss=torch.tensor(3.0))
        loss = compute_loss_func(router_aux_loss_coef=0.5)(outputs, labels)
        torch.testing.assert_close(loss, causal_lm_loss(logits, labels) + 1.5)
        with pytest.raises(ValueError, match="router_aux_loss_coef must be given"):
            compute_loss_func()(outputs, labels)

    @pytest.mark.parametrize("make", [compute_loss_func, lambda config: causal_lm_loss(*logits_and_labels(), config)])
    def test_a_config_of_another_type_is_refused(self, make):
        """Before anything is computed."""
        with pytest.raises(TypeError, match="config must be an OverToneConfig or None, got dict"):
            make({"epsilon": 0.1})
