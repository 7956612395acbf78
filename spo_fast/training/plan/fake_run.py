"""What a run costs, counted before it starts: FLOPs and bytes of its own code on fake tensors, no weights, no network.

A fake tensor has a shape, a type and a storage that takes no memory. The rollout, the reference and a training step run
on such tensors as they would run on real ones, while one mode adds up the products and another the bytes of the
storages that are alive. A network runs once for each shape it meets; a later call repeats what the first one took. So a
prediction takes as long as the Python of a few forwards (SDXL: about 15 s on a core), whatever the batch.

Not counted: what a kernel allocates inside itself (cuDNN's and cuBLAS's workspaces), the CUDA context (about 0.5 GB),
what the allocator cannot reuse, the validation's sampling (num_validation_images at a time, or a decode_chunk), and
the images of labelled pairs while they are read (pair_batches.READ_BATCH at a time).
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from spo_fast.config.scorers import find_scorer, scorer_specs
from spo_fast.config.training import Config, ScorerConfig
from spo_fast.data.files import read_json
from spo_fast.evaluation.required_files import resolve, scorer_paths
from spo_fast.method.experience import Cond, Experience, Prediction, States
from spo_fast.method.noise import KeyedDraws
from spo_fast.method.objectives import make_objective, predict_states
from spo_fast.method.protocols import Judge
from spo_fast.method.renoise import PairInputs
from spo_fast.method.rollout import RolloutBatch, Sampler
from spo_fast.method.schedule import StepTable
from spo_fast.models.diffusion import DTYPES, check_size, decode, embeddings, vae_dtype
from spo_fast.models.files.lora import read_lora
from spo_fast.models.files.single_file import text_class
from spo_fast.models.files.sources import CONFIGS, MODELS, TEXT_PARTS, Resolved
from spo_fast.models.fuse import fuse
from spo_fast.models.merged import base_weight, lora_layers
from spo_fast.models.policy import Policy
from spo_fast.models.prompt_cache import ENCODE_BATCH
from spo_fast.models.quantised import import_for
from spo_fast.models.sharded import BUCKET
from spo_fast.models.trained_weights import TrainedWeights
from spo_fast.scorers.base import InPhase
from spo_fast.scorers.latent import LatentScorer
from spo_fast.scorers.latent_files import read_configs
from spo_fast.scorers.latent_network import LatentReward
from spo_fast.scorers.preprocess import PictureScorer
from spo_fast.scorers.weighted import WeightedSum
from spo_fast.training.pair_batches import ENCODE_BATCH as IMAGES_BATCH
from spo_fast.training.plan.batches import Plan, plan_of
from spo_fast.training.plan.costs import PHASES, Costs
from spo_fast.training.plan.counters import CUDA_BLOCK, CountFlops, LiveStorage
from spo_fast.training.plan.fake_networks import FakeScorer, fake_scorer, fake_vae, vae_settings
from spo_fast.training.plan.held_bytes import optimizer_state, processes

# ---------------------------------------------------------------------------------------------------- the answer


def predict(cfg: Config, resolved: Resolved | None = None, device_type: str = "cuda") -> Costs:
    """The costs of cfg's run on a device of this type. Architectures are read from the resolved files' configs.

    resolved=None: the published architectures, and the shipped toy. Memory is that of the first iteration if it keeps
    every pair. One that keeps a few can have up to 1.5 times longer slots; states_per_forward bounds what they take.
    """
    if resolved is None and cfg.model.model == "toy":
        resolved = resolve(cfg.model, scorer_paths(cfg.scorer))
    # settings of memory and batches may change: the networks and what they took are kept
    global _latest
    model = replace(cfg.model, decode_chunk=None)
    key = (model, cfg.adapter, cfg.scorer, cfg.engine.fuse, cfg.engine.base_weights, resolved, device_type)
    if _latest is None or _latest[0] != key:
        _latest = None  # the old ones go first
        _latest = key, Networks(cfg, resolved, device_type)
    return _latest[1].costs(cfg)


_latest: tuple[Any, Networks] | None = None

# ---------------------------------------------------------------------------------------------------- networks


class Pictures(PictureScorer):
    """A scorer of pictures that only costs."""

    def __init__(self, fake: FakeScorer, score: Callable[..., Any] | None):
        self.fake, self.score = fake, score

    def encode(self, prompts: list[str]) -> Tensor:
        shape, dtype = self.fake.text
        return torch.empty(len(prompts), *shape, dtype=dtype)

    def score_pixels(self, pixels: Tensor, t: Tensor, text: Tensor) -> Tensor:
        size = 1 if self.fake.one_by_one else len(pixels)
        if self.score is not None:
            for start in range(0, len(pixels), size):
                self.score(pixels[start : start + size], text[start : start + size])
        return torch.empty(len(pixels))


def weights_of(scorer: Pictures | LatentScorer) -> list[Tensor]:
    networks = (scorer.model,) if isinstance(scorer, LatentScorer) else scorer.fake.networks
    return [weight for network in networks for weight in network.parameters()]


class Networks:
    """A run's networks as fake tensors, and what each took at the shapes it has met."""

    def __init__(self, cfg: Config, resolved: Resolved | None, device_type: str):
        from diffusers import UNet2DConditionModel

        self.block, self.cuda = (CUDA_BLOCK if device_type == "cuda" else 1), device_type == "cuda"
        source = resolved.source if resolved else MODELS[cfg.model.model](cfg.model)
        self.kind, self.config_dir = source.kind, resolved.config_dir if resolved else CONFIGS / source.kind
        self.dtype = DTYPES[cfg.model.precision_on(device_type)]
        self.latent_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.mode = FakeTensorMode()
        self.live = LiveStorage(self.block)
        self.tally: dict[str, Counter[str]] = {}
        self._seen: dict[Any, tuple[int, int, list[Any], Any]] = {}
        self._merged = False  # the LoRA is off: a rollout with merged weights
        self._pairs: PairInputs | None = None

        vae_config = vae_settings(self.kind, resolved, source.pretrained_vae_model_name_or_path)
        self.vae = self._fake(fake_vae(vae_config), vae_dtype(self.kind, self.dtype, vae_config))
        self.vae.decode = self._once(self.vae.decode, "decode")
        with torch.device("meta"):
            unet: Any = UNet2DConditionModel.from_config(read_json(self.config_dir / "unet" / "config.json"))
            self.policy = Policy(unet, replace(cfg.adapter, lora_path=None), seed=0)
        if cfg.adapter.lora_path is not None:
            read_lora(cfg.adapter.lora_path, unet, cfg.adapter)  # one that does not fit is told by a dry run too
        self.fused = self.cuda if cfg.engine.fuse is None else cfg.engine.fuse
        for network in filter(None, (unet, self.policy._frozen_copy)):
            self._fake(network, self.dtype)
            network.forward = self._once(network.forward)
        self.policy.text = self._once(self.policy.text, samples=False)  # type: ignore[method-assign]
        if (rounded := cfg.engine.base_weights) != "full":
            import_for(rounded)
            with self.mode:
                self.policy.quantise(rounded)
            self.policy.forget_full_base()
        with self.mode:  # masters and hooks again, for the fake weights
            TrainedWeights.__init__(self.policy, [(n, p) for n, p in unet.named_parameters() if p.requires_grad])
            if self.fused:
                self.policy.fuse()
                fuse(self.vae)
            if cfg.adapter.lora_path is not None:
                self.policy._start = [torch.empty_like(p) for p in self.policy._weights]

        self.text_encoders = self._text_encoders()
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        height, width = (size or unet.config.sample_size * factor for size in (cfg.model.height, cfg.model.width))
        check_size(height, width, factor)
        self.latent_shape = (unet.config.in_channels, height // factor, width // factor)
        self.vae_factor = factor
        self.scorers: dict[str, Any] = {
            name: (self._latent_scorer if find_scorer(name).judges == "latents" else self._scorer)(
                name, resolved, cfg.scorer
            )
            for name, _ in scorer_specs(cfg.scorer.scorer)
        }

    # ------------------------------------------------------------------------------------------------ building

    def _fake(self, module: nn.Module, dtype: torch.dtype | None = None) -> Any:
        """The meta module with fake weights on the CPU, of this type or their own (fake weights cannot be cast)."""
        with self.mode:
            for part in module.modules():
                for name, p in part.named_parameters(recurse=False):
                    part._parameters[name] = nn.Parameter(torch.empty(p.shape, dtype=dtype or p.dtype), p.requires_grad)
                for name, b in part.named_buffers(recurse=False):
                    part._buffers[name] = torch.empty(b.shape, dtype=b.dtype)
        return module.eval()

    def _latent_scorer(self, name: str, resolved: Resolved | None, cfg: ScorerConfig) -> LatentScorer:
        path = resolved.scorer_paths.get(name) if resolved else None
        parts = ("unet", *(part for _, part in TEXT_PARTS[self.kind]))
        configs = read_configs(path) if path else {p: read_json(self.config_dir / p / "config.json") for p in parts}
        last = configs[parts[-1]]
        with torch.device("meta"):
            network = LatentReward(configs, last["projection_dim" if self.kind == "sdxl" else "hidden_size"])
        self._fake(network, DTYPES[cfg.scorer_dtype])
        network.encode = self._once(network.encode, "score text")  # type: ignore[method-assign]
        network.score = self._once(network.score, "score")  # type: ignore[method-assign]
        lengths = [encoder.config.max_position_embeddings for encoder in self.text_encoders]
        with self.mode:
            return LatentScorer(network, lambda prompts: [torch.zeros(len(prompts), n).long() for n in lengths])

    def _scorer(self, name: str, resolved: Resolved | None, cfg: ScorerConfig) -> Pictures:
        paths = resolved.scorer_paths if resolved else {}
        fake = fake_scorer(name, paths, DTYPES[cfg.scorer_dtype], cfg.spm_time_conditioned)
        for network in fake.networks:
            self._fake(network)
        return Pictures(fake, self._once(fake.score, "score") if fake.score else None)

    def _text_encoders(self) -> list[Any]:
        from transformers import CLIPTextConfig

        encoders = []
        for _, part in TEXT_PARTS[self.kind]:
            with torch.device("meta"):
                encoder = text_class(self.config_dir / part)(CLIPTextConfig.from_pretrained(self.config_dir / part))
            encoders.append(self._fake(encoder, self.dtype))
        return encoders

    # ------------------------------------------------------------------------------------------------ running

    def _once(self, function: Callable[..., Any], part: str | None = None, samples: bool = True) -> Callable[..., Any]:
        """The function, run once for each set of shapes without gradient; with gradient it is left alone."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled():
                return function(*args, **kwargs)
            name = part or self.live.phase_name
            tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            key = (id(function), name, self._merged, *((x.shape, x.dtype) for x in tensors))
            return self._run(key, name, len(tensors[0]) if samples else 0, lambda: function(*args, **kwargs))

        return call

    def _run(self, key: Any, part: str, samples: int, function: Callable[[], Any]) -> Any:
        """function(), or what it left behind when this key was first met: its outputs, peak and FLOPs."""
        if key in self._seen:
            rise, flops, shapes, tree = self._seen[key]
            self.live.note(self.live.current_bytes + rise)
            out = pytree.tree_unflatten([s and torch.empty(s[0], dtype=s[1]) for s in shapes], tree)
        else:
            with CountFlops() as counter:
                out, rise = self.live.rise(function)
            leaves, tree = pytree.tree_flatten(out)
            flops = counter.total
            self._seen[key] = rise, flops, [None if x is None else (x.shape, x.dtype) for x in leaves], tree
        self.tally.setdefault(part, Counter()).update(samples=samples, flops=flops)
        return out

    def costs(self, cfg: Config) -> Costs:
        """Every phase of one iteration in the trainer's order, on fake tensors."""
        plan, masters = plan_of(cfg), self.policy.masters
        objective = make_objective(cfg.objective)
        guided = objective.guided(cfg.sample)
        self.tally, self.live = {}, LiveStorage(self.block)
        for master in masters:
            master.grad = None  # of the prediction before
        recompute = "enable" if cfg.optim.gradient_checkpointing else "disable"
        getattr(self.policy.unet, f"{recompute}_gradient_checkpointing")()
        self.policy.averages = None
        if objective.sampler == "ema":
            with self.mode:
                self.policy.keep_averages(objective.ema_decay)
        if self.fused:
            self.policy.fuse(recompute=cfg.engine.memory == "balanced")
        with self.mode, self.live as live:
            embedded = self._encode_prompts()
            # the trainer keeps its last micro-batch for a diagnosis, and gradients where slots straddle rollouts
            blank = self._experience(plan, self._cond(embedded, 1), objective)
            last = self._batch(blank, plan.pairs, plan.states, objective, guided)
            del blank
            leftover = self._gradients() if plan.straddles else []
            with live.phase("rollout"), self._rollout_weights(cfg):
                experience = self._collect(cfg, plan, self._cond(embedded, cfg.sample.sample_batch_size), objective)
            del embedded
            with live.phase("reference"):
                size = cfg.optim.states_at_once
                experience = objective.prepare(self.policy, self._table(cfg), experience, cfg.sample, size)
            part = self._batch(experience, plan.slot_pairs, plan.slot_states, objective, guided)
            e = self._batch(part, plan.pairs, plan.states, objective, guided)
            with live.phase("backward"):
                m = self._backward(cfg, plan, e)
            del last, part
            with live.phase("step"):
                live.note(live.current_bytes + self._step_bytes(cfg))
            del leftover, e, m
            self._pairs = None  # the trainer holds them through the iteration
        resident = self._resident(cfg)
        encoders = sum(self._bytes(encoder.parameters()) for encoder in self.text_encoders)
        if objective.sampler == "data":  # new prompts come all the time
            resident["text encoders"], encoders = encoders, 0
        samples, flops = ({part: n[what] for part, n in self.tally.items()} for what in ("samples", "flops"))
        per_prompt = flops.pop("encode prompts") // samples.pop("encode prompts")
        # the update ran one micro-batch; all take in proportion to their states
        rows = plan.all_states * (1 + guided)
        flops["policy"], samples["policy"] = flops["policy"] * rows // samples["policy"], rows
        return Costs(
            samples=samples,
            full_flops=flops,
            flops_per_prompt=per_prompt,
            resident=resident,
            gradients=self._bytes(masters),
            unknown=tuple(name for name in self.scorers if find_scorer(name).network == "unknown"),
            graphs=self.cuda and cfg.engine.cuda_graphs is not False,
            transient={
                p: live.peaks[p] + (encoders if p == "encode prompts" else 0) for p in PHASES if p in live.peaks
            },
        )

    @contextlib.contextmanager
    def _rollout_weights(self, cfg: Config) -> Iterator[None]:
        """As Policy.merged: the same shapes as without a LoRA; its storages are resident."""
        self._merged = cfg.sample.rollout_weights == "merged" and not cfg.adapter.full_finetune
        if self._merged:
            self.policy.unet.disable_adapters()
        yield
        if self._merged:
            self.policy.unet.enable_adapters()
        self._merged = False

    @torch.no_grad()
    def _encode_prompts(self) -> dict[str, Tensor]:
        """Rows of prompt embeddings; the encoders are in memory for this phase only."""
        with self.live.phase("encode prompts"):
            lengths = [encoder.config.max_position_embeddings for encoder in self.text_encoders]
            ids = [torch.zeros(ENCODE_BATCH, length, dtype=torch.int64) for length in lengths]
            run = functools.partial(embeddings, self.kind, self.text_encoders, ids)
            embedded = self._run("text", "encode prompts", ENCODE_BATCH, run)
            for name, scorer in self.scorers.items():
                if isinstance(scorer, LatentScorer):
                    continue  # it encodes prompts in each rollout
                if scorer.fake.encode is not None:
                    self._run(("text", name), "encode prompts", 0, scorer.fake.encode)
        return embedded

    def _cond(self, embedded: dict[str, Tensor], num_prompts: int) -> Cond:
        """As DiffusionModel.cond makes it."""
        cond, uncond = (
            {name: torch.empty(n, *rows.shape[1:], dtype=self.dtype) for name, rows in embedded.items()}
            for n in (num_prompts, 1)
        )
        if self.kind == "sdxl":
            uncond["time_ids"] = torch.empty(1, 6, dtype=self.dtype)
            cond["time_ids"] = uncond["time_ids"].expand(num_prompts, -1)
        return Cond(cond, uncond)

    def _table(self, cfg: Config) -> StepTable:
        steps = cfg.sample.num_steps
        alphas = torch.empty(steps, dtype=torch.float64)
        return StepTable(torch.empty(steps, dtype=torch.int64), torch.empty(steps, 5, dtype=torch.float64), alphas)

    def _encode_images(self, cfg: Config) -> None:
        """The VAE's encoder on both images of each pair: what an iteration of the first pass needs."""
        pixels = torch.empty(IMAGES_BATCH, 3, *(size * self.vae_factor for size in self.latent_shape[1:]))

        def encode() -> Tensor:
            encoded = self.vae.encode(pixels.to(self.vae.dtype))
            return encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mean

        with torch.no_grad():
            for _ in range(-(-2 * cfg.sample.sample_batch_size // IMAGES_BATCH)):
                self._run("encode images", "encode images", IMAGES_BATCH, encode)

    def _collect(self, cfg: Config, plan: Plan, cond: Cond, objective: Any) -> Experience:
        """The experience of a rollout that keeps every pair."""
        if objective.rollout is None:
            self._encode_images(cfg)
            read = self._latents(2, cfg.sample.sample_batch_size)
            draws = KeyedDraws(0, 0, torch.empty(cfg.sample.sample_batch_size, dtype=torch.int64))
            self._pairs = PairInputs(cond, torch.cat([read]), draws, torch.empty(1000))
            return objective.collect(self._sampler(cfg, lambda candidates: candidates.x0), self._pairs)
        B, specs = cfg.sample.sample_batch_size, scorer_specs(cfg.scorer.scorer)
        scorers = [self.scorers[name] for name, _ in specs]
        scorer: Any = scorers[0] if [w for _, w in specs] == [1] else WeightedSum(scorers, [w for _, w in specs])
        features = tuple(s.encode([""] * B) for s in scorers)
        text = features if isinstance(scorer, WeightedSum) else features[0]
        score = InPhase(scorer, functools.partial(self.live.phase, "score"))
        draws = KeyedDraws(0, 0, torch.empty(B, dtype=torch.int64))
        batch = RolloutBatch(cond, text, draws, self.latent_shape, self.latent_dtype)
        ema = self.policy.ema() if objective.sampler == "ema" else contextlib.nullcontext()
        with ema:
            sampler = self._sampler(cfg, score)
            kept = objective.rollout(replace(sampler, cfg=objective.sampling(cfg.sample)), batch)
        # what `collect` does next reads the device
        return replace(self._experience(plan, cond, objective), scores=kept.scores)

    def _sampler(self, cfg: Config, scorer: Judge) -> Sampler:
        into_pixels = functools.partial(decode, self.vae)
        return Sampler(self.policy, self._table(cfg), scorer, into_pixels, cfg.sample, cfg.model.images_per_decode)

    def _latents(self, *shape: int) -> Tensor:
        return torch.empty(*shape, *self.latent_shape, dtype=self.latent_dtype)

    def _states(self, number: int) -> States:
        rows, prompts = torch.zeros(2, number, dtype=torch.int64)
        return States(self._latents(number), rows, prompts)

    def _experience(self, plan: Plan, cond: Cond, objective: Any) -> Experience:
        index = torch.zeros(plan.all_pairs, *objective.shape, dtype=torch.int64)
        x_prev = self._latents(plan.all_pairs, *objective.shape)
        advantage = torch.empty(plan.all_pairs) if objective.shape[0] == 1 else None
        return Experience(self._states(plan.all_states), x_prev, index, cond, torch.empty(0), advantage=advantage)

    def _batch(self, experience: Experience, pairs: int, states: int, objective: Any, guided: bool) -> Experience:
        """As Experience.select(slice(pairs)): states and predictions are copies, children a view."""

        def outputs() -> Prediction:
            out = [torch.empty(states, *self.latent_shape, dtype=self.dtype) for _ in range(1 + guided)]
            return Prediction(out[0], out[1] if guided else None)

        return replace(
            experience,
            states=self._states(states),
            x_prev=experience.x_prev[:pairs],
            index=torch.zeros_like(experience.index[:pairs]),
            frozen=outputs() if objective.num_baselines > 0 else None,
            second_reference=outputs() if objective.num_baselines > 1 else None,
            advantage=None if experience.advantage is None else experience.advantage[:pairs],
        )

    def _backward(self, cfg: Config, plan: Plan, e: Experience) -> list[Tensor]:
        """The largest micro-batch: what the trainer holds of it besides the gradients."""
        objective, table = make_objective(cfg.objective), self._table(cfg)
        guided = objective.guided(cfg.sample)

        def run() -> list[Tensor]:
            m = predict_states(self.policy, table, e, e.states, guided)
            objective.loss(m, table, e, cfg.sample, 1.0)[0].backward()
            return [half.detach() for half in m if half is not None]

        if plan.accumulates:
            self._gradients()
        recomputed = (bool(cfg.optim.gradient_checkpointing), cfg.engine.memory == "balanced")
        key = ("backward", cfg.objective, plan.pairs, plan.states, guided, plan.accumulates, *recomputed)
        m = self._run(key, "policy", plan.states * (1 + guided), run)
        self._gradients()
        return m

    def _gradients(self) -> list[Tensor]:
        """Gradients of all masters, those that are there kept."""
        for master in self.policy.masters:
            master.grad = torch.empty_like(master) if master.grad is None else master.grad
        return [master.grad for master in self.policy.masters if master.grad is not None]

    # ------------------------------------------------------------------------------------------------ weights

    def _rounded(self, num_bytes: int) -> int:
        return -(-num_bytes // self.block) * self.block

    def _bytes(self, tensors: Iterable[Tensor]) -> int:
        return sum(self._rounded(t.nbytes) for t in tensors)

    def _resident(self, cfg: Config) -> dict[str, int]:
        policy, trained = self.policy, {id(p) for p in self.policy._weights}
        full = cfg.adapter.full_finetune
        sharded = processes(cfg) > 1
        copies = [m for m, p in zip(policy.masters, policy._weights, strict=True) if sharded or m is not p]
        rest = [t for t in (*policy.unet.parameters(), *policy.unet.buffers()) if full or id(t) not in trained]
        merged = [base_weight(layer) for _, layer in lora_layers(policy.unet)]
        held = {
            "UNet": self._bytes(rest),
            "LoRA": 0 if full else self._bytes(policy._weights),
            "float32 masters": self._bytes(self._parts(cfg, copies)),
            "merged weights": 0 if full or cfg.sample.rollout_weights == "unmerged" else self._bytes(merged),
            "optimizer state": sum(map(self._rounded, optimizer_state(self._parts(cfg, policy.masters), cfg.optim))),
            "moving averages": self._bytes(policy.averages or ()),
            "reference copy": self._bytes(
                policy._frozen_copy.parameters() if policy._frozen_copy else policy._start or ()
            ),
            "VAE": self._bytes(self.vae.parameters()),
            **{f"scorer {name}": self._bytes(weights_of(scorer)) for name, scorer in self.scorers.items()},
        }
        return {part: n for part, n in held.items() if n or part == "optimizer state"}

    def _parts(self, cfg: Config, masters: list[Tensor]) -> list[Tensor]:
        """The largest process's rows of the masters, which are all of them unless they are sharded."""
        with self.mode:
            return [m.detach()[: -(-len(m) // processes(cfg))] for m in masters]

    def _step_bytes(self, cfg: Config) -> int:
        """What torch's AdamW allocates in a step: for all weights at once on CUDA, for each in turn on a CPU; sharded
        masters' gradients besides, and two buffers in which a bucket travels."""
        sizes = [self._bytes([part]) for part in self._parts(cfg, self.policy.masters)]
        adamw = sum(sizes) if self.cuda else 2 * max(sizes)
        width = self.policy.masters[0].element_size()
        travels = sum(sizes) + 2 * width * min(BUCKET, sum(m.numel() for m in self.policy.masters))
        return (adamw if cfg.optim.optimizer == "adamw" else 0) + (travels if processes(cfg) > 1 else 0)
