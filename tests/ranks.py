"""`python -m tests.ranks`: one process of several. Runs training command lines in turn, each as a group of its own.

argv: a JSON list of [port, [flags of a run ...]]; RANK and WORLD_SIZE come from the environment.
"""

from __future__ import annotations

import json
import os
import sys

import torch

from spo_fast import train
from spo_fast.models import sharded


def main() -> int:
    torch.set_num_threads(1)
    sharded.BUCKET = 2**18  # the toy's weights in several
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    for port, line in json.loads(sys.argv[1]):
        os.environ["MASTER_PORT"] = str(port)
        if status := train.main(line):
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
