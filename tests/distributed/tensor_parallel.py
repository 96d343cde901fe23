"""A transformers model loaded with ``tp_plan="auto"``: loss and gradients are those of the whole model.

No rank may make all the logits, and it need not be told.
"""

from __future__ import annotations

import copy
import tempfile

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from overtone import OverToneConfig
from overtone.huggingface import attach


def build() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def check(config: OverToneConfig, folder: str) -> None:
    whole = build()
    ids = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(1))
    with attach(whole, config):
        expected = whole(input_ids=ids, labels=ids)
    spread = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto").eval()
    with attach(spread, config):
        outputs = spread(input_ids=ids, labels=ids)
    assert outputs.logits is None, "a rank has made all the logits"
    torch.testing.assert_close(outputs.loss, expected.loss)
    expected.loss.backward()
    outputs.loss.backward()
    for (name, got), parameter in zip(spread.named_parameters(), whole.parameters(), strict=True):
        gradient = got.grad.full_tensor() if isinstance(got.grad, DTensor) else got.grad
        torch.testing.assert_close(gradient, parameter.grad, msg=lambda text, name=name: f"{name}: {text}")
    with torch.no_grad():
        assert spread(input_ids=ids).logits.shape == (2, 9, 61)


def from_pretrained() -> None:
    names = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(names)
    if dist.get_rank() == 0:
        copy.deepcopy(build()).save_pretrained(names[0])
    dist.barrier()
    for config in (OverToneConfig(), OverToneConfig(lam=0.5, check=False, epsilon=0.0)):
        check(config, str(names[0]))


CHECKS = {"from_pretrained": from_pretrained}
