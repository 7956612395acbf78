"""Rollouts: denoise, branch, judge, keep the best and the worst; or denoise K trajectories and judge their ends.

`branching_rollout` is SPO's and MSPO's (arXiv 2406.04314, section 3; multi_sample_pipeline*.py of the published code):
K candidates part at the first step of a segment, go on independently through the segment, and one comparison of their
x0 estimates labels all of the segment's transitions. A scorer that judges children (LPO's) needs no x0: it is asked
before the UNet, which then sees the picked child only. All candidates and both guidance halves share one UNet call a
step, and nothing is read back to the host before the rollout's end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spo_fast.config.training import SampleConfig
from spo_fast.method.experience import (
    Candidates,
    Cond,
    Experience,
    Prediction,
    States,
    Text,
    asks_when,
    children_told,
    judges,
    repeat_text,
    to_device,
)
from spo_fast.method.noise import Drawn, Draws
from spo_fast.method.protocols import Decode, Denoiser, Judge, Policy
from spo_fast.method.schedule import StepTable
from spo_fast.ops.transition import transition

BRANCH_SIGMA = 0.805
"""Of t = 751, where SPO begins to branch: noise / (signal + noise) is .8046 there (4.1 times as much noise)."""


@dataclass(frozen=True)
class RolloutBatch:
    """What a rollout needs to know about its B prompts."""

    cond: Cond
    text: Text  # scorer.encode(prompts)
    draws: Draws
    latent_shape: tuple[int, int, int]  # C, H, W
    dtype: torch.dtype  # of the latents: float32, or float64 for checks
    skipped: frozenset[int] = frozenset()  # first steps of segments that are not compared (skipped_segments.py)
    iteration: int = 0  # of the run

    def __len__(self) -> int:
        return len(self.cond)


@dataclass(frozen=True)
class Segments:
    """A rollout before anything is read from the device: G (segment, step) slots of B prompts, valid or not."""

    x_t: Tensor  # (G, J, B, C, H, W) of the winner and the loser, or of all children
    x_prev: Tensor  # (G, J, B, C, H, W)
    valid: Tensor  # (G, B) bool
    rows: list[int]  # (G,) row of each slot
    shared: list[bool]  # (G,) whether all sides have one x_t
    scores: Tensor  # every score, in order

    def first(self, slots: int) -> Segments:
        """The first so many slots."""
        kept = slice(slots)
        rows, shared = self.rows[kept], self.shared[kept]
        return Segments(self.x_t[kept], self.x_prev[kept], self.valid[kept], rows, shared, self.scores)

    def compact(self, cond: Cond) -> Experience:
        """What was kept as loss terms, in the order segment, step, prompt. The rollout's one read of the device."""
        sides = torch.arange(self.x_t.shape[1])
        slot, prompt = self.valid.cpu().nonzero(as_tuple=True)  # the read; what follows is index arithmetic on the host
        shared = torch.tensor(self.shared)[slot]  # (N,)
        # states: one for sides that share x_t, else each side's own, term after term
        size = torch.where(shared, 1, len(sides))
        first = size.cumsum(0) - size
        index = first[:, None] + sides * (~shared)[:, None]  # (N, J)
        owner = torch.arange(len(slot)).repeat_interleave(size)
        side = torch.arange(owner.shape[0]) - first[owner]
        rows = torch.tensor(self.rows)[slot][owner]
        read, device = index.unsqueeze(2), self.x_t.device
        known = (slot, prompt, slot[owner], side, prompt[owner], rows, read)
        slot, prompt, of_slot, side, of_prompt, rows, index = (to_device(v, device) for v in known)
        states = States(self.x_t[of_slot, side, of_prompt], rows, of_prompt)
        x_prev = self.x_prev[slot, :, prompt]  # (N, J, C, H, W)
        return Experience(states, x_prev.unsqueeze(2), index, cond, self.scores, order=slot, read=(index, read))


def trained_steps(cfg: SampleConfig, table: StepTable) -> tuple[int, int]:
    """First step that is trained, and the one after the last, where a table's noise decides what was left open.

    Without branch_start the first step whose noise / (signal + noise), of a flow sigma, is at most branch_sigma. Steps
    with std 0 are taken, but have no log-probability: only a schedule's last can be one. Of a flow that ends with one
    the step before is left out too, unless branch_end asks for it: its std is so small that the rounding of the
    network's output is multiplied by about 30. Raises ValueError if that leaves nothing to train, or a flow's
    branch_end asks for a step without noise.
    """
    noisy, is_flow = int((table.coefficients[:, 4] > 0).sum()), table.timesteps.is_floating_point()
    first = cfg.first_branch
    if cfg.branch_start is None:
        most = BRANCH_SIGMA if cfg.branch_sigma is None else cfg.branch_sigma
        share = table.noise / (table.signal + table.noise)
        first = int((share > most + 1e-6).sum())
    end = min(cfg.last_branch, noisy)
    at = f"sigma {float(table.noise[-1]):.3g}" if is_flow else f"t = {int(table.timesteps[-1])}"
    if is_flow and noisy < table.num_steps:
        if cfg.branch_end is None:
            end = noisy - 1
        elif cfg.branch_end > noisy:
            raise ValueError(
                f"branch_end={cfg.branch_end} trains the last of {table.num_steps} steps, from {at}, which adds no "
                f"noise with sampler={cfg.sampler}: it has no log-probability. Use at most {noisy}."
            )
    if first >= end:
        # by default alone, and not for want of noise
        left_out = f", and the one before hardly any (--branch_end {noisy} trains it)" if first < noisy else ""
        raise ValueError(
            f"branch_start={cfg.branch_start} leaves no step to train: on the model's noise schedule the last of "
            f"{cfg.num_steps} steps, from {at}, adds no noise{left_out}. Use a lower --branch_start."
            if cfg.branch_start is not None
            else f"branch_sigma={most:g} leaves no step to train of {cfg.num_steps}: use a higher --branch_sigma, "
            "or more --num_steps."
        )
    return first, end


def window_at(window: str, moves: int | None, last: int, iteration: int) -> tuple[int, int]:
    """First step of FIRST:END in an iteration, and the one after its last; back to FIRST once it has reached `last`."""
    first, end = (int(part) for part in window.split(":"))
    shift = 0 if moves is None else iteration // moves % (last - end + 1)
    return first + shift, end + shift


def with_window(sampler: Sampler, cfg: SampleConfig) -> Sampler:
    """A sampler that adds noise in the steps that cfg trains, and takes those without noise elsewhere."""
    assert sampler.ode is not None, "a window needs the steps without noise"
    rows = torch.arange(sampler.table.num_steps, device=sampler.table.coefficients.device)[:, None]
    inside = (rows >= cfg.first_branch) & (rows < cfg.last_branch)
    mixed = sampler.table.coefficients.where(inside, sampler.ode.coefficients)
    return replace(sampler, table=replace(sampler.table, coefficients=mixed))


def segments(cfg: SampleConfig) -> list[tuple[int, int]]:
    """(first step, step of the judgement) of each segment; judgement at num_steps means the final latents.

    Groups of 1 + num_inner_steps steps from branch_start on, the last one as long as what is left. With last_step =
    "extend" a comparison that would fall on the last step is left out and its group runs to the end
    (multi_sample_pipeline_sdxl.py: `i == len(timesteps) - 1` takes the last branch).
    """
    starts = list(range(cfg.first_branch, cfg.last_branch, 1 + cfg.num_inner_steps))
    if cfg.last_step == "extend" and starts[-1] == cfg.num_steps - 1 and len(starts) > 1:
        starts.pop()
    return list(zip(starts, [*starts[1:], cfg.last_branch], strict=True))


def threshold_at(table: StepTable, cfg: SampleConfig, i: int) -> float | Tensor:
    """The threshold of a comparison of children of step i: with threshold_max linear in sigma (LPO), on the device."""
    if cfg.threshold_max is None:
        return cfg.threshold
    sigma = table.coefficients[:, 4]
    least = sigma.where(sigma > 0, torch.inf).amin()  # a last step without noise is never compared
    noisiness = (sigma[i] - least) / (sigma.max() - least).clamp_min(1e-12)  # of a single step
    return cfg.threshold + (cfg.threshold_max - cfg.threshold) * noisiness


def best_and_worst(scores: Tensor, threshold: float | Tensor) -> tuple[Tensor, Tensor]:  # scores (K, B)
    """Indices (2, B) of the highest and the lowest score, and whether their softmax differs by more than the threshold.

    compare_funcs.py of the published code, with a stable sort: among equal scores the first counts as higher.
    """
    ordered, indices = scores.sort(dim=0, descending=True, stable=True)
    # stacked, not indexed by [0, -1]: a Python list becomes a host tensor, and copying it waits for the device
    p = torch.stack([ordered[0], ordered[-1]]).softmax(0)
    return torch.stack([indices[0], indices[-1]]), p[0] - p[1] > threshold


Choice = Callable[[Tensor, "float | Tensor"], tuple[Tensor, Tensor]]


def _take(x: Tensor, index: Tensor) -> Tensor:  # x (K, B, ...), index (J, B) -> (J, B, ...)
    return x[index, torch.arange(x.shape[1], device=x.device)]


def predict_rows(policy: Denoiser, x: Tensor, t: Tensor, cond: Cond, guided: bool, most: int | None) -> Prediction:
    """The policy's outputs on x (B, C, H, W) at one timestep, in forwards of at most `most` rows (None: one)."""
    size = len(x) if most is None else max(1, most // (2 if guided else 1))
    if size >= len(x):
        return policy.predict(x, t, cond, guided=guided)
    rows = torch.arange(len(x), device=x.device).split(size)
    return Prediction.cat([policy.predict(x[r], t, cond.select(r), guided=guided) for r in rows])


def advance(
    policy: Denoiser, cfg: SampleConfig, table: Tensor, x: Tensor, t: Tensor, rows: Tensor, cond: Cond, drawn: Drawn
) -> Tensor:  # x (B, C, H, W) -> one child of each
    """A guided forward and its transition: what a rollout does most, as one call with tensors for all that changes."""
    m = predict_rows(policy, x, t, cond, cfg.guidance_scale > 1, cfg.rows_per_forward)
    return transition(*m, x, rows, table, cfg.guidance_scale, num_children=1, want_x0=False, **drawn)[1][0]


@dataclass(frozen=True)
class Sampler:
    """Whose images are drawn, on which steps, and who judges them."""

    policy: Policy
    table: StepTable
    scorer: Judge
    decode: Decode
    cfg: SampleConfig
    decode_chunk: int = 8  # images through the VAE at a time
    ode: StepTable | None = None  # the same steps without noise, for a method that takes both


class Rollout:
    """What every rollout is made of: the UNet's outputs, the children of a step, and the scorer's opinion of them."""

    def __init__(self, sampler: Sampler, batch: RolloutBatch):
        policy, table, self.cfg = sampler.policy, sampler.table, sampler.cfg
        self.policy, self.table, self.scorer = policy, table, sampler.scorer
        self.decode, self.chunk = sampler.decode, sampler.decode_chunk
        self.batch, self.K, self.B = batch, self.cfg.num_candidates, len(batch)
        device = table.coefficients.device
        self.every_row = torch.arange(table.num_steps, device=device)
        guided = self.cfg.guidance_scale > 1
        branched = batch.cond.select(torch.arange(self.B, device=device).repeat(self.K))  # k-major
        self.cond, self.branched_cond = (
            policy.precompute_text(batch.cond, guided),
            policy.precompute_text(branched, guided),
        )
        self.branched_text = repeat_text(batch.text, self.K)
        # read where nothing waits yet, and only for such scorers
        self.when = table.judged_at.tolist() if asks_when(sampler.scorer) else None
        # the policy owns the graphs: they outlive a rollout
        self._predict = policy.graphs.wrap("predict_rows", predict_rows)
        self._advance = policy.graphs.wrap("advance", advance)

    def _cond(self, x: Tensor) -> Cond:
        return self.cond if len(x) == self.B else self.branched_cond

    def predict(self, x: Tensor, i: int) -> Prediction:  # x (B, C, H, W) or (K B, C, H, W)
        """The policy's outputs at step i, rows_per_forward rows a forward."""
        guided, most = self.cfg.guidance_scale > 1, self.cfg.rows_per_forward
        return self._predict(self.policy, x, self.table.timesteps[i], self._cond(x), guided, most)

    def advance(self, x: Tensor, i: int) -> Tensor:  # (B, C, H, W) or (K B, C, H, W) -> one child of each
        """Step i without a comparison."""
        drawn = self.batch.draws.children(i, 1, len(x) // self.B)
        step = (self.table.timesteps[i], self._rows(x, i), self._cond(x), drawn)
        return self._advance(self.policy, self.cfg, self.table.coefficients, x, *step)

    def branch(self, m: Prediction, x: Tensor, i: int, num_children: int | None = None) -> Tensor:
        """x (B, C, H, W) -> K children of each, (K, B, C, H, W)."""
        K = self.K if num_children is None else num_children
        drawn = self.batch.draws.children(i, K, 1)
        arguments = (*m, x, self._rows(x, i), self.table.coefficients, self.cfg.guidance_scale)
        return transition(*arguments, num_children=K, want_x0=False, **drawn)[1]

    def judge(self, x: Tensor, m: Prediction | None, i: int) -> Tensor:  # (K B, C, H, W) -> (K, B) scores
        """Of the x0 estimates of step i; i = num_steps: of the final latents, at timestep 0."""
        if m is None:
            # GradSPO's code shows the final images at the last step's timestep
            if self.cfg.last_step == "keep":
                return self._score(None, x, -1)
            return self._score(None, x, None)
        arguments = (*m, x, self._rows(x, i), self.table.coefficients, self.cfg.guidance_scale)
        return self._score(x, transition(*arguments, num_children=0)[0], i)

    def judge_children(self, x: Tensor, i: int) -> Tensor:  # (K B, C, H, W) -> (K, B)
        """Of children of step i as they are, at their parent's timestep or, as the scorer has it, at their own."""
        told = i + children_told(self.scorer)
        return self._score(x, x, told) if told < self.table.num_steps else self._score(None, x, None)

    def _score(self, x_t: Tensor | None, x0: Tensor, i: int | None) -> Tensor:
        """At the timestep of step i; None: at 0."""
        steps = self.table.judged_at
        t = torch.zeros_like(steps[0]) if i is None else steps[i]
        at = None if self.when is None else 0 if i is None else self.when[i]
        candidates = Candidates(x_t, x0, t, self.branched_text, self.K, self.decode, self.chunk, at)
        return self.scorer(candidates).view(self.K, self.B)

    def _rows(self, x: Tensor, i: int) -> Tensor:
        return self.every_row[i].expand(x.shape[0])


@torch.no_grad()
def rollout_segments(sampler: Sampler, batch: RolloutBatch, choose: Choice = best_and_worst) -> Segments:
    """Everything of a branching rollout that can run without reading from the device: at most num_steps UNet calls.

    choose: scores (K, B) and a threshold -> indices (J, B) of the children that are recorded, and whose are used.
    """
    table, cfg, draws = sampler.table, sampler.cfg, batch.draws
    K, B, rollout = cfg.num_candidates, len(batch), Rollout(sampler, batch)
    x = draws.latents(batch.latent_shape, batch.dtype)
    for i in range(cfg.first_branch):
        x = rollout.advance(x, i)
    m = rollout.predict(x, cfg.first_branch)
    starts = [end for first, end in segments(cfg) if first not in batch.skipped and end < cfg.last_branch]
    picks = draws.picks(starts if cfg.next_start == "random" else [], K)

    x_t, x_prev, valid, rows, shared, scores = [], [], [], [], [], []
    for first, end in segments(cfg):
        if first in batch.skipped:
            x = rollout.branch(m, x, first, num_children=1)[0]
            for i in range(first + 1, end):
                x = rollout.advance(x, i)
            if end < cfg.last_branch:
                m = rollout.predict(x, end)
            continue
        branches = rollout.branch(m, x, first)  # (K, B, C, H, W)
        path = [x.expand_as(branches), branches]
        for i in range(first + 1, end):
            branches = rollout.advance(branches.flatten(0, 1), i).view_as(branches)
            path.append(branches)
        flat = branches.flatten(0, 1)
        if judges(sampler.scorer) == "children":
            m_all, score = None, rollout.judge_children(flat, end - 1)
        else:
            m_all = rollout.predict(flat, end) if end < cfg.num_steps else None
            score = rollout.judge(flat, m_all, end)
        final = end == cfg.num_steps and cfg.last_step == "keep"
        sides, kept = choose(score, -1.0 if final else threshold_at(table, cfg, end - 1))
        for s, i in enumerate(range(first, end)):
            x_t.append(_take(path[s], sides))
            x_prev.append(_take(path[s + 1], sides))
            valid.append(kept)
            rows.append(i)
            shared.append(s == 0)
        scores.append(score.flatten())
        if end < cfg.last_branch:
            ranked = None if cfg.next_start == "random" else best_and_worst(score, 0.0)[0]
            pick = next(picks) if ranked is None else ranked[("winner", "loser").index(cfg.next_start)]
            x = _take(branches, pick[None])[0]
            # the prediction that judged the chosen candidate starts its next step: no second UNet call
            chosen = pick * B + torch.arange(B, device=pick.device)
            m = rollout.predict(x, end) if m_all is None else m_all.select(chosen)
    return Segments(torch.stack(x_t), torch.stack(x_prev), torch.stack(valid), rows, shared, torch.cat(scores))


@dataclass(frozen=True)
class Trajectories:
    """K whole trajectories of each of B prompts."""

    x: Tensor  # (num_steps + 1, K, B, C, H, W), x_T first
    scores: Tensor  # (K, B) of their ends


@torch.no_grad()
def trajectory_rollout(sampler: Sampler, batch: RolloutBatch) -> Trajectories:
    """K trajectories of each prompt, each from noise of its own, judged at their ends. Reads nothing back."""
    K, n, rollout = sampler.cfg.num_candidates, sampler.cfg.num_steps, Rollout(sampler, batch)
    x = [batch.draws.latents(batch.latent_shape, batch.dtype, K)]  # (K B, C, H, W) each
    for i in range(n):
        x.append(rollout.advance(x[i], i))
    score = (
        rollout.judge_children(x[n], n - 1) if judges(sampler.scorer) == "children" else rollout.judge(x[n], None, n)
    )
    return Trajectories(torch.stack(x).unflatten(1, (K, len(batch))), score)


def branching_rollout(sampler: Sampler, batch: RolloutBatch) -> Experience:
    """`rollout_segments`, then the one read of the device that keeps the valid pairs."""
    return rollout_segments(sampler, batch).compact(batch.cond)


@torch.no_grad()
def sample_latents(
    policy: Denoiser, table: StepTable, cond: Cond, guidance_scale: float, x: Tensor, most_rows: int | None = None
) -> Tensor:
    """Plain sampling from the noise x (B, C, H, W) with a deterministic table (eta = 0): final latents.

    most_rows: UNet rows in one forward, as rows_per_forward.
    """
    quiet, cond = (
        torch.zeros((1, *x.shape), dtype=x.dtype, device=x.device),
        policy.precompute_text(cond, guidance_scale > 1),
    )
    for i in range(table.num_steps):
        cond_out, uncond_out = predict_rows(policy, x, table.timesteps[i], cond, guidance_scale > 1, most_rows)
        rows = torch.full((x.shape[0],), i, device=x.device)
        arguments = (cond_out, uncond_out, x, rows, table.coefficients, guidance_scale)
        x = transition(*arguments, noise=quiet, want_x0=False)[1][0]
    return x
