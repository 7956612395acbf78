"""Rows of iteration.py at full size on the null GPU, counted: one record a row.

    python -m benchmarks.nullgpu.rows KIND ROW SHARE [--iterations N] [--out FILE] [--expandable]

ROW: of iteration.py's ROWS; SHARE: of the comparisons, how many are kept. One row a process: what an earlier one
compiled or captured would count for it.
"""

from __future__ import annotations

import argparse
import datetime
import time
from pathlib import Path

from benchmarks.nullgpu.ledger import DEVICE, Ledger, start


def main() -> None:
    start()
    import torch

    from benchmarks import iteration
    from benchmarks.nullgpu import patches
    from benchmarks.nullgpu.watch import Watch, watched_timer
    from benchmarks.records import RESULTS, Records

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["sd15", "sdxl"])
    parser.add_argument("row", choices=list(iteration.ROWS))
    parser.add_argument("share", type=float)
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--prompts", type=int, help="instead of the published batch")
    parser.add_argument("--out", type=Path, default=RESULTS / f"{datetime.date.today()}_nullgpu.jsonl")
    parser.add_argument("--expandable", action="store_true", help="the allocator's expandable segments")
    parser.add_argument("--no_lines", action="store_true", help="do not look which lines wait: it costs host time")
    parser.add_argument("--label", help="what is measured, where the commit does not say it")
    args = parser.parse_args()
    if args.expandable:
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    watch = Watch(Ledger())
    patches.apply(watch.ledger, args.share)
    technique = iteration.ROWS[args.row]
    setup = iteration.Setup(args.kind, "full", "cuda", args.prompts, technique.mixed_precision)
    began = time.perf_counter()
    with iteration.tf32(technique.tf32):
        contender = iteration.make_contender(setup, technique)
        built_s = time.perf_counter() - began
        decisions = iteration.Decisions.scripted(setup.cfg, args.share, "cuda")
        watched_timer(watch)
        watch.begin()
        for _ in range(args.iterations):
            if args.no_lines:
                facts = contender.iterate(decisions)
            else:
                with watch.lines():
                    facts = contender.iterate(decisions)
            setup.timer.read_ms()
    Records(args.out, "nullgpu", DEVICE).write(
        f"{args.kind}/{args.row}/v={args.share:g}",
        **{"dtype": technique.mixed_precision, **setup.facts(), **facts, "expandable": args.expandable},
        label=args.label,
        built_s=round(built_s, 1),
        iterations=watch.iterations,
        names_not_patched=patches.missing,
    )
    if patches.missing:
        print("not there to be patched:", ", ".join(patches.missing))


if __name__ == "__main__":
    main()
