"""What a run writes loads in diffusers' own pipelines and makes the trainer's images. The truth is the pipeline."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from runs import built, run_toy
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import LATENT_SIZE, VAE_FACTOR, make_tiny_sd15, make_tiny_sdxl
from torch import Tensor

from spo_fast.method.rollout import sample_latents
from spo_fast.models.files.clip_tokenizer import END, clip_tokenizer
from spo_fast.models.files.lora import apply_lora
from spo_fast.models.files.toy import WEIGHTS
from spo_fast.scorers.clip_files import write_model
from spo_fast.scorers.spm import make_tiny_spm
from spo_fast.training import loop

PROMPTS = ["a red cube", "two boats at sea"]
STEPS = 4
GUIDANCE = 3.0
TOLERANCE = 1e-4  # of pixels in [0, 1]
LORAS = ["pytorch_lora_weights.safetensors", "lora_kohya.safetensors"]
# None: alpha is the rank
ALPHAS = [None, 2.0]
PIPELINES: dict[str, Any] = {"sd15": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Settings of a run of each kind of tiny pipeline with a random preference model."""
    root = tmp_path_factory.mktemp("tiny")
    make_tiny_spm(root / "spm", vocab_size=len(clip_tokenizer(END, 16, merges=())), max_length=16)
    directories = {"sd15": make_tiny_sd15(root / "sd15"), "sdxl": make_tiny_sdxl(root / "sdxl")}
    spm = root / "spm" / "model.safetensors"
    return {
        "toy": {"resolution": None},
        "toy, convolutions too": {"resolution": None, "lora_targets": ("to_q", "to_v", "conv1", "proj_in", "ff.net.2")},
        **{
            kind: {"model": kind, "pretrained_model_name_or_path": path, "spm_path": spm, "resolution": None}
            for kind, path in directories.items()
        },
    }


def trained(tmp_path: Path, settings: dict[str, Any], **more: Any) -> loop.Run:
    """A run of float32 whose LoRA is far from where it started, and its files in tmp_path/lora."""
    run = built(tmp_path / "run", **{**settings, "mixed_precision": "no", "rank": 4, "max_prompts": 2, **more})
    generator = torch.Generator().manual_seed(7)
    run.policy.load_state_dict(
        {name: 0.3 * torch.randn(v.shape, generator=generator) for name, v in run.policy.state_dict().items()}
    )
    run.export(tmp_path / "lora")
    return run


def noise(run: loop.Run) -> Tensor:  # (P, C, H, W)
    return torch.randn(len(PROMPTS), *run.model.latent_shape, generator=torch.Generator().manual_seed(3))


def our_images(run: loop.Run) -> Tensor:  # (P, 3, H, W) in [0, 1]
    table = run.model.table(STEPS, 0.0)
    latents = sample_latents(run.policy, table, run.model.cond(PROMPTS), GUIDANCE, noise(run))
    return (run.model.decode(latents) / 2 + 0.5).clamp(0, 1)


def pipeline_of(run: loop.Run) -> Any:
    pipe = PIPELINES[run.model.kind].from_pretrained(str(run.model.resolved.model_path), torch_dtype=torch.float32)
    # as the published scheduler settings of both models have it; the tiny SDXL's Euler settings leave it open
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pipeline_images(pipe: Any, run: loop.Run) -> Tensor:  # (P, 3, H, W) in [0, 1]
    images = pipe(
        PROMPTS,
        latents=noise(run),
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        eta=0.0,
        height=run.model.height,
        width=run.model.width,
        output_type="pt",
    )
    return images.images


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("kind", ["toy", "toy, convolutions too", "sd15", "sdxl"])
def test_pipeline_with_the_lora_makes_the_trainers_images(
    tmp_path: Path, tiny: dict[str, dict[str, Any]], kind: str, alpha: float | None
) -> None:
    run = trained(tmp_path, tiny[kind], lora_alpha=alpha)
    ours = our_images(run)
    assert ours.std() > 0.02  # images, not one colour
    with run.policy.reference():
        base = our_images(run)
    assert (ours - base).abs().max() > 100 * TOLERANCE
    pipe = pipeline_of(run)
    assert (pipeline_images(pipe, run) - base).abs().max() < TOLERANCE
    for file in LORAS:
        pipe.load_lora_weights(str(tmp_path / "lora"), weight_name=file)
        assert (pipeline_images(pipe, run) - ours).abs().max() < TOLERANCE, file
        pipe.unload_lora_weights()


def test_a_wrong_alpha_would_show(tmp_path: Path, tiny: dict[str, dict[str, Any]]) -> None:
    """The comparison above can fail: without the metadata a loader takes alpha = rank."""
    run = trained(tmp_path, tiny["toy"], lora_alpha=2.0)
    pipe = pipeline_of(run)
    pipe.load_lora_weights(load_file(tmp_path / "lora" / LORAS[0]))
    assert (pipeline_images(pipe, run) - our_images(run)).abs().max() > 10 * TOLERANCE


def test_kohya_file_has_its_names_and_alpha(tmp_path: Path, tiny: dict[str, dict[str, Any]]) -> None:
    run = trained(tmp_path, tiny["toy"], lora_alpha=2.0)
    file = tmp_path / "lora" / "lora_kohya.safetensors"
    tensors = load_file(file)
    modules = {name.rsplit(".", 2 if "lora_" in name.split(".", 1)[1] else 1)[0] for name in tensors}
    assert len(modules) == len(run.policy.names) / 2
    assert len(tensors) == 3 * len(modules)
    for module in modules:
        assert module.startswith("lora_unet_") and "." not in module
        assert tensors[f"{module}.alpha"].shape == () and tensors[f"{module}.alpha"] == 2
        down, up = tensors[f"{module}.lora_down.weight"], tensors[f"{module}.lora_up.weight"]
        assert down.shape[0] == up.shape[1] == 4
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "2.0")


def test_diffusers_file_has_the_published_names(tmp_path: Path, tiny: dict[str, dict[str, Any]]) -> None:
    run = trained(tmp_path, tiny["toy"])
    file = tmp_path / "lora" / LORAS[0]
    names = set(load_file(file))
    # diffusers writes its "lora.down" or PEFT's "lora_A" by version, and reads both
    assert len(names) == len(run.policy.names) and all(n.startswith("unet.") for n in names)
    with safe_open(file, framework="pt") as opened:
        metadata = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert metadata["unet.r"] == 4 and metadata["unet.lora_alpha"] == 4


def test_another_size_and_vae(tmp_path: Path, tiny: dict[str, dict[str, Any]]) -> None:
    """Not square, and with the VAE of another pipeline: the time ids and the scaling factor follow."""
    other = make_tiny_sdxl(tmp_path / "other", seed=5)
    size = {"height": LATENT_SIZE * VAE_FACTOR, "width": 2 * LATENT_SIZE * VAE_FACTOR}
    run = trained(tmp_path, tiny["sdxl"], **size, pretrained_vae_model_name_or_path=other / "vae")
    pipe = pipeline_of(run)
    ours = our_images(run)
    pipe.load_lora_weights(str(tmp_path / "lora"))
    assert (pipeline_images(pipe, run) - ours).abs().max() > TOLERANCE
    pipe.vae = type(pipe.vae).from_pretrained(str(other / "vae"))
    assert (pipeline_images(pipe, run) - ours).abs().max() < TOLERANCE


def test_full_finetune_loads_as_the_unet_of_a_pipeline(tmp_path: Path, tiny: dict[str, dict[str, Any]]) -> None:
    from diffusers import UNet2DConditionModel

    run = built(tmp_path / "run", **{**tiny["toy"], "full_finetune": True, "max_prompts": 2})
    generator = torch.Generator().manual_seed(7)
    state = run.policy.state_dict()
    run.policy.load_state_dict(
        {name: v + 0.1 * v.std(correction=0) * torch.randn(v.shape, generator=generator) for name, v in state.items()}
    )
    run.export(tmp_path)
    pipe = pipeline_of(run)
    ours = our_images(run)
    assert (pipeline_images(pipe, run) - ours).abs().max() > 100 * TOLERANCE
    pipe.unet = UNet2DConditionModel.from_pretrained(str(tmp_path / "unet"))
    assert (pipeline_images(pipe, run) - ours).abs().max() < TOLERANCE


def lora_of(unet: Any, alphas: dict[str, float] | None, ranks: dict[str, int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(a file in kohya's names, each layer's change of its weight), of random numbers."""
    generator = torch.Generator().manual_seed(0)
    shapes = {name: m.weight.shape for name, m in unet.named_modules() if name in ranks}
    state, change = {}, {}
    for name, r in ranks.items():
        down = torch.randn(r, *shapes[name][1:], generator=generator)
        up = torch.randn(shapes[name][0], r, *([1, 1] if len(shapes[name]) == 4 else []), generator=generator)
        key = "lora_unet_" + name.replace(".", "_")
        state |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        scale = 1.0
        if alphas is not None:
            state[f"{key}.alpha"], scale = torch.tensor(alphas[name]), alphas[name] / r
        change[name] = scale * torch.einsum("or,ri...->oi...", up.flatten(1), down)
    return state, change


@pytest.mark.parametrize("with_alphas", [True, False])
def test_a_kohya_lora_has_its_own_alpha_in_each_layer(tmp_path: Path, with_alphas: bool) -> None:
    """As resized files and those with block weights have; diffusers 0.42 takes the commonest for attention layers."""
    unet: Any = UNet2DConditionModel.from_pretrained(WEIGHTS, subfolder="unet")
    ends = ("to_q", "to_k", "to_v", "to_out.0", "conv1")
    names = [name for name, _ in unet.named_modules() if name.endswith(ends)]
    ranks, alphas = ({name: one[n % 3] for n, name in enumerate(names)} for one in ((2, 3, 4), (1.0, 2.0, 2.0)))
    state, change = lora_of(unet, alphas if with_alphas else None, ranks)
    save_file(state, tmp_path / "mine.safetensors")
    apply_lora(tmp_path / "mine.safetensors", unet)
    layers = {name: m for name, m in unet.named_modules() if hasattr(m, "get_delta_weight")}
    assert layers.keys() == change.keys() and len(set(ranks.values())) == 3
    for name, layer in layers.items():
        found, truth = layer.get_delta_weight("default"), change[name]
        assert (found - truth).norm() < 1e-5 * truth.norm(), name


@pytest.mark.parametrize("conv", [False, True])
def test_a_kohya_dora_is_its_formula(tmp_path: Path, conv: bool) -> None:
    """As ComfyUI and LyCORIS draw it: magnitude (W + s B A) / |W + s B A|, the norm that of each row."""
    unet: Any = UNet2DConditionModel.from_pretrained(WEIGHTS, subfolder="unet")
    name = next(name for name, _ in unet.named_modules() if name.endswith("conv1" if conv else "to_q"))
    state, change = lora_of(unet, {name: 1.0}, {name: 2})
    weight = unet.get_submodule(name).weight.detach().double()
    whole = weight + change[name].double()
    magnitude = torch.linspace(0.5, 2, len(weight), dtype=torch.float64).view(-1, *[1] * (weight.ndim - 1))
    truth = magnitude * whole / whole.flatten(1).norm(dim=1).view_as(magnitude)
    state[f"lora_unet_{name.replace('.', '_')}.dora_scale"] = magnitude.float()
    save_file(state, tmp_path / "mine.safetensors")
    lora = apply_lora(tmp_path / "mine.safetensors", unet)
    assert str(lora).startswith("a DoRA on 1 layers")
    layer = unet.get_submodule(name)
    layer.merge()
    assert (layer.weight.double() - truth).abs().max() < 1e-5


@pytest.mark.parametrize("file", LORAS)
def test_our_files_are_read_back_whole(tmp_path: Path, tiny: dict[str, dict[str, Any]], file: str) -> None:
    """On the embeddings of time and sizes too, whose names in kohya's files diffusers misses when they are its own."""
    targets = ("to_q", "conv1", "linear_1", "linear_2")
    run = trained(tmp_path, tiny["toy"], lora_alpha=2.0, lora_targets=targets)
    unet: Any = UNet2DConditionModel.from_pretrained(WEIGHTS, subfolder="unet")
    lora = apply_lora(tmp_path / "lora" / file, unet)
    assert {"add_embedding.linear_1", "time_embedding.linear_2"} < lora.layers.keys()
    assert len(lora.layers) == len(run.policy.names) / 2
    held = run.policy.state_dict()
    for name, (down, up, scale) in lora.layers.items():
        assert torch.equal(down, held[f"{name}.lora_A.default.weight"]) and scale == 0.5
        assert torch.equal(up, held[f"{name}.lora_B.default.weight"])
    again = built(tmp_path / "again", lora_path=tmp_path / "lora" / file, rank=4, lora_alpha=2.0, lora_targets=targets)
    assert all(torch.equal(value, held[name]) for name, value in again.policy.state_dict().items())


def test_settings_that_are_written_are_those_that_differ(tmp_path: Path, tiny: dict[str, dict[str, Any]]) -> None:
    """A loader hands them to its own PEFT, and older ones raise on a field that they do not know."""
    trained(tmp_path, tiny["toy"], lora_alpha=8.0, rank=8)  # PEFT's defaults, written all the same
    with safe_open(tmp_path / "lora" / LORAS[0], framework="pt") as opened:
        found = json.loads(opened.metadata()["lora_adapter_metadata"])
    always = {"r": 8, "lora_alpha": 8.0, "rank_pattern": {}, "alpha_pattern": {}}
    targets = found.pop("unet.target_modules")
    assert found == {f"unet.{key}": value for key, value in {**always, "init_lora_weights": "gaussian"}.items()}
    assert set(targets) > {"to_q", "to_v"}


KINDS: dict[str, dict[str, Any]] = {
    "rsLoRA": {"use_rslora": True, "lora_alpha": 2.0},
    "DoRA": {"use_dora": True, "lora_alpha": 2.0},
    "rsDoRA": {"use_rslora": True, "use_dora": True},
    "EMA": {"ema_decay": 0.5},
}


def moved(run: loop.Run, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Far from where they are; magnitudes by a factor near 1, as training leaves them."""
    draw = torch.Generator().manual_seed(7)
    noise = {n: torch.randn(v.shape, generator=draw) for n, v in state.items()}
    return {n: v * (1 + 0.1 * noise[n]) if "magnitude" in n else 0.3 * noise[n] for n, v in state.items()}


@pytest.mark.parametrize("targets", ["attention", "convolutions too"])
@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_lora_draw_alike_in_diffusers(
    tmp_path: Path, tiny: dict[str, dict[str, Any]], kind: str, targets: str
) -> None:
    settings = tiny["toy" if targets == "attention" else "toy, convolutions too"]
    run = built(tmp_path / "run", **{**settings, "mixed_precision": "no", "rank": 4, "max_prompts": 2, **KINDS[kind]})
    if kind == "EMA":
        run.policy.load_average_state_dict(moved(run, run.policy.state_dict()), "exported_averages")
    else:
        run.policy.load_state_dict(moved(run, run.policy.state_dict()))
    run.export(tmp_path / "lora")
    with run.policy.exported():
        ours = our_images(run)
    with run.policy.reference():
        assert (ours - our_images(run)).abs().max() > 100 * TOLERANCE
    pipe = pipeline_of(run)
    for file in LORAS[:1] if "DoRA" in kind else LORAS:  # diffusers 0.42 leaves kohya's dora_scale out, and warns
        pipe.load_lora_weights(str(tmp_path / "lora"), weight_name=file)
        assert (pipeline_images(pipe, run) - ours).abs().max() < TOLERANCE, file
        pipe.unload_lora_weights()
    for file in LORAS:  # and our own reading of both
        own = {"mixed_precision": "no", "rank": 4, "ema_decay": None, "lora_path": tmp_path / "lora" / file}
        again = built(tmp_path / file, **{**settings, **KINDS[kind], **own})
        held, whole = again.policy.state_dict(), run.policy.whole()
        assert held.keys() == whole.keys() and all(torch.equal(v, whole[n]) for n, v in held.items())


def test_what_is_written_may_be_read_as_other_new_files(tmp_path):
    """safetensors 0.8 gives its files to their owner alone: a server of another user could not load the LoRA."""
    before = os.umask(0o022)
    try:
        run_toy(tmp_path / "run", checkpointing_steps=1)
        model = write_model(tmp_path / "judge", {"a": torch.zeros(2)}, {})
    finally:
        os.umask(before)
    files = [*(tmp_path / "run").rglob("*.safetensors"), *model.glob("*.safetensors")]
    assert len(files) >= 6 and {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o644}
