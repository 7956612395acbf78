"""Files of flow models (SD3.5, FLUX.1): found, checked, loaded and saved as diffusers has them."""

from __future__ import annotations

import json
import math
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from test_sources import ldm_vae
from tiny import make_tiny_flux, make_tiny_sd3, make_tiny_sdxl

from spo_fast.config import presets
from spo_fast.config.errors import MissingFilesError
from spo_fast.config.recipes import TINY_VAES
from spo_fast.config.sections import ModelConfig
from spo_fast.config.training import AdapterConfig
from spo_fast.models.files import layout, load, networks
from spo_fast.models.files.find import check_asked, resolve_all
from spo_fast.models.files.lora import apply_lora, read_file, read_lora
from spo_fast.models.files.lora_files import save_transformer_lora, written_settings
from spo_fast.models.files.sources import CONFIGS, DEFAULTS, MODELS, PARTS, ModelSource, Resolved
from spo_fast.models.quantised import quantise_t5
from spo_fast.training.plan.fake_model import vae_settings

MAKERS: dict[str, Callable[..., Path]] = {"sd35": make_tiny_sd3, "flux": make_tiny_flux}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict[str, Path]:
    """A tiny model of each kind, FLUX.1-schnell's kind, and SD3 without T5."""
    folder = tmp_path_factory.mktemp("flow")
    made = {kind: make(folder / kind) for kind, make in MAKERS.items()}
    made["schnell"] = make_tiny_flux(folder / "schnell", guidance=False)
    made["sd3 without T5"] = make_tiny_sd3(folder / "sd3_no_t5", t5=False)
    return made


def pipeline(path: Path, **options: Any):
    import diffusers

    cls = diffusers.FluxPipeline if (path / "text_encoder_2" / "config.json").read_text().count("T5") else None
    cls = cls or diffusers.StableDiffusion3Pipeline
    if not (path / "text_encoder_3").is_dir() and cls is diffusers.StableDiffusion3Pipeline:
        options |= dict(text_encoder_3=None, tokenizer_3=None)  # diffusers asks for them in words
    found = cls.from_pretrained(path, local_files_only=True, **options)
    found.set_progress_bar_config(disable=True)
    return found


def picture(pipe, prompt: str = "a red cat") -> torch.Tensor:
    draws = torch.Generator().manual_seed(0)
    options = dict(height=64, width=64, num_inference_steps=2, max_sequence_length=32, output_type="pt")
    return pipe(prompt, generator=draws, **options).images


@pytest.mark.parametrize("name", ["sd35", "flux", "schnell", "sd3 without T5"])
def test_tiny_directories_are_diffusers_own(tiny, name):
    pipe = pipeline(tiny[name])
    red, blue = picture(pipe), picture(pipe, "a blue dog")
    assert red.shape == (1, 3, 64, 64) and red.std() > 0.05
    assert not torch.allclose(red, blue, atol=1e-6)  # the prompt matters


def resolve(path: Path | str, kind: str, **options: Any) -> Resolved:
    return resolve_all(ModelSource(kind=kind, pretrained_model_name_or_path=str(path), **options), download=False)


KINDS = {"sd35": "sd35", "flux": "flux", "schnell": "flux", "sd3 without T5": "sd35"}


@pytest.mark.parametrize("name", KINDS)
def test_parts_are_those_of_the_pipeline(tiny, name):
    resolved, pipe = resolve(tiny[name], KINDS[name]), pipeline(tiny[name])
    load.check_weights(resolved)
    encoders = [p for p in (pipe.text_encoder, pipe.text_encoder_2, getattr(pipe, "text_encoder_3", None)) if p]
    tokenizers = [t for t in (pipe.tokenizer, pipe.tokenizer_2, getattr(pipe, "tokenizer_3", None)) if t]
    ours = [
        (load.load_transformer(resolved, torch.float32), pipe.transformer),
        (load.load_vae(resolved, torch.float32), pipe.vae),
        *zip(load.load_text_encoders(resolved, torch.float32), encoders, strict=True),
    ]
    for mine, theirs in ours:
        assert type(mine) is type(theirs) and not mine.training
        assert not any(p.requires_grad for p in mine.parameters())
        found, wanted = mine.state_dict(), theirs.state_dict()
        assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in found)
    for mine, theirs in zip(load.load_tokenizers(resolved), tokenizers, strict=True):
        text = "A red cat, left of 2 blue dogs!"
        assert mine(text).input_ids == theirs(text).input_ids and mine.pad_token_id == theirs.pad_token_id
    config = dict(pipe.scheduler.config)
    assert {**config, **layout.scheduler_config(resolved)} == config
    folders = {file.parent.name for file in layout.text_files(resolved)}
    assert folders == {part for pair in resolved.text_parts for part in pair}
    assert [f.name for f in layout.unet_files(resolved)] == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert {f.name for f in layout.vae_files(resolved)} == {"config.json", "diffusion_pytorch_model.safetensors"}


def test_t5_in_float16_keeps_the_layer_that_overflows_in_float32(tiny):
    from transformers import T5EncoderModel

    t5 = load.load_text_encoder(resolve(tiny["flux"], "flux"), "text_encoder_2", torch.float16)
    theirs = T5EncoderModel.from_pretrained(tiny["flux"] / "text_encoder_2", dtype=torch.float16).requires_grad_(False)
    assert {n: p.dtype for n, p in t5.named_parameters()} == {n: p.dtype for n, p in theirs.named_parameters()}
    assert t5.encoder.embed_tokens.weight is t5.shared.weight
    ids = torch.tensor([[3, 4, 5, 1]])
    assert torch.equal(t5(ids)[0], theirs(ids)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_t5_in_8_bits_is_half_as_large_and_near(tiny, dtype):
    resolved, ids = resolve(tiny["flux"], "flux"), torch.tensor([[3, 4, 5, 6, 7, 8, 1]])
    exact = load.load_text_encoder(resolved, "text_encoder_2", torch.float32)(ids)[0]
    t5 = load.load_text_encoder(resolved, "text_encoder_2", dtype)
    sixteen = (t5(ids)[0].float() - exact).norm() / exact.norm()
    quantise_t5(t5, "int8")
    linear = {name: m.weight.dtype for name, m in t5.named_modules() if isinstance(m, torch.nn.Linear)}
    whole = {name for name, kept in linear.items() if kept != torch.int8}
    wide = {name for name in linear if name.endswith(".wo") and dtype == torch.float16}
    assert len(linear) == 2 * 7 and whole == wide
    error = (t5(ids)[0].float() - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.03 + sixteen  # a row's largest weight over 127, 14 layers


# --------------------------------------------------------------------------------------------------------- single files


def sd3_in_its_own_layout(transformer) -> dict[str, torch.Tensor]:
    """Stability's names of an SD3's tensors, written out: what diffusers' converter takes apart."""
    w, last = transformer.state_dict(), transformer.config.num_layers - 1
    out = {
        "pos_embed": w["pos_embed.pos_embed"],
        "final_layer.linear.weight": w["proj_out.weight"],
        "final_layer.linear.bias": w["proj_out.bias"],
    }
    for theirs, ours in {
        "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
        "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
        "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
        "context_embedder": "context_embedder",
    }.items():
        for end in ("weight", "bias"):
            out[f"{theirs}.{end}"] = w[f"{ours}.{end}"]

    def swapped(value: torch.Tensor) -> torch.Tensor:  # scale and shift stand the other way round
        return torch.cat(list(reversed(value.chunk(2))))

    for end in ("weight", "bias"):
        out[f"final_layer.adaLN_modulation.1.{end}"] = swapped(w[f"norm_out.linear.{end}"])
        for i in range(last + 1):
            block, x, context = (
                f"transformer_blocks.{i}",
                f"joint_blocks.{i}.x_block",
                f"joint_blocks.{i}.context_block",
            )
            attentions = {f"{x}.attn": ("attn", "to_{}", "to_out.0")}
            attentions |= {f"{x}.attn2": ("attn2", "to_{}", "to_out.0")} if f"{block}.attn2.to_q.bias" in w else {}
            attentions |= {f"{context}.attn": ("attn", "add_{}_proj", "to_add_out")}
            for theirs, (ours, each, proj) in attentions.items():
                qkv = [w[f"{block}.{ours}.{each.format(letter)}.{end}"] for letter in "qkv"]
                out[f"{theirs}.qkv.{end}"] = torch.cat(qkv)
                if f"{block}.{ours}.{proj}.{end}" in w:
                    out[f"{theirs}.proj.{end}"] = w[f"{block}.{ours}.{proj}.{end}"]
                for letter in "qk":
                    norm = f"norm_added_{letter}" if "context" in theirs else f"norm_{letter}"
                    out[f"{theirs}.ln_{letter}.weight"] = w[f"{block}.{ours}.{norm}.weight"]
            out[f"{x}.adaLN_modulation.1.{end}"] = w[f"{block}.norm1.linear.{end}"]
            context_norm = w[f"{block}.norm1_context.linear.{end}"]
            out[f"{context}.adaLN_modulation.1.{end}"] = swapped(context_norm) if i == last else context_norm
            for theirs, ours in ((x, "ff"), (context, "ff_context")):
                for number, layer in ((1, "net.0.proj"), (2, "net.2")):
                    if f"{block}.{ours}.{layer}.{end}" in w:
                        out[f"{theirs}.mlp.fc{number}.{end}"] = w[f"{block}.{ours}.{layer}.{end}"]
    return {name: value.clone() for name, value in out.items()}


@pytest.fixture(scope="module")
def single(tiny, tmp_path_factory) -> Path:
    """A tiny SD3's transformer in one file, named as ComfyUI names it, beside a VAE that is not read."""
    transformer = load.load_transformer(resolve(tiny["sd35"], "sd35"), torch.float32)
    file = tmp_path_factory.mktemp("single") / "sd3.safetensors"
    tensors = {f"model.diffusion_model.{n}": t for n, t in sd3_in_its_own_layout(transformer).items()}
    save_file({**tensors, "first_stage_model.decoder.conv_in.weight": torch.zeros(1)}, file)
    return file


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""])
def test_a_single_file_is_the_transformer_of_its_base(tiny, single, tmp_path, prefix):
    file = tmp_path / "own.safetensors"
    names = load_file(single)
    save_file({n.replace("model.diffusion_model.", prefix): t for n, t in names.items() if "stage" not in n}, file)
    resolved = resolve(file, "sd35", base_model_name_or_path=str(tiny["sd35"]))
    load.check_weights(resolved)
    mine = load.load_transformer(resolved, torch.float32)
    theirs = load.load_transformer(resolve(tiny["sd35"], "sd35"), torch.float32)
    config = {key: value for key, value in theirs.config.items() if not key.startswith("_")}
    assert {key: mine.config[key] for key in config} == {**config, "sample_size": 128, "dual_attention_layers": [0, 1]}
    found, wanted = mine.state_dict(), theirs.state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in found)
    assert len(load.load_text_encoders(resolved, torch.float32)) == 3
    assert load.load_vae(resolved, torch.float32).config.shift_factor == 0.0609
    assert layout.scheduler_config(resolved)["shift"] == 3.0
    assert layout.unet_files(resolved) == [file]
    assert file not in layout.text_files(resolved) and file not in layout.vae_files(resolved)


def test_a_vaes_single_file_in_its_own_layout(tiny, tmp_path):
    """As ae.safetensors, which has no quant_conv."""
    own = load.load_vae(resolve(tiny["flux"], "flux"), torch.float32).state_dict()
    save_file(ldm_vae(own, blocks=4), tmp_path / "ae.safetensors")
    borrowed = dict(pretrained_vae_model_name_or_path=str(tmp_path / "ae.safetensors"), config=str(tiny["flux"]))
    resolved = resolve(tiny["flux"], "flux", **borrowed)
    found = load.load_vae(resolved, torch.float32)
    assert all(torch.equal(value, own[name]) for name, value in found.state_dict().items())
    assert found.config.shift_factor == 0.1159 and layout.vae_files(resolved) == [tmp_path / "ae.safetensors"]


def published(folder: str, part: str = "transformer") -> Any:
    import diffusers

    config = json.loads((CONFIGS / folder / part / "config.json").read_text())
    with torch.device("meta"):
        return getattr(diffusers, config["_class_name"]).from_config(config)


FULL_SIZE = {  # parameters, as published; tensors of the published single file
    "sd35": (2_243_171_520 + 384**2 * 1536, None),
    "sd35_large": (8_056_627_520 + 192**2 * 2432, None),
    "flux": (11_901_408_320, 780),
    "flux_schnell": (11_891_178_560, 776),
}


def flux_in_its_own_layout(folder: str) -> dict[str, list[int]]:
    """Shapes of black-forest-labs' flux1-{dev,schnell}.safetensors, from their code: width 3072, 19 + 38 blocks."""
    shapes: dict[str, list[int]] = {}

    def linear(name: str, out: int, into: int) -> None:
        shapes.update({f"{name}.weight": [out, into], f"{name}.bias": [out]})

    linear("img_in", 3072, 64)
    linear("txt_in", 3072, 4096)
    for name, size in {"time_in": 256, "vector_in": 768, **({"guidance_in": 256} if folder == "flux" else {})}.items():
        linear(f"{name}.in_layer", 3072, size)
        linear(f"{name}.out_layer", 3072, 3072)
    for i in range(19):
        for part in ("img", "txt"):
            linear(f"double_blocks.{i}.{part}_mod.lin", 6 * 3072, 3072)
            linear(f"double_blocks.{i}.{part}_attn.qkv", 3 * 3072, 3072)
            linear(f"double_blocks.{i}.{part}_attn.proj", 3072, 3072)
            linear(f"double_blocks.{i}.{part}_mlp.0", 4 * 3072, 3072)
            linear(f"double_blocks.{i}.{part}_mlp.2", 3072, 4 * 3072)
            for norm in ("query", "key"):
                shapes[f"double_blocks.{i}.{part}_attn.norm.{norm}_norm.scale"] = [128]
    for i in range(38):
        linear(f"single_blocks.{i}.modulation.lin", 3 * 3072, 3072)
        linear(f"single_blocks.{i}.linear1", 7 * 3072, 3072)
        linear(f"single_blocks.{i}.linear2", 3072, 5 * 3072)
        for norm in ("query", "key"):
            shapes[f"single_blocks.{i}.norm.{norm}_norm.scale"] = [128]
    linear("final_layer.linear", 64, 3072)
    linear("final_layer.adaLN_modulation.1", 2 * 3072, 3072)
    return shapes


def empty_file(file: Path, shapes: dict[str, list[int]], bits: int = 16) -> Path:
    """A .safetensors file of zeros that takes no room on the disk."""
    header, at = {}, 0
    for name, shape in shapes.items():
        size = math.prod(shape) * bits // 8
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with file.open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        f.truncate(8 + len(text) + at)
    return file


@pytest.mark.parametrize("folder", FULL_SIZE)
def test_settings_of_the_published_models_and_their_single_files(tmp_path, folder):
    transformer = published(folder)
    size = sum(value.numel() for value in transformer.state_dict().values())
    assert size == FULL_SIZE[folder][0]
    vae = published(folder, "vae")
    assert sum(p.numel() for p in vae.parameters()) == 83_819_683 and len(vae.state_dict()) == 244  # ae.safetensors
    kind = folder.split("_")[0]
    if kind == "flux":
        shapes = flux_in_its_own_layout(folder)
        assert len(shapes) == FULL_SIZE[folder][1]
    else:
        with torch.device("meta"):
            shapes = {name: list(value.shape) for name, value in sd3_in_its_own_layout(transformer).items()}
    file = empty_file(tmp_path / "model.safetensors", shapes)
    config = json.loads((CONFIGS / kind / "transformer" / "config.json").read_text())  # of medium and dev
    loaded = networks.transformer_from_file(file, kind, config, None)
    found, wanted = loaded.state_dict(), transformer.state_dict()
    assert {n: v.shape for n, v in found.items()} == {n: v.shape for n, v in wanted.items()}
    told = {k: v for k, v in transformer.config.items() if not k.startswith("_") and v is not None}
    assert {k: loaded.config[k] for k in told} == told
    source = {"sd35": "3.5-medium", "sd35_large": "3.5-large", "flux": "1-dev", "flux_schnell": "1-schnell"}[folder]
    with pytest.raises(MissingFilesError, match=source):  # the rest is that of the model it belongs to
        resolve(file, kind)


# ----------------------------------------------------------------------------------------------------------------- LoRA

TARGETS = {"sd35": presets.ATTENTION, "flux": (*presets.ATTENTION, *presets.FEED_FORWARD)}


def with_lora(transformer, targets, rank: int = 3, alpha: float = 7.0):
    """The transformer with a LoRA whose B is not zero."""
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets)))
    for name, p in transformer.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(p, std=0.3)
    return transformer


@pytest.mark.parametrize("kind", ["sd35", "flux"])
def test_a_saved_lora_draws_the_same_in_the_pipeline_and_by_comfyuis_rule(tiny, tmp_path, kind):
    torch.manual_seed(0)
    trained, plain, loaded = (pipeline(tiny[kind]) for _ in range(3))
    before = picture(plain)
    with_lora(trained.transformer, TARGETS[kind])
    wanted = picture(trained)
    assert (wanted - before).abs().max() > 1e-2
    settings = written_settings(trained.transformer.peft_config["default"])
    files = save_transformer_lora(kind, get_peft_model_state_dict(trained.transformer), settings, tmp_path, {})
    assert [f.name for f in files] == ["pytorch_lora_weights.safetensors", "lora_comfyui.safetensors"]

    loaded.load_lora_weights(tmp_path)
    assert torch.allclose(picture(loaded), wanted, atol=1e-4)
    worn = [m.scaling for m in loaded.transformer.modules() if hasattr(m, "scaling")]
    assert len(worn) == len(read_file(files[0], plain.transformer).layers) and {*worn[0].values()} == {7 / 3}

    tensors = load_file(files[1])  # ComfyUI: W += alpha / rank * up @ down, alpha from the tensor beside
    layers = dict(plain.transformer.named_modules())
    for name in [n for n in tensors if n.endswith(".alpha")]:
        layer = name.removesuffix(".alpha")
        up, down = tensors[f"{layer}.lora_B.weight"], tensors[f"{layer}.lora_A.weight"]
        weight = layers[layer.removeprefix("transformer.")].weight
        weight.data += tensors[name] / len(down) * up @ down
    assert torch.allclose(picture(plain), wanted, atol=1e-4)

    for file in files:  # and both are read back here
        again = pipeline(tiny[kind])
        lora = apply_lora(file, again.transformer)
        assert len(lora.layers) == len(worn) and "alpha 7" in str(lora) and "rank 3" in str(lora)
        assert torch.allclose(picture(again), wanted, atol=1e-4)


def test_the_published_targets_of_sd35_leave_the_second_attention_alone(tiny):
    transformer = with_lora(load.load_transformer(resolve(tiny["sd35"], "sd35"), torch.float32), presets.ATTENTION)
    worn = {name for name, m in transformer.named_modules() if hasattr(m, "scaling")}
    assert "transformer_blocks.0.attn2.to_q" in dict(transformer.named_modules())
    ends = {name.split(".", 2)[2] for name in worn}
    assert ends == set(presets.ATTENTION) and len(worn) == 8 * 3 - 1  # the last block's text goes no further


def test_kohyas_names_of_flux_are_read(tiny, tmp_path):
    """q, k, v are one layer there, whose three parts share one lora_down."""
    torch.manual_seed(0)
    down, up = torch.randn(2, 32), torch.randn(96, 2)
    names = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(6.0)}
    file = tmp_path / "kohya.safetensors"
    save_file({f"lora_unet_double_blocks_1_img_attn_qkv.{name}": value for name, value in names.items()}, file)
    transformer = load.load_transformer(resolve(tiny["flux"], "flux"), torch.float32)
    lora = read_file(file, transformer)
    change = 6 / 2 * up @ down
    for i, letter in enumerate("qkv"):
        layer = lora.layers[f"transformer_blocks.1.attn.to_{letter}"]
        found = layer.scale * layer.up @ layer.down
        assert torch.allclose(found, change[32 * i : 32 * (i + 1)], atol=1e-5)
    assert len(lora.layers) == 3


def test_loras_of_other_networks_are_refused_in_one_line(tiny, tmp_path):
    transformer = load.load_transformer(resolve(tiny["sd35"], "sd35"), torch.float32)
    for names in (
        ("unet.mid_block.attentions.0.to_q.lora_A.weight", "unet.mid_block.attentions.0.to_q.lora_B.weight"),
        ("lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight",),
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",),
    ):
        save_file({name: torch.ones(2, 2) for name in names}, tmp_path / "other.safetensors")
        with pytest.raises(ValueError, match="another base model|text encoders") as refused:
            read_file(tmp_path / "other.safetensors", transformer)
        assert len(str(refused.value)) <= 300 and "\n" not in str(refused.value)


# --------------------------------------------------------------------------------------------------------- wrong inputs


def changed(tiny: Path, tmp_path: Path, part: str, **settings: Any) -> Path:
    """A copy of a directory, one part's settings changed."""
    copy = shutil.copytree(tiny, tmp_path / "changed")
    file = copy / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    return copy


def line_of(call: Callable[[], Any]) -> str:
    with pytest.raises((ValueError, MissingFilesError)) as refused:
        call()
    message = str(refused.value)
    assert isinstance(refused.value, MissingFilesError) or (len(message) <= 300 and "\n" not in message), message
    return message


def test_models_of_another_kind(tiny, single, tmp_path):
    unet = make_tiny_sdxl(tmp_path / "sdxl")
    assert "a UNet of kind sdxl, but kind sd35" in line_of(lambda: resolve(unet, "sd35"))
    assert "a transformer of kind sd35, but kind sdxl" in line_of(lambda: resolve(tiny["sd35"], "sdxl"))
    assert "a transformer of kind flux, but kind sd35" in line_of(lambda: resolve(tiny["flux"], "sd35"))
    assert "is a sd35 model, but kind sdxl" in line_of(lambda: resolve(single, "sdxl"))
    assert "is a sd35 model, but kind flux" in line_of(lambda: resolve(single, "flux"))
    own = tiny["sd35"] / "transformer" / "diffusion_pytorch_model.safetensors"
    assert "give the directory of the whole pipeline" in line_of(lambda: resolve(own, "sd35"))
    other = changed(tiny["sd35"], tmp_path, "transformer", _class_name="SanaTransformer2DModel")
    assert "SanaTransformer2DModel" in line_of(lambda: resolve(other, "sd35"))
    mend = line_of(lambda: resolve(tiny["sd35"], "sd35", base_model_name_or_path=str(tiny["sd35"])))
    assert "--base_model_name_or_path is for a transformer in one file" in mend


WRONG_PARTS = {
    "a FLUX VAE": ("sd35", "vae", dict(scaling_factor=0.3611, shift_factor=0.1159), "the VAE of flux"),
    "an SD3 VAE": ("flux", "vae", dict(scaling_factor=1.5305, shift_factor=0.0609), "the VAE of sd35"),
    "SDXL's VAE": ("sd35", "vae", dict(scaling_factor=0.13025, shift_factor=None), "the VAE of sdxl"),
    "channels": ("flux", "vae", dict(latent_channels=16), "latent_channels=16: the transformer takes 4"),
    "no shift": ("flux", "vae", dict(shift_factor="a"), "shift_factor='a'"),
    "means": ("sd35", "vae", dict(latents_mean=[1.0]), "latents_mean"),
    "FLUX.1-Fill": ("flux", "transformer", dict(in_channels=384, out_channels=64), "inpaints"),
    "width": ("sd35", "transformer", dict(joint_attention_dim=64), "its T5 makes 32"),
    "pooled": ("flux", "transformer", dict(pooled_projection_dim=99), "pooled prompts have 16"),
    "another T5": ("flux", "text_encoder_2", dict(model_type="umt5"), "is a T5"),
    "a diffusion's steps": ("flux", "scheduler", dict(_class_name="DDIMScheduler"), "FlowMatchEulerDiscreteScheduler"),
}


@pytest.mark.parametrize("name", WRONG_PARTS)
def test_parts_that_do_not_belong(tiny, tmp_path, name):
    kind, part, settings, says = WRONG_PARTS[name]
    assert says in line_of(lambda: resolve(changed(tiny[kind], tmp_path, part, **settings), kind))


def test_a_borrowed_vae_of_the_other_kind(tiny):
    line = line_of(lambda: resolve(tiny["sd35"], "sd35", pretrained_vae_model_name_or_path=str(tiny["flux"])))
    assert "the VAE of flux" in line


def test_sizes_and_guidance_that_a_model_does_not_take(tiny):
    sd3, schnell, dev = (resolve(tiny[name], KINDS[name]) for name in ("sd35", "schnell", "flux"))

    def ask(resolved: Resolved, scale: float = 1.0, **settings: Any) -> None:
        check_asked(resolved, ModelConfig(model=resolved.source.kind, **settings), scale)

    ask(sd3, 4.5, height=384, width=64)  # 24 positions x patch 2 x factor 8
    assert "at most 384" in line_of(lambda: ask(sd3, height=400, width=64))
    for resolved in (sd3, dev):
        assert "multiple of 16" in line_of(lambda resolved=resolved: ask(resolved, height=64, width=72))
    ask(dev, height=512, width=2048, embedded_guidance=3.5)
    ask(schnell)
    assert "draw without guidance" in line_of(lambda: ask(schnell, 3.5))
    for resolved in (sd3, schnell):
        line = line_of(lambda resolved=resolved: ask(resolved, embedded_guidance=3.5))
        assert "is told no guidance" in line


def test_damaged_weights_are_named(tiny, single, tmp_path):
    copy = shutil.copytree(tiny["sd35"], tmp_path / "copy")
    file = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    whole = load_file(file)
    for change, says in (
        ({"proj_out.bias": whole["proj_out.bias"] * float("nan")}, "not finite"),
        ({"proj_out.bias": torch.zeros(3)}, "of the wrong shape"),
        ({"proj_out.more": torch.zeros(3)}, "unexpected"),
    ):
        save_file({**whole, **change}, file)
        assert says in line_of(lambda: load.load_transformer(resolve(copy, "sd35"), torch.float32))
    save_file({n: t for n, t in whole.items() if n != "proj_out.bias"}, file)
    assert "missing: proj_out.bias" in line_of(lambda: load.check_weights(resolve(copy, "sd35")))

    tensors, base = load_file(single), {"base_model_name_or_path": str(tiny["sd35"])}
    broken = tmp_path / "broken.safetensors"
    save_file({n: t for n, t in tensors.items() if "fc1.bias" not in n}, broken)
    assert "is incomplete (transformer of sd35)" in line_of(lambda: load.check_weights(resolve(broken, "sd35", **base)))
    for name, shape in (("x_embedder.proj.weight", (32, 4)), ("pos_embed", (1,)), ("final_layer.linear.weight", ())):
        save_file({**tensors, f"model.diffusion_model.{name}": torch.zeros(shape)}, broken)
        line = line_of(lambda: resolve(broken, "sd35", **base))
        assert "is incomplete (transformer of sd35): a tensor has another shape" in line
    save_file({**tensors, "model.diffusion_model.scaled_fp8": torch.zeros(1)}, broken)
    assert "scaled_fp8" in line_of(lambda: load.check_weights(resolve(broken, "sd35", **base)))


def test_a_t5_that_the_index_names_may_not_be_missing(tiny, tmp_path):
    copy = shutil.copytree(tiny["sd35"], tmp_path / "copy")
    shutil.rmtree(copy / "text_encoder_3")
    assert "text_encoder_3/" in line_of(lambda: resolve(copy, "sd35"))


# -------------------------------------------------------------------------------------------------------------- the hub

PUBLISHED = {  # as listed on the hub (SD3.5-large has both sets), duplicates and single files among them
    "sd35": """model_index.json sd3.5_large.safetensors scheduler/scheduler_config.json
        text_encoder/config.json text_encoder/model.fp16.safetensors text_encoder/model.safetensors
        text_encoder_2/config.json text_encoder_2/model.fp16.safetensors text_encoder_2/model.safetensors
        text_encoder_3/config.json text_encoder_3/model-00001-of-00002.safetensors
        text_encoder_3/model-00002-of-00002.safetensors text_encoder_3/model.fp16-00001-of-00002.safetensors
        text_encoder_3/model.fp16-00002-of-00002.safetensors text_encoder_3/model.safetensors.index.fp16.json
        text_encoder_3/model.safetensors.index.json tokenizer/merges.txt tokenizer/special_tokens_map.json
        tokenizer/tokenizer_config.json tokenizer/vocab.json tokenizer_2/merges.txt tokenizer_2/special_tokens_map.json
        tokenizer_2/tokenizer_config.json tokenizer_2/vocab.json tokenizer_3/special_tokens_map.json
        tokenizer_3/spiece.model tokenizer_3/tokenizer.json tokenizer_3/tokenizer_config.json transformer/config.json
        transformer/diffusion_pytorch_model-00001-of-00002.safetensors
        transformer/diffusion_pytorch_model-00002-of-00002.safetensors
        transformer/diffusion_pytorch_model.safetensors.index.json vae/config.json
        vae/diffusion_pytorch_model.safetensors text_encoders/t5xxl_fp16.safetensors""",
    "flux": """model_index.json flux1-dev.safetensors ae.safetensors scheduler/scheduler_config.json
        text_encoder/config.json text_encoder/model.safetensors text_encoder_2/config.json
        text_encoder_2/model-00001-of-00002.safetensors text_encoder_2/model-00002-of-00002.safetensors
        text_encoder_2/model.safetensors.index.json tokenizer/merges.txt tokenizer/special_tokens_map.json
        tokenizer/tokenizer_config.json tokenizer/vocab.json tokenizer_2/special_tokens_map.json
        tokenizer_2/spiece.model tokenizer_2/tokenizer.json tokenizer_2/tokenizer_config.json transformer/config.json
        transformer/diffusion_pytorch_model-00001-of-00003.safetensors
        transformer/diffusion_pytorch_model-00002-of-00003.safetensors
        transformer/diffusion_pytorch_model-00003-of-00003.safetensors
        transformer/diffusion_pytorch_model.safetensors.index.json vae/config.json
        vae/diffusion_pytorch_model.safetensors""",
}


@pytest.mark.parametrize("kind", PUBLISHED)
@pytest.mark.parametrize("precision", ["auto", "no"])
def test_files_asked_of_the_hub(kind, precision):
    names = PUBLISHED[kind].split()
    source = MODELS[kind](ModelConfig(model=kind, mixed_precision=precision))
    chosen, lacking = layout.select_files(names, PARTS[kind], source.variant)
    unwanted = {"sd3.5_large.safetensors", "text_encoders/t5xxl_fp16.safetensors", "flux1-dev.safetensors"}
    unwanted |= {"ae.safetensors", *(n for n in names if n.endswith("spiece.model"))}
    halves = {n for n in names if "fp16" in n and "t5xxl" not in n}
    wholes = {n for n in names if re.fullmatch(r"text_encoder\w*/model.*", n)} - halves if kind == "sd35" else set()
    unwanted |= wholes if precision == "auto" else halves
    assert not lacking and {*chosen} == {*names} - unwanted and len(chosen) == len({*chosen})
    assert layout.select_files(names, PARTS["sd35"], "fp16")[1]  # a variant that is asked for in so many words


def test_gated_ids_say_where_to_accept_and_how_to_log_in(monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    source = ModelSource(**vars(DEFAULTS["flux"]) | {"cache_dir": str(tmp_path)})
    page = "https://huggingface.co/black-forest-labs/FLUX.1-dev"
    with pytest.raises(MissingFilesError) as refused:
        resolve_all(source, download=False)
    assert page in str(refused.value) and "HF_TOKEN" in str(refused.value)

    class Refusing:
        def list_repo_files(self, *_: Any, **__: Any) -> list[str]:
            raise GatedRepoError("Access is restricted", response=mock.Mock())

    monkeypatch.setattr(huggingface_hub, "HfApi", Refusing)
    monkeypatch.setattr("spo_fast.models.files.find.offline_reason", lambda: None)
    with pytest.raises(MissingFilesError) as refused:
        resolve_all(source)
    [missing] = refused.value.missing
    assert page in missing.why and "hf auth login" in missing.why and "HF_TOKEN" in missing.why
    assert missing.flag == "--pretrained_model_name_or_path" and len(missing.why) < 200


@pytest.mark.parametrize("kind", ["sd35", "flux"])
def test_a_lora_that_was_saved_goes_on_as_it_was(tiny, tmp_path, kind):
    """--lora_path: the tensors by the names of the trained network's own, of the same rank, alpha and layers."""
    transformer = with_lora(load.load_transformer(resolve(tiny[kind], kind), torch.float32), TARGETS[kind])
    settings = written_settings(transformer.peft_config["default"])
    save_transformer_lora(kind, get_peft_model_state_dict(transformer), settings, tmp_path, {})
    wanted = {name: p.detach().clone() for name, p in transformer.named_parameters() if ".lora_" in name}
    for file in (tmp_path, tmp_path / "lora_comfyui.safetensors"):
        found = read_lora(file, transformer, AdapterConfig(rank=3, lora_alpha=7.0, lora_targets=TARGETS[kind]))
        assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    for adapter, says in (
        (AdapterConfig(rank=4, lora_alpha=7.0, lora_targets=TARGETS[kind]), "rank 3, but --rank is 4"),
        (AdapterConfig(rank=3, lora_targets=TARGETS[kind]), "--lora_alpha 7"),
    ):
        assert says in line_of(lambda adapter=adapter: read_lora(tmp_path, transformer, adapter))
    other = with_lora(load.load_transformer(resolve(tiny[kind], kind), torch.float32), ["attn.to_q"])
    less = AdapterConfig(rank=3, lora_alpha=7.0, lora_targets=("attn.to_q",))
    line = line_of(lambda: read_lora(tmp_path, other, less))
    assert "attn.add_k_proj" in line and "attn.to_out.0" in line  # as they are to be given


def test_tiny_vaes_of_the_fast_recipe(tiny, tmp_path):
    from diffusers import AutoencoderTiny

    sizes = dict(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, latent_channels=4)
    AutoencoderTiny(**sizes, num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1,) * 4).save_pretrained(tmp_path)
    for kind, name in (("sd35", "madebyollin/taesd3"), ("flux", "madebyollin/taef1")):
        resolved = resolve(tiny[kind], kind, pretrained_vae_model_name_or_path=str(tmp_path))
        load.check_weights(resolved)
        assert type(load.load_vae(resolved, torch.float32)) is AutoencoderTiny
        assert TINY_VAES[kind] == name and vae_settings(kind, None, name)["latent_channels"] == 16
