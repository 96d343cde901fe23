"""What the loss does to each token: what diagnostics, callbacks and users' loggers read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from overtone.checks import check_labels, check_tensors, flatten_tokens, working_dtype
from overtone.config import OverToneConfig, checked_config
from overtone.functional import ground_truth_check, mix_target, top_n_sigma_filter
from overtone.hold import is_settled, read_hold
from overtone.loss import overtone_loss
from overtone.shard import VocabularyShard, refuse_reference_with_shard, take_shard

__all__ = ["TokenStates", "token_states", "underfitting_degree"]

BLOCK_ELEMENTS = 2**19
"""Logits of as many rows as are looked at together."""


@dataclass(frozen=True)
class TokenStates:
    """The state of each token, every field of the labels' shape.

    Attributes:
        kl: KL(target || prediction) before the clip, in nats; 0 where ignored.
        log_prob: log-probability of the true token, in nats; 0 where ignored.
        settled: `overtone.hold.is_settled`: its KL is below epsilon, so it sends no gradient.
        mixed: the ground-truth check passed, so the target mixes in the model's own distribution.
        kept: how many tokens the top-n-sigma filter kept; 0 where ignored.
        correct: the true token is the model's most probable one.
        counted: the label is not ignore_index; settled, mixed and correct are False elsewhere.
    """

    kl: Tensor
    log_prob: Tensor
    settled: Tensor
    mixed: Tensor
    kept: Tensor
    correct: Tensor
    counted: Tensor


@torch.no_grad()
def token_states(
    logits: Tensor,
    labels: Tensor,
    config: OverToneConfig | None = None,
    *,
    reference_logits: Tensor | None = None,
    ignore_index: int = -100,
    shard: VocabularyShard | None = None,
) -> TokenStates:
    """How the loss sees each token; no gradient, and no more memory than a block of rows.

    Args:
        logits: ``(..., V)``.
        labels: ``(...)``, token ids or ignore_index.
        config: the settings of the loss; None for the defaults. check=False counts every token as mixed.
        reference_logits: ``(..., V)``, the unedited model's logits, if the loss uses them.
        ignore_index: label of positions that do not count.
        shard: as in `overtone.overtone_loss`; every rank then sees a block of whole rows at a time.

    Raises:
        ValueError, TypeError: as `overtone.overtone_loss`.
    """
    config = checked_config(config)
    logits, labels, shard = take_shard(logits, labels, shard)
    if reference_logits is not None:
        refuse_reference_with_shard(shard)
    check_tensors(logits, labels, reference_logits, may_be_empty=shard is not None)
    vocabulary = logits.shape[-1] if shard is None else shard.size
    token_logits, token_labels = flatten_tokens(logits, labels)
    reference = None if reference_logits is None else reference_logits.reshape(token_logits.shape)
    check_labels(token_labels, vocabulary, ignore_index)
    counted = token_labels != ignore_index
    settings = {**config.as_kwargs(), "epsilon": 0.0, "hold": None, "anchor": 0.0}
    kl = overtone_loss(
        token_logits,
        token_labels,
        reference_logits=reference,
        ignore_index=ignore_index,
        reduction="none",
        shard=shard,
        **settings,
    )
    log_prob = torch.zeros_like(kl)
    mixed, correct = torch.zeros_like(counted), torch.zeros_like(counted)
    kept = torch.zeros_like(token_labels)
    size = max(1, BLOCK_ELEMENTS // vocabulary)
    for rows in torch.split(counted.nonzero().squeeze(1), size):
        scores, truth = token_logits[rows].to(working_dtype(logits)), token_labels[rows]
        scores = scores if shard is None else shard.whole_rows(scores)
        source = scores if reference is None else reference[rows].to(scores.dtype)
        filtered = top_n_sigma_filter(source, config.n_sigma)
        candidate = mix_target(filtered.softmax(dim=1), truth, config.lam)
        log_prob[rows] = scores.log_softmax(dim=1).gather(1, truth.unsqueeze(1)).squeeze(1)
        passed = ground_truth_check(candidate, truth) if config.check else torch.ones_like(truth, dtype=torch.bool)
        mixed[rows] = passed & ~kl[rows].isnan()
        kept[rows] = (filtered > float("-inf")).sum(dim=1)
        correct[rows] = ground_truth_check(scores, truth) & ~kl[rows].isnan()
    holding = read_hold(config.hold)
    settled = counted & is_settled(kl, config.epsilon, correct if holding.correct else None)
    fields = (kl, log_prob, settled, mixed, kept, correct, counted)
    return TokenStates(*(field.reshape(labels.shape) for field in fields))


@torch.no_grad()
def underfitting_degree(unedited_logits: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """How much less sure a model is of each target token than the unedited model was of its own greedy token.

    `UD_i = log pi_0(greedy_i | c_i) - log pi_t(y_i | c_i)`, section 3.1 of the paper; negative means overfitted.

    Args:
        unedited_logits: of the model before the edit, ``(..., V)``.
        logits: of the model at step t, at the same positions, ``(..., V)``.
        labels: target tokens y, ``(...)``, none of them ignored.

    Returns:
        UD in nats, ``(...)``.

    Raises:
        ValueError, TypeError: as `overtone.overtone_loss`, and for unedited_logits of another shape.
    """
    check_tensors(logits, labels)
    check_labels(labels, logits.shape[-1], None)
    if not isinstance(unedited_logits, Tensor):
        raise TypeError(f"unedited_logits must be a torch.Tensor, got {type(unedited_logits).__name__}")
    if unedited_logits.shape != logits.shape:
        raise ValueError(
            f"unedited_logits must have the shape of logits {tuple(logits.shape)}, got {tuple(unedited_logits.shape)}"
        )
    dtype = working_dtype(logits)
    before = unedited_logits.to(dtype).log_softmax(dim=-1).amax(dim=-1)
    now = logits.to(dtype).log_softmax(dim=-1).gather(-1, labels.long().unsqueeze(-1)).squeeze(-1)
    return before - now
