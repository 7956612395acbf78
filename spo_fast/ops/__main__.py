"""`python -m spo_fast.ops`: op | device | backend | reason, for this machine."""

from __future__ import annotations

import argparse
import sys

from spo_fast.ops import (  # noqa: F401  (importing registers the ops)
    ada_norm,
    geglu,
    gelu_tanh,
    group_norm_silu,
    joint_heads,
    log_ratio,
    lora_linear,
    merge_lora,
    preference_loss,
    resize_normalize,
    transition,
)
from spo_fast.ops.backend import table


def main(arguments: list[str] | None = None) -> int:
    """Print the table; returns the exit status."""
    about = "Which backend computes each operation here, and why."
    parser = argparse.ArgumentParser(prog="python -m spo_fast.ops", description=about)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="of this type alone, had or not")
    device = parser.parse_args(arguments).device
    rows = [("op", "device", "backend", "reason"), *table(None if device is None else (device,))]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3], sep="  ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
