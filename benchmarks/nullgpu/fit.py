"""Does what a run chooses for a card fit it? Full-size networks, the real caching allocator, every pair kept.

    python -m benchmarks.nullgpu.fit KIND GIB [FIELD=VALUE ...] [--iterations N] [--out FILE] [--expandable]

Prints what was chosen and predicted, and by iteration what was allocated and reserved at the peak, and how often the
allocator had to give memory back before it got some (retries: each waits for the GPU). One record.
"""

from __future__ import annotations

import argparse
import datetime
import os
from pathlib import Path

from benchmarks.nullgpu.ledger import DEVICE, Ledger, start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["sd15", "sdxl"])
    parser.add_argument("gib", type=float, help="of the card's memory")
    parser.add_argument("fields", nargs="*", help="of the config, for example memory=balanced")
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--expandable", action="store_true", help="the allocator's expandable segments")
    args = parser.parse_args()
    start()
    os.environ["NULLCUDA_GIB"] = str(args.gib)  # read when the device is first asked for its memory
    import torch
    import yaml

    from benchmarks import iteration
    from benchmarks.nullgpu import patches
    from benchmarks.nullgpu.watch import GIB, Watch, watched_timer
    from benchmarks.records import RESULTS, Records
    from spo_fast.config.presets import PRESETS
    from spo_fast.models.device import found_device
    from spo_fast.training.accelerate import recompute
    from spo_fast.training.plan.fake_run import predict
    from spo_fast.training.plan.fit_memory import choose

    if args.expandable:
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    watch = Watch(Ledger(), tables=False)
    patches.apply(watch.ledger)
    fields = {name: yaml.safe_load(value) for name, value in (field.split("=") for field in args.fields)}
    given = PRESETS[args.kind]().with_fields(**{"mixed_precision": "fp16", "compile": "off", **fields})
    found = found_device(torch.device("cuda", 0))
    cfg, choices = choose(given, found)
    costs = predict(cfg, None, "cuda")
    chosen = {choice.flag: choice.value for choice in choices}
    peaks = {phase: round(size / GIB, 2) for phase, size in costs.peaks.items()}
    print(", ".join(f"{flag} {value}" for flag, value in chosen.items()))
    assert found.usable_bytes is not None
    print(f"predicted: {max(peaks.values()):.2f} of {found.usable_bytes / GIB:.2f} GiB ({peaks})", flush=True)
    setup = iteration.Setup(args.kind, "full", "cuda", None, str(given.model.mixed_precision), cfg=cfg)
    technique = iteration.Technique(fuse=bool(cfg.engine.fuse), graphs=bool(cfg.engine.cuda_graphs))
    status = "ok"
    try:
        contender = iteration.Ours(setup, technique)
        recompute(contender.policy, cfg)
        decisions = iteration.Decisions.scripted(setup.cfg, 1.0, "cuda")
        watched_timer(watch)
        watch.begin()
        for _ in range(args.iterations):
            contender.iterate(decisions)
            setup.timer.read_ms()
    except torch.OutOfMemoryError as error:
        status = "failed"
        print("OUT OF MEMORY:", str(error)[:300])
    out = args.out or RESULTS / f"{datetime.date.today()}_nullgpu.jsonl"
    Records(out, "nullgpu", DEVICE).write(
        f"{args.kind}/fit {args.gib:g} GiB" + "".join(f" {field}" for field in args.fields),
        status,
        chosen=chosen,
        predicted_gib=peaks,
        kept_by_graphs_gib=round(costs.kept_by_graphs / GIB, 2),
        usable_gib=round(found.usable_bytes / GIB, 2),
        expandable=args.expandable,
        iterations=watch.iterations,
        names_not_patched=patches.missing,
    )


if __name__ == "__main__":
    main()
