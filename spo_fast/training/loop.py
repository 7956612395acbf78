"""The loop: collect experience, evaluate the reference on it, update the policy. Everything else is elsewhere."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import itertools
import json
import shutil
import textwrap
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spo_fast.config.errors import RunError
from spo_fast.config.scorers import scorer_specs
from spo_fast.config.training import Config, SampleConfig
from spo_fast.data import files as data_files
from spo_fast.data.files import without_nan
from spo_fast.data.prompt_order import training_prompts
from spo_fast.data.prompts import count_repeats
from spo_fast.evaluation.metrics import make_metric
from spo_fast.evaluation.pages.model_card import claim_repository, upload, write_card
from spo_fast.evaluation.pages.run_record import read_metrics
from spo_fast.evaluation.pages.run_report import write_report
from spo_fast.evaluation.pictures import write_grid
from spo_fast.evaluation.required_files import resolve, run_paths
from spo_fast.method import skipped_segments
from spo_fast.method.experience import Candidates, judges
from spo_fast.method.noise import KeyedDraws
from spo_fast.method.objectives import make_objective, predict_states
from spo_fast.method.rollout import RolloutBatch, sample_latents
from spo_fast.method.schedule import StepTable, full_table
from spo_fast.models.accelerate import pick_attention
from spo_fast.models.attention import KERNELS
from spo_fast.models.compile import keep_cache_in
from spo_fast.models.device import Choice, found_device, listed
from spo_fast.models.diffusion import DTYPES, DiffusionModel
from spo_fast.models.fuse import fuse
from spo_fast.models.graphs import Capture, CudaCapture
from spo_fast.models.policy import Policy
from spo_fast.models.prompt_cache import count_truncated
from spo_fast.scorers.base import InPhase
from spo_fast.scorers.registry import load_scorer
from spo_fast.training import rebalance
from spo_fast.training.accelerate import compile_networks, replayed
from spo_fast.training.diagnosis import base_errors, base_text, start_text
from spo_fast.training.learner import Learner
from spo_fast.training.monitor.gpu import gpu_stats
from spo_fast.training.monitor.log import MetricsLog
from spo_fast.training.monitor.progress import ProgressLine
from spo_fast.training.monitor.throughput import Telemetry
from spo_fast.training.monitor.timer import Timer
from spo_fast.training.monitor.warnings import Watch
from spo_fast.training.pair_batches import PairReader, repeated
from spo_fast.training.plan.fake_run import predict
from spo_fast.training.plan.fit_memory import choose, is_out_of_memory, out_of_memory
from spo_fast.training.rollout_statistics import Saturation, gaps
from spo_fast.training.run import TrainingRun
from spo_fast.training.setup import check_fit
from spo_fast.training.signals import Stopped
from spo_fast.training.validation import Validation, held_out_metrics, wanted_by


class Inputs(NamedTuple):
    """What an iteration learns from."""

    batch: Any  # RolloutBatch of this process, or renoise.PairInputs
    prompts: slice  # which of the global batch it is; empty if nothing of it is kept
    total: int  # prompts of the global batch
    epoch: int


class Run(TrainingRun[Config]):
    """One run of preference optimisation: its parts, built from a Config."""

    def __init__(self, cfg: Config):
        super().__init__(cfg)
        sharded = cfg.adapter.full_finetune and self.group.size > 1
        if sharded and cfg.optim.optimizer != "adamw":
            raise ValueError(
                f"--full_finetune on several processes keeps a part of the optimizer's state on each, which "
                f"--optimizer {cfg.optim.optimizer} cannot be cut into. Use --optimizer adamw."
            )
        self.prompts, self.sampler = training_prompts(cfg, self.group.size)
        self.metrics, self.wanted = held_out_metrics(cfg, self.validation_prompts()), wanted_by(cfg, self.prompts)
        resolved = resolve(cfg.model, run_paths(cfg))
        self.lock = data_files.lock(self.run_dir) if self.group.main else None
        self.found = found_device(self.device)
        if self.found.memory_bytes is not None:
            print("predicting what fits into memory ...", flush=True)
        cfg, self.choices = choose(cfg, self.found, resolved)
        self.cfg = cfg
        # before anything is loaded: nobody should learn after ten hours that nobody was logged in
        self.repository = (
            claim_repository(cfg.run.hub_model_id or self.run_dir.resolve().name)
            if cfg.run.push_to_hub and self.group.main
            else None
        )

        prompt_cache = cfg.data.prompt_cache_dir or self.run_dir / "prompt_cache"
        self.model = DiffusionModel(cfg.model, resolved, self.device, prompt_cache)
        if cfg.optim.gradient_checkpointing:
            self.model.unet.enable_gradient_checkpointing()
        self.policy = Policy(self.model.unet, cfg.adapter, cfg.run.seed)
        if sharded:
            self.policy.shard()
        if cfg.engine.base_weights != "full":
            self.policy.quantise(cfg.engine.base_weights)
        if cfg.engine.fuse:
            self.policy.fuse(recompute=cfg.engine.memory == "balanced")
            fuse(self.model.vae)
            self.choices.append(self.pick_attention())
        self.objective, self.pairs = make_objective(cfg.objective), None
        if self.objective.sampler == "data":
            if self.group.size > 1:
                raise ValueError(f"--method {cfg.objective.method} trains on one process. Start it without torchrun.")
            self.pairs = PairReader(self.model, cfg, self.run_dir, self.resume is not None)
        self.table = self.model.table(cfg.sample.num_steps, cfg.sample.eta)
        if self.pairs is not None:  # noised to any timestep
            self.table = full_table(self.model.alphas_cumprod, self.model.prediction_type).to(self.device)
        self.scorer = load_scorer(
            scorer_specs(cfg.scorer.scorer), resolved.scorer_paths, self.model.tokenize, self.device,
            DTYPES[cfg.scorer.scorer_dtype], token_ids=self.model.token_ids,
            time_conditioned=cfg.scorer.spm_time_conditioned, wanted=self.wanted,
        )  # fmt: skip
        check_fit(self.objective, self.scorer, cfg)
        if cfg.engine.compile != "off":
            self.compile()
        on_gpu = self.device.type == "cuda"
        self.record_graphs(CudaCapture(self.device) if on_gpu and cfg.engine.cuda_graphs else None)
        self.total = cfg.run.iterations((self.pairs or self.sampler).iterations_per_epoch)
        self.learner = Learner(self.policy, self.objective, self.table, cfg, self.total, self.group)
        self.warnings = Watch(cfg)
        self.before: Validation | None = None
        self.shown: dict[int, Validation] = {}  # of this process, by iterations done

    def compile(self, backend: Any = "inductor") -> None:
        """torch.compile of all networks, its cache in the run's directory."""
        keep_cache_in(self.run_dir)
        compile_networks(self.policy, self.model.vae, self.scorer, self.cfg, backend)

    def record_graphs(self, capture: Capture | None) -> None:
        """From now on calls of a rollout whose shapes came before are replayed."""
        self.decode = replayed(self.policy, self.model.decode, self.scorer, capture)

    def pick_attention(self) -> Choice:
        """Put the attention kernel into the fused UNet that was asked for, or the fastest on this run's shapes."""
        rows = self.cfg.optim.states_at_once * (2 if self.cfg.sample.guidance_scale > 1 else 1)
        tokens = self.model.tokenizers[0].model_max_length
        choice = pick_attention(self.policy.unet, self.cfg.engine, rows, self.model.latent_shape, tokens)
        self.policy.attend_with(KERNELS[choice.value])
        return choice

    def announce(self) -> None:
        """What the run is about to do, in a few lines."""
        cfg, trained = self.cfg, sum(p.numel() for p in self.policy.network().values())
        if self.choices:
            print(f"chosen for this device ({self.found.name}):\n{textwrap.indent(listed(self.choices), '  ')}")
        repeats = count_repeats(self.prompts)
        cut = count_truncated(self.model.tokenizers[0], self.prompts)
        print(
            f"{cfg.objective.method} on {self.model.resolved.model_path} ({self.model.height}x{self.model.width}), ",
            end="",
        )
        print(f"{trained:,} trained weights, {self.policy.dtype} on {self.device}".replace("torch.", ""))
        if self.pairs is not None:
            rows, held_out = len(self.pairs.train_rows), len(self.pairs.valid_rows)
            print(f"{rows:,} pairs of {cfg.pairs.pairs}, {held_out:,} held out; ", end="")
        else:
            print(f"{len(self.prompts)} prompts, {repeats} of them repeats; ", end="")
        size, each = self.group.size, cfg.sample.sample_batch_size
        of = f"{size * each} {'pairs' if self.pairs else 'prompts'}"
        print(f"{self.total} iterations of {of}" + (f" on {size} processes" if size > 1 else ""))
        if self.pairs is not None:
            print(repeated(len(self.pairs.train_rows), each, "an iteration"), end="")
        if cut and self.pairs is None:
            limit = self.model.tokenizers[0].model_max_length
            print(f"warning: prompts longer than {limit} tokens: {cut}; what lies beyond is not read.")

    def encode_prompts(self) -> None:
        """All prompts through the text encoders once; they leave memory afterwards."""
        prompts = self.prompts if self.pairs is None else []  # those of pairs are encoded as they come
        if not self.group.main:
            self.group.any(False)  # process 0 encodes them, the others read
        encoded = self.model.prompt_cache.ensure([*prompts, "", *self.validation_prompts()])
        if self.group.main:
            self.group.any(False)
        if encoded:
            print(f"encoded {encoded} prompts into {self.model.prompt_cache.directory}")

    def inputs(self, iteration: int) -> Inputs:
        if self.pairs is not None:
            pairs, self.state.position = self.pairs.batch(iteration, self.state.position)
            epoch = self.state.position // len(self.pairs.train_rows)
            return Inputs(pairs, slice(0, len(pairs)), len(pairs), epoch)
        batch = self.sampler.batch(iteration)
        own = self.group.share(slice(0, len(batch.indices)))
        # a short last batch may leave a process nothing: it draws the first prompt, of which nothing is kept
        inputs = self.rollout_batch(batch.indices[own] or batch.indices[:1], iteration)
        inputs = replace(inputs, closed=skipped_segments.closed(self.state.window, iteration, self.cfg.sample))
        return Inputs(inputs, own, len(batch.indices), batch.epoch)

    def rollout_batch(self, indices: list[int], iteration: int) -> RolloutBatch:
        prompts = [self.prompts[i] for i in indices]
        draws = KeyedDraws(self.cfg.run.seed, iteration, torch.tensor(indices, device=self.device))
        text = self.scorer.encode(prompts)
        return RolloutBatch(self.model.cond(prompts), text, draws, self.model.latent_shape, self.model.latent_dtype)

    def rollout_weights(self, sample: SampleConfig, iteration: int) -> contextlib.AbstractContextManager[None]:
        """Inside, the policy's weights are those that `iteration`'s rollout uses."""
        merged = sample.rollout_weights == "merged"
        return self.policy.merged(self.cfg.run.seed, iteration) if merged else contextlib.nullcontext()

    def iterate(self, iteration: int, timer: Timer) -> dict[str, Any] | None:
        """One iteration: experience, frozen networks, updates. Returns what to log; None if the run is to stop."""
        cfg, sample, objective = self.cfg, self.cfg.sample, self.objective
        decode = Saturation(self.decode)
        score = InPhase(self.scorer, functools.partial(self.score_phase, timer))  # decoding included
        with contextlib.suppress(Stopped), timer("rollout"), self.rollout_weights(sample, iteration):
            inputs = self.inputs(iteration)
            arguments = (self.policy, self.table, score, decode, inputs.batch, sample, cfg.model.images_per_decode)
            experience = objective.collect(*arguments)
        if self.group.any(bool(self.stop.signal)):
            return None
        scores = rebalance.whole_scores(experience.scores, inputs.prompts, self.group)
        cut = lambda total: (slot.terms for slot in self.learner.slots(total, self.state))  # noqa: E731
        dealt = rebalance.rebalance(experience, inputs.prompts, self.group, cfg.run.seed, iteration, cut)
        experience, total, B = dealt.experience, dealt.total, inputs.total
        left_out: dict[str, float] = {}
        if sample.branch_window == "auto":
            skipped_segments.observe(self.state.window, dealt.rows.tolist(), sample, inputs.batch.closed, B)
            of_children = judges(self.scorer) == "children"
            left_out = skipped_segments.saved(self.state.window, inputs.batch.closed, sample, B, of_children)
        with timer("reference"):
            batches = functools.partial(self.learner.batches, experience, total, self.state)
            most = cfg.optim.states_at_once
            experience = objective.prepare(self.policy, self.table, experience, sample, most, batches)
            if iteration == 0 and self.policy.keeps_full_base and self.group.main:
                errors = base_errors(self.policy, self.table, experience, sample, objective, most)
                print(base_text(cfg.engine.base_weights, errors))
                left_out |= {name: float(values.mean()) for name, (_, values) in errors.items()}
            self.policy.forget_full_base()
        skipped = self.state.skipped_steps
        record = self.learner.update(experience, self.state, timer, total)
        if self.learner.deviations is not None and iteration == 0:
            print(start_text(self.learner.deviations))
        if total == 0 and not scores.isfinite().all():
            self.state.nonfinite_in_a_row += 1
        states = sum(int(n) for n in self.group.gather(torch.tensor([len(experience.states)])))
        judged: dict[str, Any] = {}
        if len(scores):  # labelled pairs have none
            judged = {"score_mean": scores.mean(), "score_std": scores.std()}
            judged |= gaps(scores.view(-1, sample.num_candidates, B))
        return {
            **{"epoch": inputs.epoch, **judged},
            **{"pairs": total, "valid_share": total / (B * len(objective.term_states(sample))), "states": states},
            "images": scores.numel(),
            **decode.record(self.group, inputs.prompts),
            **left_out,
            **record,
            **{"optimizer_steps": self.state.optimizer_steps, "skipped_steps": self.state.skipped_steps},
            **{"nonfinite_steps": self.state.skipped_steps - skipped},
        }

    def score_phase(self, timer: Timer) -> contextlib.AbstractContextManager[None]:
        """A judgement is a safe point: nothing has changed yet in this iteration."""
        self.stop.safe_point()
        return timer("score")

    def diagnosis(self) -> Path:
        """nonfinite.json and nonfinite.safetensors: what of the last batch is not finite, and the batch itself."""
        from safetensors.torch import save_file

        weights = self.policy.network()
        report: dict[str, Any] = {"state": dataclasses.asdict(self.state), "gradients": self.learner.broken}
        report["weights"] = [name for name, value in weights.items() if not value.isfinite().all()]
        if self.learner.scaler.is_enabled():
            report["loss_scale"] = self.learner.scaler.get_scale()
        tensors: dict[str, Tensor] = {}
        if (last := self.learner.last) is not None:
            e = last.experience
            tensors |= {"x_t": e.states.x_t, "x_prev": e.x_prev, "loss": last.loss}
            for whose, m in (("policy", last.m), ("reference", e.frozen)):
                if m is not None:
                    tensors |= {f"{whose}_{k}": v for k, v in m._asdict().items() if v is not None}
            report["timesteps"] = self.table.timesteps[e.states.rows].tolist()
        report["finite_share"] = {name: float(value.isfinite().float().mean()) for name, value in tensors.items()}
        path = self.run_dir / "nonfinite.json"
        data_files.write_atomically(path, json.dumps(report, indent=1) + "\n")
        save_file(
            {name: value.detach().cpu().contiguous() for name, value in tensors.items()},
            path.with_suffix(".safetensors"),
        )
        return path

    def export(self, directory: Path) -> list[Path]:
        return self.model.save(self.policy, directory)

    def settings(self) -> dict[str, Any]:
        size = self.group.size
        return {**super().settings(), "world_size": size, "global_batch": size * self.cfg.sample.sample_batch_size}

    def export_beside(self, checkpoint_dir: Path) -> None:
        self.export(checkpoint_dir)

    def watch(self, record: Mapping[str, Any]) -> list[str]:
        return self.warnings.look(record)

    # ------------------------------------------------------------------------------------------------ validation

    def validation_prompts(self) -> list[str]:
        return list(self.cfg.run.validation_prompt) or self.prompts[:4]

    @torch.no_grad()
    def validate(self) -> tuple[list[list[Tensor]], float] | None:
        """Images of the validation prompts from fixed noise, and the scorer's mean opinion of them; None if turned off.

        Plain DDIM (eta = 0) with the training's steps and guidance. The noise depends on the seed only, so values
        before and after training are of the same noise.
        """
        prompts, count = self.validation_prompts(), self.cfg.run.num_validation_images
        if count == 0:
            return None
        table = self.model.table(self.cfg.sample.num_steps, 0.0)
        images, scores = [], []
        for p, prompt in enumerate(prompts):
            row: list[Tensor] = []
            for start in range(0, count, self.cfg.model.images_per_decode):
                size = min(self.cfg.model.images_per_decode, count - start)
                pixels, score = self._validation_images(table, prompt, p * count + start, size)
                row += list(pixels.float().cpu())
                scores.append(score)
            images.append(row)
        return images, float(torch.cat(scores).mean())

    def _validation_images(self, table: StepTable, prompt: str, first: int, size: int) -> tuple[Tensor, Tensor]:
        """`size` images of one prompt from the noise of validation image `first` on, and their scores at timestep 0."""
        index = torch.arange(first, first + size, device=self.device)
        # iteration 2^32 - 1: a key that no iteration of training uses
        draws = KeyedDraws(self.cfg.run.seed, 2**32 - 1, index)
        x = draws.latents(self.model.latent_shape, self.model.latent_dtype)
        prompts = [prompt] * size
        sample = self.cfg.sample
        cond = self.model.cond(prompts)
        latents = sample_latents(self.policy, table, cond, sample.guidance_scale, x, sample.rows_per_forward)
        pixels = self.model.decode(latents)
        now = torch.zeros((), dtype=torch.int64, device=self.device)
        text = self.scorer.encode(prompts)
        # already decoded: the scorer gets the same pixels, whatever it asks for
        return pixels, self.scorer(Candidates(None, latents, now, text, 1, lambda _: pixels, size))

    def show(self, name: str) -> Validation | None:
        """Validate and write samples/<name>.png, a row a prompt."""
        result = self.validate()
        if result is None:
            return None
        images, score = result
        write_grid(self.run_dir / "samples" / f"{name}.png", images, self.validation_prompts())
        return Validation(score, self.measured(images), self.shown_settings())

    def shown_settings(self) -> dict[str, Any]:
        """What validation pictures and their score depend on beside the weights, as JSON gives it back."""
        cfg = self.cfg
        found = {
            "prompts": self.validation_prompts(),
            **{name: cfg.flat()[name] for name in ("num_validation_images", "seed", "num_steps", "guidance_scale")},
            **{"latents": list(self.model.latent_shape), "scorer": list(cfg.scorer.scorer)},
        }
        return json.loads(json.dumps(found))

    @torch.no_grad()
    def measured(self, images: list[list[Tensor]]) -> dict[str, list[float]]:
        """Held-out metrics and looks of the pictures, prompt after prompt. A metric's weights are loaded for it and
        dropped again: training has the memory."""
        found: dict[str, list[float]] = {}
        pictures = torch.stack([image for row in images for image in row]).clamp(-1, 1)
        texts = [prompt for prompt, row in zip(self.validation_prompts(), images, strict=True) for _ in row]
        for name in ("looks", *self.metrics):
            paths, dtype = self.model.resolved.scorer_paths, DTYPES[self.cfg.scorer.scorer_dtype]
            metric = make_metric(name, paths, self.model.tokenize, self.device, dtype, self.wanted)
            for start in range(0, len(texts), self.cfg.model.images_per_decode):
                part = slice(start, start + self.cfg.model.images_per_decode)
                for what, values in metric(pictures[part].to(self.device), texts[part]).items():
                    found.setdefault(what, []).extend(values.double().tolist())
        return found

    @torch.no_grad()
    def held_out_accuracy(self) -> float | None:
        """Share of the held-out pairs whose preferred image is ahead in what the loss compares; level ones count half.

        None without held-out pairs. Always of the same noise. Before training Diffusion-DPO's is 1/2.
        """
        held_out = None if self.pairs is None else self.pairs.held_out()
        if held_out is None:
            return None
        sample, most = self.cfg.sample, self.cfg.optim.states_at_once
        whole = self.objective.collect(self.policy, self.table, None, None, held_out, sample, 1)
        ahead = []
        for part in whole.micro_batches(most):
            e = self.objective.prepare(self.policy, self.table, part, sample, None)
            sides = self.objective.sides(predict_states(self.policy, self.table, e, e.states, False), e)
            ahead.append(sides[:, 0] - sides[:, 1])
        return float((torch.cat(ahead).sign() + 1).mean() / 2)

    def show_progress(self, iteration: int, log: MetricsLog, timer: Timer) -> dict[str, Any]:
        """The grid and scores of the weights after `iteration`, where they are due: what to log."""
        done, every = self.state.iteration, self.cfg.run.validation_steps or self.cfg.run.checkpointing_steps
        if done % every and done != self.total:
            return {}
        with timer("validate"):
            shown, accuracy = self.show(f"step-{done}"), self.held_out_accuracy()
        found: dict[str, Any] = {} if accuracy is None else {"validation_accuracy": accuracy}
        if shown is None:
            return found
        self.shown[done] = shown
        log.reporter.images(iteration, "samples", self.run_dir / "samples" / f"step-{done}.png")
        print(f"validation after {done} iterations: {shown.words(self.metrics, self.before)}")
        return {**found, **shown.record(self.metrics, self.before, self.cfg.run.seed)}

    def report(self) -> None:
        """Write report.html. Training never ends because of it."""
        try:
            write_report(self.run_dir)
        except Exception as error:
            again = f"python -m spo_fast.report {self.run_dir} makes it later"
            print(f"no report.html ({type(error).__name__}: {error}); {again}")

    # ------------------------------------------------------------------------------------------------ the run

    def train(self) -> Path:
        """From the first or the resumed iteration to the last; returns the run directory."""
        timer = Timer(self.device)
        try:
            with self.stop:
                return self._train(timer)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise RunError(out_of_memory(self.cfg, timer.phase, self.found, self.model.resolved)) from error
        finally:
            self.group.leave()

    def _train(self, timer: Timer) -> Path:
        self.announce()
        with timer("encode prompts"):
            self.encode_prompts()
        with self.start() as log:
            if log is not None:
                with timer("validate"):
                    self.before = self.before_training(log)
            timer.read_ms()  # the first iteration's record has its own times only
            try:
                done = self._loop(log, timer)
            finally:
                if self.pairs is not None:
                    self.pairs.close()
        if not done:
            self.stopped()
        elif self.group.main:
            self.finish()
        elif self.policy.shards is not None:
            self.export(self.run_dir)  # its part of what process 0 writes
        self.group.any(False)
        return self.run_dir

    def _loop(self, log: MetricsLog | None, timer: Timer) -> bool:
        """False if the run was asked to stop before its end."""
        costs = None if self.found.memory_bytes is None else predict(self.cfg, self.model.resolved, self.device.type)
        records = () if log is None else read_metrics(log.path)
        telemetry = Telemetry(self.device, self.found.name, costs, records, self.group.size)
        print("".join(f"{note}\n" for note in telemetry.notes()), end="")
        with ProgressLine(self.total) as progress:
            while (iteration := self.state.iteration) < self.total:
                before = copy.deepcopy(self.state)
                record = self.iterate(iteration, timer)
                if record is None:
                    self.state = before
                    return False
                self.state.iteration += 1
                self.learner.check_weights()
                if log is not None:
                    self.tell(iteration, record, log, timer, telemetry, progress)
                timer.read_ms()
                unfit, most = self.state.nonfinite_in_a_row, self.cfg.optim.max_nonfinite_steps
                # in fp16 the first steps overflow while a scale is looked for
                looking = self.learner.scaler.is_enabled()
                never = self.state.iteration == self.total and not (self.state.optimizer_steps or looking)
                broken = unfit >= most or (never and unfit > 0)
                if broken:
                    raise RunError(self.broken_text("optimizer steps" if record["pairs"] else "iterations' scores"))
                if self.state.iteration % self.cfg.run.checkpointing_steps == 0 or self.state.iteration == self.total:
                    self.check_agreement()
                    with timer("save"):
                        self.save()
                if self.group.any(bool(self.stop.signal)):  # where all wait for process 0's files
                    return self.state.iteration == self.total
        return True

    def tell(
        self,
        iteration: int,
        record: dict[str, Any],
        log: MetricsLog,
        timer: Timer,
        telemetry: Telemetry,
        progress: ProgressLine,
    ) -> None:
        """Grids, log, warnings and progress of an iteration, by process 0."""
        record |= self.show_progress(iteration, log, timer)
        record["device"] = self.found.name
        record |= (times := timer.read_ms()) | telemetry.read(record, times)
        record |= gpu_stats(self.device.index or 0) if self.device.type == "cuda" else {}
        # logged before it is saved: what a resumed run repeats is cut from the log, what is missing stays so
        record = log.log(iteration, record)
        for warning in record.get("warnings", ()):
            print(f"warning: iteration {iteration}: {warning}.")
        progress.update(record)
        if "validation_score" in record and self.state.iteration < self.total:
            self.report()

    def broken_text(self, what: str) -> str:
        """Why the run stops, its diagnosis written."""
        if not self.group.main:
            return f"{what} were not finite; process 0 says more."
        self.report()
        return (
            f"{self.state.nonfinite_in_a_row} {what} in a row were not finite; see {self.diagnosis()}. "
            "Go on from the last checkpoint (--resume_from_checkpoint latest) with a lower --learning_rate, or start "
            "anew with --mixed_precision bf16 or no."
        )

    def check_agreement(self) -> None:
        """Raises RunError if the processes' weights have come apart: a faulty device, or unequal libraries."""
        if self.group.size > 1:
            parts = self.policy.shards is not None
            weights = self.policy.network().values() if parts else self.learner.parameters
            sums = torch.stack([p.detach().double().sum() for p in weights])
            if any(not torch.equal(*pair) for pair in itertools.pairwise(self.group.gather(sums[None]))):
                raise RunError(
                    f"the processes' weights differ after iteration {self.state.iteration}: a device or its libraries "
                    "compute something else. --resume_from_checkpoint latest goes on from before it."
                )

    def before_training(self, log: MetricsLog) -> Validation | None:
        """The validation before training, kept in the run directory so that a resumed run still has it."""
        samples = self.run_dir / "samples"
        path = samples / "before.json"
        # like the log's records: what this run is about to repeat, and the end that is none any more
        later = [
            p for p in samples.glob("step-*.png") if p.stem[5:].isdigit() and int(p.stem[5:]) > self.state.iteration
        ]
        for grid in (*later, samples / "after.png"):
            grid.unlink(missing_ok=True)
        if self.resume is not None:
            kept = Validation.read(path) if path.is_file() else None
            if kept is None or not self.cfg.run.num_validation_images or kept.of == self.shown_settings():
                return kept
            print("the pictures before training were of other validation settings: nothing is compared with them")
            for old in (path, path.with_suffix(".png")):
                data_files.set_aside(old)
            return None
        shown = self.show("before")
        if (accuracy := self.held_out_accuracy()) is not None:
            print(f"held-out preference accuracy before training: {accuracy:.3f}")
        if shown is not None:
            data_files.write_atomically(path, json.dumps(without_nan(shown._asdict())) + "\n")
            log.reporter.images(0, "samples_before", samples / "before.png")
        return shown

    def finish(self) -> None:
        """Export the trained weights and show what training did to images from the same noise."""
        files = self.export(self.run_dir)
        if self.pairs is not None:
            self.pairs.split.finish()
        samples, before, after = self.run_dir / "samples", self.before, self.shown.get(self.state.iteration)
        if after is None:  # a finished run, resumed
            after = self.show("after")
        else:
            shutil.copyfile(samples / f"step-{self.state.iteration}.png", samples / "after.png")
        if before is not None and after is not None:
            count = len(self.validation_prompts()) * self.cfg.run.num_validation_images
            print(f"{count} images from the same noise, before and after: {after.words(self.metrics, before)}")
            print(f"sample grids: {samples / 'before.png'}, {samples / 'after.png'}")
        self.report()
        write_card(self.run_dir, self.repository)
        print(f"what the run did: {self.run_dir / 'report.html'}; model card: {self.run_dir / 'README.md'}")
        print("trained weights: " + ", ".join(str(f) for f in files))
        if self.repository is not None:
            print(f"uploaded to {upload(self.run_dir, self.repository)}")


def train(cfg: Config) -> Path:
    """Train as cfg says; returns the run directory, which holds the LoRA, checkpoints, metrics and sample grids."""
    return Run(cfg).train()
