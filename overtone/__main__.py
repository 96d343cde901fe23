"""`python -m overtone`, for launchers that start a module: `torchrun --nproc-per-node 2 -m overtone bench`."""

import sys

from overtone.cli import main

if __name__ == "__main__":  # a spawned worker imports this file too
    sys.exit(main())
