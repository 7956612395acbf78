"""The latent reward model against diffusers' whole UNet and transformers' text encoders, in float64."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from runs import default_float64
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spo_fast.models.files.clip_tokenizer import END, clip_tokenizer
from spo_fast.models.files.toy import tiny_text_encoder
from spo_fast.scorers.latent_files import init_latent_reward, load_latent_reward, save_latent_reward
from spo_fast.scorers.latent_network import LatentReward

WIDTH, MAX_LENGTH, LATENT = 16, 16, 8
PROMPTS = ["a cat", "two dogs in the rain", ""]
SETTINGS = dict(sample_size=LATENT, layers_per_block=2, norm_num_groups=4)


class Parts(NamedTuple):
    """A tiny diffusion model with as many blocks and layers as the real one."""

    unet: UNet2DConditionModel
    text_encoders: list[nn.Module]
    ids: list[Tensor]
    empty_ids: list[Tensor]
    stages: tuple[int, ...]
    """Which of the UNet's skip states the published model pools, conv_in's being the first."""

    @property
    def is_sdxl(self) -> bool:
        return len(self.text_encoders) == 2


def make_parts(kind: str) -> Parts:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizers = [clip_tokenizer(pad, MAX_LENGTH, merges=()) for pad in (END, "!")]
        text_encoders = [tiny_text_encoder(tokenizers[0], WIDTH, projected=False)]
        if kind == "sd15":
            tokenizers = tokenizers[:1]
            unet = UNet2DConditionModel(
                **SETTINGS, block_out_channels=(8, 12, 16, 16), cross_attention_dim=WIDTH, attention_head_dim=2
            )
        else:
            text_encoders.append(tiny_text_encoder(tokenizers[1], WIDTH, projected=True))
            unet = UNet2DConditionModel(
                **SETTINGS,
                block_out_channels=(8, 12, 16),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                cross_attention_dim=2 * WIDTH,
                attention_head_dim=(2, 3, 4),
                transformer_layers_per_block=(1, 2, 3),
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=6 * 8 + WIDTH,
            )

    def tokenize(tokenizer: Any, prompts: list[str]) -> Tensor:
        return tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids

    ids, empty_ids = ([tokenize(tokenizer, prompts) for tokenizer in tokenizers] for prompts in (PROMPTS, [""]))
    return Parts(unet.eval(), text_encoders, ids, empty_ids, (2, 5, 8, 11) if kind == "sd15" else (2, 5, 8))


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def parts(request: pytest.FixtureRequest) -> Parts:
    return make_parts(request.param)


@pytest.fixture(scope="module")
def model(parts: Parts) -> LatentReward:
    """What init_latent_reward makes, in evaluation mode; tests do not change it."""
    return init(parts).eval().requires_grad_(False)


def init(parts: Parts, dtype: torch.dtype = torch.float32) -> LatentReward:
    projection = None if parts.is_sdxl else randn(24, WIDTH, seed=9)
    return init_latent_reward(parts.unet, parts.text_encoders, text_projection=projection, seed=1, dtype=dtype)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(num_candidates: int = 2) -> tuple[Tensor, Tensor]:  # k-major; each timestep differs
    num_images = num_candidates * len(PROMPTS)
    return randn(num_images, 4, LATENT, LATENT, seed=2), torch.arange(num_images) * 190 + 1


def max_error(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).abs().max().item()


# ------------------------------------------------------------------------------------------------------ truth, float64


def true_text(parts: Parts, ids: list[Tensor], tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    encoders = [encoder.double() for encoder in parts.text_encoders]
    with default_float64():
        outputs = [encoder(i, output_hidden_states=True) for encoder, i in zip(encoders, ids, strict=True)]
    for encoder in encoders:
        encoder.float()
    if parts.is_sdxl:
        return torch.cat([output.hidden_states[-2] for output in outputs], dim=-1), outputs[1].text_embeds
    return outputs[0].last_hidden_state, outputs[0].pooler_output @ tensors["text_projection.weight"].double().T


def true_means(parts: Parts, x_t: Tensor, t: Tensor, context: Tensor, feature: Tensor) -> list[Tensor]:
    """Spatial means of the pooled skip states and of the mid block, read off a pass of the whole UNet."""
    unet, seen = parts.unet.double(), {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, output: seen.update({name: output})

    blocks = {"conv_in": unet.conv_in, **{f"down{i}": b for i, b in enumerate(unet.down_blocks)}, "mid": unet.mid_block}
    handles = [block.register_forward_hook(keep(name)) for name, block in blocks.items()]
    side = 8.0 * LATENT
    sizes = torch.tensor([[side, side, 0.0, 0.0, side, side]], dtype=torch.float64).repeat(len(x_t), 1)
    added = {"text_embeds": feature, "time_ids": sizes} if parts.is_sdxl else None
    unet(x_t.double(), t, encoder_hidden_states=context, added_cond_kwargs=added)
    for handle in handles:
        handle.remove()
    unet.float()
    skips = [seen["conv_in"], *(state for i in range(len(unet.down_blocks)) for state in seen[f"down{i}"][1])]
    return [x.flatten(2).sum(-1) / x[0, 0].numel() for x in (*(skips[i] for i in parts.stages), seen["mid"])]


@torch.no_grad()
def true_scores(parts: Parts, tensors: dict[str, Tensor], x_t: Tensor, t: Tensor, g: float) -> Tensor:
    num_candidates = len(x_t) // len(PROMPTS)
    (context, feature), (empty_context, empty_feature) = (
        true_text(parts, ids, tensors) for ids in (parts.ids, parts.empty_ids)
    )
    context, feature = context.repeat(num_candidates, 1, 1), feature.repeat(num_candidates, 1)
    cond = true_means(parts, x_t, t, context, feature)
    uncond = true_means(parts, x_t, t, empty_context.expand_as(context), empty_feature.expand_as(feature))
    pooled = torch.cat([*cond[:-1], uncond[-1] + g * (cond[-1] - uncond[-1])], dim=-1)
    visual = pooled @ tensors["visual_projection.weight"].double().T
    return tensors["logit_scale"].double().exp() * F.cosine_similarity(visual, feature, dim=-1)


# --------------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("guidance_scale", [7.5, 1.0, 0.0])
def test_scores_are_those_of_the_whole_networks(parts: Parts, model: LatentReward, guidance_scale: float):
    x_t, t = inputs()
    truth = true_scores(parts, model.state_dict(), x_t, t, guidance_scale)
    assert truth.std() > 0.3 and truth.abs().max() <= math.exp(2.6592)
    scores = model(x_t, t, parts.ids, parts.empty_ids, guidance_scale)
    assert scores.dtype == torch.float32 and max_error(scores, truth) < 2e-5


def test_guidance_is_7_5_and_acts_on_the_mid_block_alone(parts: Parts, model: LatentReward):
    x_t, t = inputs()
    assert torch.equal(model(x_t, t, parts.ids, parts.empty_ids), model(x_t, t, parts.ids, parts.empty_ids, 7.5))
    context, feature = (rows.repeat(2, *[1] * (rows.ndim - 1)) for rows in model.encode(parts.ids))
    empty = model.encode(parts.empty_ids)
    at = {g: model.visual_features(x_t, t, (context, feature), empty, g).double() for g in (0.0, 1.0, 7.5)}
    assert max_error(at[7.5], at[0.0] + 7.5 * (at[1.0] - at[0.0])) < 1e-4  # linear in g
    blind = copy.deepcopy(model)
    blind.visual_projection.weight[:, -parts.unet.config["block_out_channels"][-1] :] = 0
    low, high = (blind.visual_features(x_t, t, (context, feature), empty, g) for g in (0.0, 7.5))
    assert torch.equal(low, high) and max_error(at[0.0], at[7.5]) > 1e-3


@pytest.mark.usefixtures("two_threads")
def test_prompts_encoded_before_score_the_same(parts: Parts, model: LatentReward):
    x_t, t = inputs(num_candidates=1)
    scores = model.score(x_t, t, model.encode(parts.ids), model.encode(parts.empty_ids))
    assert max_error(scores, model(x_t, t, parts.ids, parts.empty_ids)) < 1e-5
    # each image sees its own timestep and its own prompt
    assert max_error(scores, model(x_t, t.flip(0), parts.ids, parts.empty_ids)) > 1e-2
    assert max_error(scores, model(x_t, t, [i.flip(0) for i in parts.ids], parts.empty_ids)) > 1e-2


def test_one_pass_of_the_unet_for_pairs_and_guidance(parts: Parts, model: LatentReward):
    batches: list[int] = []
    x_t, t = inputs()
    with model.unet.conv_in.register_forward_hook(lambda module, args, output: batches.append(len(output))):
        model(x_t, t, parts.ids, parts.empty_ids)
        model(x_t, t, parts.ids, parts.empty_ids, guidance_scale=1)
    assert batches == [4 * len(PROMPTS), 2 * len(PROMPTS)]


def test_gradients_reach_all_that_scores_depend_on(parts: Parts):
    model = init(parts)
    assert model.training
    model.unet.enable_gradient_checkpointing()
    x_t, t = inputs()
    pairs = model(x_t, t, parts.ids, parts.empty_ids).view(2, len(PROMPTS))
    F.softplus(pairs[1] - pairs[0]).mean().backward()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == frozen
    # hidden_states[-2] of SDXL's first encoder is all that is used of it: not its last layer (of two), nor the norm
    unused = ("text_encoder.text_model.encoder.layers.1.", "text_encoder.text_model.final_layer_norm.")
    expected = {name for name, _ in model.named_parameters() if parts.is_sdxl and name.startswith(unused)}
    assert frozen == expected and len(expected) == (18 if parts.is_sdxl else 0)
    moved = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0]
    for part in ("unet.conv_in", "unet.down_blocks.0", "unet.mid_block", "text_encoder.text_model", "logit_scale"):
        assert any(name.startswith(part) for name in moved), part


def test_start_is_the_diffusion_model_itself(parts: Parts):
    model, again = init(parts), init(parts)
    tensors, unet = model.state_dict(), parts.unet.state_dict()
    assert all(torch.equal(tensors[f"unet.{k}"], v) for k, v in unet.items() if f"unet.{k}" in tensors)
    assert {k for k in unet if f"unet.{k}" not in tensors} == {
        k for k in unet if k.startswith(("up_blocks", "conv_norm_out", "conv_out"))
    }
    assert model.unet.conv_in.weight.data_ptr() != parts.unet.conv_in.weight.data_ptr()
    projection = tensors["visual_projection.weight"]
    assert abs(projection.std().item() / 0.02 - 1) < 0.1 and torch.equal(projection, again.visual_projection.weight)
    assert tensors["logit_scale"] == pytest.approx(math.log(1 / 0.07), abs=1e-4)


def test_16_bit_towers_keep_the_logit_scale(parts: Parts, model: LatentReward):
    x_t, t = inputs()
    low = init(parts, dtype=torch.bfloat16).eval()
    assert {p.dtype for name, p in low.named_parameters() if name != "logit_scale"} == {torch.bfloat16}
    assert low.logit_scale.dtype == torch.float32 and low.logit_scale == model.logit_scale
    with torch.no_grad():
        scores = low(x_t, t, parts.ids, parts.empty_ids, 1.0)
    assert scores.dtype == torch.float32
    assert max_error(scores, model(x_t, t, parts.ids, parts.empty_ids, 1.0)) < 0.15


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_bit_identical(parts: Parts, tmp_path: Path, dtype: torch.dtype):
    model = init(parts, dtype)
    loaded = load_latent_reward(save_latent_reward(model, tmp_path / "lrm"), dtype=dtype)
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in before)
    x_t, t = inputs()
    with torch.no_grad():
        scores = [m.eval()(x_t, t, parts.ids, parts.empty_ids) for m in (model, loaded)]
    near = 1e-5 if dtype == torch.float32 else 1e-2  # a CPU's products differ with where a tensor lies
    torch.testing.assert_close(*scores, rtol=near, atol=near)
    assert not loaded.training


def published_key(name: str, key: str) -> str:
    """Every transformers release before 5 wrote `text_model.`, and old ones an index buffer."""
    return key if name == "unet" or key.startswith("text_") else f"text_model.{key}"


def write_published(parts: Parts, model: LatentReward, directory: Path) -> Path:
    """By hand, what the published training saves: whole UNet, text encoders, and a pickle of the rest."""
    names = ["unet", "text_encoder", "text_encoder_2"][: 1 + len(parts.text_encoders)]
    for name, part in zip(names, [parts.unet, *parts.text_encoders], strict=True):
        part.save_pretrained(directory / name)
        file = next((directory / name).glob("*.safetensors"))
        tensors = {published_key(name, key): value for key, value in load_file(file).items()}
        if name != "unet":
            tensors["text_model.embeddings.position_ids"] = torch.arange(MAX_LENGTH)[None]
        save_file(tensors, file)
    rest: dict[str, Any] = {"visual_projection": {"weight": model.visual_projection.weight.data}}
    if not parts.is_sdxl:
        rest["text_projection"] = {"weight": model.text_projection.weight.data}
    torch.save({**rest, "logit_scale": model.logit_scale.item()}, directory / "state_dict.pt")
    return directory


def test_published_directory_loads(parts: Parts, model: LatentReward, tmp_path: Path):
    loaded = load_latent_reward(write_published(parts, model, tmp_path)).state_dict()
    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.equal(loaded[key], value) for key, value in model.state_dict().items())
    wanted = {
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight",
        "unet.mid_block.resnets.1.conv2.bias",
        "unet.time_embedding.linear_1.weight",
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.weight",
        "visual_projection.weight",
        "logit_scale",
        *(
            {"text_encoder_2.text_projection.weight", "unet.add_embedding.linear_1.weight"}
            if parts.is_sdxl
            else {"text_projection.weight"}
        ),
    }
    assert wanted <= loaded.keys()


def test_published_state_dict_loads(parts: Parts, model: LatentReward):
    """SDXL's loader also takes the state dict of the whole module, VAE and up blocks included."""
    tensors = dict(model.state_dict())
    tensors |= {f"unet.{key}": value for key, value in parts.unet.state_dict().items()}
    tensors["vae.encoder.conv_in.weight"] = torch.zeros(1)
    loaded = load_latent_reward(tensors, configs=model.configs).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in model.state_dict().items())


def test_loading_is_strict(parts: Parts, model: LatentReward):
    key = "unet.mid_block.resnets.0.conv1.weight"

    def load(change: dict[str, Tensor | None]) -> None:
        tensors = {k: v for k, v in {**model.state_dict(), **change}.items() if v is not None}
        load_latent_reward(tensors, configs=model.configs)

    load({})
    with pytest.raises(ValueError, match=f"1 missing: {key}"):
        load({key: None})
    with pytest.raises(ValueError, match="1 unexpected: unet.hat.weight"):
        load({"unet.hat.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match=f"1 of the wrong shape: {key} 3, not "):
        load({key: torch.zeros(3)})
    with pytest.raises(ValueError, match="no visual_projection.weight. Expected a directory with unet/"):
        load({"visual_projection.weight": None})
    with pytest.raises(ValueError, match="configs of no part"):
        load_latent_reward(model.state_dict())


def test_what_cannot_be_read_says_why(parts: Parts, model: LatentReward, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist. Expected a directory with unet/"):
        load_latent_reward(tmp_path / "nowhere")
    write_published(parts, model, tmp_path)
    torch.save({}, tmp_path / "unet" / "second.bin")
    with pytest.raises(ValueError, match="has 2 files of weights"):
        load_latent_reward(tmp_path)
    saved = save_latent_reward(model, tmp_path / "saved")
    configs = json.loads((saved / "config.json").read_text())
    configs["unet"]["class_embed_type"] = "timestep"
    with pytest.raises(ValueError, match="conditioned as neither.*class_embed_type"):
        load_latent_reward(saved, configs=configs)
    with pytest.raises(ValueError, match="5 latents for 3 prompts"):
        model(torch.zeros(5, 4, LATENT, LATENT), torch.zeros(5).long(), parts.ids, parts.empty_ids)
    if parts.is_sdxl:
        with pytest.raises(ValueError, match="leave text_projection out"):
            init_latent_reward(parts.unet, parts.text_encoders, text_projection=torch.eye(WIDTH))
    else:
        drawn = init_latent_reward(parts.unet, parts.text_encoders).text_projection.weight
        assert drawn.shape == (WIDTH, WIDTH) and abs(drawn.std().item() * WIDTH**0.5 - 1) < 0.2
