"""`python -m spo_fast.ops`: op | device | backend | reason, for this machine."""

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


def main() -> None:
    """Print the table."""
    rows = [("op", "device", "backend", "reason"), *table()]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3], sep="  ")


if __name__ == "__main__":
    main()
