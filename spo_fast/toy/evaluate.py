"""`python -m spo_fast.toy.evaluate RUN`: the true scores of a toy run's pictures, before and after training.

Same test prompts and same noise for every row, so differences are paired. The base model at several guidance scales
stands beside them: what guidance alone would have given.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from spo_fast import train
from spo_fast.config import command, flags
from spo_fast.config.tables import markdown
from spo_fast.data import files, toy_world
from spo_fast.evaluation.pictures import write_grid
from spo_fast.evaluation.sampling import draw_latents
from spo_fast.evaluation.statistics import Estimate, estimate
from spo_fast.method.experience import Candidates
from spo_fast.method.noise import KeyedDraws
from spo_fast.method.rollout import RolloutBatch, rollout_segments
from spo_fast.models.files.toy import WITHOUT_T5
from spo_fast.training import run_directory
from spo_fast.training.loop import Run

BATCH = 128
GUIDANCE_SCALES = (1.0, 2.0, 3.0, 5.0)
FLOW_STEPS = 20  # Euler's, of a flow model's pictures
NOISE = 2**32 - 2  # the iteration whose noise evaluations use: neither training nor validation gets there


def true_scores(pixels: Tensor, prompts: list[str]) -> dict[str, Tensor]:  # (B, 3, 16, 16) -> (B,) each
    """aesthetics 0..10; layout: everything as the caption says; share of it; out_of_range: share of pixels."""
    right = toy_world.layout(pixels, prompts).float()
    return {
        "aesthetics": toy_world.aesthetics(pixels),
        "layout": right.all(1).float(),
        "share": right.mean(1),
        "out_of_range": (pixels.abs() > 1).float().mean((1, 2, 3)),
        **toy_world.looks(pixels),
    }


@torch.no_grad()
def pictures(run: Run, prompts: list[str], guidance_scale: float, seed: int) -> Tensor:  # (N, 3, 16, 16)
    """What the run's policy makes of the prompts: plain DDIM from noise that depends on (seed, place in the list)."""
    table = run.model.table(run.cfg.sample.num_steps, 0.0)
    made = []
    for start in range(0, len(prompts), BATCH):
        part = prompts[start : start + BATCH]
        numbers = range(start, start + len(part))
        latents = draw_latents(run.policy, run.model, table, part, numbers, guidance_scale, (seed, NOISE))
        made.append(run.model.decode(latents).float().cpu())
    return torch.cat(made)


def flow_pictures(directory: Path, prompts: list[str], guidance_scale: float, seed: int) -> Tensor:
    """(N, 3, 16, 16) in FLOW_STEPS Euler steps of diffusers' own pipeline, without T5's tokens, not clamped."""
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline.from_pretrained(
        directory, **WITHOUT_T5, torch_dtype=torch.float32, local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    generator, made = torch.Generator().manual_seed(seed), []
    settings = {"num_inference_steps": FLOW_STEPS, "max_sequence_length": 0, "output_type": "latent"}
    for start in range(0, len(prompts), BATCH):
        part = prompts[start : start + BATCH]
        latents = pipe(part, guidance_scale=guidance_scale, generator=generator, **settings).images
        with torch.no_grad():
            made.append(pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample)
    return torch.cat(made)


def prompts_to_test(count: int) -> list[str]:
    """The test prompts over and over."""
    return (toy_world.TEST * math.ceil(count / len(toy_world.TEST)))[:count]


# ---------------------------------------------------------------------------------------------------- controls


@dataclass
class TrueScorer:
    """In a preference model's place: notes the true scores of all candidates, and scores at random (seed) or 0."""

    random_seed: int | None = None
    layout: dict[int, list[Tensor]] = field(default_factory=dict)  # timestep -> (K, B) shares
    aesthetics: dict[int, list[Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.random_seed or 0)

    def encode(self, prompts: list[str]) -> Tensor:  # (B,) places in CAPTIONS
        """The prompts' places in the world's captions."""
        texts = list(toy_world.CAPTIONS)
        return torch.tensor([texts.index(prompt) for prompt in prompts])

    def __call__(self, candidates: Candidates) -> Tensor:  # (K B,)
        """Random scores, or zeros; the true ones are noted."""
        texts, t, K = list(toy_world.CAPTIONS), int(candidates.t), candidates.num_candidates
        pixels = torch.cat([part for _, part in candidates.pixel_chunks()])
        assert isinstance(candidates.text, Tensor)
        prompts = [texts[i] for i in candidates.text.tolist()]
        self.layout.setdefault(t, []).append(toy_world.layout(pixels, prompts).float().mean(1).view(K, -1))
        self.aesthetics.setdefault(t, []).append(toy_world.aesthetics(pixels).view(K, -1))
        if self.random_seed is None:
            return torch.zeros(len(pixels), device=pixels.device)
        # 0.05: about as many pairs pass the toy preset's threshold as with its preference model
        return 0.05 * torch.randn(len(pixels), generator=self.generator).to(pixels.device)

    def spread(self, of: str) -> dict[int, Estimate]:
        """Timestep -> standard deviation among the children of one x_t, averaged over prompts."""
        return {t: estimate(torch.cat(rows, 1).std(0)) for t, rows in getattr(self, of).items()}


def candidate_spread(run: Run, prompts: list[str], num_candidates: int, seed: int) -> TrueScorer:
    """How much candidates that share x_t differ, by the timestep they are judged at (branching at every step)."""
    scorer = TrueScorer()
    sample = run.cfg.with_fields(num_candidates=num_candidates, branch_start=0, num_inner_steps=0).sample
    for start in range(0, len(prompts), BATCH // 2):
        part = prompts[start : start + BATCH // 2]
        draws = KeyedDraws(seed, NOISE - 1, torch.arange(start, start + len(part), device=run.device))
        cond, text = run.model.cond(part), scorer.encode(part)
        batch = RolloutBatch(cond, text, draws, run.model.latent_shape, run.model.latent_dtype)
        rollout_segments(replace(run.sampler, scorer=scorer, decode=run.model.decode, cfg=sample), batch)
    return scorer


# ---------------------------------------------------------------------------------------------------- the report


def rows_of(
    run: Run, prompts: list[str], seed: int, scales: Iterable[float]
) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
    """(name, pictures, their true scores): the base at several guidance scales, and the run's policy."""
    own = run.cfg.sample.guidance_scale
    with run.policy.reference():
        for g in sorted({*scales, own}):
            x = pictures(run, prompts, g, seed)
            yield f"base, guidance {g:g}" + (" (before)" if g == own else ""), x, true_scores(x, prompts)
    x = pictures(run, prompts, own, seed)
    yield f"trained, guidance {own:g} (after)", x, true_scores(x, prompts)


def report(
    run: Run, num_images: int, seed: int = 0, scales: Iterable[float] = GUIDANCE_SCALES
) -> tuple[str, dict[str, dict[str, list[float]]]]:
    """The table, and its numbers by row and score as (mean, standard error, pictures)."""
    prompts = prompts_to_test(num_images)
    columns = ("aesthetics", "layout", "out_of_range")
    names = ("aesthetics (0-10)", "layout right", "pixels out of range")
    lines = [[f"{num_images} pictures of {len(set(prompts))} test prompts", *names]]
    found, numbers, before = {}, {}, ""
    for name, x, scores in rows_of(run, prompts, seed, scales):
        found[name] = scores
        estimates = {c: estimate(scores[c]) for c in scores}
        numbers[name] = {c: list(e) for c, e in estimates.items()}
        lines.append([name, *(f"{estimates[c].mean:.3f} ± {estimates[c].error:.3f}" for c in columns)])
        if name.endswith(")"):
            write_grid(run.run_dir / "samples" / f"test-{name.split('(')[1][:-1]}.png", grid(x))
            before = before or name
    gains = {c: estimate(scores[c] - found[before][c]) for c in scores}
    numbers["gain"] = {c: list(e) for c, e in gains.items()}
    lines.append(["after - before, paired", *(f"{gains[c].mean:+.3f} ± {gains[c].error:.3f}" for c in columns)])
    return markdown(lines), numbers


def grid(pixels: Tensor, rows: int = 8, columns: int = 8) -> list[list[Tensor]]:
    """Pictures in whole rows."""
    whole = [list(row) for row in pixels[: rows * columns].split(columns)]
    return [row for row in whole if len(row) == len(whole[0])]


def load_run(run_dir: Path, **changes: object) -> Run:
    """A finished run's parts with its trained weights. The run directory must not be in use."""
    if not (run_dir / "config.yaml").is_file():
        raise FileNotFoundError(f"{run_dir} is no run's directory: it has no config.yaml.")
    cfg = train.parse(["--config", str(run_dir / "config.yaml"), "--output_dir", str(run_dir)])
    run = train.build(cfg.with_fields(resume_from_checkpoint="latest", **changes))
    if run.cfg.model.model != "toy":
        raise ValueError(f"{run_dir} is a run of {run.cfg.model.model}: only the toy's world has true scores.")
    if run.resume is None or run_directory.number(run.resume) != run.total:
        raise FileNotFoundError(f"{run_dir} has no checkpoint {run.total}: the run has not finished.")
    from safetensors.torch import load_file

    run.policy.load_state_dict(load_file(run.resume / "trained.safetensors"))
    return run


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    return command.guarded(lambda: evaluate(arguments), arguments)


def evaluate(arguments: list[str] | None) -> None:
    """The command: true scores of a run before and after, printed and kept in its directory."""
    parser = flags.Parser("python -m spo_fast.toy.evaluate", __doc__.split("\n")[0])
    parser.add_argument("run_dir", type=Path, help="output directory of a run of --model toy")
    parser.add_argument("--num_images", type=int, default=128, help="pictures of each row")
    parser.add_argument("--seed", type=int, default=0, help="of the noise they start from")
    args = parser.parse_args(arguments)
    if args.num_images < 1:
        parser.error(f"--num_images={args.num_images} must be at least 1.")
    run = load_run(args.run_dir)
    table, numbers = report(run, args.num_images, args.seed)
    files.write_atomically(args.run_dir / "true_scores.json", json.dumps(numbers, indent=1) + "\n")
    files.write_atomically(args.run_dir / "true_scores.md", table + "\n")
    print(table)


if __name__ == "__main__":
    sys.exit(main())
