"""One training iteration: the published execution strategy against ours, one technique a row, quality beside speed.

Each row runs in a process of its own. The first, `truth`, evaluates a few recorded pairs in float32; every later row
evaluates the same pairs with the same weights, and its errors stand in its record. Ours counts only if they are no
larger than the published strategy's in the same 16-bit type (`gate`). Scores come from the real decoder and the real
preference network at its real cost; which pairs are kept is scripted, so that all rows train on as many.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import networks
from benchmarks.published import PublishedLoop
from benchmarks.records import Records, quantiles
from benchmarks.shapes import iteration_config, latent_shape
from spo_fast.config.training import Config
from spo_fast.method.experience import Candidates, Cond, Experience, Prediction, States, judges
from spo_fast.method.noise import KeyedDraws, permutation
from spo_fast.method.objectives import make_objective, predict_states
from spo_fast.method.rollout import RolloutBatch, Sampler, segments
from spo_fast.method.schedule import StepTable, ddim_table
from spo_fast.models.diffusion import DTYPES, decode_in_cache
from spo_fast.models.fuse import fuse
from spo_fast.models.graphs import CudaCapture
from spo_fast.models.policy import Policy
from spo_fast.ops.log_ratio import log_ratio
from spo_fast.training.accelerate import compile_networks, replayed
from spo_fast.training.checkpoint import TrainState
from spo_fast.training.learner import Learner
from spo_fast.training.monitor.timer import Timer

# ---------------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class Technique:
    """What one row switches on."""

    published: bool = False
    modern: bool = False
    """The published loop in one 16-bit type, without its detours (published.py)."""
    mixed_precision: str = "fp16"
    fuse: bool = False
    """The package's ops inside the networks, channels-last, text keys and values once a rollout."""
    compile: str = "off"
    graphs: bool = False
    merged: bool = False
    """Rollouts use merged weights, rounded stochastically."""
    scorer_dtype: str = "no"
    tf32: bool = False
    """float32 products in TF32: the published script allows it, and its preference model runs in float32."""


ROWS: dict[str, Technique] = {
    "published": Technique(published=True, tf32=True),
    "modern": Technique(published=True, modern=True, mixed_precision="bf16", scorer_dtype="bf16", tf32=True),
    "ours": Technique(),
    "ours+spm_tf32": Technique(tf32=True),
    "ours+spm_bf16": Technique(scorer_dtype="bf16"),
    "ours+fuse": Technique(fuse=True),
    "ours+compile": Technique(fuse=True, compile="regional"),
    "ours+graphs": Technique(fuse=True, graphs=True),
    "ours+merged": Technique(fuse=True, merged=True),
    "ours+all": Technique(fuse=True, compile="regional", graphs=True, scorer_dtype="bf16", tf32=True),
    "ours+all+merged": Technique(
        fuse=True, compile="regional", graphs=True, merged=True, scorer_dtype="bf16", tf32=True
    ),
    "ours+bf16": Technique(mixed_precision="bf16"),
}

# ---------------------------------------------------------------------------------------------------- decisions


@dataclass(frozen=True)
class Decisions:
    """Scripted comparisons, the same for every row: exactly round(valid_share * C * B) of them are kept."""

    valid: Tensor  # (C, B) bool
    ranks: Tensor  # (C, K, B) permutations of 0..K-1

    @classmethod
    def scripted(cls, cfg: Config, valid_share: float, device: str) -> Decisions:
        C, K, B = len(segments(cfg.sample)), cfg.sample.num_candidates, cfg.sample.sample_batch_size
        generator = torch.Generator().manual_seed(7)
        order = torch.rand(C * B, generator=generator).argsort()
        valid = torch.zeros(C * B, dtype=torch.bool)
        valid[order[: round(valid_share * C * B)]] = True
        ranks = torch.rand(C, K, B, generator=generator).argsort(dim=1)
        return cls(valid.view(C, B).to(device), ranks.to(device))

    def scores(
        self, comparison: int
    ) -> Tensor:  # (K B,) k-major: 2 apart if valid (softmaxes differ by .76), else equal
        return (2.0 * self.ranks[comparison] * self.valid[comparison]).flatten()


class ScriptedScorer:
    """Pays for the real scores, then answers from the script."""

    def __init__(self, real: Any, decisions: Decisions):
        self.real, self.decisions, self.next = real, decisions, 0
        self.judges = judges(real)

    def __call__(self, candidates: Candidates) -> Tensor:
        self.real(candidates)
        self.next += 1
        return self.decisions.scores(self.next - 1)


# ---------------------------------------------------------------------------------------------------- recorded pairs


@dataclass(frozen=True)
class Pairs:
    """N recorded transitions of a winner and a loser, on the fp16 grid, so that no row sees other numbers."""

    x_t: Tensor  # (N, 2, C, H, W) float32; equal sides where x_t is shared
    x_prev: Tensor  # (N, 2, C, H, W)
    rows: Tensor  # (N,) of the table
    shared: tuple[bool, ...]  # (N,)

    def __len__(self) -> int:
        return len(self.shared)


def random_states(cfg: Config, latent: tuple[int, int, int], device: str, pairs: int = 4) -> Pairs:
    """x_t of unit variance at steps spread over the branching range; x_prev is filled in by `with_children`."""
    generator = torch.Generator().manual_seed(8)
    x_t = torch.randn(pairs, 2, *latent, generator=generator).half().float()
    shared = tuple(n % 2 == 0 for n in range(pairs))
    for n in range(pairs):
        if shared[n]:
            x_t[n, 1] = x_t[n, 0]
    rows = torch.linspace(cfg.sample.first_branch, cfg.sample.num_steps - 1, pairs).long()
    return Pairs(x_t.to(device), torch.zeros_like(x_t).to(device), rows.to(device), shared)


@torch.no_grad()
def with_children(pairs: Pairs, loop: PublishedLoop, cond: Cond) -> Pairs:
    """x_prev drawn from the policy of `loop`, one state at a time."""
    x_prev = torch.empty_like(pairs.x_prev)
    generator = torch.Generator().manual_seed(9)
    for n in range(len(pairs)):
        for side in range(2):
            x, t = pairs.x_t[n : n + 1, side].to(loop.dtype), loop.timesteps[pairs.rows[n : n + 1]]
            mean, std = loop._mean(loop.policy(x, t, cond.select(torch.tensor([n % batch_of(cond)]))), t, x)
            noise = torch.randn(x.shape, generator=generator).to(x.device)
            x_prev[n, side] = (mean + std * noise)[0].half().float()
    return replace(pairs, x_prev=x_prev)


def batch_of(cond: Cond) -> int:
    return cond.cond["prompt_embeds"].shape[0]


def as_experience(pairs: Pairs, cond: Cond, dtype: torch.dtype) -> Experience:
    """The pairs in our form, latents in dtype: a shared x_t is one state."""
    pairs = replace(pairs, x_t=pairs.x_t.to(dtype), x_prev=pairs.x_prev.to(dtype))
    x_t: list[Tensor] = []
    rows: list[Tensor] = []
    prompts, index = [], []
    for n, shared in enumerate(pairs.shared):
        first = len(x_t)
        for side in range(1 if shared else 2):
            x_t.append(pairs.x_t[n, side])
            rows.append(pairs.rows[n])
            prompts.append(n % batch_of(cond))
        index.append([first, first if shared else first + 1])
    device = pairs.x_t.device
    states = States(torch.stack(x_t), torch.stack(rows), torch.tensor(prompts, device=device))
    index_ = torch.tensor(index, device=device)[..., None]
    return Experience(states, pairs.x_prev.unsqueeze(2), index_, cond, pairs.x_t.new_empty(0))


@dataclass(frozen=True)
class Evaluation:
    """What a row makes of the recorded pairs."""

    log_ratios: Tensor  # (N, 2) float32 or float64, on the CPU
    loss: Tensor  # () mean over the pairs, without clamp
    gradients: dict[str, Tensor]  # d loss / d LoRA by UNet name, on the CPU

    def errors(self, truth: Evaluation) -> dict[str, float]:
        """Relative: |loss - truth| / |truth|, and norms of the differences over the norms."""
        norm = torch.linalg.vector_norm
        names = sorted(truth.gradients)
        if sorted(self.gradients) != names:
            raise ValueError("the two evaluations trained different weights")
        difference = torch.stack([norm(self.gradients[n].double() - truth.gradients[n].double()) for n in names])
        size = torch.stack([norm(truth.gradients[n].double()) for n in names])
        ratios = self.log_ratios.double() - truth.log_ratios.double()
        return {
            "loss_error": float((self.loss - truth.loss).abs() / truth.loss.abs()),
            "log_ratio_error": float(norm(ratios) / norm(truth.log_ratios.double())),
            "gradient_error": float(norm(difference) / norm(size)),
        }


# ---------------------------------------------------------------------------------------------------- contenders


class Published:
    """published.py's loop behind the interface of this file."""

    def __init__(self, setup: Setup, technique: Technique, exact: bool = False):
        self.setup = setup
        dtype = DTYPES[technique.mixed_precision]
        parts = setup.parts(dtype, DTYPES[technique.scorer_dtype])
        encoders = networks.make_text_encoders(*setup.where, dtype) if setup.rollouts else []
        self.loop = PublishedLoop(
            *(parts["unet"], setup.cfg, setup.scheduler, dtype, setup.timer),
            vae=parts["vae"],
            spm=parts["spm"],
            text_encoders=encoders,
            exact=exact,
            modern=technique.modern,
        )

    def iterate(self, decisions: Decisions) -> dict[str, Any]:
        setup = self.setup
        cond = setup.conditioning(self.loop.dtype)
        return self.loop.iterate(setup.ids, cond, setup.latent, decisions) | {
            "loss_scale": self.loop.scaler.get_scale()
        }

    def evaluate(self, pairs: Pairs) -> Evaluation:
        loop, cond = self.loop, self.setup.conditioning(self.loop.dtype)
        scale = 1024.0 if loop.dtype == torch.float16 else 1.0
        ratios: list[Tensor] = []
        total: Tensor | float = 0.0
        for n in range(len(pairs)):
            part = {"x_t": pairs.x_t[n : n + 1], "x_prev": pairs.x_prev[n : n + 1]}
            one = cond.select(torch.tensor([n % batch_of(cond)], device=pairs.x_t.device))
            ratio = loop.log_ratios({**part, "t": loop.timesteps[pairs.rows[n : n + 1]]}, one)
            loss, _ = loop.loss(ratio, clip=None)
            (loss * (scale / len(pairs))).backward()
            ratios.append(ratio.detach())
            total = total + loss.detach() / len(pairs)
        gradients = {name: (p.grad / scale).cpu() for name, p in loop.trained.items()}
        loop.optimizer.zero_grad()
        return Evaluation(torch.cat(ratios).cpu(), torch.as_tensor(total).cpu(), gradients)


class Ours:
    """spo_fast's own classes, wired as loop.Run wires them."""

    def __init__(self, setup: Setup, technique: Technique):
        self.setup, self.dtype = setup, DTYPES[technique.mixed_precision]
        parts = setup.parts(self.dtype, DTYPES[technique.scorer_dtype])
        unet, self.vae, self.scorer = parts["unet"], parts["vae"], parts["spm"]
        self.policy = Policy(unet, setup.cfg.adapter, setup.cfg.run.seed)
        weights = networks.lora_weights({n: m.shape for n, m in self.policy.state_dict().items()})
        self.policy.load_state_dict(weights)
        weights_of = "merged" if technique.merged else "unmerged"
        self.cfg = setup.cfg.with_fields(
            mixed_precision=technique.mixed_precision, compile=technique.compile, rollout_weights=weights_of
        )
        if technique.fuse:
            self.policy.fuse()
            if self.vae is not None:
                fuse(self.vae)
        if technique.compile != "off":
            compile_networks(self.policy, self.vae, self.scorer, self.cfg)
        self.objective = make_objective(self.cfg.objective)
        self.learner = Learner(self.policy, self.objective, setup.table, self.cfg, total_iterations=1000)
        self.state, self.rolling = TrainState(), False
        self.text = None if self.scorer is None else self.scorer.encode_ids(setup.ids)  # once a run
        self.decoder = self.decode
        if technique.graphs and setup.device == "cuda":  # whose parts cannot be timed from outside
            capture = CudaCapture(torch.device("cuda", torch.cuda.current_device()))
            self.decoder = replayed(self.policy, self.decode, self.scorer, capture, self.cfg)
        else:
            self._time_parts()

    def _time_parts(self) -> None:
        """Phases inside the rollout. The policy's calls count as `unet` only there."""
        timer = self.setup.timer
        predict = self.policy.predict

        def timed_predict(*args: Any, **kwargs: Any) -> Prediction:
            with timer("unet") if self.rolling else contextlib.nullcontext():
                return predict(*args, **kwargs)

        self.policy.predict = timed_predict  # type: ignore[method-assign]
        if hasattr(self.scorer, "score_pixels"):
            score_pixels = self.scorer.score_pixels

            def timed_score(*args: Any, **kwargs: Any) -> Tensor:
                with timer("score"):
                    return score_pixels(*args, **kwargs)

            self.scorer.score_pixels = timed_score

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        with contextlib.nullcontext() if self.policy.graphs.capture else self.setup.timer("decode"):
            return decode_in_cache(self.vae, latents)

    def iterate(self, decisions: Decisions) -> dict[str, Any]:
        """loop.Run.iterate with the script in the scorer's place; always iteration 0, so that shapes repeat."""
        setup, cfg = self.setup, self.cfg
        prompts = torch.arange(cfg.sample.sample_batch_size, device=setup.device)
        draws = KeyedDraws(cfg.run.seed, 0, prompts)
        cond = setup.conditioning(self.dtype)
        batch = RolloutBatch(cond, self.text, draws, setup.latent, torch.float32)
        self.rolling = True
        merged = self.cfg.sample.rollout_weights == "merged"
        weights = self.policy.merged(cfg.run.seed, 0) if merged else contextlib.nullcontext()
        with setup.timer("rollout"), weights:
            scorer = ScriptedScorer(self.scorer, decisions)
            most = cfg.model.images_per_decode
            sampler = Sampler(self.policy, setup.table, scorer, self.decoder, cfg.sample, most)
            experience = self.objective.collect(sampler, batch)
        self.rolling = False
        experience = experience.select(permutation(len(experience), cfg.run.seed, 0))
        states = self.learner.cfg.optim.states_at_once
        with setup.timer("reference"):
            experience = self.objective.prepare(self.policy, setup.table, experience, cfg.sample, states)
        before = self.state.optimizer_steps
        record = self.learner.update(experience, self.state, setup.timer)
        self.policy.graphs.waits = False
        return {
            "pairs": len(experience),
            "states": len(experience.states),
            "optimizer_steps": self.state.optimizer_steps - before,
            "loss": float(record["loss"]) if "loss" in record else None,
            "loss_scale": self.learner.scaler.get_scale(),
            "dead_batches": int(record["dead_batches"]),  # the published loop skips none
        }

    def evaluate(self, pairs: Pairs) -> Evaluation:
        table, sample, scale = self.setup.table, self.cfg.sample, 1024.0 if self.dtype == torch.float16 else 1.0
        objective = replace(self.objective, clip=None)
        latent_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        e = as_experience(pairs, self.setup.conditioning(self.dtype), latent_dtype)
        e = objective.prepare(self.policy, table, e, sample, self.learner.cfg.optim.states_at_once)
        ratios: list[Tensor] = []
        total: Tensor | float = 0.0
        for part in e.micro_batches(self.learner.cfg.optim.states_at_once):
            m = predict_states(self.policy, table, part, part.states, guided=True)
            loss, _ = objective.loss(m, table, part, sample, 1 / len(e))
            assert part.frozen is not None
            with torch.no_grad():
                x_prev, index = part.x_prev.flatten(0, 2), part.index.flatten()
                ratio, _ = log_ratio(
                    *(*m, *part.frozen, part.states.x_t, x_prev, index, part.states.rows, table.coefficients),
                    sample.guidance_scale,
                )
            ratios.append(ratio.view(-1, 2))
            (loss * scale).backward()
            total = total + loss.detach()
        gradients = {}
        for name, master in zip(self.policy.names, self.policy.masters, strict=True):
            assert master.grad is not None
            gradients[name] = (master.grad / scale).cpu()
        self.policy.drop_gradients()
        return Evaluation(torch.cat(ratios).cpu(), torch.as_tensor(total).cpu(), gradients)


class Setup:
    """What all rows of one model share: settings, schedule, conditioning, and how to build the networks."""

    def __init__(
        self,
        kind: str,
        size: str,
        device: str,
        prompts: int | None,
        mixed_precision: str = "fp16",
        rollouts: bool = True,  # build VAE, preference model and text encoders as well
        cfg: Config | None = None,  # instead of the published SPO's
    ):
        self.kind, self.device, self.rollouts = kind, device, rollouts
        self.where = (kind, size, device)
        self.size = size
        self.cfg = cfg or iteration_config(kind, size, prompts, mixed_precision)
        self.latent = latent_shape(kind, size)
        sample = self.cfg.sample
        self.scheduler = networks.ddim_scheduler(kind, sample.num_steps)
        table = ddim_table(self.scheduler.alphas_cumprod, self.scheduler.timesteps, sample.eta, "epsilon")
        self.table: StepTable = table.to(device)
        self.timer = Timer(device)
        self._cond: dict[torch.dtype, Cond] = {}
        self.ids = networks.token_ids(sample.sample_batch_size, device, size)

    def parts(self, dtype: torch.dtype, scorer_dtype: torch.dtype) -> dict[str, Any]:
        unet = networks.make_unet(*self.where, dtype)
        if not self.rollouts:
            return {"unet": unet, "vae": None, "spm": None}
        vae = networks.make_vae(*self.where, dtype)
        return {"unet": unet, "vae": vae, "spm": networks.make_spm(self.size, self.device, scorer_dtype)}

    def facts(self) -> dict[str, Any]:
        """For the records; a reduced batch is no measurement of the published iteration."""
        prompts = self.cfg.sample.sample_batch_size
        whole = (
            self.size == "full" and prompts == iteration_config(self.kind, "full", None, "no").sample.sample_batch_size
        )
        return {"prompts": prompts, "shapes": {"latent": self.latent}, "published_batch": whole}

    def conditioning(self, dtype: torch.dtype) -> Cond:
        if dtype not in self._cond:
            prompts = self.cfg.sample.sample_batch_size
            self._cond[dtype] = networks.conditioning(*self.where[:2], prompts, self.device, dtype)
        return self._cond[dtype]


def make_contender(setup: Setup, technique: Technique) -> Published | Ours:
    return (Published if technique.published else Ours)(setup, technique)


@contextlib.contextmanager
def tf32(matmuls: bool, convolutions: bool = True) -> Iterator[None]:
    """What float32 products may be rounded to. PyTorch's default is no for matrices and yes for convolutions."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32, cudnn.allow_tf32 = matmuls, convolutions
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


# ---------------------------------------------------------------------------------------------------- the gate

SLACK = {"fp64": 1e-9, "no": 1e-4, "fp16": 1e-3, "bf16": 8e-3}  # a few units in the last place of the compute type
TIMES_WORSE = {"fp64": 2, "no": 2, "fp16": 2, "bf16": 16}  # bf16 has three bits less than the published fp16


def gate(errors: dict[str, float], published: dict[str, float], mixed_precision: str) -> str:
    """ "passed", or why a row's times do not count: an error that the published strategy does not make."""
    for name, error in errors.items():
        limit = SLACK[mixed_precision] + TIMES_WORSE[mixed_precision] * published[name]
        if not error <= limit:
            return f"failed: {name} {error:.3g} > {limit:.3g}"
    return "passed"


# ---------------------------------------------------------------------------------------------------- running


def truth(setup: Setup, scratch: Path, records: Records) -> None:
    """The recorded pairs and what float32 (float64 if tiny) makes of them, into scratch for the other rows."""
    precision = "no" if setup.size == "full" else "fp64"
    with tf32(False, False):
        # smaller networks in float64; at full size float32 is exact enough to judge 16 bits by, and fits
        row = Published(setup, Technique(published=True, mixed_precision=precision), exact=True)
        pairs = random_states(setup.cfg, setup.latent, setup.device)
        pairs = with_children(pairs, row.loop, setup.conditioning(row.loop.dtype))
        evaluation = row.evaluate(pairs)
    norm = torch.stack([g.norm() for g in evaluation.gradients.values()]).norm()
    if not (torch.isfinite(norm) and norm > 0):
        raise RuntimeError(f"the float32 gradient has norm {norm}: nothing could be compared with it")
    torch.save({"pairs": pairs, "truth": evaluation}, scratch / f"{setup.kind}_truth.pt")
    records.write(
        f"{setup.kind}/truth",
        dtype=str(row.loop.dtype)[6:],
        loss=float(evaluation.loss),
        gradient_norm=float(norm),
        log_ratios=evaluation.log_ratios.flatten().tolist(),
    )


def parity(contender: Published | Ours, setup: Setup, technique: Technique, scratch: Path) -> dict[str, Any]:
    """The row's errors on the recorded pairs and the gate's verdict; both say why when there is nothing to compare."""
    file, published_file = scratch / f"{setup.kind}_truth.pt", scratch / f"{setup.kind}_published.json"
    if not file.is_file():
        return {"gate": "not checked: the row `truth` did not run"}
    with torch.serialization.safe_globals([Pairs, Evaluation]):
        saved = torch.load(file, map_location="cpu", weights_only=True)
    errors = contender.evaluate(replace(saved["pairs"], **_moved(saved["pairs"], setup.device))).errors(saved["truth"])
    if technique.published and not technique.modern:
        published_file.write_text(json.dumps(errors))
        finite = all(e < float("inf") for e in errors.values())
        return {**errors, "gate": "passed" if finite else "failed: not finite"}
    if not published_file.is_file():
        return {**errors, "gate": "not checked: the row `published` did not run"}
    return {**errors, "gate": gate(errors, json.loads(published_file.read_text()), technique.mixed_precision)}


def _moved(pairs: Pairs, device: str) -> dict[str, Tensor]:
    return {name: getattr(pairs, name).to(device) for name in ("x_t", "x_prev", "rows")}


def run_row(
    *,
    setup: Setup,
    row: str,
    technique: Technique,
    scratch: Path,
    records: Records,
    deadline: Callable[[], float],  # seconds left
    valid_shares: tuple[float, ...] = (0.5, 1.0),
    repetitions: int = 5,
) -> None:
    """Parity, then as many whole iterations as the time allows (at least one after a warm-up), a record a share."""
    with tf32(technique.tf32):
        contender = make_contender(setup, technique)
        quality = parity(contender, setup, technique, scratch)
        records.write(f"{setup.kind}/{row}/parity", dtype=technique.mixed_precision, **quality)
        for share in valid_shares:
            name = f"{setup.kind}/{row}/v={share:g}"
            common: dict[str, Any] = {"dtype": technique.mixed_precision, **setup.facts(), **quality}
            decisions = Decisions.scripted(setup.cfg, share, setup.device)
            setup.timer.read_ms()
            warmup_s, _ = timed_iteration(contender, decisions)
            reset_peak(setup.device)
            if technique.graphs and deadline() > 0:
                # a graph is recorded at the second call of its shape; later ones allocate nothing: its peak counts
                timed_iteration(contender, decisions)
            setup.timer.read_ms()
            times: list[float] = []
            phases: list[dict[str, float]] = []
            facts: dict[str, Any] = {}
            graphs = compiled_graphs()
            while len(times) < repetitions and (not times or deadline() > 1.2 * times[-1]):
                seconds, facts = timed_iteration(contender, decisions)
                times.append(seconds)
                phases.append(setup.timer.read_ms())
            middle = {p: sorted(ph[p] for ph in phases)[len(phases) // 2] for p in phases[0]}
            records.write(
                name,
                **{**common, **quantiles([1000 * s for s in times]), "phases_ms": middle, "warmup_s": warmup_s},
                **{**facts, **peak_memory(setup.device)},
                graphs_compiled=graphs,
                graphs_compiled_after_warmup=compiled_graphs() - graphs,
            )


def timed_iteration(contender: Published | Ours, decisions: Decisions) -> tuple[float, dict[str, Any]]:
    """Seconds of one whole iteration by the host's clock, the device idle before and after."""
    sync = torch.cuda.synchronize if contender.setup.device == "cuda" else lambda: None
    sync()
    start = time.perf_counter()
    facts = contender.iterate(decisions)
    sync()
    return time.perf_counter() - start, facts


def compiled_graphs() -> int:
    """Graphs that torch.compile has made in this process; growth after the warm-up means recompilation."""
    return int(torch._dynamo.utils.counters["stats"].get("unique_graphs", 0))


def reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_memory(device: str) -> dict[str, float]:
    if device != "cuda":
        return {}
    gib = 2.0**30
    return {
        "peak_allocated_gib": torch.cuda.max_memory_allocated() / gib,
        "peak_reserved_gib": torch.cuda.max_memory_reserved() / gib,
    }
