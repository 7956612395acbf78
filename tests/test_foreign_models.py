"""Models of other people: incomplete, damaged, of another kind, in every layout. Each loads right or ends in a line."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny, DDIMScheduler
from runs import flags
from safetensors.torch import load_file, save_file
from test_sources import single_file_tensors
from test_wrong_inputs import refused
from tiny import make_tiny_sd15, make_tiny_sdxl
from torch import Tensor

from spo_fast import train
from spo_fast.config.errors import MissingFilesError
from spo_fast.config.sections import ModelConfig
from spo_fast.models.diffusion import DiffusionModel
from spo_fast.models.files import load, prediction
from spo_fast.models.files.find import resolve_all
from spo_fast.models.files.layout import scheduler_config
from spo_fast.models.files.sources import ModelSource, Resolved
from spo_fast.models.files.toy import WEIGHTS
from spo_fast.models.prompt_cache import PromptCache
from spo_fast.models.tensor_cache import RowCache
from spo_fast.scorers.clip_files import load_any_clip, load_clip
from spo_fast.scorers.latent_files import init_latent_reward, load_latent_reward, save_latent_reward
from spo_fast.scorers.spm import make_tiny_spm

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("tiny")
    found = {"sd15": make_tiny_sd15(base / "sd15"), "sdxl": make_tiny_sdxl(base / "sdxl")}
    found["taesd"] = shutil.copytree(found["sdxl"], base / "taesd")
    channels = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    shutil.rmtree(found["taesd"] / "vae")
    AutoencoderTiny(**channels, **blocks).save_pretrained(found["taesd"] / "vae")
    return found


def copy_of(model: Path, to: Path) -> Path:
    """A copy whose files are links, so that it costs nothing: they are replaced, never written into."""
    return shutil.copytree(model, to, copy_function=os.link)


def resolve(model: Path, **options: Any) -> Resolved:
    kind = "sd15" if "sd15" in model.name else "sdxl"
    return resolve_all(ModelSource(kind=kind, pretrained_model_name_or_path=str(model), **options))


def shards(folder: Path, stem: str, tensors: Tensors, count: int = 3, suffix: str = "safetensors") -> None:
    names = sorted(tensors)
    places = {}
    for i in range(count):
        shard = f"{stem}-{i + 1:05}-of-{count:05}.{suffix}"
        part = {name: tensors[name] for name in names[i::count]}
        torch.save(part, folder / shard) if suffix == "bin" else save_file(part, folder / shard)
        places |= dict.fromkeys(part, shard)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def write(folder: Path, tensors: Tensors, layout: str) -> None:
    """A network's weights as they are found on the hub."""
    (old,) = folder.glob("*.safetensors")
    stem, pickled = old.stem, {"model": "pytorch_model"}.get(old.stem, old.stem)
    old.unlink()
    if layout == "plain":
        save_file(tensors, old)
    elif layout == "fp16":
        save_file(
            {n: t.half() if t.is_floating_point() else t for n, t in tensors.items()},
            folder / f"{stem}.fp16.safetensors",
        )
    elif layout == "bin":
        torch.save(tensors, folder / f"{pickled}.bin")
    else:
        shards(
            folder,
            stem if layout == "shards" else pickled,
            tensors,
            suffix={"shards": "safetensors"}.get(layout, "bin"),
        )


LAYOUTS = ("plain", "fp16", "bin", "shards", "bin shards")
LOADERS: dict[str, Callable[[Resolved], Any]] = {
    "unet": lambda resolved: load.load_unet(resolved, torch.float32),
    "vae": lambda resolved: load.load_vae(resolved, torch.float32),
    "tiny vae": lambda resolved: load.load_vae(resolved, torch.float32),
    "text_encoder": lambda resolved: load.load_text_encoders(resolved, torch.float32)[0],
    "text_encoder_2": lambda resolved: load.load_text_encoders(resolved, torch.float32)[1],
}
VICTIMS = {
    "unet": "mid_block.resnets.0.conv1.weight",
    "vae": "decoder.mid_block.resnets.0.conv1.weight",
    "tiny vae": "decoder.layers.2.conv.0.weight",
    "text_encoder": "encoder.layers.1.mlp.fc2.weight",
    "text_encoder_2": "text_projection.weight",
}


def misshapen(value: Tensor) -> Tensor:
    """As many numbers in another shape, which a reshape would hide."""
    return value.transpose(0, 1).contiguous() if value.shape[0] != value.shape[1] else value[:-1].contiguous()


def spoiled(tensors: Tensors, name: str, fault: str) -> Tensors:
    changed = dict(tensors)
    value = changed.pop(name)
    if fault == "nan":
        changed[name] = value.clone()
        changed[name].view(-1)[-1] = float("nan")
    elif fault == "inf":
        changed[name] = value.clone()
        changed[name].view(-1)[0] = -float("inf")
    elif fault == "unexpected":
        changed |= {name: value, f"{name}_scale": torch.ones(1)}
    elif fault == "misshapen":
        changed[name] = misshapen(value)
    elif fault == "quantised":
        changed[name] = torch.zeros(value.shape, dtype=torch.int8)
    return changed


FAULTS = {
    "missing": "1 missing: {}",
    "unexpected": "1 unexpected: {}_scale",
    "misshapen": "1 of the wrong shape: {} ",
    "nan": "not finite (NaN or infinity) in 1 of its",
    "inf": "not finite (NaN or infinity) in 1 of its",
    "quantised": "1 quantised: {}",
}


def key_of(tensors: Tensors, ending: str) -> str:
    (name,) = (name for name in tensors if name.endswith(ending))
    return name


def model_of(part: str, tiny: dict[str, Path]) -> tuple[Path, str]:
    return tiny["taesd" if part == "tiny vae" else "sdxl"], part.removeprefix("tiny ")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("part", LOADERS)
def test_every_layout_holds_the_same(part: str, layout: str, tiny: dict[str, Path], tmp_path: Path) -> None:
    model, folder = model_of(part, tiny)
    copy = copy_of(model, tmp_path / "m")
    (file,) = (model / folder).glob("*.safetensors")
    tensors = load_file(file)
    for other in ("unet", "vae", "text_encoder", "text_encoder_2") if layout == "fp16" else (folder,):
        (whole,) = (model / other).glob("*.safetensors")
        write(copy / other, load_file(whole), layout)
    state = LOADERS[part](resolve(copy, variant="fp16" if layout == "fp16" else None)).state_dict()
    assert len(state) == len(tensors)
    for name, value in state.items():
        wanted = tensors[name if name in tensors else key_of(tensors, name.removeprefix("text_model."))]
        assert torch.equal(value, wanted.half().float() if layout == "fp16" else wanted), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("part", LOADERS)
def test_directories(part: str, fault: str, layout: str, tiny: dict[str, Path], tmp_path: Path) -> None:
    model, folder = model_of(part, tiny)
    copy = copy_of(model, tmp_path / "m")
    (file,) = (model / folder).glob("*.safetensors")
    tensors = load_file(file)
    victim = key_of(tensors, VICTIMS[part])
    for other in ("unet", "vae", "text_encoder", "text_encoder_2") if layout == "fp16" else (folder,):
        (whole,) = (model / other).glob("*.safetensors")
        content = spoiled(tensors, victim, fault) if other == folder else load_file(whole)
        write(copy / other, content, layout)
    resolved = resolve(copy, variant="fp16" if layout == "fp16" else None)
    with pytest.raises(ValueError) as info:
        LOADERS[part](resolved)
    told = str(info.value)
    assert len(told) <= 300 and "\n" not in told
    assert f"m/{folder}/" in told and VICTIMS[part] in told
    bare = victim.removeprefix("text_model.")  # which names a network has is a matter of transformers' version
    assert FAULTS[fault].format(bare) in told or FAULTS[fault].format(f"text_model.{bare}") in told


SINGLE = {  # part -> name of the victim in the original layout
    "unet": "model.diffusion_model.middle_block.0.in_layers.2.weight",
    "vae": "first_stage_model.decoder.mid.block_1.conv1.weight",
    "text_encoder": "conditioner.embedders.0.transformer.text_model.encoder.layers.1.mlp.fc2.weight",
    "text_encoder_2": "conditioner.embedders.1.model.text_projection",
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("part", SINGLE)
def test_single_files(part: str, fault: str, tiny: dict[str, Path], tmp_path: Path) -> None:
    tensors = single_file_tensors("sdxl", tiny["sdxl"])
    if fault == "misshapen" and part == "text_encoder_2":
        tensors[SINGLE[part]] = tensors[SINGLE[part]][:-1]  # square: its transpose is sound
        changed = tensors
    else:
        changed = spoiled(tensors, SINGLE[part], fault)
    file = tmp_path / "model_sdxl.safetensors"
    save_file({n: t.contiguous() for n, t in changed.items()}, file)
    with pytest.raises(ValueError) as info:
        LOADERS[part](resolve(file, config=str(tiny["sdxl"])))
    told = str(info.value)
    assert len(told) <= 300 and "\n" not in told and "model_sdxl.safetensors" in told
    tail = SINGLE[part].removeprefix("conditioner.embedders.1.model.").removeprefix("model.diffusion_model.")
    assert VICTIMS[part] in told or tail in told  # a converter's names, or the file's


@pytest.mark.parametrize("style", ["with text_model.", "without"])
@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_text_encoders_of_old_and_new_transformers(
    part: str, style: str, tiny: dict[str, Path], tmp_path: Path
) -> None:
    copy = copy_of(tiny["sdxl"], tmp_path / "sdxl")
    file = copy / part / "model.safetensors"
    bare = {name.removeprefix("text_model."): value for name, value in load_file(file).items()}
    named = (
        dict(bare) if style == "without" else {f"text_model.{n}": t for n, t in bare.items() if "projection" not in n}
    )
    named |= {name: value for name, value in bare.items() if name == "text_projection.weight"}
    named["text_model.embeddings.position_ids"] = torch.full((1, 16), 7)  # old files hold it, merged ones a wrong one
    write(copy / part, named, "plain")
    encoder = LOADERS[part](resolve(copy))
    state = {name.removeprefix("text_model."): value for name, value in encoder.state_dict().items()}
    assert state.keys() == bare.keys() and all(torch.equal(state[name], bare[name]) for name in bare)
    constants = [buffer for name, buffer in encoder.named_buffers() if name.endswith("position_ids")]
    assert all(torch.equal(buffer, torch.arange(16)[None]) for buffer in constants)
    write(copy / part, {**bare, **{f"text_model.{n}": t.clone() for n, t in bare.items()}}, "plain")
    with pytest.raises(ValueError, match="under two names"):
        LOADERS[part](resolve(copy))


def test_the_rest_of_a_clip_is_left_out(tiny: dict[str, Path], tmp_path: Path) -> None:
    """OpenAI's own repository holds two towers, merged single files the first encoder's projection."""
    copy = copy_of(tiny["sdxl"], tmp_path / "sdxl")
    tensors = load_file(copy / "text_encoder" / "model.safetensors")
    rest = ("vision_model.post_layernorm.bias", "visual_projection.weight", "text_projection.weight", "logit_scale")
    more = {name: torch.ones(3) for name in rest}
    write(copy / "text_encoder", {**tensors, **more}, "plain")
    file = tmp_path / "sdxl.safetensors"
    prefix = "conditioner.embedders.0.transformer."
    single = {**single_file_tensors("sdxl", tiny["sdxl"]), **{prefix + name: value for name, value in more.items()}}
    save_file({name: value.contiguous() for name, value in single.items()}, file)
    truth = LOADERS["text_encoder"](resolve(tiny["sdxl"])).state_dict()
    for resolved in (resolve(copy), resolve(file, config=str(tiny["sdxl"]))):
        state = LOADERS["text_encoder"](resolved).state_dict()
        assert state.keys() == truth.keys() and all(torch.equal(state[name], truth[name]) for name in truth)


TOKENIZERS: dict[str, tuple[Callable[[Path], Any], str]] = {  # what is done to the toy's folder -> what is said
    "no length": (lambda m: settings_of(m, "tokenizer", model_max_length=None), "has no model_max_length: its text"),
    "no settings": (lambda m: (m / "tokenizer" / "tokenizer_config.json").unlink(), "has no model_max_length"),
    "too long": (lambda m: settings_of(m, "tokenizer_2", model_max_length=77), "model_max_length=77: its text encoder"),
    "of two lengths": (lambda m: settings_of(m, "tokenizer", model_max_length=8), "have model_max_length 8 and 16"),
    "no JSON": (lambda m: replace_file(m / "tokenizer" / "tokenizer.json", "{"), "holds no CLIP tokenizer"),
    "another JSON": (lambda m: replace_file(m / "tokenizer" / "tokenizer.json", "{}"), "holds no CLIP tokenizer"),
    "more tokens": (lambda m: settings_of(m, "text_encoder", vocab_size=100), "555 tokens: its text encoder has"),
}


def replace_file(file: Path, text: str) -> None:
    file.unlink()  # a link
    file.write_text(text)


def settings_of(model: Path, part: str, **changes: Any) -> None:
    file = model / part / ("tokenizer_config.json" if part.startswith("tokenizer") else "config.json")
    found = {name: value for name, value in {**json.loads(file.read_text()), **changes}.items() if value is not None}
    replace_file(file, json.dumps(found))


@pytest.mark.parametrize("dry", [True, False], ids=["dry_run", "run"])
@pytest.mark.parametrize("case", TOKENIZERS)
def test_tokenizers_of_other_text_encoders(
    case: str, dry: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, says = TOKENIZERS[case]
    model = copy_of(WEIGHTS, tmp_path / "toy")
    change(model)
    if case == "more tokens":  # the encoder is whole, and smaller
        tensors = load_file(model / "text_encoder" / "model.safetensors")
        name = key_of(tensors, "token_embedding.weight")
        write(model / "text_encoder", {**tensors, name: tensors[name][:100].contiguous()}, "plain")
    line = flags(tmp_path / "run", pretrained_model_name_or_path=model) + ["--dry_run"] * dry
    error = refused(train.main, line, capsys)
    assert says in error and len(error) <= 300


def test_values_beyond_the_type(tiny: dict[str, Path], tmp_path: Path) -> None:
    """Finite in the file and not in float16: another fault than a NaN in the file, with another remedy."""
    copy = copy_of(tiny["sdxl"], tmp_path / "sdxl")
    tensors = load_file(copy / "unet" / "diffusion_pytorch_model.safetensors")
    tensors["conv_in.weight"] = tensors["conv_in.weight"] * 1e7
    write(copy / "unet", tensors, "plain")
    assert load.load_unet(resolve(copy), torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="values beyond float16's range in 1 of .*conv_in.weight. Use bf16 or no"):
        load.load_unet(resolve(copy), torch.float16)


def test_attention_names_of_old_vaes(tiny: dict[str, Path], tmp_path: Path) -> None:
    """Half of the hub's VAEs, SD-1.5's own among them, have the names of diffusers before 0.17."""
    copy = copy_of(tiny["sd15"], tmp_path / "sd15")
    tensors = load_file(copy / "vae" / "diffusion_pytorch_model.safetensors")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = dict(tensors)
    for name in tensors:
        for new, before in old.items():
            if f".{new}." in name:
                renamed[name.replace(new, before)] = renamed.pop(name)
    assert renamed.keys() != tensors.keys()
    write(copy / "vae", renamed, "bin")
    loaded = load.load_vae(resolve(copy), torch.float32).state_dict()
    assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[n], t) for n, t in tensors.items())
    torch.save({**tensors, **renamed}, copy / "vae" / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="under two names"):
        load.load_vae(resolve(copy), torch.float32)


def test_shards_that_are_not_whole(tiny: dict[str, Path], tmp_path: Path) -> None:
    copy = copy_of(tiny["sdxl"], tmp_path / "sdxl")
    tensors = load_file(copy / "unet" / "diffusion_pytorch_model.safetensors")
    write(copy / "unet", tensors, "shards")
    twice = copy / "unet" / "diffusion_pytorch_model-00002-of-00003.safetensors"
    save_file({**load_file(twice), sorted(tensors)[0]: torch.zeros(2)}, twice)
    with pytest.raises(ValueError, match="holds what another shard holds too: " + sorted(tensors)[0]):
        load.load_unet(resolve(copy), torch.float32)
    index = copy / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(ValueError, match="is no index of shards"):
        load.load_unet(resolve(copy), torch.float32)


# ------------------------------------------------------------------------------------------------------- command line


def toy(tmp_path: Path, part: str, change: Callable[[Tensors], Tensors], layout: str = "plain") -> Path:
    """The shipped toy with a change to the tensors of one part."""
    copy = copy_of(WEIGHTS, tmp_path / "toy")
    (file,) = (copy / part).glob("*.safetensors")
    write(copy / part, change(load_file(file)), layout)
    return copy


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: spoiled(tensors, key_of(tensors, name), "missing")


def with_nan(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: spoiled(tensors, key_of(tensors, name), "nan")


@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        ("text_encoder_2", without("text_projection.weight"), "1 missing: text_projection.weight"),
        ("text_encoder", with_nan("layers.0.mlp.fc1.bias"), "not finite"),
        ("unet", without("conv_out.bias"), "1 missing: conv_out.bias"),
        ("unet", with_nan("conv_in.weight"), "not finite"),
        ("vae", without("post_quant_conv.weight"), "1 missing: post_quant_conv.weight"),
    ],
)
def test_no_cache_of_unsound_models(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str, change: Any, says: str
) -> None:
    model = toy(tmp_path, part, change)
    line = flags(tmp_path / "run", pretrained_model_name_or_path=model, prompt_cache_dir=tmp_path / "cache")
    error = refused(train.main, line, capsys)
    assert f"toy/{part}/" in error and says in error and len(error) <= 300
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


@pytest.mark.parametrize("layout", ["plain", "bin", "shards"])
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2"])
def test_dry_runs_know_missing_tensors(
    part: str, layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names and shapes are looked at, no weight is read."""
    name = {"unet": "conv_out.bias", "vae": "post_quant_conv.bias"}.get(part, "final_layer_norm.bias")
    model = toy(tmp_path, part, without(name), layout)
    line = [*flags(tmp_path / "run", pretrained_model_name_or_path=model), "--dry_run"]
    assert f"{name}. Download or convert it again" in refused(train.main, line, capsys)


def test_caches_keep_finite_rows_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    value = torch.tensor([float("nan")])
    cache = PromptCache(tmp_path, "f", lambda: lambda prompts: {"x": value.expand(len(prompts), 1)})
    with pytest.raises(ValueError, match="what a network made of 'a cat' is not finite in float32: nothing is kept"):
        cache.ensure(["a cat"])
    assert not list(tmp_path.rglob("*.safetensors"))
    sound = RowCache(tmp_path, "f")
    sound.write("a cat", {"x": torch.ones(1)})
    file = sound.path("a cat")
    from spo_fast.models.tensor_cache import checksum

    save_file({"x": value}, file, {"crc32": checksum("a cat", {"x": value}), "key": "a cat"})  # an older version's
    assert sound.read("a cat") is None and "a NaN or an infinity" in caplog.text


# --------------------------------------------------------------------------------------------------- preference models


@pytest.mark.parametrize("layout", ["plain", "bin", "shards", "bin shards"])
@pytest.mark.parametrize("fault", [None, *FAULTS])
@pytest.mark.parametrize("aware", [True, False])
def test_preference_models(fault: str | None, layout: str, aware: bool, tmp_path: Path) -> None:
    folder = make_tiny_spm(tmp_path / "spm")
    if not aware:
        whole = load_file(folder / "model.safetensors")
        plain = {n.removeprefix("model."): t for n, t in whole.items() if "adaLN" not in n and "t_embedder" not in n}
        save_file(plain, folder / "model.safetensors")
    tensors = load_file(folder / "model.safetensors")
    victim = "text_model.encoder.layers.0.mlp.fc2.weight"
    name = key_of(tensors, victim)
    write(folder, spoiled(tensors, name, fault) if fault else tensors, layout)
    if fault is None:
        loaded = load_any_clip(folder)
        assert loaded.config.time_conditioned is aware
        assert all(torch.equal(tensors[f"model.{n}" if aware else n], t) for n, t in loaded.state_dict().items())
        source = ModelSource(kind="sdxl", pretrained_model_name_or_path=str(WEIGHTS))
        scorer = "spm" if aware else "pickscore"
        found = resolve_all(source, {scorer: str(folder)}).scorer_paths[scorer]
        assert load_any_clip(found).config == loaded.config
        return
    with pytest.raises(ValueError) as info:
        load_clip(folder, time_conditioned=aware)
    told = str(info.value)
    assert len(told) <= 300 and "/spm/" in told and victim in told and FAULTS[fault].format(victim) in told


BROKEN_CLIPS: dict[str, tuple[dict[str, Any], str]] = {  # settings of the vision tower -> what is said
    "no heads": ({"num_attention_heads": 0}, "must be whole numbers above 0"),
    "heads in words": ({"num_attention_heads": "4"}, "must be whole numbers above 0"),
    "eps in words": ({"layer_norm_eps": "1e-5"}, "layer_norm_eps='1e-5' a number"),
    "a list": ({"hidden_act": ["gelu"]}, r"CLIP activation \['gelu'\] is not known"),
}


@pytest.mark.parametrize("case", BROKEN_CLIPS)
def test_preference_models_with_broken_settings(case: str, tmp_path: Path) -> None:
    folder, (changes, says) = make_tiny_spm(tmp_path / "spm"), BROKEN_CLIPS[case]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vision_config": {**config["vision_config"], **changes}}))
    with pytest.raises(ValueError, match=says):
        load_any_clip(folder)
    (folder / "config.json").write_text(json.dumps({**config, "text_config": None}))
    with pytest.raises(ValueError, match="text_config is a JSON NoneType, not an object"):
        load_any_clip(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="no known CLIP has") as info:
        load_any_clip(folder)
    assert len(str(info.value)) <= 300
    torch.save({1: torch.ones(1)}, folder / "numbers.bin")
    with pytest.raises(ValueError, match="holds no state dict"):
        load_any_clip(folder / "numbers.bin")


@pytest.fixture(scope="module")
def reward(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    resolved = resolve(tiny["sdxl"])
    parts = load.load_unet(resolved, torch.float32), load.load_text_encoders(resolved, torch.float32)
    return save_latent_reward(init_latent_reward(*parts), tmp_path_factory.mktemp("lrm") / "lrm")


@pytest.mark.parametrize("layout", ["plain", "shards", "bin"])
@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_latent_reward_models(fault: str | None, layout: str, reward: Path, tmp_path: Path) -> None:
    folder = copy_of(reward, tmp_path / "lrm")
    tensors = load_file(folder / "model.safetensors")
    victim = "unet.mid_block.resnets.0.conv1.weight"
    write(folder, spoiled(tensors, victim, fault) if fault else tensors, layout)
    if fault is None:
        loaded = load_latent_reward(folder).state_dict()
        assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[n], t) for n, t in tensors.items())
        return
    with pytest.raises(ValueError) as info:
        load_latent_reward(folder)
    told = str(info.value)
    assert len(told) <= 300 and "/lrm" in told and FAULTS[fault].format(victim) in told


def test_published_latent_reward_in_shards(reward: Path, tiny: dict[str, Path], tmp_path: Path) -> None:
    """A folder a network, as on the hub, one of them in shards."""
    tensors = load_file(reward / "model.safetensors")
    for part in ("unet", "text_encoder", "text_encoder_2"):
        copy_of(tiny["sdxl"] / part, tmp_path / "lrm" / part)
    write(tmp_path / "lrm" / "unet", load_file(tiny["sdxl"] / "unet" / "diffusion_pytorch_model.safetensors"), "shards")
    rest = {"visual_projection": {"weight": tensors["visual_projection.weight"]}, "logit_scale": 2.6592}
    torch.save(rest, tmp_path / "lrm" / "state_dict.pt")
    loaded = load_latent_reward(tmp_path / "lrm").state_dict()
    assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[n], t) for n, t in tensors.items())
    (tmp_path / "lrm" / "state_dict.pt").write_bytes(b"no pickle")
    with pytest.raises(ValueError, match="state_dict.pt holds no logit_scale"):
        load_latent_reward(tmp_path / "lrm")


def test_sharded_scorer_from_the_command_line(tmp_path: Path) -> None:
    """The shipped SPM in shards scores as it does in one file: one log, to the digit."""
    from runs import facts, run_toy

    spm = shutil.copytree(WEIGHTS / "spm", tmp_path / "spm")
    write(spm, load_file(spm / "model.safetensors"), "shards")
    runs = [run_toy(tmp_path / name, max_train_steps=1, spm_path=path) for name, path in (("a", None), ("b", spm))]
    assert facts(runs[0]) == facts(runs[1])


# --------------------------------------------------------------------------------------------- networks of other kinds

KINDS: list[tuple[str, dict[str, Any], str]] = [
    ("unet", {"in_channels": 8, "out_channels": 4}, "in_channels=8, out_channels=4: it edits images"),
    ("unet", {"in_channels": 9, "out_channels": 4}, "in_channels=9, out_channels=4: it inpaints"),
    ("unet", {"in_channels": 5, "out_channels": 4}, "in_channels=5, out_channels=4"),
    ("unet", {"in_channels": 3, "out_channels": 6}, "in_channels=3, out_channels=6"),
    ("unet", {"in_channels": 16, "out_channels": 16}, "latent_channels=3: the UNet takes 16"),
    ("unet", {"time_cond_proj_dim": 256}, "time_cond_proj_dim=256"),
    ("unet", {"class_embed_type": "projection"}, "class_embed_type=projection"),
    ("unet", {"class_embed_type": "timestep"}, "class_embed_type=timestep"),
    ("unet", {"num_class_embeds": 1000}, "num_class_embeds=1000"),
    ("unet", {"encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim_type=text_proj"),
    ("unet", {"encoder_hid_dim": 1024}, "encoder_hid_dim=1024"),
    ("unet", {"addition_embed_type": "image"}, "holds a UNet of kind sd15"),
    ("unet", {"time_embedding_type": "fourier"}, "time_embedding_type=fourier"),
    ("unet", {"attention_type": "gated"}, "attention_type=gated"),
    ("unet", {"cross_attention_dim": 2048}, "cross_attention_dim=2048: the text encoders make 64 + 64 channels"),
    ("unet", {"cross_attention_dim": [128, 64]}, "cross_attention_dim=[128, 64]"),
    (
        "unet",
        {"projection_class_embeddings_input_dim": 104},
        "sizes and the pooled prompt make 112 (a refiner takes 5)",
    ),
    ("unet", {"sample_size": None}, "sample_size=None"),
    ("unet", {"sample_size": [16, 16]}, "sample_size=[16, 16]"),
    ("unet", {"_class_name": "UNetMotionModel"}, "_class_name=UNetMotionModel"),
    ("vae", {"latent_channels": 16}, "latent_channels=16: the UNet takes 3 (in_channels)"),
    ("vae", {"latent_channels": 4}, "latent_channels=4: the UNet takes 3"),
    ("vae", {"latents_mean": [0.1, 0.2, 0.3]}, "latents_mean=[0.1, 0.2, 0.3]"),
    ("vae", {"latents_std": [1, 2, 3]}, "latents_std=[1, 2, 3]"),
    ("vae", {"shift_factor": 0.1159}, "shift_factor=0.1159"),
    ("vae", {"scaling_factor": 0}, "scaling_factor=0"),
    ("vae", {"scaling_factor": None}, "scaling_factor=None"),
    ("vae", {"latent_channels": "3"}, "latent_channels='3', which is no whole number"),
    ("text_encoder", {"hidden_size": "64"}, "hidden_size='64'"),
    ("text_encoder", {"num_attention_heads": 3}, "describes no CLIPTextModel"),
    ("text_encoder", {"hidden_act": "swish2"}, "describes no CLIPTextModel"),
    ("unet", {"norm_num_groups": 7}, "describes no UNet2DConditionModel"),
    ("unet", {"down_block_types": ["A", "B"]}, "describes no UNet2DConditionModel"),
    ("vae", {"_class_name": "AutoencoderKLWan"}, "a VAE must be one of AutoencoderKL, AutoencoderTiny"),
    ("text_encoder", {"model_type": "t5"}, "model_type=t5"),
    ("text_encoder", {"hidden_size": 768}, "the text encoders make 768 + 64 channels"),
    ("text_encoder_2", {"projection_dim": 1280}, "make 1328"),
    ("scheduler", {"prediction_type": "flow_prediction"}, "prediction_type=flow_prediction"),
    ("scheduler", {"prediction_type": "v-prediction"}, "prediction_type=v-prediction"),
]


@pytest.mark.parametrize("dry", [True, False], ids=["dry_run", "run"])
@pytest.mark.parametrize(("part", "change", "says"), KINDS, ids=[f"{p} {c}" for p, c, _ in KINDS])
def test_other_kinds(
    part: str, change: dict[str, Any], says: str, dry: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = copy_of(WEIGHTS, tmp_path / "toy")
    file = model / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    settings = json.loads(file.read_text()) | change
    file.unlink()
    file.write_text(json.dumps(settings))
    line = flags(tmp_path / "run", pretrained_model_name_or_path=model) + ["--dry_run"] * dry
    error = refused(train.main, line, capsys)
    assert says in error and len(error) <= 300
    assert not (tmp_path / "run" / "prompt_cache").exists()


def test_vae_of_the_other_kind(tiny: dict[str, Path], tmp_path: Path) -> None:
    """SD-1.5's and SDXL's latents have one shape: only the scaling factor tells them apart."""
    with pytest.raises(ValueError, match="scaling_factor=0.18215: that is the VAE of sd15"):
        resolve(tiny["sdxl"], pretrained_vae_model_name_or_path=str(tiny["sd15"]))
    with pytest.raises(ValueError, match="scaling_factor=0.13025: that is the VAE of sdxl"):
        resolve(tiny["sd15"], pretrained_vae_model_name_or_path=str(tiny["sdxl"]))
    for kind, other in (("sd15", "sdxl"), ("sdxl", "sd15")):
        file = tmp_path / f"{other}.safetensors"
        save_file({n: t.contiguous() for n, t in single_file_tensors(other, tiny[other]).items()}, file)
        with pytest.raises(ValueError, match=f"is a {other} model with the VAE of {other}"):
            resolve(tiny[kind], pretrained_vae_model_name_or_path=str(file))
    copy = copy_of(tiny["sdxl"], tmp_path / "sdxl")
    file = copy / "vae" / "config.json"
    settings = json.loads(file.read_text())
    del settings["scaling_factor"]  # of which diffusers would make SD-1.5's
    file.unlink()
    file.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="scaling_factor=None: it must be a positive number. SDXL's is 0.13025"):
        resolve(copy)


@pytest.mark.parametrize(
    ("name", "shape", "says"),
    [
        ("model.diffusion_model.input_blocks.0.0.weight", (16, 9, 3, 3), "in_channels=9, out_channels=4: it inpaints"),
        ("model.diffusion_model.input_blocks.0.0.weight", (16, 8, 3, 3), "in_channels=8"),
        ("model.diffusion_model.out.2.weight", (8, 16, 3, 3), "out_channels=8"),
        ("first_stage_model.decoder.conv_in.weight", (16, 16, 3, 3), "latent_channels=16"),
    ],
)
def test_other_kinds_in_single_files(
    name: str, shape: tuple[int, ...], says: str, tiny: dict[str, Path], tmp_path: Path
) -> None:
    file = tmp_path / "sd15.safetensors"
    save_file({**single_file_tensors("sd15", tiny["sd15"]), name: torch.zeros(shape)}, file)
    with pytest.raises(ValueError) as info:
        resolve(file, config=str(tiny["sd15"]))
    assert says in str(info.value) and "sd15.safetensors" in str(info.value) and len(str(info.value)) <= 300


# ------------------------------------------------------------------------------------------------------- predictions

STABLE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ZERO = {"rescale_betas_zero_snr": True}
LDM = "model:\n  target: ldm.models.diffusion.ddpm.LatentDiffusion\n  params:\n    linear_start: {}\n{}"
SGM = "model:\n  params:\n    denoiser_config:\n      params:\n        scaling_config:\n          target: sgm.x.{}\n"


def alphas(dtype: torch.dtype = torch.float32, **changes: Any) -> Tensors:
    return {"alphas_cumprod": DDIMScheduler(**{**STABLE, **changes}).alphas_cumprod.to(dtype)}


Told = tuple[Tensors, dict[str, str], str, Any]
NOTHING = torch.zeros(0)
PREDICTIONS: dict[str, Told] = {  # tensors, metadata, YAML, (prediction, zero terminal SNR) or words of the error
    "nothing": ({}, {}, "", ("epsilon", False)),
    "its own schedule": (alphas(), {}, "", ("epsilon", False)),
    "its own schedule in fp16": (alphas(torch.float16), {}, "", ("epsilon", False)),
    "its own schedule in bf16": (alphas(torch.bfloat16), {}, "", ("epsilon", False)),
    "its own schedule in fp64": (alphas(torch.float64), {}, "", ("epsilon", False)),
    "modelspec epsilon": ({}, {"modelspec.prediction_type": "epsilon"}, "", ("epsilon", False)),
    "modelspec v": ({}, {"modelspec.prediction_type": "v"}, "", ("v_prediction", False)),
    "modelspec v_prediction": ({}, {"modelspec.prediction_type": "v_prediction"}, "", ("v_prediction", False)),
    "ComfyUI's key": ({}, {"modelspec.predict_key": "v"}, "", ("v_prediction", False)),
    "kohya's key": ({}, {"ss_v_parameterization": "True"}, "", ("v_prediction", False)),
    "modelspec unknown": ({}, {"modelspec.prediction_type": "flow"}, "", "predicts 'flow'. Known are epsilon"),
    "marker": ({"v_pred": NOTHING}, {}, "", ("v_prediction", False)),
    "markers": ({"v_pred": NOTHING, "ztsnr": NOTHING}, {}, "", ("v_prediction", True)),
    "zero SNR alone": ({"ztsnr": NOTHING}, {}, "", ("v_prediction", True)),
    "EDM": ({"edm_vpred.sigma_max": torch.ones(1)}, {}, "", "holds edm_vpred.sigma_max: its noise schedule is EDM's"),
    "zero SNR in the table": (alphas(**ZERO), {}, "", ("v_prediction", True)),
    "zero SNR in the table, fp16": (alphas(torch.float16, **ZERO), {}, "", ("v_prediction", True)),
    "another table": (alphas(beta_schedule="linear"), {}, "", "alphas_cumprod of another noise schedule"),
    "a shorter table": ({"alphas_cumprod": torch.ones(10)}, {}, "", "alphas_cumprod of another noise schedule"),
    "a table of integers": ({"alphas_cumprod": torch.ones(1000).int()}, {}, "", "alphas_cumprod of another noise"),
    "YAML eps": ({}, {}, LDM.format("0.00085", "    parameterization: eps\n"), ("epsilon", False)),
    "YAML v": ({}, {}, LDM.format("0.00085", "    parameterization: \"v\"\n"), ("v_prediction", False)),
    "YAML x0": ({}, {}, LDM.format("0.00085", "    parameterization: x0\n"), ("sample", False)),
    "YAML that does not say": ({}, {}, LDM.format("0.00085", ""), ("epsilon", False)),
    "YAML of another program": ({}, {}, "prompts: [a cat]\n", ("epsilon", False)),
    "YAML w": ({}, {}, LDM.format("0.00085", "    parameterization: w\n"), "predicts 'w'"),
    "YAML with other betas": (
        alphas(beta_start=0.001), {}, LDM.format("0.001", "    parameterization: v\n"), ("v_prediction", False)
    ),
    "betas against the table": (alphas(), {}, LDM.format("0.002", ""), "alphas_cumprod of another noise schedule"),
    "betas that are none": ({}, {}, LDM.format("many", ""), "linear_start='many' is not a number"),
    "cosine": ({}, {}, LDM.format("0.00085", "    beta_schedule: cosine\n"), "beta_schedule='cosine' is none of"),
    "YAML with another scale": ({}, {}, LDM.format("0.00085", "    scale_factor: 0.5\n"), "has scale_factor=0.5"),
    **{
        f"YAML with {bad}": (alphas(), {}, LDM.format("0.00085", f"    {bad}\n"), says)
        for bad, says in {
            "timesteps: 0": "timesteps=0 must be above 1",
            "timesteps: 1": "timesteps=1 must be above 1",
            "timesteps: .inf": "timesteps=inf is not a number",
            "linear_end: -1": "linear_end=-1 must be between 0 and 1",
            "linear_end: .nan": "linear_end=nan must be between 0 and 1",
            "beta_schedule: [linear]": "beta_schedule=['linear'] is none of",
        }.items()
    },
    "YAML with its own scale": ({}, {}, LDM.format("0.00085", "    scale_factor: 0.18215\n"), ("epsilon", False)),
    "SGM eps": ({}, {}, SGM.format("EpsScaling"), ("epsilon", False)),
    "SGM v": ({}, {}, SGM.format("VScaling"), ("v_prediction", False)),
    "SGM EDM": ({}, {}, SGM.format("EDMScaling"), "has EDMScaling"),
    "no YAML": ({}, {}, "model: [", "beside the model's file, is not YAML"),
    "metadata against YAML": (
        {}, {"modelspec.prediction_type": "epsilon"}, LDM.format("0.00085", "    parameterization: v\n"),
        "its metadata (modelspec.prediction_type) says epsilon; sd15.yaml says v_prediction",
    ),
    "marker against metadata": ({"v_pred": NOTHING}, {"modelspec.prediction_type": "epsilon"}, "", "says epsilon; its"),
    "epsilon at zero SNR": (alphas(**ZERO), {"modelspec.prediction_type": "epsilon"}, "", "zero terminal SNR"),
}  # fmt: skip


@pytest.fixture(scope="module")
def unsaid(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Settings of the tiny SD-1.5 in which, as in the published ones, no prediction is named."""
    folder = copy_of(tiny["sd15"], tmp_path_factory.mktemp("config") / "sd15")
    file = folder / "scheduler" / "scheduler_config.json"
    settings = json.loads(file.read_text())
    del settings["prediction_type"]
    file.unlink()
    file.write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("name", PREDICTIONS)
def test_predictions_of_single_files(name: str, tiny: dict[str, Path], unsaid: Path, tmp_path: Path) -> None:
    tensors, metadata, text, wanted = PREDICTIONS[name]
    file = tmp_path / "sd15.safetensors"
    save_file({**single_file_tensors("sd15", tiny["sd15"]), **tensors}, file, metadata)
    if text:
        file.with_suffix(".yaml").write_text(text)
    if isinstance(wanted, str):
        with pytest.raises(ValueError) as info:
            resolve(file, config=str(unsaid))
        assert wanted in str(info.value) and len(str(info.value)) <= 300
        return
    settings = scheduler_config(resolve(file, config=str(unsaid)))
    scheduler = DDIMScheduler.from_config(settings)
    assert (scheduler.config.prediction_type, scheduler.config.rescale_betas_zero_snr) == wanted
    if "alphas_cumprod" in tensors:
        assert torch.allclose(
            scheduler.alphas_cumprod.double(), tensors["alphas_cumprod"].double(), rtol=1e-2, atol=1e-5
        )


def test_a_v_prediction_file_is_trained_as_one(tiny: dict[str, Path], unsaid: Path, tmp_path: Path) -> None:
    file = tmp_path / "sd15.safetensors"
    save_file({**single_file_tensors("sd15", tiny["sd15"]), "v_pred": NOTHING}, file)
    cfg = ModelConfig(model="sd15", pretrained_model_name_or_path=str(file), mixed_precision="no")
    model = DiffusionModel(cfg, resolve(file, config=str(unsaid)), torch.device("cpu"), tmp_path / "cache")
    assert model._ddim.config["prediction_type"] == "v_prediction"
    abar = model._ddim.alphas_cumprod[model.table(4, 1.0).timesteps].double()
    c, d = model.table(4, 1.0).coefficients[:, 2:4].T  # x0 = sqrt(abar) x_t - sqrt(1 - abar) v
    assert torch.allclose(c, abar.sqrt()) and torch.allclose(d, -(1 - abar).sqrt())


def test_settings_given_with_a_file_count(tiny: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "sd15.safetensors"
    save_file({**single_file_tensors("sd15", tiny["sd15"]), "v_pred": NOTHING}, file)
    with pytest.raises(ValueError, match="its settings says epsilon; its tensor v_pred says v_prediction"):
        resolve(file, config=str(tiny["sd15"]))


def test_a_directorys_weights_that_say_otherwise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = copy_of(WEIGHTS, tmp_path / "toy")  # a v-prediction
    file = model / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    file.unlink()
    save_file(tensors, file, {"modelspec.prediction_type": "epsilon"})
    error = refused(train.main, flags(tmp_path / "run", pretrained_model_name_or_path=model), capsys)
    assert "says epsilon (modelspec.prediction_type), but scheduler/scheduler_config.json v_prediction" in error


@pytest.mark.parametrize("schedule", ["scaled_linear", "linear"])
def test_schedules_without_a_library(schedule: str) -> None:
    settings = {**STABLE, "beta_schedule": schedule}
    plain, zero = DDIMScheduler(**settings), DDIMScheduler(**settings, rescale_betas_zero_snr=True)
    ours = torch.tensor(prediction.alphas_cumprod(settings))
    assert torch.allclose(ours, plain.alphas_cumprod, rtol=1e-4, atol=0)
    rescaled = torch.tensor(prediction.rescaled_to_zero(ours.tolist()))
    assert torch.allclose(rescaled, zero.alphas_cumprod, rtol=1e-4, atol=1e-7) and rescaled[-1] == 0


# ------------------------------------------------------------------------------------------------------- variants


@pytest.mark.parametrize("layout", ["one file", "shards"])
def test_fp16_alone_names_the_variant(layout: str, tiny: dict[str, Path], tmp_path: Path) -> None:
    copy = copy_of(tiny["sdxl"], tmp_path / "sdxl")
    for part in ("unet", "text_encoder", "text_encoder_2", "vae"):
        (file,) = (copy / part).glob("*.safetensors")
        write(copy / part, load_file(file), "fp16")
        if layout == "shards":
            half = copy / part / f"{file.stem}.fp16.safetensors"
            shards(copy / part, f"{file.stem}.fp16", load_file(half))
            (copy / part / f"{file.stem}.fp16.safetensors.index.json").rename(
                copy / part / f"{file.stem}.safetensors.index.fp16.json"
            )
            half.unlink()
    with pytest.raises(MissingFilesError, match="use --variant fp16"):
        resolve(copy)
    resolved = resolve(copy, variant="fp16")
    plain = load.load_unet(resolve(tiny["sdxl"]), torch.float16).state_dict()
    assert all(torch.equal(plain[n], t) for n, t in load.load_unet(resolved, torch.float16).state_dict().items())
    with pytest.raises(MissingFilesError, match="leave --variant out"):
        resolve(tiny["sdxl"], variant="fp16")
    with pytest.raises(MissingFilesError, match=r"vae/diffusion_pytorch_model.*fp16.*give that file itself"):
        resolve(tiny["sdxl"], pretrained_vae_model_name_or_path=str(copy))


# ------------------------------------------------------------------------------------------------- sizes that are told


def test_size_told(tiny: dict[str, Path], tmp_path: Path) -> None:
    """SDXL's UNet is told the run's size, or with native the one it was made for, as the published SPMs were."""

    def told(**settings: Any) -> list[float]:
        cfg = ModelConfig(model="sdxl", mixed_precision="no", **settings)
        model = DiffusionModel(cfg, resolve(tiny["sdxl"]), torch.device("cpu"), tmp_path / "cache")
        cond = model.cond(["a cat", "a dog"])
        assert cond.cond["time_ids"].tolist() == 2 * cond.uncond["time_ids"].tolist()
        return cond.uncond["time_ids"][0].tolist()

    assert told() == told(size_told="native") == [64, 64, 0, 0, 64, 64]
    assert told(height=32, width=48) == [32, 48, 0, 0, 32, 48]
    assert told(height=32, width=48, size_told="native") == [64, 64, 0, 0, 64, 64]
    with pytest.raises(ValueError, match="size_told=native is SDXL's"):
        ModelConfig(model="sd15", size_told="native")
