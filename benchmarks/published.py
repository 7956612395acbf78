"""The published loop's execution strategy (SPO, RockeyCoss/SPO at 27a8642), restated to be timed against.

What it does, and this file repeats: the policy runs under fp16 autocast with float32 PEFT LoRA weights and float32
outputs; the reference is a deep copy of the UNet in plain fp16; a pair costs four UNet calls (policy and reference, for
the winner and for the loser, each with both guidance halves), also where winner and loser share x_t; prompt encoders
run for every batch of prompts; the preference model runs in float32 (TF32 products allowed) and its text tower once
for every score; all candidates are decoded at once; latents are kept in fp16; every comparison, and three reductions
a micro-batch, are read back to the host; the last micro-batch is ragged; the allocator's cache is emptied after each
rollout; the gradient-norm clipping acts on nothing. All of today's libraries' speed is given to it: attention is SDPA
everywhere, the preference model's towers too.

modern=True is the same loop as one would write it today, still in eager mode: LoRA and everything else in one 16-bit
type without autocast, the reference by turning the LoRA off, prompts and text features encoded once, nothing read back
in training, no cache emptied.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

from benchmarks.networks import lora_weights
from spo_fast.config.training import Config
from spo_fast.method.experience import Cond
from spo_fast.method.rollout import segments

Phase = Callable[[str], contextlib.AbstractContextManager]


class PublishedLoop:
    """One rank of the published training, from networks that are already on the device."""

    def __init__(
        self,
        unet: Any,  # without adapter, in `dtype`
        cfg: Config,
        scheduler: Any,  # diffusers' DDIMScheduler, timesteps set
        dtype: torch.dtype,  # float16 as published; float32 and float64 turn autocast off
        phase: Phase,
        *,
        vae: Any = None,
        text_encoders: list[Any] | None = None,
        spm: Any = None,  # ClipScorer in float32
        exact: bool = False,  # log-probabilities in float64, to be a yardstick: the published ones cancel in float32
        modern: bool = False,
    ):
        self.modern = modern
        self.features: Tensor | None = None  # of the text tower, if they are kept
        self.unet, self.cfg, self.dtype, self.phase = unet, cfg, dtype, phase
        self.vae, self.text_encoders, self.spm = vae, text_encoders or [], spm
        self.device = unet.device
        self.reference = None if modern else copy.deepcopy(unet)
        rank = cfg.adapter.rank
        unet.add_adapter(
            LoraConfig(
                r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(cfg.adapter.lora_targets)
            )
        )
        self.trained = {name: p for name, p in unet.named_parameters() if p.requires_grad}
        weights = lora_weights({name: p.shape for name, p in self.trained.items()})
        for name, p in self.trained.items():
            # float32 where the base has 16 bits
            p.data = weights[name].to(self.device, torch.float32 if dtype.itemsize == 2 and not modern else dtype)
        o = cfg.optim
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), o.learning_rate, (o.adam_beta1, o.adam_beta2), o.adam_epsilon, o.adam_weight_decay
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        self.exact = exact
        self.alphas = scheduler.alphas_cumprod.to(self.device, torch.float64 if exact else torch.float32)
        self.timesteps = scheduler.timesteps.to(self.device)
        self.stride = scheduler.config.num_train_timesteps // cfg.sample.num_steps
        self.slots = 0

    # ------------------------------------------------------------------------------------------------ networks

    def _guided(self, network: Any, x: Tensor, t: Tensor, cond: Cond, cast: bool) -> Tensor:
        """One UNet call on both halves and their combination, in the type the network returns."""
        B = x.shape[0]
        inputs = {name: torch.cat([cond.uncond[name].expand_as(v), v]) for name, v in cond.cond.items()}
        embeds = inputs.pop("prompt_embeds")
        autocast = torch.autocast(self.device.type, self.dtype, enabled=cast and self.dtype.itemsize == 2)
        with autocast:
            t = t if t.ndim == 0 else torch.cat([t, t])
            out = network(torch.cat([x, x]), t, embeds, added_cond_kwargs=inputs or None, return_dict=False)[0]
        out = out.float() if cast and self.dtype.itemsize == 2 else out
        uncond, text = out[:B], out[B:]
        return uncond + self.cfg.sample.guidance_scale * (text - uncond)

    def policy(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        out = self._guided(self.unet, x, t, cond, cast=not self.modern)
        return out.float() if self.dtype.itemsize == 2 else out

    @torch.no_grad()
    def frozen(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        if self.reference is not None:
            return self._guided(self.reference, x, t, cond, cast=False)
        self.unet.disable_adapters()
        out = self._guided(self.unet, x, t, cond, cast=False).float()
        self.unet.enable_adapters()
        return out

    def encode(self, ids: Tensor, cond: Cond) -> Cond:
        """Every batch of prompts through the encoders again. The work is what is timed; the result is dropped for
        the given conditioning, which all contenders share."""
        for encoder in () if self.modern and self.features is not None else self.text_encoders:
            encoder(ids, output_hidden_states=True)
        return cond

    # ------------------------------------------------------------------------------------------------ DDIM

    def _levels(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """alpha, alpha of the previous step, std, shaped for `like`; computed anew at every use, in float32."""
        previous = (t - self.stride).clamp_min(0)
        alpha, alpha_prev = (self.alphas[v].view(-1, *[1] * (like.ndim - 1)) for v in (t, previous))
        variance = (1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)
        return alpha, alpha_prev, self.cfg.sample.eta * variance**0.5

    def _x0(self, eps: Tensor, t: Tensor, x: Tensor) -> Tensor:
        alpha, _, _ = self._levels(t, x)
        return (x - (1 - alpha) ** 0.5 * eps) / alpha**0.5

    def _mean(self, eps: Tensor, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        _, alpha_prev, std = self._levels(t, x)
        direction = (1 - alpha_prev - std**2).clamp_min(0) ** 0.5 * eps
        return alpha_prev**0.5 * self._x0(eps, t, x) + direction, std

    def _children(self, eps: Tensor, t: Tensor, x: Tensor, count: int) -> Tensor:  # (K, B, C, H, W)
        mean, std = self._mean(eps, t, x)
        return (mean + std * torch.randn(count, *x.shape, device=x.device, dtype=x.dtype)).to(x.dtype)

    def log_prob(self, eps: Tensor, t: Tensor, x: Tensor, x_prev: Tensor) -> Tensor:  # (B,)
        if self.exact:
            eps, x, x_prev = eps.double(), x.double(), x_prev.double()
        mean, std = self._mean(eps, t, x)
        terms = -((x_prev - mean) ** 2) / (2 * std**2) - std.log() - math.log(math.sqrt(2 * math.pi))
        return terms.mean((1, 2, 3))

    # ------------------------------------------------------------------------------------------------ rollout

    @torch.no_grad()
    def rollout(self, ids: Tensor, cond: Cond, latent: tuple[int, int, int], decisions: Any) -> dict[str, Any]:
        """Collect the pairs of one batch of prompts: {"x_t", "x_prev" (N, 2, C, H, W), "t" (N,), "prompts" (N,)}.

        decisions.scores(c) stands in for the c-th comparison's scores, after the real ones were computed.
        """
        sample, K, B = self.cfg.sample, self.cfg.sample.num_candidates, ids.shape[0]
        with self.phase("encode"):
            cond = self.encode(ids, cond)
        many = torch.arange(B, device=self.device).repeat(K)
        branched = cond.select(many)
        x = torch.randn(B, *latent, device=self.device, dtype=self.dtype)

        def predict(x: Tensor, i: int, c: Cond) -> Tensor:
            with self.phase("unet"):
                return self.policy(x, self.timesteps[i], c)

        for i in range(sample.first_branch):
            x = self._children(predict(x, i, cond), self.timesteps[i], x, 1)[0]
        eps = predict(x, sample.first_branch, cond)
        kept: dict[str, list[Tensor]] = {"x_t": [], "x_prev": [], "t": [], "prompts": []}
        for c, (first, end) in enumerate(segments(sample)):
            branches = self._children(eps, self.timesteps[first], x, K)
            path = [x.expand(K, *x.shape), branches]
            for i in range(first + 1, end):
                flat = branches.flatten(0, 1)
                child = self._children(predict(flat, i, branched), self.timesteps[i], flat, 1)
                branches = child.view_as(branches)
                path.append(branches)
            flat, last = branches.flatten(0, 1), end == sample.num_steps
            eps_all = None if last else predict(flat, end, branched)
            t = torch.zeros_like(self.timesteps[0]) if last else self.timesteps[end]
            self._score(flat if eps_all is None else self._x0(eps_all, t, flat), t, ids.repeat(K, 1))
            sides, valid = self._compare(decisions.scores(c).view(K, B), sample.threshold)
            for s, i in enumerate(range(first, end)):
                for name, latents in (("x_t", path[s]), ("x_prev", path[s + 1])):
                    kept[name].append(latents[sides, torch.arange(B, device=self.device)][:, valid].transpose(0, 1))
                kept["prompts"].append(valid.nonzero()[:, 0])
                kept["t"].append(self.timesteps[i].repeat(len(kept["prompts"][-1])))
            if eps_all is not None:
                pick = torch.randint(0, K, (B,), device=self.device)
                column = torch.arange(B, device=self.device)
                x, eps = branches[pick, column], eps_all.view_as(branches)[pick, column]
        return {name: torch.cat(values) for name, values in kept.items()} | {"cond": cond}

    def _score(self, latents: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        """All candidates decoded at once; image and text tower for every score."""
        with self.phase("decode"):
            pixels = self.vae.decode(latents.to(self.vae.dtype) / self.vae.config.scaling_factor, return_dict=False)[0]
        with self.phase("score"):
            if self.features is None or not self.modern:
                self.features = self.spm.encode_ids(ids)
            return self.spm.score_pixels(pixels, t, self.features)

    def _compare(self, scores: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
        """(2, B) winner and loser, (B,) whether softmax tells them apart by more than the threshold."""
        ordered, index = scores.sort(0, descending=True)
        p = ordered[[0, -1]].softmax(0)
        return index[[0, -1]], p[0] - p[1] > threshold

    # ------------------------------------------------------------------------------------------------ training

    def log_ratios(self, pairs: dict[str, Any], cond: Cond) -> Tensor:  # (N, 2): winner, loser
        """Four UNet calls for the pairs given, gradient to the LoRA."""
        t, ratios = pairs["t"], []
        for side in range(2):
            x, x_prev = pairs["x_t"][:, side].to(self.dtype), pairs["x_prev"][:, side].to(self.dtype)
            with self.phase("reference"):
                eps_ref = self.frozen(x, t, cond)
            with self.phase("backward"):
                eps = self.policy(x, t, cond)
                ratios.append(self.log_prob(eps, t, x, x_prev) - self.log_prob(eps_ref, t, x, x_prev))
        return torch.stack(ratios, dim=1)

    def loss(self, log_ratios: Tensor, clip: float | None) -> tuple[Tensor, Tensor]:
        """Mean of -log sigmoid(beta (log r_w - log r_l)), r clamped; and r (N, 2)."""
        ratios = log_ratios.exp() if clip is None else log_ratios.exp().clamp(1 - clip, 1 + clip)
        kept = log_ratios if clip is None else ratios.log()
        z = self.cfg.objective.beta * (kept[:, 0] - kept[:, 1])
        # with the clamp |z| is small, and the published -log(sigmoid(z)) is safe; without it, it would overflow
        return (-torch.nn.functional.logsigmoid(z)).mean(), ratios

    def train(self, pairs: dict[str, Any]) -> dict[str, float]:
        """One pass over the pairs in random order. Returns the number of optimizer steps and the last loss."""
        o, cond, N = self.cfg.optim, pairs["cond"], len(pairs["t"])
        order = torch.randperm(N, device=self.device)
        steps, loss_value = 0, 0.0
        for start in range(0, N, o.train_batch_size):
            part = order[start : start + o.train_batch_size]
            batch = {name: pairs[name][part] for name in ("x_t", "x_prev", "t")}
            ratios = self.log_ratios(batch, cond.select(pairs["prompts"][part]))
            with self.phase("backward"):
                loss, r = self.loss(ratios, self.cfg.objective.clip)
                if not self.modern:
                    loss_value = loss.detach().mean().item()
                    r[:, 0].detach().mean().item(), r[:, 1].detach().mean().item()
                self.scaler.scale(loss / o.gradient_accumulation_steps).backward()
            self.slots += 1
            if self.slots % o.gradient_accumulation_steps == 0:
                with self.phase("step"):
                    self.scaler.unscale_(self.optimizer)
                    # the published call clips nothing: AdamW had exhausted the filter it is given
                    torch.nn.utils.clip_grad_norm_([], 1.0)
                    self.scaler.step(self.optimizer)
                    self.scaler.update()
                    self.optimizer.zero_grad()
                steps += 1
        return {"optimizer_steps": steps, "loss": loss_value}

    def iterate(self, ids: Tensor, cond: Cond, latent: tuple[int, int, int], decisions: Any) -> dict[str, float]:
        """Rollout and training on it."""
        pairs = self.rollout(ids, cond, latent, decisions)
        if self.device.type == "cuda" and not self.modern:
            torch.cuda.empty_cache()
        return {"pairs": len(pairs["t"])} | self.train(pairs)
