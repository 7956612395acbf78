"""`python -m tests.ranks`: one process of several. Runs training command lines in turn, each as a group of its own.

argv: a JSON list of [port, [flags of a run ...]]; RANK and WORLD_SIZE come from the environment.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import sys
import time
from typing import Any

import torch
import torch.distributed as dist

from spo_fast import train
from spo_fast.evaluation.pages import run_report
from spo_fast.models import sharded
from spo_fast.models.diffusion import DTYPES
from spo_fast.training import run_directory, validation


def process_0_takes_longer_than(seconds: float) -> None:
    """Collectives of the networks time out after so many seconds; process 0's grids and checkpoints take longer."""
    dist.init_process_group = functools.partial(dist.init_process_group, timeout=datetime.timedelta(seconds=seconds))

    def slow(whole: Any) -> Any:
        def call(*args: Any) -> Any:
            if os.environ["RANK"] == "0":
                time.sleep(1.5 * seconds)
            return whole(*args)

        return call

    for method in ("before_training", "look"):
        setattr(validation.Validator, method, slow(getattr(validation.Validator, method)))
    run_directory.write_sums = slow(run_directory.write_sums)


def main() -> int:
    torch.set_num_threads(1)
    sharded.BUCKET = 2**18  # the toy's weights in several
    run_report.draw = lambda chart, run: None  # curves of reports are what others test
    if patience := os.environ.get("PATIENCE_S"):
        process_0_takes_longer_than(float(patience))
    if os.environ.get("FLOAT64_SCORER"):
        DTYPES["no"] = torch.float64
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    for port, line in json.loads(sys.argv[1]):
        os.environ["MASTER_PORT"] = str(port)
        if status := train.main(line):
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
