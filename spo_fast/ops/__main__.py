"""`python -m spo_fast.ops`: op | device | backend | reason, for this machine."""

from spo_fast.ops import geglu, group_norm_silu, preference_loss, transition  # noqa: F401  (registers the ops)
from spo_fast.ops.backend import table


def main() -> None:
    rows = [("op", "device", "backend", "reason"), *table()]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3], sep="  ")


if __name__ == "__main__":
    main()
