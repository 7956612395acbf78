"""A command of the project on the null GPU, counted iteration by iteration.

    python -m benchmarks.nullgpu.command [--share S] [--out FILE] MODULE ARGUMENTS...

For example MODULE ARGUMENTS = spo_fast.train --model toy --device cuda --output_dir /tmp/run. Iterations end where the
trainer's timer is read; what comes after the last one is printed as one more. Nothing is written unless --out is given.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path

from benchmarks.nullgpu.ledger import DEVICE, Ledger, start


def main() -> None:
    start()
    import torch

    from benchmarks.nullgpu import patches
    from benchmarks.nullgpu.watch import Watch, watched_timer
    from benchmarks.records import Records

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0, help="of the comparisons, how many are kept")
    parser.add_argument("--out", type=Path, help="records")
    parser.add_argument("module")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    watch = Watch(Ledger())
    patches.apply(watch.ledger, args.share)
    torch.cuda.init()
    watched_timer(watch)
    watch.begin()
    sys.argv = [args.module, *args.arguments]
    code: object = 0
    try:
        with watch.lines():
            runpy.run_module(args.module, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        code = ended.code
    watch.end({})
    if args.out is not None:
        words = " ".join([args.module, *args.arguments])
        Records(args.out, "nullgpu", DEVICE).write(
            f"command {words}", exit=code, iterations=watch.iterations, names_not_patched=patches.missing
        )
    raise SystemExit(code)


if __name__ == "__main__":
    main()
