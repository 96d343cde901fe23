#!/usr/bin/env bash
# torch 2.13.0: F.linear_cross_entropy gives NaN gradients where F.cross_entropy gives zeros.
#
# A batch whose labels are all ignore_index has the mean 0 / 0: both losses are NaN. The gradient of F.cross_entropy is
# exactly 0 then, and so is that of F.linear_cross_entropy as it is called by default; a training step leaves the model
# whole. With options=LinearCrossEntropyOptions(), which only asks for the chunked computation, the gradients of the
# hidden states and of the weight are NaN, and the step destroys the output layer.
# For whom it matters: training with masked prompts, where a micro-batch can be all prompt.
#
# Seen (loss, largest gradient of hidden, of weight):
#   F.linear + F.cross_entropy:         nan 0.0 0.0
#   F.linear_cross_entropy:             nan 0.0 0.0
#   F.linear_cross_entropy, options:    nan nan nan
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import math

import torch
from torch.nn import LinearCrossEntropyOptions
from torch.nn import functional as F

labels = torch.full((4,), -100)


def seen(loss_function):
    torch.manual_seed(0)
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    loss = loss_function(hidden, weight)
    loss.backward()
    return loss.item(), hidden.grad.abs().max().item(), weight.grad.abs().max().item()


plain = seen(lambda hidden, weight: F.cross_entropy(F.linear(hidden, weight), labels))
default = seen(lambda hidden, weight: F.linear_cross_entropy(hidden, weight, labels))
chunked = seen(
    lambda hidden, weight: F.linear_cross_entropy(hidden, weight, labels, options=LinearCrossEntropyOptions())
)
print("F.linear + F.cross_entropy:      ", *plain)
print("F.linear_cross_entropy:          ", *default)
print("F.linear_cross_entropy, options: ", *chunked)
for values in (plain, default):
    assert math.isnan(values[0]) and values[1:] == (0, 0), "the behaviour has changed"
assert all(map(math.isnan, chunked)), "the behaviour has changed"
PYTHON
