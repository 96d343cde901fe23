"""Perplexity against transformers' own loss, text by text."""

from __future__ import annotations

import math

import mini_lab
import pytest
import torch

from overtone.lab.score.perplexity import perplexity

TEXTS = ["the head of acme is bo cy .", "zed likes tea", "ana", "dan likes rain . eve likes milk . bo runs acme"]


class TestPerplexity:
    @pytest.mark.parametrize("batch", [1, 3, 32])
    def test_is_that_of_every_token_but_the_first(self, batch):
        model, tokenizer = mini_lab.random_model(), mini_lab.tokenizer()
        nats, tokens = 0.0, 0
        for text in TEXTS:
            ids = torch.tensor([tokenizer(text).input_ids])
            if ids.shape[1] > 1:
                nats += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
                tokens += ids.shape[1] - 1
        assert perplexity(model, tokenizer, TEXTS, batch=batch) == pytest.approx(math.exp(nats / tokens), rel=1e-5)

    def test_of_a_broken_model_is_infinite(self):
        """exp(1e4 nats) is beyond floating point."""
        model = mini_lab.random_model()
        with torch.no_grad():
            model.lm_head.weight.mul_(1e4)
        assert perplexity(model, mini_lab.tokenizer(), TEXTS) == math.inf

    @pytest.mark.parametrize("texts", [[], ["ana"]])
    def test_nothing_to_predict_is_refused(self, texts):
        with pytest.raises(ValueError, match=f"texts are {len(texts)} without a token that another precedes"):
            perplexity(mini_lab.random_model(), mini_lab.tokenizer(), texts)
