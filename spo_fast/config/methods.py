"""METHODS: a record for each method, beside its class (method/objectives.py). Everything that knows methods reads it.

A method from outside the package is a record of the same kind in a file of the user's own: --method module:record.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

from spo_fast.config import published
from spo_fast.config.errors import UsageError, did_you_mean
from spo_fast.config.outside import is_outside, load_outside
from spo_fast.config.published import Given
from spo_fast.config.sections import FLOWS, PairSourceConfig

NOISE = ("eta", "sampler")
RANGE = ("branch_start", "branch_sigma", "branch_end")
CANDIDATES = ("num_candidates", "normalise_scorers")
"""What candidates are drawn and judged with, whatever the method."""
TRAJECTORIES = (*CANDIDATES, *NOISE, *RANGE, "rollout_weights")
"""What whole trajectories of a prompt are drawn with."""
COMPARISONS = ("threshold", "threshold_max")
STEPS = ("next_start", "last_step", "branch_window")
SEGMENTS = (*TRAJECTORIES, "num_inner_steps", *STEPS, *COMPARISONS)
"""What candidates of a step are drawn and compared with."""
PAIRS = tuple(f.name for f in dataclasses.fields(PairSourceConfig))
"""What labelled pairs are read with."""

LN2 = math.log(2)  # -log sigmoid(0)
LOG_RATIOS = "beta times the difference of the log-ratios"


@dataclass(frozen=True, kw_only=True)
class Paper:
    """Where a method is from."""

    title: str
    arxiv: str = ""
    venue: str = ""
    sentence: str = ""
    """Markdown in place of what follows from the above."""

    def markdown(self) -> str:
        """The sentence of the model card."""
        link = f", [arXiv {self.arxiv}](https://arxiv.org/abs/{self.arxiv})" if self.arxiv else ""
        return self.sentence or f"{self.title}{f' ({self.venue})' if self.venue else ''}{link}."


@dataclass(frozen=True, kw_only=True)
class Method:
    """All that is known of a method besides its class. Without PyTorch, so that --help takes no second."""

    name: str
    objective: str | type
    """The class (method/objectives.py), or module:class where importing it must wait."""
    reads: tuple[str, ...]
    """Settings of rollouts or pairs that it reads: TRAJECTORIES, SEGMENTS, PAIRS or some of them."""
    settings: tuple[str, ...] = ()
    """Its own settings. Left out where objective is a class: then they are the fields that its code reads."""
    paper: Paper | None = None
    published: Callable[[Given], Given] = field(default=lambda given: {})
    """All settings given so far, the model's name among them -> those of the published runs, over the preset's."""
    start: float | Callable[[Given], float] | None = None
    """Loss of a policy that has learnt nothing (or what it is by the settings); None: it has no such value."""
    leaves_start: bool = False
    """A policy that learns leaves that value for good: a loss that stays is worth a warning."""
    margin: str = ""
    """What the statistic `margin` is, for the report."""
    about: str = ""
    """What training was, for the card. Left out: the name."""
    tags: tuple[str, ...] = ("preference-optimization",)
    """The card's, besides the name."""
    recipe: Callable[[Given], Given] | None = None
    """What --recipe published changes for it; None: it has no such recipe."""
    of_flows: bool = False
    """Flows are among what was published: steps, guidance and eta too."""
    transitions: bool = True
    """It trains steps that add noise; else pictures are noised to any step's level. Where objective is a class: its."""
    misfit: Callable[[Given], str] = field(default=lambda settings: "")
    """All settings -> why it cannot run with them and what to change, or an empty text."""

    def __post_init__(self) -> None:
        if isinstance(self.objective, str):
            return
        if not dataclasses.is_dataclass(self.objective):
            raise ValueError(f"{self.objective.__name__} needs @dataclass(frozen=True, kw_only=True).")
        object.__setattr__(self, "settings", self.settings or settings_of(self.objective))
        object.__setattr__(self, "transitions", getattr(self.objective, "transitions", True))

    @property
    def own_class(self) -> bool:
        """The class is at hand: a method from outside the package."""
        return not isinstance(self.objective, str)

    @property
    def on_pairs(self) -> bool:
        """It learns from labelled pairs, not from rollouts."""
        return "pairs" in self.reads

    @property
    def compares(self) -> bool:
        """It learns from pairs of a rollout whose scores differ enough."""
        return "threshold" in self.reads

    @property
    def unit(self) -> str:
        """What the loss is of."""
        return "pair" if self.on_pairs or self.compares else "loss term"

    def start_of(self, settings: Given) -> float | None:
        """Loss of a policy that has learnt nothing, of a run with these settings."""
        found: float | None = self.asked("start", settings) if callable(self.start) else self.start
        return found

    def asked(self, what: str, settings: Given) -> Any:
        """What a function of the record says to these settings. Raises ValueError if it fails."""
        try:
            return getattr(self, what)(settings)
        except UsageError:
            raise
        except Exception as error:  # whatever the user's own code raises
            text = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"method {self.name}: `{what}` of its record ends in {text:.150}. Mend it.") from error

    def kind(self) -> type:
        """The class. Raises ValueError if its fields are not the settings that the record names."""
        if not isinstance(self.objective, str):
            return self.objective
        module, _, name = self.objective.partition(":")
        found: type = getattr(importlib.import_module(module), name)
        if set(settings_of(found)) != set(self.settings):
            raise ValueError(f"record {self.name} names {self.settings}, and its class reads {settings_of(found)}.")
        return found

    def defaults(self, given: Given) -> dict[str, Any]:
        """What choosing the method sets: the class's defaults, and over them what was published.

        Of flows without the steps, guidance and eta that its authors published for diffusions.
        """
        own = {} if isinstance(self.objective, str) else {
            f.name: f.default for f in dataclasses.fields(self.objective)
            if f.name in self.settings and f.default is not dataclasses.MISSING
        }  # fmt: skip
        unread = {} if "num_inner_steps" in self.reads else {"num_inner_steps": 0}
        of_diffusions = () if self.of_flows or given["model"] not in FLOWS else ("num_steps", "guidance_scale", "eta")
        found = {**unread, **own, **self.asked("published", given)}
        return {name: value for name, value in found.items() if name not in of_diffusions}


def settings_of(kind: type) -> tuple[str, ...]:
    """The fields of an objective's class, but for inherited ones that only overridden code reads.

    Read is also what a function of the method's own module reads, and what a base's method does that is called by name.
    """
    read, overridden, bases = set(), set(), {"super", *(c.__name__ for c in kind.__mro__[1:])}
    for name in {name for c in kind.__mro__ for name in vars(c)}:
        functions = [f for c in kind.__mro__ if (f := _function(vars(c).get(name)))]
        goes_on = (bases & set(f.__code__.co_names) for f in functions)
        live = next((n for n, more in enumerate(goes_on) if not more), len(functions))
        read |= {n for f in functions[: live + 1] for n in _names_of(f, set())}
        overridden |= {n for f in functions[live + 1 :] for n in _names(f.__code__)}
    return tuple(f.name for f in dataclasses.fields(kind) if f.name in read or f.name not in overridden)


def _function(member: Any) -> FunctionType | None:
    """A method's own code: no property's wrapper, no decorator's, nothing that dataclasses write."""
    found = member.fget if isinstance(member, property) else inspect.unwrap(member) if callable(member) else None
    return found if isinstance(found, FunctionType) and not found.__name__.startswith("__") else None


def _names_of(function: FunctionType, seen: set[FunctionType]) -> set[str]:
    """Of attributes that it reads, or that functions of its module do which it names."""
    seen.add(function)
    names = _names(function.__code__)
    called = (function.__globals__.get(name) for name in tuple(names))
    own = [f for f in called if isinstance(f, FunctionType) and f.__module__ == function.__module__ and f not in seen]
    return names.union(*(_names_of(f, seen) for f in own))


def _names(code: Any) -> set[str]:
    """Of attributes, in inner functions too."""
    inner = (c for c in code.co_consts if inspect.iscode(c))
    return set(code.co_names).union(*map(_names, inner))


# ---------------------------------------------------------------------------------------------- the records


SPO_PAPER = Paper(
    title="Step-by-step Preference Optimization",
    arxiv="2406.04314",
    venue="CVPR 2025",
    sentence=(
        "*Aesthetic Post-Training Diffusion Models from Generic Preferences with Step-by-step Preference "
        "Optimization*\n(CVPR 2025, [arXiv 2406.04314](https://arxiv.org/abs/2406.04314))."
    ),
)


_CODE = "spo_fast.method.objectives:"
_GRADIENTS = "spo_fast.method.policy_gradients:"
_MATCHING = "spo_fast.method.matching:"
_reinforcement = functools.partial(
    Method,
    reads=TRAJECTORIES,
    tags=("reinforcement-learning",),
    start=0.0,  # a prompt's advantages sum to 0
)
_pictures = functools.partial(
    _reinforcement,
    reads=(*CANDIDATES, "branch_start", "branch_end"),
    of_flows=True,
    transitions=False,
    misfit=published.guided_or_noisy,
)
_pairs = functools.partial(Method, reads=PAIRS, settings=("beta", "prompt_dropout"), transitions=False)
_spo = functools.partial(
    Method,
    reads=SEGMENTS,
    settings=("beta", "clip"),
    start=LN2,
    leaves_start=True,
    margin=LOG_RATIOS,
)

METHODS: dict[str, Method] = {
    record.name: record
    for record in (
        _spo(
            name="spo",
            objective=_CODE + "SPO",
            published=lambda given: {"num_inner_steps": 0},
            paper=SPO_PAPER,
            about="step-by-step preference\noptimisation (SPO)",
            recipe=published.published_spo,
        ),
        _spo(
            name="mspo",
            tags=("spo", "preference-optimization"),
            objective=_CODE + "MSPO",
            published=published.mspo_method,
            paper=SPO_PAPER,
            about="step-by-step preference\noptimisation (MSPO)",
            recipe=published.published_spo,
        ),
        _spo(
            name="d3po",
            objective=_CODE + "D3PO",
            reads=(*CANDIDATES, *NOISE, "branch_start", "branch_sigma", "rollout_weights", *COMPARISONS),
            published=published.d3po,
            paper=Paper(title="D3PO", arxiv="2311.13231"),
            leaves_start=False,  # its beta keeps the loss there
        ),
        _spo(
            name="lpo",
            objective=_CODE + "LPO",
            published=published.lpo,
            paper=Paper(title="Latent Preference Optimization", arxiv="2502.01051"),
            recipe=published.published_code,
            misfit=published.no_latent_judge,
        ),
        _spo(
            name="gradspo",
            objective=_CODE + "GradSPO",
            reads=(*CANDIDATES, *NOISE, *RANGE, *STEPS, *COMPARISONS),  # rollouts of averages
            settings=("beta", "clip", "guidance_step", "ema_decay"),
            published=published.gradspo,
            paper=Paper(title="GradSPO", venue="NeurIPS 2025"),
            leaves_start=False,  # its clamp keeps the loss there
            margin="beta times the difference of how much nearer to its target than the reference a side is",
            recipe=published.published_code,
            misfit=published.unlike_siblings,
        ),
        _reinforcement(
            name="ddpo",
            objective=_GRADIENTS + "DDPO",
            settings=("clip", "advantage_clip"),
            published=published.ddpo,
            paper=Paper(title="DDPO", arxiv="2305.13301"),
        ),
        _reinforcement(
            name="dpok",
            objective=_GRADIENTS + "DPOK",
            settings=("clip", "advantage_clip", "kl_weight"),
            published=published.dpok,
            paper=Paper(title="DPOK", arxiv="2305.16381"),
        ),
        _reinforcement(
            name="stepgrpo",
            objective=_GRADIENTS + "StepGRPO",
            reads=("next_start", "last_step", *TRAJECTORIES),
            settings=("clip", "advantage_clip", "kl_weight", "weight_by_std", "guard_ratio", "dead_zone"),
            published=published.stepgrpo,
            paper=Paper(title="Step-wise group-relative policy optimisation", arxiv="2603.28718"),
            misfit=published.unlike_siblings,
        ),
        _reinforcement(
            name="grpo",
            objective=_GRADIENTS + "GRPO",
            settings=("clip", "advantage_clip", "kl_weight", "advantage_std", "grpo_window", "window_moves"),
            published=published.grpo,
            of_flows=True,
            paper=Paper(title="Flow-GRPO", arxiv="2505.05470"),
            misfit=published.bad_window,
        ),
        _pictures(
            name="nft",
            objective=_MATCHING + "NFT",
            settings=("beta", "advantage_clip", "advantage_std", "kl_weight"),
            published=published.nft,
            paper=Paper(title="DiffusionNFT", arxiv="2509.16117"),
            start=None,  # two errors, which no advantage weighs down to 0
        ),
        _pictures(
            name="awm",
            objective=_MATCHING + "AWM",
            settings=("advantage_clip", "advantage_std", "kl_weight", "awm_clip", "ema_weight"),
            published=published.awm,
            paper=Paper(title="Advantage weighted matching", arxiv="2509.25050"),
        ),
        Method(
            name="dense",
            objective=_CODE + "DenseReward",
            reads=TRAJECTORIES,
            settings=("beta", "clip", "gamma", "num_ranked", "num_sampled_steps", "terms_per_prompt"),
            published=published.dense,
            paper=Paper(
                title="a dense reward view on aligning text-to-image diffusion",
                arxiv="2402.08265",
            ),
            start=lambda settings: math.log(math.factorial(settings["num_ranked"])),  # all orders are as likely
            margin="beta times the difference of the means over steps of the log-ratios",
            misfit=published.too_few_to_rank,
        ),
        _pairs(
            name="dpo",
            objective=_CODE + "DiffusionDPO",
            published=published.dpo,
            paper=Paper(title="Diffusion-DPO", arxiv="2311.12908"),
            start=LN2,
            leaves_start=True,
            margin="beta / 2 times the difference of how much nearer to the noise than the reference a side is",
        ),
        _pairs(
            name="mapo",
            objective=_CODE + "MaPO",
            published=published.mapo,
            paper=Paper(title="MaPO", arxiv="2406.06424"),
            margin="1000 times the difference of the weighted denoising errors",
            misfit=published.not_of_velocities,
        ),
    )
}
"""By the value of --method."""


def register_method(record: Method, name: str | None = None) -> Method:
    """Make a record of the user's own a choice of --method. Raises ValueError for what is none, or for a name taken."""
    if not isinstance(record, Method):
        raise UsageError(f"--method {name}: that is a {type(record).__name__}, not a spo_fast.config.methods.Method.")
    same = METHODS.get(record.name)
    if same is not None and same is not record and (name or record.name) != record.name:
        raise UsageError(f"--method {name}: {record.name} is a method already: name the record otherwise.")
    name = name or record.name
    if METHODS.get(name, record) is not record:
        raise ValueError(f"there is a method {name} already: register {record.objective} by another name.")
    METHODS[name] = record
    return record


def find_method(name: str) -> Method:
    """A record by the value of --method; module:record is imported. Raises UsageError for an unknown one."""
    if name not in METHODS and is_outside(name):
        register_method(load_outside("--method", name), name)
    if name not in METHODS:
        raise UsageError(f"method={name!r:.60} is none of {', '.join(METHODS)}.{did_you_mean(name, METHODS)}")
    return METHODS[name]


ALL_READ = ("ema_decay",)
"""Own settings of some methods that mean something to every other one, too."""


def readers() -> dict[str, tuple[str, ...]]:
    """Setting -> the methods that read it, of those that not all read. Given to another method it is an error."""
    read = {name: (*record.settings, *record.reads) for name, record in METHODS.items()}
    names = dict.fromkeys(setting for settings in read.values() for setting in settings if setting not in ALL_READ)
    return {setting: tuple(m for m in METHODS if setting in read[m]) for setting in names}


def check_read(method: str, flags: set[str]) -> None:
    """Raises UsageError for a flag that says nothing to this method."""
    reads = readers()
    for name in sorted(flags & reads.keys()):
        if method not in reads[name]:
            raise UsageError(f"--{name} is not read by --method {method}, only by {', '.join(reads[name])}.")
