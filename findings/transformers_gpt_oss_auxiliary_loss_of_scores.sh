#!/usr/bin/env bash
# transformers 4.57.1, torch 2.13.0: GPT-OSS's auxiliary loss has no gradient with one expert per token.
#
# The load-balancing loss takes the softmax of the router's logits. GPT-OSS records the router's scores in their place:
# already a softmax over the chosen experts, 0 for all others. With one expert per token every score is 0 or 1 whatever
# the logits are, so the loss is the same number in every step and its gradient is 0; with more the gradient is that of
# a softmax of a softmax. Mended in transformers 5: there router_logits are logits.
# For whom it matters: training GPT-OSS with output_router_logits=True.
#
# Seen (largest gradient of the router's weights, with one and with two experts per token; sums of router_logits):
#   one expert:  0.0, each row sums to 1
#   two experts: above 0, each row sums to 1
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy transformers==4.57.1
"$folder/venv/bin/python" - 2>"$folder/log" <<'PYTHON'
import torch
from transformers import GptOssConfig, GptOssForCausalLM


def largest_gradient(experts_per_token):
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=61, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=experts_per_token,
        rope_scaling=None, layer_types=["full_attention"] * 2,
    )
    model = GptOssForCausalLM(config)
    outputs = model(input_ids=torch.arange(3, 13)[None], output_router_logits=True)
    for logits in outputs.router_logits:
        torch.testing.assert_close(logits.sum(dim=-1), torch.ones(10))
    weights = [parameter for name, parameter in model.named_parameters() if name.endswith("router.weight")]
    return max(gradient.abs().max().item() for gradient in torch.autograd.grad(outputs.aux_loss, weights))


one, two = largest_gradient(1), largest_gradient(2)
print("one expert: ", one)
print("two experts:", two)
assert one == 0 and two > 0, "the behaviour has changed"
PYTHON
