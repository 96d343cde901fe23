#!/usr/bin/env bash
# torch 2.13.0: an autograd.Function with a setup_context costs several times as much a call as one without.
#
# The documentation prefers forward(x) with setup_context(ctx, inputs, output), which torch.func needs, to
# forward(ctx, x). Function.apply then binds the arguments to inspect.signature(forward) in every call, though the class
# does not change. The values and gradients are the same; the call takes about three times as long.
# For whom it matters: small tensors, for example a loss of a few tokens in an editing loop.
#
# Seen (how many times as long as forward(ctx, x), the best of 7 runs): 3.5
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import timeit

import torch


class Together(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


class Apart(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x * 2

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


x = torch.ones(1, requires_grad=True)
together, apart = (min(timeit.repeat(lambda: f.apply(x), number=2000, repeat=7)) for f in (Together, Apart))
print(f"setup_context: {apart / together:.1f} times as long")
assert apart > 1.5 * together, "the behaviour has changed"
PYTHON
