"""The settings of preference optimisation, one frozen dataclass a concern.

Field names are the flags and the YAML file's keys. A preset (config/presets.py) returns a whole Config; the resolved
one is saved beside the weights as config.yaml.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from spo_fast.config.fields import (
    Count,
    Kind,
    NotNegative,
    Positive,
    Range,
    Section,
    Settings,
    Share,
    Threshold,
    Whole,
    doc_of,
    kinds_of,
    parted,
    require,
)
from spo_fast.config.methods import METHODS, find_method, readers
from spo_fast.config.run import DataConfig, RunConfig
from spo_fast.config.scorers import name_and_weight, scorer_names
from spo_fast.config.sections import (
    FLOWS,
    AdamConfig,
    ComputeConfig,
    ModelConfig,
    PairSourceConfig,
    ScorerPaths,
)

# ------------------------------------------------------------------------------------------------ what a field may hold


Guidance = Annotated[float, Range(0, 100, why="beyond, what is drawn is noise")]

# ---------------------------------------------------------------------------------------------- preference optimisation


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(Section):
    """Which weights are trained."""

    rank: Count = 4
    """Rank of the LoRA matrices."""
    lora_alpha: Positive | None = None
    """LoRA alpha; the update is scaled by alpha / rank. Default: the rank (scale 1), as published."""
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Names (endings) of the linear layers that get a LoRA."""
    use_rslora: bool = False
    """rsLoRA: the update is scaled by alpha / sqrt(rank) instead, so that it does not shrink as the rank grows."""
    use_dora: bool = False
    """DoRA: a trained magnitude for each row of weights beside the LoRA, whose sum with the weights it rescales. PEFT's
    own layers compute it, several times slower than this package's LoRA."""
    full_finetune: bool = False
    """Train every UNet weight instead of a LoRA; keeps a frozen copy as the reference."""
    lora_path: str | None = None
    """Start from these LoRA weights, which are the reference then: a file of diffusers, PEFT, kohya, ... (or its
    directory) of the same base model, rank, lora_alpha and lora_targets. Default: a new LoRA."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.lora_targets) > 0, "lora_targets is empty: nothing would be trained.")
        require(
            self.lora_path is None or not self.full_finetune,
            "lora_path starts a LoRA, but full_finetune trains none: leave one of them out.",
        )
        kind = "use_dora" if self.use_dora else "use_rslora"
        require(
            not (self.full_finetune and (self.use_dora or self.use_rslora)),
            f"{kind} is a kind of LoRA, but full_finetune trains none: leave one of them out.",
        )

    @property
    def scale(self) -> float:
        """Of the update B A."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    @property
    def alpha(self) -> float:
        """lora_alpha, by default the rank."""
        return self.rank if self.lora_alpha is None else self.lora_alpha


@dataclass(frozen=True, kw_only=True)
class SampleConfig(Section):
    """The rollout: steps, candidates, comparisons."""

    sample_batch_size: Count = 10
    """Prompts of one rollout on each rank; of dpo and mapo pairs of one iteration."""
    num_steps: Annotated[int, Range(1, 999)] = 20
    """Steps of a rollout."""
    sampler: Literal["ddim", "flow_sde", "cps", "dance"] = "ddim"
    """How a step adds noise. ddim: the posterior of the forward process, of diffusions the only one. On flows also
    flow_sde (Flow-GRPO), cps (Flow-CPS), dance (DanceGRPO), each with its published eta unless that is given."""
    eta: Annotated[float, Range(0.001, 2, why="at 0 a step is deterministic and has no log-probability")] = 1.0
    """The sampler's noise level, of ddim and cps at most 1; 0 has no log-probabilities, and near it their size knows no
    limit."""
    guidance_scale: Guidance = 5.0
    """Classifier-free guidance, in sampling and in training. At 1 or below the unconditional half is not evaluated."""
    num_candidates: Annotated[int, Range(2, why="two or more are needed to compare")] = 4
    """k: candidates x_{t-1} drawn at each branching step."""
    num_inner_steps: Whole = 0
    """MSPO: steps that candidates go on by themselves after they part, before they are compared. 0 is SPO."""
    branch_start: Whole | None = 4
    """First branching step, an index below num_steps. 4 of 20 is t = 751: above it there is no detail to compare. Of a
    flow by default the first step that branch_sigma allows."""
    branch_sigma: Annotated[float, Range(0, 1, "(]")] | None = None
    """In place of branch_start: branch from the first step on whose sigma (noise / (signal + noise)) is at most this.
    Default: of a flow .805, the noise of SPO's t = 751."""
    branch_end: Count | None = None
    """Stop branching before this step: with branch_start the range of timesteps that is trained. Default: num_steps; of
    a flow with ddim or cps two less, since its last step adds no noise and the one before hardly any."""
    threshold: Threshold = 0.3
    """A pair is kept if softmax([s_w, s_l]) differs by more than this: s_w - s_l > 2 artanh(threshold)."""
    threshold_max: Threshold | None = None
    """LPO: the threshold at the noisiest step; it rises linearly with sigma_t, from --threshold at the least noisy one.
    Default: the same at all."""
    next_start: Literal["random", "winner", "loser"] = "random"
    """Which candidate the next step starts from. The paper's ablation: random is far better."""
    last_step: Literal["compare", "extend", "keep"] = "compare"
    """If the last step is a comparison point: compare there and branch once more, or (extend, the published SDXL code)
    skip that comparison and let the group run to the end. keep (GradSPO's code): as compare, but the final images are
    judged at the last timestep instead of 0, and whatever they score the pair is kept."""
    rows_per_forward: Annotated[int, Range(2, why="one state and its unconditional half")] | None = None
    """UNet rows (candidates times 2 for guidance) in one forward without gradient: memory. Default: all of a step's, or
    what the device's memory allows."""
    branch_window: Literal["all", "auto"] = "all"
    """auto: comparisons whose pairs are almost never valid are left out, one candidate goes on there: less time, a few
    pairs lost, both logged. Inexact."""
    rollout_weights: Literal["unmerged", "merged"] | None = None
    """merged: rollouts use a copy of the weights with the LoRA added in: fewer products. In float32 exact but for the
    order of sums; in 16 bits rounded stochastically, right on average only. Candidates are compared among themselves
    either way. None: merged on a CPU in float32, if the network is wide; else unmerged."""

    def __post_init__(self) -> None:
        super().__post_init__()
        most = 1.0 if self.sampler in ("ddim", "cps") else math.inf
        require(self.eta <= most, f"eta={self.eta:g} of sampler={self.sampler} must be at most {most:g}.")
        require(
            self.branch_start is None or self.branch_sigma is None,
            f"branch_start={self.branch_start} and branch_sigma={self.branch_sigma} say the same thing: give one.",
        )
        require(
            self.first_branch < self.num_steps,
            f"branch_start={self.branch_start} leaves no steps to branch (num_steps={self.num_steps}). "
            f"Use a value from 0 to {self.num_steps - 1}; the published runs use 4 of 20.",
        )
        require(
            self.first_branch < self.last_branch <= self.num_steps,
            f"branch_end={self.branch_end} must lie above branch_start={self.first_branch} and not above "
            f"num_steps={self.num_steps}. Leave it out to branch to the end.",
        )

    @property
    def first_branch(self) -> int:
        """branch_start; 0 until a flow's schedule has decided it."""
        return self.branch_start or 0

    @property
    def last_branch(self) -> int:
        """branch_end, resolved."""
        return self.num_steps if self.branch_end is None else self.branch_end

    @property
    def branching_steps(self) -> int:
        """Steps whose transitions are trained: the most pairs one prompt can give."""
        return self.last_branch - self.first_branch

    @property
    def rows_of_a_step(self) -> int:
        """UNet rows of a whole step: every candidate of every prompt, twice for guidance."""
        return self.sample_batch_size * self.num_candidates * (2 if self.guidance_scale > 1 else 1)


@dataclass(frozen=True, kw_only=True)
class EngineConfig(ComputeConfig):
    """How the networks are computed. Nothing here but base_weights and memory=small changes what is computed."""

    memory: Literal["fast", "balanced", "small"] | None = None
    """What the backward keeps of the forward. fast: all it needs. balanced: norms are computed again. small: everything
    is (gradient_checkpointing), images are decoded singly and AdamW keeps 8-bit state, unless set otherwise. Default:
    the first whose activations fit into the device's memory."""
    base_weights: Literal["full", "nf4", "int8", "fp8"] = "full"
    """How the frozen UNet's transformers hold their linear layers. nf4 (bitsandbytes): a quarter of the memory. int8,
    fp8 (a GPU of compute capability 8.9): half, and products in 8 bits. All but full are inexact, for policy and
    reference alike; what they change is measured and printed in the first iteration."""
    cuda_graphs: bool | None = None
    """On a CUDA device: what an iteration repeats (forwards, backwards, decoding, scoring) is replayed as CUDA graphs
    from the second iteration on. Default: where what they keep fits beside an optimizer step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.fuse is not False or self.memory != "balanced",
            "memory=balanced is a property of the fused networks: leave out --no-fuse, or use fast or small.",
        )


@dataclass(frozen=True, kw_only=True)
class OptimConfig(AdamConfig):
    """The optimizer, and how an iteration's terms become its steps."""

    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine", "polynomial"] = "constant"
    """Learning-rate schedule over the iterations of the run."""
    accumulation: Literal["balanced", "published"] = "balanced"
    """balanced: an iteration's pairs are cut into nearly equal optimizer steps, every pair weighs the same and is used
    once. published: slots straddle rollouts, a short one has full weight, as in the published code."""
    states_per_forward: Annotated[int, Range(2, why="the two sides of a pair can have different x_t")] | None = None
    """UNet states (times 2 for guidance) in one training forward and backward: memory. Default: one slot's most, or
    what the device's memory allows."""
    gradient_checkpointing: bool | None = None
    """Recompute activations in the backward pass: less memory, about a third more training time. Default: if memory is
    small."""
    max_nonfinite_steps: Count = 10
    """Stop, with a diagnosis, after so many optimizer steps in a row whose loss or gradient was not finite. Each is
    skipped and counted."""

    @property
    def states_at_once(self) -> int:
        """UNet states in one forward of training; a slot has two a term at most."""
        return self.states_per_forward or 2 * self.train_batch_size


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(Section):
    """Settings that only some methods read; their records (methods.py) say which."""

    method: Annotated[str, METHODS] = "spo"
    """What trains the model; it brings its published settings. On rollouts: spo, mspo (with inner steps), d3po (whole
    trajectories), lpo (latent scorer), gradspo, dense (DenseReward); policy gradients stepgrpo (of a step's children),
    grpo, ddpo and dpok (of trajectories); nft and awm (finished pictures, noised again). On --pairs: dpo
    (Diffusion-DPO), mapo. One of your own, from a file beside the command or installed: module:record."""
    beta: Positive = 10.0
    """Strength of the preference in the loss; of mapo the weight of its margin; of nft how far its two policies lie
    from the old one, 1 being the policy itself."""
    clip: Annotated[float, Range(0, 1, "()", why="none turns the clamp off")] | None = 0.1
    """Probability ratios are clamped to [1 - clip, 1 + clip]; none turns the clamp off."""
    guidance_step: Positive = 0.5
    """gradspo: how far the noise target is shifted along the reward."""
    ema_decay: Share = 0.9
    """Of a moving average of the trained weights, per optimizer step: the one that is exported (export_ema), which
    begins where this is given; of gradspo the one that collects."""
    advantage_clip: Positive = 5.0
    """Policy gradients, nft, awm: advantages are clamped to +- this many standard deviations."""
    advantage_std: Literal["prompt", "global"] = "prompt"
    """Whose standard deviation an advantage is measured in: that of the prompt's candidates, or that of all scores of
    the iteration."""
    kl_weight: NotNegative = 0.01
    """Weight of the distance from the reference; at 0 that is not evaluated. grpo, stepgrpo: of the steps' KL. dpok,
    nft, awm: of the mean squared difference of the predictions."""
    weight_by_std: bool = False
    """stepgrpo: each step's term weighs as much as its noise, std (TempFlow-GRPO)."""
    guard_ratio: bool = False
    """stepgrpo: ratios without the bias of their logarithm and of one spread at all steps (GRPO-Guard)."""
    dead_zone: NotNegative | None = None
    """stepgrpo: no term of a step whose candidates' scores differ by at most this; 0: that are all alike. Default: a
    term of each."""
    grpo_window: str | None = None
    """grpo: FIRST:END, the steps that add noise and are trained; the others follow the probability flow (MixGRPO).
    Default: all do, and those that branch_start and branch_end leave are trained."""
    window_moves: Count | None = None
    """grpo: iterations after which grpo_window moves on by a step, and from its last place back to its first; MixGRPO:
    25. Default: it stays."""
    awm_clip: Positive = 1.0
    """awm: ratios are clamped to [1 - awm_clip, 1 + awm_clip]."""
    ema_weight: NotNegative = 1.0
    """awm: weight of the mean squared difference from the moving average's predictions."""
    gamma: Annotated[float, Range(0, 1, "(]")] = 0.9
    """dense: step i (0 the noisiest) is drawn with weight gamma^i."""
    num_ranked: Annotated[int, Range(2)] = 2
    """dense: trajectories of a prompt that one term ranks, drawn from its num_candidates."""
    num_sampled_steps: Count = 3
    """dense: steps drawn for a term. All of a term's states are in one backward: memory."""
    terms_per_prompt: Count = 10
    """dense: terms drawn from each prompt's trajectories."""
    prompt_dropout: Share = 0.0
    """dpo, mapo: share of the prompts that are replaced by the empty one."""


def objective_section() -> type[ObjectiveConfig]:
    """ObjectiveConfig, and the settings that only methods from outside the package have: fields of their classes."""
    return _objective_section(tuple(record.objective for record in METHODS.values() if record.own_class))


@functools.cache
def _objective_section(classes: tuple[type, ...]) -> type[ObjectiveConfig]:
    own: dict[str, tuple[str, Any, Any]] = {}
    known = {f.name for f in dataclasses.fields(ObjectiveConfig)}
    elsewhere = {f.name for s in typing.get_type_hints(Config).values() for f in dataclasses.fields(s)} - known
    for cls in classes:
        hints = typing.get_type_hints(cls, include_extras=True)
        for f in dataclasses.fields(cls):
            kind = Kind.of(hints[f.name])
            if f.name in known:
                there, label = kinds_of(ObjectiveConfig)[f.name], f"{cls.__name__}.{f.name}"
                alike = (kind.base, kind.optional, kind.many) == (there.base, there.optional, there.many)
                require(alike, f"{label} is a setting already, of another type: name it otherwise.")
                if f.default is not dataclasses.MISSING:
                    there.check(f"{label}, which is a setting already,", f.default)
                continue
            simple = kind.base in (int, float, str, bool) and f.default is not dataclasses.MISSING
            require(simple, f"{cls.__name__}.{f.name} must be a number, a text or a bool and have a default.")
            require(f.name not in elsewhere, f"{cls.__name__}.{f.name} is a setting already: name it otherwise.")
            same = own.get(f.name, (f.name, hints[f.name], None))[1] == hints[f.name]
            require(same, f"{cls.__name__}.{f.name} is another method's, of another type: name it otherwise.")
            help_text = doc_of(cls, f) or f"Of {cls.__name__}."
            own[f.name] = (f.name, hints[f.name], field(default=f.default, kw_only=True, metadata={"help": help_text}))
    if not own:
        return ObjectiveConfig
    return dataclasses.make_dataclass("ObjectiveConfig", own.values(), bases=(ObjectiveConfig,), frozen=True)


@dataclass(frozen=True, kw_only=True)
class ScorerConfig(ScorerPaths):
    """What judges the candidates of a step."""

    scorer: tuple[str, ...] = ("spm",)
    """Scorers: {scorers}; a weight after a colon, as in spm:1 pickscore:0.5, makes a weighted sum, and timesteps after
    an @ let a scorer judge at these alone, as in spm:1@0-750 hpsv2:1@500-1000 (finished pictures are at 0). One of your
    own is a function in a file beside the command or installed, module:function or module:function:0.5: pictures
    (N, 3, H, W) in [0, 1] and prompts in, N numbers out. geneval (1 if all is as asked, else 0) needs --prompts with
    what it looks for, such as evaluation_metadata.jsonl. lrm, the latent reward model, judges noisy latents and cannot
    be mixed."""
    spm_time_conditioned: bool = True
    """Off: --spm_path holds a model without the timestep (train_spm --no-time_conditioned), the paper's ablation."""
    normalise_scorers: bool = False
    """Bring each scorer's scores of a prompt's candidates to mean 0 and deviation 1 before they are weighed and added
    up, so that none outweighs the others by its scale."""
    scorer_dtype: Literal["no", "fp16", "bf16"] = "no"
    """Compute type of the scorers' towers; the published code uses float32 (no)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.scorer) > 0, "scorer is empty: name one, such as spm.")


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """A run of preference optimisation (train.py)."""

    @classmethod
    def sections(cls) -> dict[str, type]:
        """The config's sections by name; the objective's with the settings of methods from outside the package."""
        return super().sections() | {"objective": objective_section()}

    @classmethod
    def docs(cls) -> dict[str, str]:
        """Settings that only some methods read say whose they are."""
        docs, own = super().docs(), {f.name for f in dataclasses.fields(objective_section())}
        docs["scorer"] = docs["scorer"].format(scorers=", ".join(scorer_names()))
        for name, methods in readers().items():
            if name in own and len(methods) > 2:
                others = [m for m in METHODS if m not in methods]
                docs[name] += f" Not of {', '.join(others)}." if len(others) < len(methods) else ""
        return docs

    def __post_init__(self) -> None:
        if not isinstance(self.objective, section := objective_section()):
            object.__setattr__(self, "objective", section(**vars(self.objective)))
        self._take_largest()
        trained = {name_and_weight(entry)[0] for entry in self.scorer.scorer}
        shown = next((name for name in parted(self.run.validation_metrics) if name in trained), None)
        require(shown is None, f"validation_metrics: {shown} is the scorer, whose score is shown anyway. Name another.")
        require(
            "lrm" not in trained or self.objective.method == "lpo" or self.model.model not in FLOWS,
            f"scorer=lrm is a UNet of SD-1.5 or SDXL, which cannot judge latents of {self.model.model}. Use spm.",
        )
        require(
            "dina" not in trained or self.model.model in ("sd35", "toy-flow"),
            f"scorer=dina is made of SD3's blocks, which cannot judge latents of {self.model.model}. Use spm.",
        )
        sampler, model = self.sample.sampler, self.model.model
        require(
            sampler == "ddim" or model in FLOWS,
            f"sampler={sampler} is for flows: --model {model} takes DDIM's steps. Leave it out.",
        )
        method, settings = find_method(self.objective.method), self.flat()
        misfit = method.asked("misfit", settings)
        require(not misfit, f"method={self.objective.method} {misfit}")
        method.start_of(settings)  # asked for again by warnings, report and card
        rounded = self.engine.base_weights
        require(
            rounded == "full" or not self.adapter.full_finetune,
            f"base_weights={rounded} rounds the weights that full_finetune trains: leave one of them out.",
        )
        require(
            rounded == "full" or self.sample.rollout_weights != "merged",
            f"rollout_weights=merged adds the LoRA to a base that base_weights={rounded} has rounded: use "
            "--rollout_weights unmerged, or --base_weights full.",
        )
        require(
            not (self.run.export_ema and self.optim.optimizer == "schedulefree"),
            "optimizer=schedulefree exports an average of its own: leave out --export_ema and --ema_decay.",
        )
        odd = f"base_weights={rounded}" if rounded != "full" else f"rollout_weights={self.sample.rollout_weights}"
        require(
            not self.adapter.use_dora or (rounded == "full" and self.sample.rollout_weights != "merged"),
            f"{odd} knows plain LoRAs alone: leave it or use_dora out.",
        )

    def _take_largest(self) -> None:
        """Of several sizes; what is drawn and predicted without being told another."""
        if not (sizes := self.data.sizes):
            return
        height, width = largest = max(sizes, key=lambda size: size[0] * size[1])
        given = (self.model.height, self.model.width)
        require(
            given in ((None, None), largest),
            f"height and width are {given[0]} and {given[1]}, but the largest of resolutions is {width}x{height}: "
            "leave height, width and resolution out.",
        )
        object.__setattr__(self, "model", dataclasses.replace(self.model, height=height, width=width))
        method = self.objective.method
        require(
            not find_method(method).on_pairs,
            f"resolutions: --method {method} reads labelled pairs as square images of one size. Use --resolution.",
        )
        require(
            len(sizes) < 2 or not self.engine.cuda_graphs,
            "cuda_graphs would keep the memory of each of resolutions: leave one of them out.",
        )

    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    scorer: ScorerConfig = field(default_factory=ScorerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    pairs: PairSourceConfig = field(default_factory=PairSourceConfig)
    run: RunConfig = field(default_factory=RunConfig)


DECIDES: dict[str, tuple[str, ...]] = {
    "rows_per_forward": ("rollout",),
    "decode_chunk": ("score",),
    "states_per_forward": ("reference", "backward"),
    "cuda_graphs": ("reference", "backward", "step"),
    "memory": ("backward",),
    "gradient_checkpointing": ("backward",),
}
"""Setting -> the phases whose memory it decides. Of one phase's settings the cheapest comes first."""
LEAST = {"rows_per_forward": 2, "decode_chunk": 1, "states_per_forward": 2}
