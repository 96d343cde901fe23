"""Checks on several processes, in one world: what every process asserts for itself.

Started by torchrun or accelerate launch with the checks as its arguments, each as the module and its name there, such
as ``vocabulary.layer``. Every rank says of each check that it agrees; the first that does not ends the world. What
would wait for another rank for ever ends after a minute.
"""

from __future__ import annotations

import importlib
import sys
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, size = dist.get_rank(), dist.get_world_size()
    for name in sys.argv[1:]:
        module, _, check = name.partition(".")
        try:
            importlib.import_module(module).CHECKS[check]()
        except Exception as error:
            raise AssertionError(f"{name}: rank {rank} of {size} does not agree") from error
        sys.stdout.write(f"{name}: rank {rank} of {size} agrees\n")
        sys.stdout.flush()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
