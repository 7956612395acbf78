"""Held-out scores and grids of a run."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spo_fast.config.training import Config
from spo_fast.data.files import set_aside, without_nan, write_atomically
from spo_fast.data.prompt_sets import Wanted
from spo_fast.evaluation.metrics import make_metric
from spo_fast.evaluation.pictures import PROMPTS_FILE, write_grid
from spo_fast.evaluation.sampling import NOISES, draw_latents
from spo_fast.method.experience import Candidates
from spo_fast.method.schedule import StepTable
from spo_fast.models.diffusion import DTYPES, DiffusionModel
from spo_fast.models.policy import Policy
from spo_fast.scorers.base import Scorer
from spo_fast.training.monitor.log import MetricsLog
from spo_fast.training.monitor.timer import Timer
from spo_fast.training.verdicts import HeldOut, Shown, Validation


@dataclass
class Validator:
    """Draws, judges and measures what the policy makes of the validation prompts, and looks at held-out pairs."""

    cfg: Config
    run_dir: Path
    model: DiffusionModel
    policy: Policy
    scorer: Scorer
    prompts: list[str]
    metrics: list[str]
    wanted: dict[str, Wanted] | None  # by geneval
    held_out_accuracy: Callable[[], float | None]
    held_out: HeldOut
    before: Validation | None = None
    last: tuple[int, Validation] | None = None  # of this process: iterations done, and what it found

    @property
    def samples(self) -> Path:
        """Where grids and the pictures' measurements are kept."""
        return self.run_dir / "samples"

    @torch.no_grad()
    def validate(self) -> tuple[list[list[Tensor]], list[float]] | None:
        """Images of the validation prompts from fixed noise, and the scorer's opinion of each; None if turned off.

        Plain DDIM (eta = 0) with the training's steps and guidance. The noise depends on the seed only, so values
        before and after training are of the same noise.
        """
        cfg, count = self.cfg, self.cfg.run.num_validation_images
        if count == 0:
            return None
        table = self.model.table(cfg.sample.num_steps, 0.0)
        images, scores = [], []
        for p, prompt in enumerate(self.prompts):
            row: list[Tensor] = []
            for start in range(0, count, cfg.model.images_per_decode):
                size = min(cfg.model.images_per_decode, count - start)
                pixels, score = self._draw(table, [prompt] * size, p * count + start)
                row += list(pixels.float().cpu())
                scores.append(score)
            images.append(row)
        return images, torch.cat(scores).double().tolist()

    def _latents(self, table: StepTable, prompts: list[str], first: int) -> Tensor:
        """Of the prompts, from the noise of validation image `first` on."""
        sample, numbers = self.cfg.sample, range(first, first + len(prompts))
        given = (self.policy, self.model, table, prompts, numbers, sample.guidance_scale)
        return draw_latents(*given, (self.cfg.run.seed, NOISES["validation"]), sample.rows_per_forward)

    def _draw(self, table: StepTable, prompts: list[str], first: int) -> tuple[Tensor, Tensor]:
        """Images of the prompts and their scores at timestep 0."""
        latents, count = self._latents(table, prompts, first), len(prompts)
        pixels = self.model.decode(latents)
        now = torch.zeros((), dtype=torch.int64, device=self.model.device)
        text = self.scorer.encode(prompts)
        # already decoded: the scorer gets the same pixels, whatever it asks for
        return pixels, self.scorer(Candidates(None, latents, now, text, 1, lambda _: pixels, count))

    def show(self, name: str) -> Validation | None:
        """Validate what is exported and write samples/<name>.png, a row a prompt."""
        with self.policy.exported():
            result = self.validate()
        if result is None:
            return None
        images, scores = result
        write_grid(self.samples / f"{name}.png", images, self.prompts)
        return Validation(statistics.fmean(scores), {"score": scores} | self.measured(images), self.settings())

    def settings(self) -> Shown:
        """What the pictures drawn now depend on."""
        flat = self.cfg.flat()
        found = {name: flat[name] for name in ("num_validation_images", "seed", "num_steps", "guidance_scale")}
        found |= {"prompts": self.prompts, "latents": self.model.latent_shape, "scorer": flat["scorer"]}
        found |= {name: value for name, value in self.cfg.model.told.items() if value is not None}
        return json.loads(json.dumps(found))

    @torch.no_grad()
    def measured(self, images: list[list[Tensor]]) -> dict[str, list[float]]:
        """Held-out metrics and image statistics of the pictures, prompt after prompt. A metric's weights are loaded for
        it and dropped again: training has the memory."""
        found: dict[str, list[float]] = {}
        pictures = torch.stack([image for row in images for image in row]).clamp(-1, 1)
        texts = [prompt for prompt, row in zip(self.prompts, images, strict=True) for _ in row]
        model, cfg = self.model, self.cfg
        paths, dtype, most = model.resolved.scorer_paths, DTYPES[cfg.scorer.scorer_dtype], cfg.model.images_per_decode
        for name in ("looks", *self.metrics):
            metric = make_metric(name, paths, model.tokenize, model.device, dtype, self.wanted)
            for start in range(0, len(texts), most):
                part = slice(start, start + most)
                for what, values in metric(pictures[part].to(model.device), texts[part]).items():
                    found.setdefault(what, []).extend(values.double().tolist())
        return found

    def before_training(self, log: MetricsLog, resumed: bool, done: int) -> None:
        """Validate, and keep it in the run directory so that a resumed run, of `done` iterations, still has it."""
        path = self.samples / "before.json"
        # like the log's records: what this run is about to repeat, and the end that is none any more
        steps = [p for p in self.samples.glob("step-*.png") if p.stem[5:].isdigit()]
        later = [p for p in steps if int(p.stem[5:]) > done]
        for grid in (*later, self.samples / "after.png", self.samples / "strengths.png"):
            grid.unlink(missing_ok=True)
        if self.cfg.run.num_validation_images:
            self.samples.mkdir(exist_ok=True)
            write_atomically(self.samples / PROMPTS_FILE, json.dumps(self.prompts, ensure_ascii=False, indent=1) + "\n")
        if resumed:
            self.held_out.go_on(done)
            self.before = self._read_before(path)
            return
        self.before = self.show("before")
        if (accuracy := self.held_out_accuracy()) is not None:
            print(f"held-out preference accuracy before training: {accuracy:.3f}")
        if self.before is not None:
            write_atomically(path, json.dumps(without_nan(self.before._asdict())) + "\n")
            log.reporter.images(0, "samples_before", self.samples / "before.png")

    def _read_before(self, path: Path) -> Validation | None:
        """That of the run that goes on, unless it was of other settings."""
        kept = Validation.read(path) if path.is_file() else None
        if kept is None or not self.cfg.run.num_validation_images or kept.of == self.settings():
            return kept
        print("the pictures before training were of other validation settings: nothing is compared with them")
        for old in (path, path.with_suffix(".png")):
            set_aside(old)
        return None

    def look(self, log: MetricsLog, timer: Timer, done: int) -> dict[str, object]:
        """The grid and scores of the weights after so many iterations: what to log."""
        with timer("validate"):
            shown = self.show(f"step-{done}")
            with self.policy.exported():
                accuracy = self.held_out_accuracy()
        found: dict[str, object] = {} if accuracy is None else {"validation_accuracy": accuracy}
        if shown is None:
            return found
        self.last = done, shown
        log.reporter.images(done - 1, "samples", self.samples / f"step-{done}.png")
        print(f"validation after {done} iterations: {shown.words(self.metrics, self.before)}")
        found |= shown.record(self.metrics, self.before, self.cfg.run.seed)
        found |= self.held_out.look(done, shown, self.before, str(found.get("hacking", "")))
        self.held_out.keep(
            done, shown, lambda folder: self.model.save(self.policy, folder, self.run_dir.resolve().name)
        )
        return found

    @torch.no_grad()
    def sweep(self) -> None:
        """samples/strengths.png: each prompt's first image, with the LoRA at each of cfg.run.strengths."""
        cfg, model = self.cfg, self.model
        if cfg.adapter.full_finetune or not cfg.run.strengths or not cfg.run.num_validation_images:
            return
        table, columns = model.table(cfg.sample.num_steps, 0.0), []
        for strength in cfg.run.strengths:
            with self.policy.exported(), self.policy.scaled(strength):
                first = [p * cfg.run.num_validation_images for p in range(len(self.prompts))]
                drawn = [self._latents(table, [q], n) for q, n in zip(self.prompts, first, strict=True)]
            columns.append([model.decode(x)[0].float().cpu() for x in drawn])
        write_grid(self.samples / "strengths.png", [list(row) for row in zip(*columns, strict=True)], self.prompts)

    def after_training(self, done: int) -> None:
        """samples/after.png, and what training did to images from the same noise."""
        self.sweep()
        if self.last is None or self.last[0] != done:  # a finished run, resumed
            after = self.show("after")
        else:
            after = self.last[1]
            shutil.copyfile(self.samples / f"step-{done}.png", self.samples / "after.png")
        if self.before is not None and after is not None:
            count = len(self.prompts) * self.cfg.run.num_validation_images
            print(f"{count} images from the same noise, before and after: {after.words(self.metrics, self.before)}")
            seed = f"seed {self.cfg.run.seed}, pictures 0 to {count - 1}"
            print(f"sample grids ({seed}): {self.samples / 'before.png'}, {self.samples / 'after.png'}")
