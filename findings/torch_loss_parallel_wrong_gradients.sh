#!/usr/bin/env bash
# torch 2.13.0: inside loss_parallel() the gradient of log_softmax, and of cross-entropy with soft targets, is wrong.
#
# loss_parallel() lets F.cross_entropy work on logits that are sharded over the vocabulary. Inside it any other function
# of F.log_softmax, an entropy bonus say, and F.cross_entropy with class probabilities return the right value and a
# wrong gradient; nothing is raised. Without the context manager the same functions of the same DTensors are right.
# For whom it matters: losses beyond plain cross-entropy under tensor parallelism (distillation, entropy terms).
#
# Seen (error of the value, error of the gradient, against the same on one process, float64):
#   labels, inside:             0.0e+00 1.4e-17
#   entropy, outside:           0.0e+00 0.0e+00
#   entropy, inside:            0.0e+00 3.4e-01
#   probabilities, outside:     4.4e-16 0.0e+00
#   probabilities, inside:      4.4e-16 1.1e-01
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/ranks.py" <<'PYTHON'
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import loss_parallel
from torch.nn import functional as F

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(0)
logits = torch.randn(4, 10, dtype=torch.float64)
labels = torch.randint(10, (4,))
probabilities = torch.randn(4, 10, dtype=torch.float64).softmax(dim=1)
sharded_probabilities = distribute_tensor(probabilities, mesh, [Shard(1)])


def entropy(scores):
    log_probs = F.log_softmax(scores, dim=-1)
    return -(log_probs.exp() * log_probs).sum()


def errors(sharded_loss, whole_loss, context):
    whole = logits.clone().requires_grad_()
    expected = whole_loss(whole)
    expected.backward()
    sharded = distribute_tensor(logits, mesh, [Shard(1)]).requires_grad_()
    with context():
        loss = sharded_loss(sharded)
        loss.backward()
    value = loss.full_tensor() if hasattr(loss, "full_tensor") else loss
    return (value - expected).abs().item(), (sharded.grad.full_tensor() - whole.grad).abs().max().item()


def with_labels(scores):
    return F.cross_entropy(scores, labels)


def with_probabilities(scores):
    return F.cross_entropy(scores, probabilities)


def with_sharded_probabilities(scores):
    return F.cross_entropy(scores, sharded_probabilities)


found = {
    "labels, inside": errors(with_labels, with_labels, loss_parallel),
    "entropy, outside": errors(entropy, entropy, nullcontext),
    "entropy, inside": errors(entropy, entropy, loss_parallel),
    "probabilities, outside": errors(with_sharded_probabilities, with_probabilities, nullcontext),
    "probabilities, inside": errors(with_sharded_probabilities, with_probabilities, loss_parallel),
}
if dist.get_rank() == 0:
    for case, (value, gradient) in found.items():
        print(f"{case + ':':24}{value:.1e} {gradient:.1e}")
for case, (value, gradient) in found.items():
    is_wrong = case in ("entropy, inside", "probabilities, inside")
    assert value < 1e-12 and (gradient > 1e-2) == is_wrong, f"the behaviour has changed: {case}"
dist.destroy_process_group()
PYTHON
"$folder/venv/bin/torchrun" --nproc-per-node 2 "$folder/ranks.py"
