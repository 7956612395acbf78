"""The trained network: a frozen base plus a LoRA, the reference being the same network with the LoRA off (or, if the
run started from a given LoRA, with that one).

Compute runs in one type throughout (no autocast); trained weights have float32 masters when that type has 16 bits, and
gradients are added up in the masters, so that neither small updates nor accumulation are lost to rounding.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import replace

import torch
from peft import LoraConfig
from torch import Tensor

from spo_fast.config.training import AdapterConfig
from spo_fast.method.experience import Cond, Precomputed, Prediction
from spo_fast.models.attention import Attend, attend_with
from spo_fast.models.doors import Inputs, Network, door_of
from spo_fast.models.files.lora import read_lora
from spo_fast.models.fuse import fuse
from spo_fast.models.graphs import Graphs
from spo_fast.models.merged import MergedWeights, base_weight, lora_layers
from spo_fast.models.quantised import QuantisedLinear, import_for, in_full, quantise_base
from spo_fast.models.trained_weights import TrainedWeights


class Policy(TrainedWeights):
    """Network + trained weights. `predict` is the only way to evaluate the network."""

    def __init__(self, network: Network, adapter: AdapterConfig, seed: int):
        self.network, self.adapter = network.requires_grad_(False).eval(), adapter
        self._frozen_copy: Network | None = None
        self.fused = False
        self._full: dict[QuantisedLinear, Tensor] = {}  # the base's weights before they were rounded
        self.batch_sizes: tuple[int, ...] = ()
        """Rising. Compiled, the network sees batches of these sizes only: `predict` fills up with its first row."""
        self.state_sizes: tuple[int, ...] = ()
        """The same, of batches with a timestep a row, states of an experience: few pairs never need a rollout's sizes,
        for which no backward was compiled."""
        if adapter.full_finetune:
            self._frozen_copy = copy.deepcopy(network)
            network.requires_grad_(True)
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)  # PEFT draws its initial weights from the global generator
                _add_lora(network, adapter)
        named = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
        # PEFT draws in the network's type (and may keep the values in another): masters start from 16-bit values then,
        # as in the published runs
        dtype = network.dtype  # diffusers walks all modules for it: 16 ms on SDXL
        for _, p in named:
            p.data = p.data.to(dtype)
        super().__init__(named)
        self.reach = None if adapter.full_finetune else base_norm(network)
        """Norm of the frozen weights that a LoRA changes; None if what is trained are whole weights."""
        self._merged: MergedWeights | None = None
        self.graphs = Graphs(None)
        """Of calls whose shapes repeat: `predict`, and what a rollout makes of it (method/rollout.py)."""
        self._which = ""  # of the networks that share one: trained, reference or merged
        self._start: list[Tensor] | None = None
        if adapter.lora_path is not None:
            self.load_state_dict(read_lora(adapter.lora_path, network, adapter))
            self._start = [p.detach().clone() for p in self._weights]

    @torch.no_grad()
    def size(self) -> Tensor:  # ()
        """Of LoRAs the norm of what they add to the frozen weights, scale B A of all layers: B begins at 0."""
        if self.adapter.full_finetune:
            return super().size()
        halves = dict(zip(self.names, self.masters, strict=True))
        squares = []
        for name, down in halves.items():
            if ".lora_A." in name:
                a, b = down.flatten(1), halves[name.replace(".lora_A.", ".lora_B.")].flatten(1)  # (r, in), (out, r)
                squares.append(((a @ a.T) * (b.T @ b)).sum())  # |B A|^2 without B A itself
        return self.adapter.scale * torch.stack(squares).sum().clamp_min(0).sqrt()

    @contextlib.contextmanager
    def ema(self) -> Iterator[None]:
        """Inside, `predict` is the moving average of the trained network (keep_averages)."""
        assert self.averages is not None, "call keep_averages first"
        with self._filled(self.averages):
            yield

    @contextlib.contextmanager
    def scaled(self, strength: float) -> Iterator[None]:
        """Inside, `predict` is the network with its LoRA at this weight, as pipelines apply one."""
        # the B halves alone: what a LoRA adds is proportional to them, also within DoRA's norm
        halves = zip(self.names, self._weights, strict=True)
        with self._filled([p * strength if ".lora_B." in name else p.clone() for name, p in halves]):
            yield

    def quantise(self, how: str) -> None:
        """Keep the frozen base in fewer bits (quantised.py), before `fuse`. Inexact."""
        import_for(how)
        self._full = quantise_base(self.network, how)

    @contextlib.contextmanager
    def full_base(self) -> Iterator[None]:
        """Inside, `predict` uses the base as it was loaded; afterwards that is forgotten."""
        with in_full(self._full):
            yield
        self.forget_full_base()

    @property
    def keeps_full_base(self) -> bool:
        """Whether the weights of a quantised base are still held as they were."""
        return bool(self._full)

    def forget_full_base(self) -> None:
        """Let them go."""
        self._full = {}

    def fuse(self, recompute: bool = False) -> None:
        """Compute with our ops (fuse.py). recompute: norms and gates in the backward pass, instead of keeping them."""
        for network in filter(None, (self.network, self._frozen_copy)):
            fuse(network, recompute)
        self.fused = True

    def attend_with(self, attend: Attend) -> None:
        """Another kernel for a fused network's attentions."""
        for network in filter(None, (self.network, self._frozen_copy)):
            attend_with(network, attend)

    @property
    def dtype(self) -> torch.dtype:
        """The compute type."""
        return self.network.dtype

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.network.device

    def predict(
        self,
        x_t: Tensor,  # (B, C, H, W) latents
        t: Tensor,  # () or (B,) timesteps, as the table has them
        cond: Cond,  # of the B rows
        guided: bool,  # evaluate the unconditional half as well, in the same forward
    ) -> Prediction:
        """The network's raw outputs, one call of it for all rows and both halves."""
        B = len(x_t)
        padded = next((size for size in (self.state_sizes if t.ndim else self.batch_sizes) if size >= B), B)
        if padded > B > 0:
            rows = torch.arange(padded, device=x_t.device)
            rows = rows.where(rows < B, 0)  # what is computed of the rest gets no gradient: it adds zeros
            m = self.predict(x_t[rows], t if t.ndim == 0 else t[rows], cond.select(rows), guided)
            return m.select(slice(B))
        call, name = denoise, f"predict {self._which}"
        if not torch.is_grad_enabled():
            call = self.graphs.wrap(name, denoise)
        elif self.shards is None:  # whole gradients of parts come and go: no graph could add to them
            call = self.graphs.wrap_trained(name, denoise, self)
        return call(self.network, x_t, t, cond, guided)

    @torch.no_grad()
    def precompute_text(self, cond: Cond, guided: bool) -> Cond:
        """cond with what a fused network computes of it alone: for many calls without gradient, one set of weights."""
        if not self.fused:
            return cond
        return replace(cond, text=self.text(told(self.network, len(cond), cond, guided)))

    def text(self, inputs: Inputs) -> Precomputed:
        """What the fused network computes of the prompts alone."""
        return precomputed(self.network, inputs)

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, `predict` is the network that training started from."""
        if self._frozen_copy is not None:
            trained, self.network = self.network, self._frozen_copy
            try:
                yield
            finally:
                self.network = trained
            return
        if self._start is not None:
            with self._filled(self._start):
                yield
            return
        with self._without_lora("reference"):
            yield

    @contextlib.contextmanager
    def _without_lora(self, which: str) -> Iterator[None]:
        self.network.disable_adapters()
        self._which = which
        try:
            yield
        finally:
            self.network.enable_adapters()
            self._which = ""

    @contextlib.contextmanager
    def merged(self, seed: int, iteration: int) -> Iterator[None]:
        """Inside, `predict` uses the LoRA added into a copy of the weights, rounded by the key (seed, iteration).

        Without gradient. Exact but for the order of sums in float32; in 16 bits right on average. Full fine-tuning has
        nothing to merge.
        """
        if self._frozen_copy is not None:
            yield
            return
        if self._merged is None:
            self._merged = MergedWeights(self.network, self.state_dict())
        self._merged.merge(seed, iteration)
        with self._without_lora("merged"), self._merged.swapped_in():
            yield


def _add_lora(network: Network, adapter: AdapterConfig) -> None:
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]  # PEFT only divides it by r
        init_lora_weights="gaussian",
        target_modules=list(adapter.lora_targets),
        use_rslora=adapter.use_rslora,
        use_dora=adapter.use_dora,
    )
    try:
        network.add_adapter(config)
    except ValueError as error:  # no such layer, or one of a kind that takes no LoRA
        names = " ".join(adapter.lora_targets)
        raise ValueError(
            f"--lora_targets {names} fits no layer of the network ({error}). Try to_q to_k to_v."
        ) from error


@torch.no_grad()
def base_norm(network: Network) -> Tensor:  # () float32 or wider
    """Norm of all frozen weights that wear a LoRA."""
    weights = [base_weight(layer) for _, layer in lora_layers(network)]
    if weights[0].is_meta:
        return weights[0].new_zeros(())  # there are no numbers
    wide = torch.promote_types(weights[0].dtype, torch.float32)
    return torch.stack([torch.linalg.vector_norm(w, dtype=wide) for w in weights]).norm()


def denoise(
    network: Network,
    x_t: Tensor,  # (B, C, H, W) latents
    t: Tensor,  # () or (B,) timesteps, as the table has them
    cond: Cond,  # of the B rows
    guided: bool,  # evaluate the unconditional half as well, in the same forward
) -> Prediction:
    """The network's raw outputs, one call for all rows and both halves (unconditional first, as diffusers)."""
    B = x_t.shape[0]
    x = x_t.to(network.dtype)
    if guided:
        x = torch.cat([x, x])
        t = t if t.ndim == 0 else torch.cat([t, t])
    out = door_of(network).predict(network, x, t, told(network, B, cond, guided), cond.text)
    return Prediction(out[B:], out[:B]) if guided else Prediction(out, None)


def told(network: Network, B: int, cond: Cond, guided: bool) -> Inputs:
    """What the network is told of B rows, or of twice as many, that is not in cond.text."""
    names = list(cond.cond) if cond.text is None else [n for n in door_of(network).beside_text if n in cond.cond]
    if not names:
        return {}
    dtype = network.dtype  # once: diffusers walks all modules for it
    inputs = {name: cond.cond[name].to(dtype) for name in names}
    if not guided:
        return inputs
    empty = {name: cond.uncond[name].to(dtype).expand(B, *value.shape[1:]) for name, value in inputs.items()}
    return {name: torch.cat([empty[name], value]) for name, value in inputs.items()}


@torch.no_grad()
def precomputed(network: Network, inputs: Inputs) -> Precomputed:
    """What a fused network computes of the prompts alone: for steps without gradient, until its weights change."""
    return door_of(network).text(network, inputs)
