"""What a run tells and leaves: an iteration's record, and what it has made at its end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from spo_fast.config.sections import FLOWS, TOYS
from spo_fast.data.files import write_atomically
from spo_fast.evaluation.pages.model_card import upload, write_card
from spo_fast.models.files.comfyui import Shown, workflow
from spo_fast.models.files.lora_files import COMFYUI_FILE, KOHYA_FILE
from spo_fast.models.flow import FlowModel
from spo_fast.training.monitor.log import MetricsLog
from spo_fast.training.monitor.progress import ProgressLine
from spo_fast.training.monitor.throughput import Telemetry
from spo_fast.training.monitor.timer import Timer
from spo_fast.training.plan.counted import predict

if TYPE_CHECKING:
    from spo_fast.training.setup import Parts


WORKFLOW = "comfyui_workflow.json"


class Monitor:
    """Grids, log, warnings and progress of each iteration, by process 0; the others have no log and tell nothing."""

    def __init__(self, run: Parts, log: MetricsLog | None, timer: Timer):
        self.run, self.log, self.timer = run, log, timer
        costs = None if run.found.memory_bytes is None else predict(run.cfg, run.model.resolved, run.device.type)
        hours = run.history.latest("gpu_hours") or 0.0
        self.telemetry = Telemetry(run.device, run.found.name, costs, hours, run.group.size)
        print("".join(f"{note}\n" for note in self.telemetry.notes()), end="")
        self.progress = ProgressLine(run.total, done=run.state.iteration)

    def __enter__(self) -> Monitor:
        self.progress.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.__exit__(*error)

    def write(self, iteration: int, record: dict[str, object]) -> None:
        """Log, warn, show; with the validation's results where it is due. Process 0's timer alone is read."""
        run, log = self.run, self.log
        if log is not None:
            if run.due(run.cfg.run.validation_steps or run.cfg.run.checkpointing_steps):
                record |= run.validator.look(log, self.timer, run.state.iteration)
            record["device"] = run.found.name
            record |= (times := self.timer.read_ms()) | self.telemetry.read(record, times)
            record |= run.gpu_stats()
            # logged before it is saved: what a resumed run repeats is cut from the log, what is missing stays so
            record = log.log(iteration, record)
            warnings = record.get("warnings")
            for warning in warnings if isinstance(warnings, list) else ():
                print(f"warning: iteration {iteration}: {warning}.")
            self.progress.update(record)
            if "validation_score" in record and not run.done:
                run.report()
        self.timer.read_ms()


def write_workflow(run: Parts) -> list[Path]:
    """A ComfyUI workflow with the LoRA, as what has been trained on is drawn; of the toys and whole networks none."""
    cfg, kind = run.cfg, run.model.kind
    if cfg.adapter.full_finetune or cfg.model.model in TOYS:
        return []
    told = run.model.told_guidance if isinstance(run.model, FlowModel) else None
    guidance = cfg.sample.guidance_scale if told is None else told
    shown = Shown(
        prompt=(run.validator.prompts or run.prompts)[0],
        height=run.model.height,
        width=run.model.width,
        steps=cfg.sample.num_steps,
        guidance_scale=guidance,
        seed=cfg.run.seed,
    )
    lora = COMFYUI_FILE if kind in FLOWS else KOHYA_FILE
    path = run.run_dir / WORKFLOW
    write_atomically(path, json.dumps(workflow(kind, lora, shown), indent=1) + "\n")
    return [path]


def finish(run: Parts) -> None:
    """Export the trained weights, show what training did to images from the same noise, write report and card."""
    if not run.group.main:
        if run.policy.shards is not None:
            run.export(run.run_dir)  # its part of what process 0 writes
        return
    if run.state.pairs == 0 or run.state.optimizer_steps == 0:
        print(
            "warning: nothing was trained: no pair or term was kept, or no step taken. The weights are as they began."
        )
    files = [*run.export(run.run_dir), *write_workflow(run)]
    if run.pairs is not None:
        run.pairs.split.finish()
    run.validator.after_training(run.state.iteration)
    run.report()
    write_card(run.run_dir, run.repository)
    print(f"model card: {run.run_dir / 'README.md'}; trained weights: " + ", ".join(str(f) for f in files))
    if run.repository is not None:
        print(f"uploaded to {upload(run.run_dir, run.repository)}")
    print(
        f"next: open {run.run_dir / 'report.html'}; compare: python -m spo_fast.compare --a base --b "
        f"{run.run_dir}; loading it is shown in the report and the model card"
    )
