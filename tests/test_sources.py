"""Directories, single files and the hub; the truth is diffusers' own loading, or the tensors that were saved."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_tiny_sd15, make_tiny_sdxl
from torch import Tensor

from spo_fast.config.errors import MissingFilesError
from spo_fast.config.scorers import FLOWS, KINDS
from spo_fast.models.files import load
from spo_fast.models.files.clip_tokenizer import clip_tokenizer
from spo_fast.models.files.find import resolve_all
from spo_fast.models.files.layout import scheduler_config, select_files, text_files
from spo_fast.models.files.load import load_text_encoders, load_tokenizers, load_unet, load_vae
from spo_fast.models.files.sources import CONFIGS, DEFAULTS, ModelSource, Resolved
from spo_fast.models.files.toy import no_progress_bar

ROOT = Path(__file__).parent.parent
UNETS = [kind for kind in KINDS if kind not in FLOWS]
PIPELINES = {"sd15": diffusers.StableDiffusionPipeline, "sdxl": diffusers.StableDiffusionXLPipeline}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("tiny")
    return {"sd15": make_tiny_sd15(base / "sd15"), "sdxl": make_tiny_sdxl(base / "sdxl")}


def resolve(kind: str, path: Path, **options) -> Resolved:
    return resolve_all(ModelSource(kind=kind, pretrained_model_name_or_path=str(path), **options))


def pipeline(kind: str, path: Path):
    with no_progress_bar():
        pipe = PIPELINES[kind].from_pretrained(str(path), local_files_only=True, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def assert_same_tensors(model: torch.nn.Module, truth: torch.nn.Module) -> None:
    ours, theirs = model.state_dict(), truth.state_dict()
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name


def run_python(code: str, **env: str) -> str:
    """The last line a fresh interpreter prints."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE_"))}
    path = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    clean |= {"PYTHONPATH": path, "no_proxy": "127.0.0.1", **env}
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


# ---------------------------------------------------------------------------------------------- directories


@pytest.mark.parametrize("kind", UNETS)
def test_directory_loads_what_diffusers_loads(kind: str, tiny: dict[str, Path], caplog, capfd) -> None:
    resolved = resolve(kind, tiny[kind])
    unet, vae = load_unet(resolved, torch.float32), load_vae(resolved, torch.float32)
    tokenizers, encoders = load_tokenizers(resolved), load_text_encoders(resolved, torch.float32)
    assert caplog.records == [] and capfd.readouterr() == ("", "")  # no warnings, no bars
    truth = pipeline(kind, tiny[kind])
    for ours, theirs in zip((unet, vae, *encoders), parts_of(truth), strict=True):
        assert_same_tensors(ours, theirs)
        assert not ours.training and not any(p.requires_grad for p in ours.parameters())
    prompt = "A red Circle, 12 é"
    truth_tokenizers = [truth.tokenizer] + ([truth.tokenizer_2] if kind == "sdxl" else [])
    for ours, theirs in zip(tokenizers, truth_tokenizers, strict=True):
        options = dict(padding="max_length", truncation=True)
        assert ours(prompt, **options).input_ids == theirs(prompt, **options).input_ids
    assert scheduler_config(resolved)["_class_name"] == type(truth.scheduler).__name__
    assert images(kind, truth, unet, vae, encoders).equal(
        images(kind, truth, *parts_of(truth)[:2], parts_of(truth)[2:])
    )


def parts_of(pipe) -> list:
    encoders = [pipe.text_encoder] + ([pipe.text_encoder_2] if hasattr(pipe, "text_encoder_2") else [])
    return [pipe.unet, pipe.vae, *encoders]


def images(kind: str, pipe, unet, vae, encoders) -> Tensor:  # (1, 3, 64, 64)
    """Two denoising steps of a pipeline with these parts in it."""
    pipe.unet, pipe.vae, pipe.text_encoder = unet, vae, encoders[0]
    if kind == "sdxl":
        pipe.text_encoder_2 = encoders[1]
    g = torch.Generator().manual_seed(0)
    return pipe("a cat", num_inference_steps=2, height=64, width=64, generator=g, output_type="pt").images


def test_parts_load_in_16_bits_and_by_variant(tiny: dict[str, Path], tmp_path: Path) -> None:
    path = shutil.copytree(tiny["sdxl"], tmp_path / "m")
    for file in path.glob("*/*.safetensors"):  # as published beside the plain ones
        half = {n: t.half() for n, t in load_file(file).items()}
        save_file(half, file.with_name(f"{file.stem}.fp16.safetensors"), metadata={"format": "pt"})
        file.unlink()
    with pytest.raises(MissingFilesError, match="unet/diffusion_pytorch_model.safetensors"):
        resolve("sdxl", path)
    resolved = resolve("sdxl", path, variant="fp16")
    plain = resolve("sdxl", tiny["sdxl"])
    assert_same_tensors(load_unet(resolved, torch.float16), load_unet(plain, torch.float16))
    assert_same_tensors(load_vae(resolved, torch.bfloat16), load_vae(plain, torch.float16).to(torch.bfloat16))
    encoders = (load_text_encoders(model, torch.float16) for model in (resolved, plain))
    for ours, theirs in zip(*encoders, strict=True):
        assert ours.dtype == torch.float16
        assert_same_tensors(ours, theirs)
    assert {f.suffixes[0] for f in text_files(resolved) if f.suffix == ".safetensors"} == {".fp16"}


def test_other_vae(tiny: dict[str, Path], tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).eval()
    small.save_pretrained(tmp_path / "taesd")
    other = make_tiny_sd15(tmp_path / "other", seed=1)
    truth = {
        tmp_path / "taesd": small,  # a repository of its own, told apart by _class_name
        tmp_path / "taesd" / "diffusion_pytorch_model.safetensors": small,  # its file, with config.json beside it
        other / "vae": diffusers.AutoencoderKL.from_pretrained(other / "vae"),
        other: diffusers.AutoencoderKL.from_pretrained(other / "vae"),  # borrowed from a pipeline
    }
    for path, vae in truth.items():
        resolved = resolve("sd15", tiny["sd15"], pretrained_vae_model_name_or_path=str(path))
        assert_same_tensors(load_vae(resolved, torch.float32), vae)
    shutil.copytree(tiny["sd15"], tmp_path / "no-vae", ignore=shutil.ignore_patterns("vae"))
    assert resolve("sd15", tmp_path / "no-vae", pretrained_vae_model_name_or_path=str(other)).vae_path == other
    with pytest.raises(MissingFilesError, match="vae/config.json"):
        resolve("sd15", tmp_path / "no-vae")


def test_directory_of_the_other_kind_or_another_class(tiny: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds a UNet of kind sdxl"):
        resolve("sd15", tiny["sdxl"])
    with pytest.raises(ValueError, match="unknown model kind 'sdlx'.*'sdxl'"):
        ModelSource(kind="sdlx", pretrained_model_name_or_path="x/y")
    path = shutil.copytree(tiny["sd15"], tmp_path / "m")
    (path / "vae" / "config.json").write_text('{"_class_name": "VQModel"}')
    with pytest.raises(ValueError, match="VQModel; a VAE must be one of AutoencoderKL, AutoencoderTiny"):
        load_vae(resolve("sd15", path), torch.float32)
    shutil.copy(tiny["sd15"] / "vae" / "config.json", path / "vae" / "config.json")
    (path / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut short")
    with pytest.raises(ValueError, match="unet/diffusion_pytorch_model.safetensors is no .safetensors file"):
        resolve("sd15", path)  # before anything is loaded
    save_file({"conv_in.weight": torch.zeros(1)}, path / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(
        ValueError, match="unet/diffusion_pytorch_model.safetensors does not fit the network of 208 tensors"
    ):
        load_unet(resolve("sd15", path), torch.float32)


def test_hub_layout_of_a_tokenizer(tiny: dict[str, Path], tmp_path: Path) -> None:
    """The hub has vocab.json and merges.txt where a new save_pretrained writes tokenizer.json."""
    from spo_fast.models.files.clip_tokenizer import clip_merges, clip_vocab

    path = shutil.copytree(tiny["sd15"], tmp_path / "m", ignore=shutil.ignore_patterns("tokenizer"))
    merges = clip_merges()
    (path / "tokenizer").mkdir()
    (path / "tokenizer" / "vocab.json").write_text(json.dumps(clip_vocab(merges)))
    lines = ["#version: 0.2", *map(" ".join, merges), ""]
    with pytest.raises(MissingFilesError, match="tokenizer/merges.txt"):
        resolve("sd15", path)
    (path / "tokenizer" / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    shutil.copy(CONFIGS / "sd15" / "tokenizer" / "tokenizer_config.json", path / "tokenizer")
    file = path / "text_encoder" / "config.json"  # of the published sizes: a tokenizer is read beside its encoder
    file.write_text(json.dumps({**json.loads(file.read_text()), "vocab_size": 49408, "max_position_embeddings": 77}))
    (tokenizer,) = load_tokenizers(resolve("sd15", path))
    prompts = ["a photo of a cat", "Café déjà-vu 123 🎉 don't!", ""]
    assert tokenizer(prompts, padding=True).input_ids == clip_tokenizer()(prompts, padding=True).input_ids


# ---------------------------------------------------------------------------------------------- the shipped settings


def test_clip_tokenizer_gives_the_published_ids() -> None:
    first, second = clip_tokenizer(), clip_tokenizer("!")
    assert len(first) == len(second) == 49408
    assert first("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    padded = dict(padding="max_length", max_length=5)
    assert first("a", **padded).input_ids == [49406, 320, 49407, 49407, 49407]
    assert second("a", **padded).input_ids == [49406, 320, 49407, 0, 0]
    assert first.model_max_length == 77


@pytest.mark.parametrize(
    ("kind", "unet", "text"),
    [("sd15", 859_520_964, [123_060_480]), ("sdxl", 2_567_463_684, [123_060_480, 694_659_840])],
)
def test_shipped_settings_have_the_published_sizes(kind: str, unet: int, text: list[int], tmp_path: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    def size(model: torch.nn.Module) -> int:
        return sum(p.numel() for p in model.parameters())

    def settings(part: str) -> dict:
        return json.loads((CONFIGS / kind / part / "config.json").read_text())

    with torch.device("meta"):
        vae = diffusers.AutoencoderKL.from_config(settings("vae"))
        assert size(diffusers.UNet2DConditionModel.from_config(settings("unet"))) == unet
        assert (size(vae.encoder), size(vae.decoder), size(vae)) == (34_163_592, 49_490_179, 83_653_863)
        classes = zip(("text_encoder", "text_encoder_2"), (CLIPTextModel, CLIPTextModelWithProjection), strict=True)
        assert [size(c(CLIPTextConfig(**settings(p)))) for p, c in list(classes)[: len(text)]] == text
    assert vae.config.scaling_factor == {"sd15": 0.18215, "sdxl": 0.13025}[kind]
    golden = json.loads((ROOT / "tests" / "golden" / f"models_{kind}.json").read_text())["scheduler_as_shipped"]
    source = ModelSource(kind=kind, pretrained_model_name_or_path="any.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "any.safetensors")
    shipped = scheduler_config(Resolved(source, model_path=tmp_path / "any.safetensors", vae_path=None))
    assert {k: shipped[k] for k in golden if k != "_diffusers_version"} == {
        k: v for k, v in golden.items() if k != "_diffusers_version"
    }


# ---------------------------------------------------------------------------------------------- single files


def ldm_unet(tensors: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """diffusers' names to those of the original code, the inverse of what is tested; layers: per block."""
    fixed = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    resnet = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }
    attended = {n.split(".")[1] for n in tensors if n.startswith("up_blocks") and "attentions" in n}
    out = {}
    for name, t in tensors.items():
        if m := re.fullmatch(r"(down|up)_blocks\.(\d)\.(resnets|attentions)\.(\d)\.(.*)", name):
            i = int(m[2]) * (layers + 1) + int(m[4]) + (m[1] == "down")
            new = f"{'input' if m[1] == 'down' else 'output'}_blocks.{i}.{int(m[3] == 'attentions')}.{m[5]}"
        elif m := re.fullmatch(r"down_blocks\.(\d)\.downsamplers\.0\.conv\.(.*)", name):
            new = f"input_blocks.{(int(m[1]) + 1) * (layers + 1)}.0.op.{m[2]}"
        elif m := re.fullmatch(r"up_blocks\.(\d)\.upsamplers\.0\.conv\.(.*)", name):
            # the up-sampler is the last of its block, which holds the ResNet's and maybe an attention before it
            new = f"output_blocks.{int(m[1]) * (layers + 1) + layers}.{1 + (m[1] in attended)}.conv.{m[2]}"
        else:
            old = next(o for o in fixed if name.startswith(o + "."))
            new = fixed[old] + name.removeprefix(old)
        if "resnets" in name:
            new = re.sub(
                r"\.(norm1|conv1|time_emb_proj|norm2|conv2|conv_shortcut)\.", lambda m: f".{resnet[m[1]]}.", new
            )
        assert new not in out
        out[new] = t
    return out


def ldm_vae(tensors: dict[str, Tensor], blocks: int) -> dict[str, Tensor]:
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    out = {}
    for name, t in tensors.items():
        new = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", name)
        new = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", new)
        new = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{blocks - 1 - int(m[1])}.block.{m[2]}", new)
        new = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", new)
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", new)
        new = new.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        if m := re.fullmatch(r"(.*)mid_block\.attentions\.0\.(.*)\.(weight|bias)", new):
            new = f"{m[1]}mid.attn_1.{attention[m[2]]}.{m[3]}"
            out[new] = t[:, :, None, None] if t.dim() == 2 else t  # 1x1 convolutions there
        else:
            out[new] = t
    return out


def openclip(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors = {n.removeprefix("text_model."): t for n, t in tensors.items()}
    out = {
        "token_embedding.weight": tensors["embeddings.token_embedding.weight"],
        "positional_embedding": tensors["embeddings.position_embedding.weight"],
        "ln_final.weight": tensors["final_layer_norm.weight"],
        "ln_final.bias": tensors["final_layer_norm.bias"],
        "text_projection": tensors["text_projection.weight"].T,
        "logit_scale": torch.tensor(4.6),  # in the published files, of no use
    }
    for i in range(1 + max(int(n.split(".")[2]) for n in tensors if "layers" in n)):
        old, new = f"encoder.layers.{i}.", f"transformer.resblocks.{i}."
        for kind in ("weight", "bias"):
            fused = torch.cat([tensors[f"{old}self_attn.{p}_proj.{kind}"] for p in "qkv"])
            out[f"{new}attn.in_proj_{kind}"] = fused
            out[f"{new}attn.out_proj.{kind}"] = tensors[f"{old}self_attn.out_proj.{kind}"]
            out[f"{new}ln_1.{kind}"] = tensors[f"{old}layer_norm1.{kind}"]
            out[f"{new}ln_2.{kind}"] = tensors[f"{old}layer_norm2.{kind}"]
            out[f"{new}mlp.c_fc.{kind}"] = tensors[f"{old}mlp.fc1.{kind}"]
            out[f"{new}mlp.c_proj.{kind}"] = tensors[f"{old}mlp.fc2.{kind}"]
    return out


def single_file_tensors(kind: str, path: Path) -> dict[str, Tensor]:
    """A whole model as its original code would have saved it."""

    def read(part: str) -> dict[str, Tensor]:
        (file,) = (path / part).glob("*.safetensors")
        return load_file(file)

    out = {f"model.diffusion_model.{n}": t for n, t in ldm_unet(read("unet"), layers=1).items()}
    out |= {f"first_stage_model.{n}": t for n, t in ldm_vae(read("vae"), blocks=4).items()}
    out |= {f"model_ema.{n}": torch.zeros(1) for n in ("decay", "num_updates")}
    clip = "cond_stage_model.transformer." if kind == "sd15" else "conditioner.embedders.0.transformer."
    text = {"text_model." + n.removeprefix("text_model."): t for n, t in read("text_encoder").items()}
    out |= {clip + n: t for n, t in text.items()}
    out[clip + "text_model.embeddings.position_ids"] = torch.arange(16)[None]
    if kind == "sdxl":
        out |= {f"conditioner.embedders.1.model.{n}": t for n, t in openclip(read("text_encoder_2")).items()}
    return {n: t.contiguous() for n, t in out.items()}


@pytest.fixture(scope="module")
def single(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("single")
    for kind in UNETS:
        save_file(single_file_tensors(kind, tiny[kind]), base / f"{kind}.safetensors")
    return {kind: base / f"{kind}.safetensors" for kind in UNETS}


@pytest.mark.parametrize("kind", UNETS)
def test_single_file_equals_its_directory(
    kind: str, tiny: dict[str, Path], single: dict[str, Path], tmp_path: Path, caplog, capfd
) -> None:
    config = shutil.copytree(tiny[kind], tmp_path / "config", ignore=shutil.ignore_patterns("*.safetensors"))
    resolved = resolve(kind, single[kind], config=str(config))
    unet, vae = load_unet(resolved, torch.float32), load_vae(resolved, torch.float32)
    tokenizers, encoders = load_tokenizers(resolved), load_text_encoders(resolved, torch.float32)
    assert caplog.records == [] and capfd.readouterr() == ("", "")
    truth = pipeline(kind, tiny[kind])
    for ours, theirs in zip((unet, vae, *encoders), parts_of(truth), strict=True):
        assert_same_tensors(ours, theirs)
        assert not any(t.is_meta for t in (*ours.parameters(), *ours.buffers()))
    expected = images(kind, truth, *parts_of(truth)[:2], parts_of(truth)[2:])
    assert images(kind, truth, unet, vae, encoders).equal(expected)
    assert tokenizers[0]("a cat").input_ids == truth.tokenizer("a cat").input_ids
    assert load_unet(resolved, torch.bfloat16).dtype == torch.bfloat16
    assert load_text_encoders(resolved, torch.float16)[-1].dtype == torch.float16


def test_single_file_uses_the_shipped_settings(single: dict[str, Path]) -> None:
    """The tiny file cannot fill the published architecture: the sizes tell. The tokenizers are the real ones."""
    source = ModelSource(kind="sdxl", pretrained_model_name_or_path=str(single["sdxl"]))
    with pytest.raises(ValueError, match="sdxl.safetensors has cross_attention_dim=32: .* make 768 . 1280 channels"):
        resolve_all(source)
    resolved = Resolved(source, model_path=single["sdxl"], vae_path=None)
    assert resolved.config_dir == CONFIGS / "sdxl"
    with pytest.raises(ValueError, match=r"the UNet in .*sdxl.safetensors does not fit the network of 1680 tensors"):
        load_unet(resolved, torch.float32)
    with pytest.raises(ValueError, match="the VAE in .*sdxl.safetensors does not fit"):
        load_vae(resolved, torch.float32)
    tokenizers = load.load_tokenizers(resolved)
    assert [len(t) for t in tokenizers] == [49408, 49408] and [t.pad_token_id for t in tokenizers] == [49407, 0]
    names = {f"{f.parent.name}/{f.name}" for f in text_files(resolved)}
    assert {"tokenizer_2/tokenizer_config.json", "text_encoder/config.json"} <= names
    assert single["sdxl"] in text_files(resolved)


def test_vae_as_single_file(tiny: dict[str, Path], single: dict[str, Path], tmp_path: Path) -> None:
    truth = diffusers.AutoencoderKL.from_pretrained(tiny["sd15"] / "vae")
    tensors = truth.state_dict()
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {re.sub(r"(to_q|to_k|to_v|to_out\.0)", lambda m: old_names[m[1]], n): t for n, t in tensors.items()}
    files = {
        "ldm": {**ldm_vae(tensors, blocks=4), "loss.logvar": torch.zeros(1)},
        "diffusers": tensors,
        "diffusers_0_16": old,
    }
    for name, content in files.items():
        save_file({n: t.contiguous() for n, t in content.items()}, tmp_path / f"{name}.safetensors")
    paths = [tmp_path / f"{name}.safetensors" for name in files] + [single["sd15"]]  # or out of a whole model
    for path in paths:
        resolved = resolve("sd15", tiny["sd15"], pretrained_vae_model_name_or_path=str(path), config=str(tiny["sd15"]))
        assert_same_tensors(load_vae(resolved, torch.float32), truth)
    assert (
        load_vae(
            resolve("sd15", tiny["sd15"], pretrained_vae_model_name_or_path=str(paths[1]), config=str(tiny["sd15"])),
            torch.float16,
        ).dtype
        == torch.float16
    )


def test_wrong_single_files(tiny: dict[str, Path], single: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a sdxl model, but kind sd15 was asked for"):
        resolve("sd15", single["sdxl"])
    (tmp_path / "cut.safetensors").write_bytes(single["sd15"].read_bytes()[:100])
    with pytest.raises(ValueError, match="cut short"):
        resolve("sd15", tmp_path / "cut.safetensors")
    (tmp_path / "m.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match="only .safetensors"):
        resolve("sd15", tmp_path / "m.ckpt")
    tensors = load_file(single["sd15"])
    no_vae = {n: t for n, t in tensors.items() if not n.startswith("first_stage_model.")}
    save_file(no_vae, tmp_path / "no_vae.safetensors")
    with pytest.raises(ValueError, match="--pretrained_vae_model_name_or_path"):
        resolve("sd15", tmp_path / "no_vae.safetensors")
    save_file({**tensors, "edm_mean": torch.zeros(4)}, tmp_path / "v.safetensors")
    with pytest.raises(ValueError, match="holds edm_mean: its noise schedule is EDM's"):
        resolve("sd15", tmp_path / "v.safetensors")
    own = str(tiny["sd15"])
    resolve("sd15", tmp_path / "no_vae.safetensors", pretrained_vae_model_name_or_path=own, config=own)
    with pytest.raises(ValueError, match="holds no VAE"):
        resolve("sd15", tiny["sd15"], pretrained_vae_model_name_or_path=str(tmp_path / "no_vae.safetensors"))
    for name in ("model.diffusion_model.out.2.weight", "cond_stage_model.transformer.text_model.final_layer_norm.bias"):
        save_file({n: t for n, t in tensors.items() if n != name}, tmp_path / "part.safetensors")
        resolved = resolve("sd15", tmp_path / "part.safetensors", config=str(tiny["sd15"]))
        with pytest.raises(ValueError, match="1 missing: (conv_out.weight|(text_model.)?final_layer_norm.bias)"):
            load_unet(resolved, torch.float32)
            load_text_encoders(resolved, torch.float32)


# ---------------------------------------------------------------------------------------------- files of a repository


def test_select_files_takes_each_weight_once() -> None:
    names = {"unet/config.json", "scheduler/scheduler_config.json", "model_index.json", "sd_xl_base_1.0.safetensors"}
    stems = ("unet/diffusion_pytorch_model", "text_encoder/model")
    names |= {s + e for s in stems for e in (".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin", ".msgpack")}
    names |= {"text_encoder/config.json", "text_encoder/model.onnx", "text_encoder/pytorch_model.bin"}
    names |= {
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "tokenizer/tokenizer_config.json",
        "safety_checker/config.json",
    }
    parts = ("unet", "text_encoder", "tokenizer", "scheduler")

    chosen, lacking = select_files(names, parts, None)
    assert lacking == [] and len(chosen) == len(set(chosen))
    assert {c for c in chosen if "model." in c} == {s + ".safetensors" for s in stems}
    assert (
        "model_index.json" in chosen and "tokenizer/merges.txt" in chosen and "safety_checker/config.json" not in chosen
    )
    chosen, _ = select_files(names, parts, "fp16")
    assert {c for c in chosen if "model." in c} == {s + ".fp16.safetensors" for s in stems}
    only_bin = {n for n in names if not n.endswith(".safetensors")}
    chosen, lacking = select_files(only_bin, parts, None)
    assert lacking == [] and {"unet/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin"} < set(chosen)
    _, lacking = select_files(names, parts, "bf16")
    assert lacking == ["unet/diffusion_pytorch_model.bf16.safetensors", "text_encoder/model.bf16.safetensors"]


def test_select_files_wants_every_shard() -> None:
    shards = [f"unet/diffusion_pytorch_model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = "unet/diffusion_pytorch_model.safetensors.index.json"
    chosen, lacking = select_files(["unet/config.json", index, *shards], ["unet"], None)
    assert lacking == [] and set(chosen) == {"unet/config.json", index, *shards}
    _, lacking = select_files(["unet/config.json", index, *shards[:2]], ["unet"], None)
    assert lacking == ["unet/diffusion_pytorch_model.safetensors"]


RESOLVE = """
import json, sys, time
from spo_fast.config import errors
from spo_fast.models.files import find, sources
start = time.monotonic()
try:
    r = find.resolve_all(sources.{source}, {scorers})
    out = dict(path=str(r.model_path), scorers={{k: str(v) for k, v in r.scorer_paths.items()}})
except errors.MissingFilesError as error:
    out = dict(message=str(error))
heavy = sorted({{"torch", "diffusers", "transformers"}} & set(sys.modules))
print(json.dumps(dict(out, heavy=heavy, seconds=time.monotonic() - start)))
"""


@pytest.mark.parametrize("kind", KINDS)
def test_everything_missing_is_named_at_once(kind: str, tmp_path: Path) -> None:
    code = RESOLVE.format(source=f"DEFAULTS[{kind!r}]", scorers='{"spm": None, "pickscore": None}')
    out = json.loads(run_python(code, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1"))
    message = out["message"]
    default = DEFAULTS[kind]
    assert default.pretrained_model_name_or_path in message and "--pretrained_model_name_or_path" in message
    vae = default.pretrained_vae_model_name_or_path
    assert (vae is None) == ("--pretrained_vae_model_name_or_path" not in message) and (vae or "") in message
    file = {"sd15": "sd-v1-5"}.get(kind, "sdxl") + "_step-aware_preference_model.bin"
    for words in ("SPO-Diffusion-Models/Step-Aware_Preference_Models", file, "--spm_path"):
        assert words in message
    assert "yuvalkirstain/PickScore_v1" in message and "--pickscore_path" in message
    assert message.count("HF_HUB_OFFLINE is set") == (3 if vae is None else 4)
    assert ("accept its terms at https://huggingface.co/" in message) is (kind in FLOWS)
    assert out["heavy"] == []


@pytest.mark.parametrize(
    "endpoint", ["http://127.0.0.1:9", pytest.param("http://hub.invalid", marks=pytest.mark.slow)]
)  # a port nobody listens on; a name that some networks take seconds to deny
def test_unreachable_hub_is_asked_once(endpoint: str, tmp_path: Path) -> None:
    code = RESOLVE.format(source="DEFAULTS['sdxl']", scorers='{"spm": None, "pickscore": None}')
    out = json.loads(run_python(code, HF_HOME=str(tmp_path), HF_ENDPOINT=endpoint))
    assert out["message"].count("the hub cannot be reached") == 4 and out["heavy"] == []
    assert out["seconds"] < 10


def test_local_paths_that_are_not_there(tiny: dict[str, Path], tmp_path: Path) -> None:
    source = ModelSource(kind="sd15", pretrained_model_name_or_path=str(tmp_path / "nowhere"))
    with pytest.raises(MissingFilesError) as info:
        resolve_all(source, {"spm": "models/spm.bin", "pickscore": str(tiny["sd15"])})
    whys = {m.flag: m.why for m in info.value.missing}
    assert whys["--pretrained_model_name_or_path"] == whys["--spm_path"] == "no such file or directory"
    assert whys["--pickscore_path"] == "the directory lacks config.json, model.safetensors"
    with pytest.raises(
        ValueError, match="unknown scorer 'spn'; known: spm, pickscore, .*text_projection. Did you mean 'spm'"
    ):
        resolve_all(source, {"spn": None})
    spm = tmp_path / "sd-v1-5_step-aware_preference_model.bin"
    spm.write_bytes(b"x")
    source = ModelSource(kind="sd15", pretrained_model_name_or_path=str(tiny["sd15"]))
    for given in (spm, tmp_path):  # the file, or the directory that holds it
        assert resolve_all(source, {"spm": str(given)}).scorer_paths == {"spm": spm}


class FakeHub(BaseHTTPRequestHandler):
    """As much of the hub as its client asks for: org/tiny is there, org/gated is gated, the rest is absent."""

    root: Path
    log: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if path.startswith(("/api/models/org/tiny/tree/", "/api/models/org/tiny/revision/")):
            files = sorted(f.relative_to(self.root).as_posix() for f in self.root.rglob("*") if f.is_file())
            tree = [dict(type="file", path=f, size=(self.root / f).stat().st_size, oid="0" * 40) for f in files]
            info = dict(id="org/tiny", sha="a" * 40, siblings=[dict(rfilename=f) for f in files])
            self.answer(json.dumps(tree if "/tree/" in path else info).encode(), **{"Content-Type": "application/json"})
        elif m := re.match(r"/org/tiny/resolve/[^/]+/(.*)", path):
            if self.command == "GET":
                self.log.append(m[1])
            self.answer((self.root / m[1]).read_bytes(), ETag=f'"{abs(hash(m[1])):x}"', **{"X-Repo-Commit": "a" * 40})
        elif "org/gated" in path:
            self.answer(b"{}", 403, **{"X-Error-Code": "GatedRepo"})
        elif path == "/":
            self.answer(b"hello")
        else:
            self.answer(b"{}", 404, **{"X-Error-Code": "RepoNotFound"})

    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub(tiny: dict[str, Path], tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    root = shutil.copytree(tiny["sd15"], tmp_path / "repository")
    for name in ("unet/diffusion_pytorch_model", "text_encoder/model", "vae/diffusion_pytorch_model"):
        for suffix in (".bin", ".fp16.safetensors", ".msgpack"):
            (root / (name + suffix)).write_bytes(b"a duplicate")
    (root / "sd-v1-5_step-aware_preference_model.bin").write_bytes(b"weights")
    log: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Hub", (FakeHub,), {"root": root, "log": log}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", log
    server.shutdown()
    server.server_close()


def test_hub_download_then_cache(hub: tuple[str, list[str]], tiny: dict[str, Path], tmp_path: Path) -> None:
    """Only what is needed is downloaded; afterwards the cache serves it offline, and loads."""
    endpoint, log = hub
    source = 'ModelSource(kind="sd15", pretrained_model_name_or_path="org/tiny")'
    code = RESOLVE.format(source=source, scorers='{"spm": "org/tiny"}')
    env = dict(
        HF_HOME=str(tmp_path / "hf"), HF_ENDPOINT=endpoint, HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_PROGRESS_BARS="1"
    )
    out = json.loads(run_python(code, **env))
    assert "path" in out, out["message"]
    own = {f.relative_to(tiny["sd15"]).as_posix() for f in tiny["sd15"].rglob("*") if f.is_file()}
    assert sorted(log) == sorted([*own, "sd-v1-5_step-aware_preference_model.bin"])
    log.clear()
    again = json.loads(run_python(code, HF_HUB_OFFLINE="1", HF_HOME=env["HF_HOME"]))
    assert "path" in again, again["message"]
    assert again["path"] == out["path"] and again["scorers"] == out["scorers"] and log == []
    unet = load_unet(resolve("sd15", Path(out["path"])), torch.float32)
    assert_same_tensors(unet, load_unet(resolve("sd15", tiny["sd15"]), torch.float32))


def test_absent_and_gated_are_not_offline(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    endpoint, _ = hub
    names = 'pretrained_model_name_or_path="org/gated", pretrained_vae_model_name_or_path="org/none"'
    source = f'ModelSource(kind="sd15", {names})'
    code = RESOLVE.format(source=source, scorers='{"pickscore": "org/tiny"}')
    out = json.loads(run_python(code, HF_HOME=str(tmp_path / "hf"), HF_ENDPOINT=endpoint, HF_HUB_DISABLE_XET="1"))
    lines = {line.split("--")[1].split()[0]: line for line in out["message"].splitlines() if "--" in line}
    assert "gated: accept its terms" in lines["pretrained_model_name_or_path"]
    assert "no such repository" in lines["pretrained_vae_model_name_or_path"]
    assert "the repository lacks config.json, model.safetensors" in lines["pickscore_path"]
    assert "cannot be reached" not in out["message"]
