"""Flow models from the command line to other software: what a run trains is what diffusers' pipelines draw with it.
And a third model, through a door of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from runs import command_line
from tiny import make_tiny_flux, make_tiny_sd3
from torch import Tensor

from spo_fast import train
from spo_fast.config.training import AdapterConfig, ObjectiveConfig, SampleConfig
from spo_fast.method.experience import Candidates, Cond
from spo_fast.method.flow_schedule import flow_steps, flow_table
from spo_fast.method.noise import KeyedDraws
from spo_fast.method.objectives import make_objective, predict_states
from spo_fast.method.rollout import RolloutBatch, Sampler, sample_latents
from spo_fast.models.doors import FLOW_DOORS, FlowDoor, Inputs
from spo_fast.models.files.lora import read_lora
from spo_fast.models.policy import Policy
from spo_fast.models.quantised import QuantisedLinear

PROMPTS = ("a red cat", "green tea")
TINY_SD3: dict[str, Any] = dict(
    sample_size=16, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
    joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=16, out_channels=4, pos_embed_max_size=24,
)  # fmt: skip
PIPELINES = {"sd35": StableDiffusion3Pipeline, "flux": FluxPipeline}


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("prompts.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    Path("flow_judge.py").write_text(
        "def brightness(pixels, prompts):\n    return 40 * pixels.mean((1, 2, 3))\n", encoding="utf-8"
    )
    return {
        "prompts": "prompts.txt",
        "scorer": "flow_judge:brightness",
        "height": 128,
        "width": 128,
        "mixed_precision": "no",
        "sample_batch_size": 2,
        "num_steps": 5,
        "threshold": 1e-4,
        "max_train_steps": 2,
        "num_validation_images": 0,
        "max_sequence_length": 16,
        "learning_rate": 0.02,
        "beta": 0.1,
    }


@pytest.mark.parametrize("kind", PIPELINES)
def test_diffusers_draws_the_trainers_pictures(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """With LoRA files whose alpha is twice the rank."""
    made = {"sd35": make_tiny_sd3, "flux": make_tiny_flux}[kind](tmp_path / kind)
    settings |= {"model": kind, "pretrained_model_name_or_path": made}
    assert train.main(command_line({**settings, "output_dir": "run"})) == 0
    run = train.build(train.parse(command_line({**settings, "output_dir": "again"})))
    adapter = run.cfg.adapter
    assert adapter.alpha == 2 * adapter.rank
    run.policy.load_state_dict(read_lora(Path("run/pytorch_lora_weights.safetensors"), run.policy.network, adapter))
    x = torch.randn(2, *run.model.latent_shape, generator=torch.Generator().manual_seed(0))
    guidance, steps = run.cfg.sample.guidance_scale, 6
    ours = sample_latents(run.policy, run.model.table(steps, 0.0), run.model.cond(PROMPTS), guidance, x)

    pipe: Any = PIPELINES[kind].from_pretrained(made)
    pipe.set_progress_bar_config(disable=True)
    told = {"prompt": list(PROMPTS), "num_inference_steps": steps, "height": 128, "width": 128}
    told |= {"output_type": "latent", "max_sequence_length": 16}
    if kind == "sd35":
        told |= {"latents": x, "guidance_scale": guidance, "negative_prompt": ["", ""]}
    else:
        told |= {"latents": pipe._pack_latents(x, 2, *x.shape[1:]), "guidance_scale": 3.5}
    base = pipe(**told).images
    pipe.load_lora_weights("run", weight_name="pytorch_lora_weights.safetensors")
    theirs = pipe(**told).images
    assert (theirs - base).abs().max() > 1e-2  # two steps at a high rate moved it
    if kind == "flux":
        theirs = pipe._unpack_latents(theirs, 128, 128, 8)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-4)
    pipe.vae.float()
    pixels = pipe.vae.decode(theirs / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor).sample
    assert torch.allclose(run.model.decode(ours), pixels, rtol=0, atol=1e-4)


# ---------------------------------------------------------------------------------------------------- a third door


class SanaDoor(FlowDoor):
    """SANA: latents as they are, 1000 sigma, its text with a mask."""

    patch = 1

    def predict(
        self, network: Any, x: Tensor, t: Tensor, inputs: Inputs, text: object = None
    ) -> Tensor:  # (B, C, H, W), () or (B,) -> (B, C, H, W)
        told = {"encoder_hidden_states": inputs["prompt_embeds"], "encoder_attention_mask": inputs["mask"]}
        return network(x, timestep=t.expand(len(x)) * network.config.timestep_scale, return_dict=False, **told)[0]

    def shapes(self, config: Mapping[str, Any], tokens: int) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (tokens, config["caption_channels"]), "mask": (tokens,)}


def test_a_third_model_needs_a_door_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rollout, judgement, loss and gradient of SANA's network; its pictures are those of diffusers' own loop."""
    monkeypatch.setitem(FLOW_DOORS, "SanaTransformer2DModel", SanaDoor())
    torch.manual_seed(0)
    network: Any = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=12,
        sample_size=8, patch_size=1,
    ).double()  # fmt: skip
    policy = Policy(network, AdapterConfig(rank=2, lora_targets=("to_q", "to_v")), seed=0)
    generator = torch.Generator().manual_seed(1)
    words = {"prompt_embeds": torch.randn(3, 5, 12, generator=generator).double(), "mask": torch.ones(3, 5).double()}
    empty = {"prompt_embeds": torch.zeros(1, 5, 12).double(), "mask": torch.ones(1, 5).double()}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    sigmas, timesteps = flow_steps(scheduler, 6, 64, even=False)
    cfg = SampleConfig(num_steps=6, branch_start=1, branch_end=4, num_candidates=3, guidance_scale=4.5, threshold=0.0)
    table = flow_table(sigmas, 1.0, "ddim", timesteps)

    class Judge:
        def __call__(self, candidates: Candidates) -> Tensor:
            assert candidates.t.dtype == torch.int64
            return candidates.x0.mean((1, 2, 3))

    batch = RolloutBatch(
        Cond(words, empty), torch.empty(3), KeyedDraws(0, 0, torch.arange(3)), (4, 8, 8), torch.float64
    )
    objective = make_objective(ObjectiveConfig(method="spo"))
    e = objective.collect(Sampler(policy, table, Judge(), lambda latents: latents, cfg), batch)
    assert len(e) == 9  # three prompts, three comparisons each
    e = objective.prepare(policy, table, e, cfg, 64)
    m = predict_states(policy, table, e, e.states, guided=True)
    loss, _ = objective.loss(m, table, e, cfg, 1.0)
    loss.backward()
    norms = [p.grad.norm() for name, p in network.named_parameters() if "lora_B" in name]
    assert norms and all(norm > 0 for norm in norms)

    x = torch.randn(3, 4, 8, 8, generator=generator).double()
    ours = sample_latents(policy, flow_table(sigmas, 0.0, timesteps=timesteps), Cond(words, empty), 4.5, x)
    scheduler.set_timesteps(6)
    with torch.no_grad():
        for t in scheduler.timesteps:
            told = torch.cat([empty["prompt_embeds"].expand(3, -1, -1), words["prompt_embeds"]])
            masks = torch.ones(6, 5).double()
            out = network(torch.cat([x, x]), told, t.expand(6), encoder_attention_mask=masks, return_dict=False)[0]
            v = out[:3] + 4.5 * (out[3:] - out[:3])
            x = x + (scheduler.sigmas[scheduler.index_for_timestep(t) + 1] - t / 1000).double() * v
    assert torch.allclose(ours, x, rtol=0, atol=1e-5)  # its scheduler's sigmas are float32


def test_t5_alone_is_held_in_8_bits(settings: dict[str, Any], tmp_path: Path) -> None:
    """And prompts encoded by it are kept apart from those of the whole one."""
    settings |= {"model": "sd35", "pretrained_model_name_or_path": make_tiny_sd3(tmp_path / "sd35")}
    rows = []
    for how in ("full", "int8"):
        run = train.build(train.parse(command_line({**settings, "t5_weights": how, "output_dir": how})))
        quantised = [[isinstance(m, QuantisedLinear) for m in e.modules()] for e in run.model.text_encoders()]
        assert [any(found) for found in quantised] == [False, False, how == "int8"]
        rows.append(run.model.cond(PROMPTS).cond["prompt_embeds"])
    clip = run.model.tokenizers[0].model_max_length
    assert torch.equal(rows[0][:, :clip], rows[1][:, :clip])
    change = (rows[0] - rows[1])[:, clip:].norm() / rows[0][:, clip:].norm()
    assert 0 < change < 0.05
    cfg = train.parse(["--model", "sd35", "--memory", "small"])
    assert (
        cfg.model.t5_weights == "int8"
        and train.parse(["--model", "sdxl", "--memory", "small"]).model.t5_weights == "full"
    )


def test_a_forward_asks_its_networks_type_twice_at_most() -> None:
    """diffusers walks all modules for it: 16 ms on SDXL. Once for the latents, once for the prompts, guided or not."""
    asked: list[int] = []
    torch.manual_seed(0)
    network: Any = SD3Transformer2DModel(**TINY_SD3)
    policy = Policy(network, AdapterConfig(rank=2, lora_targets=("to_q",)), seed=0)
    plain = type(network).dtype.fget
    network.__class__ = type("Asked", (type(network),), {"dtype": property(lambda n: asked.append(1) or plain(n))})
    words = {"prompt_embeds": torch.zeros(3, 5, 32), "pooled": torch.zeros(3, 16)}
    cond = Cond(words, {name: value[:1] for name, value in words.items()})
    for fused in (False, True):
        if fused:
            policy.fuse()
            cond = policy.precompute_text(cond, guided=True)
        asked.clear()
        with torch.no_grad():
            policy.predict(torch.zeros(3, 4, 16, 16), torch.tensor(500.0), cond, guided=True)
        assert len(asked) == (1 if fused else 2)
