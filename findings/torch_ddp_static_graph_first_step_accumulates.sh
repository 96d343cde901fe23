#!/usr/bin/env bash
# torch 2.13.0: DistributedDataParallel(static_graph=True) fails an internal assertion when its first step accumulates.
#
# Gradient accumulation runs all but the last micro-batch under no_sync(). With static_graph=True, which reentrant
# checkpointing needs, that works from the second step on, or with one micro-batch in the first step; a first step of
# two micro-batches, the first under no_sync(), raises "INTERNAL ASSERT FAILED ... please report a bug to PyTorch".
# For whom it matters: whoever accumulates gradients from the first step on with static_graph=True.
#
# Seen (micro-batches of each step):
#   static_graph=False, steps of 2 and 2: done
#   static_graph=True,  steps of 1 and 2: done
#   static_graph=True,  steps of 2 and 2: RuntimeError: expect_autograd_hooks_ INTERNAL ASSERT FAILED
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/ranks.py" <<'PYTHON'
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")


def outcome(static_graph, steps):
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Linear(4, 2), static_graph=static_graph)
    try:
        for micro_batches in steps:
            for number in range(micro_batches):
                is_last = number == micro_batches - 1
                with nullcontext() if is_last else model.no_sync():
                    model(torch.ones(3, 4)).sum().backward()
    except RuntimeError as error:
        return f"RuntimeError: {str(error).partition(' at ')[0]}"
    return "done"


cases = [(False, (2, 2)), (True, (1, 2)), (True, (2, 2))]
found = [outcome(*case) for case in cases]
if dist.get_rank() == 0:
    for (static_graph, steps), seen in zip(cases, found):
        print(f"static_graph={static_graph}, steps of {steps[0]} and {steps[1]}: {seen}")
assert found[:2] == ["done", "done"] and "INTERNAL ASSERT FAILED" in found[2], "the behaviour has changed"
dist.destroy_process_group()
PYTHON
"$folder/venv/bin/torchrun" --nproc-per-node 2 "$folder/ranks.py"
