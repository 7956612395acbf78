"""LoRA files of other programs. The truth is W + alpha / rank * up @ down, added by hand in float64, and diffusers."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
from safetensors.torch import load_file, save_file
from tiny import make_tiny_sd15, make_tiny_sdxl
from torch import Tensor

from spo_fast.config.training import AdapterConfig
from spo_fast.data.files import read_json
from spo_fast.models.files import find, sources
from spo_fast.models.files.lora import apply_lora, layer_names, ldm_names, read_file, read_lora
from spo_fast.models.files.lora_files import find_lora

KINDS = ("sd15", "sdxl")


@pytest.fixture(scope="module")
def unets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Tiny UNets of both kinds in float64: nobody may change them."""
    root = tmp_path_factory.mktemp("tiny")
    made = {"sd15": make_tiny_sd15(root / "sd15"), "sdxl": make_tiny_sdxl(root / "sdxl")}
    return {
        kind: UNet2DConditionModel.from_pretrained(path, subfolder="unet").double().eval().requires_grad_(False)
        for kind, path in made.items()
    }


@torch.no_grad()
def output(unet: Any) -> Tensor:
    """Of inputs that are the same at every call."""
    g, c = torch.Generator().manual_seed(5), unet.config

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(unet.dtype)

    added = None
    if c.addition_embed_type is not None:
        pooled = c.projection_class_embeddings_input_dim - 6 * c.addition_time_embed_dim
        added = {"text_embeds": draw(2, pooled), "time_ids": draw(2, 6)}
    x, text = draw(2, 4, 8, 8), draw(2, 7, c.cross_attention_dim)
    return unet(x, torch.tensor(501), text, added_cond_kwargs=added).sample.double()


# ------------------------------------------------------------------------------------------------------ names of layers


def in_ldm(layer: str) -> str:
    """A layer's name in the original network, for UNets of two resolutions, one ResNet each (two in the decoder)."""
    singles = {
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    }
    if layer in singles:
        return singles[layer]
    if layer == "up_blocks.0.upsamplers.0.conv":
        return "output_blocks.1.UP.conv"  # behind the attention, if there is one
    side, rest = layer.split(".", 1)
    if side == "mid_block":
        what, number, rest = rest.split(".", 2)
        place = "middle_block.1" if what == "attentions" else f"middle_block.{2 * int(number)}"
    else:
        block, what, number, rest = rest.split(".", 3)
        first = {"down_blocks": [1, 3], "up_blocks": [0, 2]}[side][int(block)]
        blocks = {"down_blocks": "input_blocks", "up_blocks": "output_blocks"}[side]
        place = f"{blocks}.{first + int(number)}.{int(what == 'attentions')}"
    resnet = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1"}
    resnet |= {"conv_shortcut": "skip_connection", "norm1": "in_layers.0", "norm2": "out_layers.0"}
    return f"{place}.{resnet.get(rest, rest) if what == 'resnets' else rest}"


def sgm(layer: str, unet: Any) -> str:
    return in_ldm(layer).replace("UP", str(1 + hasattr(unet.up_blocks[0], "attentions")))


def processor(layer: str, _: Any) -> str:
    """diffusers before 0.22: LoRAs of attention were attention processors."""
    return re.sub(r"\.(to_[qkv]|to_out)(\.0)?$", r".processor.\1", layer)


def same(layer: str, _: Any) -> str:
    return layer


def flat(name: Callable[[str, Any], str]) -> Callable[[str, Any], str]:
    return lambda layer, unet: name(layer, unet).replace(".", "_")


STYLES: dict[str, tuple[str, Callable[[str, Any], str], str, str]] = {  # prefix, layer, endings
    "diffusers": ("unet.", same, ".lora.down", ".lora.up"),
    "diffusers, old": ("unet.", processor, "_lora.down", "_lora.up"),
    "attention processors": ("", processor, "_lora.down", "_lora.up"),
    "diffusers, linear layers": ("unet.", same, ".lora_linear_layer.down", ".lora_linear_layer.up"),
    "diffusers, PEFT's endings": ("unet.", same, ".lora_A", ".lora_B"),
    "of a UNet alone": ("", same, ".lora_A", ".lora_B"),
    "PEFT": ("base_model.model.", same, ".lora_A", ".lora_B"),
    "kohya": ("lora_unet_", flat(same), ".lora_down", ".lora_up"),
    "kohya, SGM": ("lora_unet_", flat(sgm), ".lora_down", ".lora_up"),
    "kohya's endings": ("unet.", same, ".lora_down", ".lora_up"),
    "LyCORIS": ("lycoris_", flat(same), ".lora_down", ".lora_up"),
    "OneTrainer": ("unet.", sgm, ".lora_down", ".lora_up"),
    "OneTrainer, inside": ("lora_unet.", same, ".lora_down", ".lora_up"),
    "ComfyUI": ("diffusion_model.", sgm, ".lora_down", ".lora_up"),
    "ComfyUI, PEFT's endings": ("diffusion_model.", sgm, ".lora_A", ".lora_B"),
}
OLD = ("diffusers, old", "attention processors")  # know attention only


def named(style: str, layer: str, unet: Any) -> tuple[str, str, str]:
    """(the layer's name with its prefix, the names of its two matrices)."""
    prefix, name, down, up = STYLES[style]
    whole = prefix + name(layer, unet)
    return whole, f"{whole}{down}.weight", f"{whole}{up}.weight"


# ------------------------------------------------------------------------------------------------------------- files


def layers_of(unet: Any, style: str = "kohya") -> dict[str, torch.Size]:
    """The layers a style can name: all that a LoRA can be on."""
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    every = {name: m.weight.shape for name, m in unet.named_modules() if isinstance(m, kinds)}
    attention = tuple(f".{end}" for end in ("to_q", "to_k", "to_v", "to_out.0"))
    return {n: s for n, s in every.items() if style not in OLD or n.endswith(attention)}


def matrices(unet: Any, ranks: Callable[[int], int], style: str = "kohya") -> dict[str, tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    made = {}
    for number, (name, shape) in enumerate(layers_of(unet, style).items()):
        r, ones = ranks(number), [1] * (len(shape) - 2)
        down = torch.randn(r, *shape[1:], generator=g) / math.prod(shape[1:]) ** 0.5
        made[name] = down, 0.3 * torch.randn(shape[0], r, *ones, generator=g)
    return made


def merged(unet: Any, changes: dict[str, Tensor]) -> Tensor:
    """What the UNet gives with these added to its parameters, in float64."""
    other = copy.deepcopy(unet)
    with torch.no_grad():
        for name, change in changes.items():
            other.get_parameter(name).add_(change.double())
    return output(other)


def product(down: Tensor, up: Tensor, scale: float) -> Tensor:
    return scale * torch.einsum("or,ri...->oi...", up.double().flatten(1), down.double())


def drawn(unet: Any, file: Path) -> Tensor:
    other = copy.deepcopy(unet)
    apply_lora(file, other)
    return output(other)


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() < 1e-9 * b.abs().max())


def half(value: Tensor) -> Tensor:
    return value.half()


VARIANTS: dict[str, dict[str, Any]] = {
    "whole": {},
    "alpha": {"alpha": lambda n: 2.0},
    "ranks and alphas of all sizes": {"alpha": lambda n: (0.5, 2.0, 8.0, 3.0)[n % 4], "ranks": lambda n: 1 + n % 3},
    "ranks of all sizes": {"ranks": lambda n: 1 + n % 3},
    "half": {"alpha": lambda n: 2.0, "cast": half},
    "alpha as an integer": {"alpha": lambda n: 2},
    "mixed with diffusers' names": {"alpha": lambda n: 2.0, "other": "diffusers"},
    "mixed with SGM's names": {"alpha": lambda n: 2.0, "other": "kohya, SGM"},
}


def made_file(unet: Any, style: str, variant: str, file: Path) -> dict[str, Tensor]:
    """Writes it; returns what it adds to each weight."""
    v, state, changes = VARIANTS[variant], {}, {}
    alpha, cast = v.get("alpha"), v.get("cast", lambda value: value)
    for n, (layer, pair) in enumerate(matrices(unet, v.get("ranks", lambda n: 4), style).items()):
        down, up = map(cast, pair)
        whole, down_name, up_name = named(v.get("other", style) if n % 3 == 1 else style, layer, unet)
        state |= {down_name: down, up_name: up}
        if alpha is not None:
            state[f"{whole}.alpha"] = torch.tensor(alpha(n))
        changes[f"{layer}.weight"] = product(down, up, 1.0 if alpha is None else alpha(n) / len(down))
    save_file(state, file)
    return changes


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_style_is_read_whole(unets: dict[str, Any], tmp_path: Path, kind: str, style: str, variant: str) -> None:
    file = tmp_path / "lora.safetensors"
    changes = made_file(unets[kind], style, variant, file)
    lora = read_file(file, unets[kind])
    assert {f"{layer}.weight" for layer in lora.layers} == changes.keys() and not lora.changes
    for layer, found in lora.layers.items():
        torch.testing.assert_close(product(*found), changes[f"{layer}.weight"], rtol=1e-12, atol=0)
    assert lora.has_alpha == ("alpha" in VARIANTS[variant]) == ("the file gives none" not in str(lora))


@pytest.mark.parametrize("kind", KINDS)
def test_the_network_gives_what_merged_weights_give(unets: dict[str, Any], tmp_path: Path, kind: str) -> None:
    unet, file = unets[kind], tmp_path / "lora.safetensors"
    for variant in ("ranks and alphas of all sizes", "mixed with SGM's names"):
        changes = made_file(unet, "kohya", variant, file)
        found = drawn(unet, file)
        assert close(found, merged(unet, changes)) and not close(found, output(unet))


@pytest.mark.parametrize("kind", KINDS)
def test_names_of_the_original_network_are_those_that_diffusers_converts(kind: str) -> None:
    """Of the published networks' settings: each layer's LDM name leads back to it, and no two names meet."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    config = read_json(sources.CONFIGS / kind / "unet" / "config.json")
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(config)
    layers = [n.removesuffix(".weight") for n, _ in unet.named_parameters() if n.endswith(".weight")]
    known = layer_names(unet)
    assert set(known.values()) == set(layers)
    prefix = "model.diffusion_model."
    ldm = {
        name: layer for name, layer in known.items() if re.match("input_|middle_|output_|time_embed_|label_|out_", name)
    }
    assert len({*ldm.values()}) == len(layers)
    # underscores back to dots, by the blocks' names and what stands in the layers' own
    words = r"(input|middle|output)_(blocks?)|time_embed|label_emb|(in|out|emb)_layers|skip_connection|proj_(in|out)"
    words += r"|transformer_blocks|to_(q|k|v|out)"

    def dotted(name: str) -> str:
        kept = re.sub(words, lambda m: m[0].replace("_", "-"), name)
        return kept.replace("_", ".").replace("-", "_")

    names = [name for name in ldm if not name.endswith("to_out")]
    state = {f"{prefix}{dotted(name)}.{end}": torch.tensor(0.0) for name in names for end in ("weight", "bias")}
    converted = convert_ldm_unet_checkpoint(dict(state), config)
    assert {n.rpartition(".")[0] for n in converted} == set(layers)
    theirs = {id(value): name for name, value in converted.items()}  # the same tensor under both names
    for name in names:
        assert theirs[id(state[f"{prefix}{dotted(name)}.weight"])] == f"{known[name]}.weight"
    assert ldm_names(unet)["conv_in"] == "input_blocks.0.0"


@pytest.mark.parametrize("style", ["diffusers", "diffusers, old", "diffusers, PEFT's endings", "kohya"])
def test_diffusers_reads_the_same(unets: dict[str, Any], tmp_path: Path, style: str) -> None:
    """On attention layers, where diffusers reads these styles right."""
    unet, state = unets["sdxl"], {}
    for layer, (down, up) in matrices(unet, lambda n: 4, "diffusers, old").items():
        whole, down_name, up_name = named(style, layer, unet)
        state |= {down_name: down, up_name: up}
        if style == "kohya":
            state[f"{whole}.alpha"] = torch.tensor(2.0)
    save_file(state, tmp_path / "lora.safetensors")
    loader, theirs = StableDiffusionXLLoraLoaderMixin, copy.deepcopy(unet)
    found, alphas = loader.lora_state_dict(str(tmp_path), weight_name="lora.safetensors", unet_config=unet.config)
    loader.load_lora_into_unet(found, alphas, theirs, adapter_name="default")
    assert close(drawn(unet, tmp_path / "lora.safetensors"), output(theirs.double()))


# ------------------------------------------------------------------------------------------------- what stands beside


def test_changes_without_matrices_are_added(unets: dict[str, Any], tmp_path: Path) -> None:
    """What ComfyUI saves of norms and biases, LyCORIS' norms, and a bias of a LoRA, even on a layer without one."""
    unet, g = unets["sdxl"], torch.Generator().manual_seed(2)
    query = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    assert unet.get_submodule(query).bias is None

    def like(name: str) -> Tensor:
        return 0.2 * torch.randn(unet.get_parameter(name).shape, generator=g)

    down, up = torch.randn(2, 32, generator=g), torch.randn(32, 2, generator=g)
    changes = {
        name: like(name) for name in ("conv_norm_out.weight", "conv_in.bias", "conv_out.weight", "conv_out.bias")
    }
    changes |= {name: like(name) for name in ("mid_block.resnets.0.norm1.weight", "mid_block.resnets.0.norm1.bias")}
    bias = torch.randn(32, generator=g)
    state = {
        "diffusion_model.out.0.diff": changes["conv_norm_out.weight"],
        "diffusion_model.input_blocks.0.0.diff_b": changes["conv_in.bias"],
        "lora_unet_out_2.diff": changes["conv_out.weight"],
        "lora_unet_out_2.diff_b": changes["conv_out.bias"],
        "lora_unet_mid_block_resnets_0_norm1.w_norm": changes["mid_block.resnets.0.norm1.weight"],
        "lora_unet_mid_block_resnets_0_norm1.b_norm": changes["mid_block.resnets.0.norm1.bias"],
        f"unet.{query}.lora_A.weight": down,
        f"unet.{query}.lora_B.weight": up,
        f"unet.{query}.lora_B.bias": bias,
        f"unet.{query}.alpha": torch.tensor(3.0),
    }
    save_file(state, tmp_path / "lora.safetensors")
    truth = copy.deepcopy(unet)
    truth.get_submodule(query).bias = torch.nn.Parameter(1.5 * bias.double())
    changes[f"{query}.weight"] = product(down, up, 1.5)
    assert close(drawn(unet, tmp_path / "lora.safetensors"), merged(truth, changes))


def test_a_fused_network_draws_the_same(unets: dict[str, Any], tmp_path: Path) -> None:
    """Mixed ranks and alphas on every layer, biases on layers that had none, changed norms."""
    from spo_fast.models.fuse import fuse

    unet, file = copy.deepcopy(unets["sdxl"]).float(), tmp_path / "lora.safetensors"
    made_file(unet, "kohya", "ranks and alphas of all sizes", file)
    state, g = load_file(file), torch.Generator().manual_seed(6)
    for name, module in unet.named_modules():
        key = "lora_unet_" + name.replace(".", "_")
        if f"{key}.alpha" in state:
            state[f"{key}.lora_up.bias"] = 0.1 * torch.randn(len(module.weight), generator=g)
        elif "norm" in name and hasattr(module, "weight"):
            state[f"{key}.diff"] = 0.1 * torch.randn(len(module.weight), generator=g)
    save_file(state, file)
    apply_lora(file, unet)
    plain = output(unet)
    fuse(unet)
    assert (output(unet) - plain).abs().max() < 1e-4 * plain.abs().max()
    assert (plain - output(unets["sdxl"])).abs().max() > 0.1 * plain.abs().max()


def test_a_convolution_between_the_matrices(unets: dict[str, Any], tmp_path: Path) -> None:
    """LoCon's lora_mid: three convolutions one after the other, run as such here."""
    unet, g = unets["sd15"], torch.Generator().manual_seed(2)
    down, mid, up = (torch.randn(*s, generator=g) for s in ((2, 16, 1, 1), (2, 2, 3, 3), (16, 2, 1, 1)))
    key = "lora_unet_down_blocks_0_resnets_0_conv1"
    state = {f"{key}.lora_down.weight": down, f"{key}.lora_mid.weight": mid, f"{key}.lora_up.weight": up}
    save_file({**state, f"{key}.alpha": torch.tensor(1.0)}, tmp_path / "lora.safetensors")
    other = copy.deepcopy(unet)
    apply_lora(tmp_path / "lora.safetensors", other)
    x = torch.randn(1, 16, 5, 5, generator=g, dtype=torch.float64)
    conv = torch.nn.functional.conv2d
    change = conv(conv(conv(x, down.double()), mid.double(), padding=1), up.double()) * 0.5
    layer = "down_blocks.0.resnets.0.conv1"
    assert close(other.get_submodule(layer)(x), unet.get_submodule(layer)(x) + change)


@pytest.mark.parametrize("flatten", [True, False])
def test_a_pointwise_convolution_and_a_linear_layer_are_one(
    unets: dict[str, Any], tmp_path: Path, flatten: bool
) -> None:
    unet = unets["sd15" if flatten else "sdxl"]  # whose proj_in is a convolution, and a linear layer
    pair = matrices(unet, lambda n: 4)["mid_block.attentions.0.proj_in"]
    down, up = (m.flatten(1) if flatten else m[:, :, None, None] for m in pair)
    assert down.ndim == (2 if flatten else 4)
    key = "lora_unet_mid_block_attentions_0_proj_in"
    save_file({f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}, tmp_path / "lora.safetensors")
    truth = merged(unet, {"mid_block.attentions.0.proj_in.weight": product(*pair, 1.0)})
    assert close(drawn(unet, tmp_path / "lora.safetensors"), truth)


# ----------------------------------------------------------------------------------------------------------- settings


def peft_lora(unet: Any, **options: Any) -> tuple[Any, Any]:
    """(the UNet wearing a random LoRA of PEFT, its PEFT model)."""
    from peft import LoraConfig, get_peft_model

    targets = ["to_q", "to_k", "conv1", "proj_in"]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        settings = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, "target_modules": targets, **options}
        model = get_peft_model(copy.deepcopy(unet), LoraConfig(**settings))
    return model.base_model.model, model


SETTINGS: dict[str, dict[str, Any]] = {
    "alpha": {},
    "rank pattern": {"rank_pattern": {"to_q": 2, "down_blocks.*.conv1": 8}},
    "alpha pattern": {"alpha_pattern": {"to_q": 2, "^mid_block.resnets.0.conv1": 9, r".*attn2\.to_k": 1}},
    "both": {"alpha_pattern": {"to_q": 2}, "rank_pattern": {"to_q": 2, "to_k": 3}},
    "rsLoRA": {"use_rslora": True},
    "rsLoRA with patterns": {"use_rslora": True, "alpha_pattern": {"to_q": 2}, "rank_pattern": {"to_q": 2}},
}


@pytest.mark.parametrize("how", ["diffusers", "of a UNet alone", "PEFT's folder", "PEFT's folder, renamed"])
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_give_the_strength_that_peft_computes_with(
    unets: dict[str, Any], tmp_path: Path, name: str, how: str
) -> None:
    worn, model = peft_lora(unets["sdxl"], **SETTINGS[name])
    truth = output(worn)
    if how.startswith("PEFT's folder"):
        model.save_pretrained(tmp_path)
        if how.endswith("renamed"):
            (tmp_path / "adapter_model.safetensors").rename(tmp_path / "mine.safetensors")
    else:
        prefix = "unet." if how == "diffusers" else ""
        from peft import get_peft_model_state_dict

        state = {
            f"{prefix}{n.removeprefix('base_model.model.')}": v for n, v in get_peft_model_state_dict(model).items()
        }
        config = {
            f"{prefix}{k}": list(v) if isinstance(v, set) else v
            for k, v in model.peft_config["default"].to_dict().items()
        }
        metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(config)}
        save_file(state, tmp_path / "adapter.safetensors", metadata=metadata)
    assert close(drawn(unets["sdxl"], find.find_contender(str(tmp_path), "sdxl", "--lora")[1]), truth)


# -------------------------------------------------------------------------------------------------- what is refused

KEY = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def two(key: str = KEY) -> dict[str, Tensor]:
    return {f"{key}.lora_down.weight": torch.ones(2, 32), f"{key}.lora_up.weight": torch.ones(32, 2)}


def settings(**more: Any) -> dict[str, str]:
    config = {"unet.r": 2, "unet.lora_alpha": 2, **{f"unet.{k}": v for k, v in more.items()}}
    return {"lora_adapter_metadata": json.dumps(config)}


def nothing(**more: Tensor) -> dict[str, Tensor]:
    return {f"{KEY}.{name.replace('__', '.')}": value for name, value in more.items()}


ONE = torch.ones(1)
REFUSED: dict[str, tuple[Any, str]] = {  # tensors (and metadata) -> what is said of them
    "DoRA of another base": ({**two(), f"{KEY}.dora_scale": ONE}, "has magnitudes of"),
    "DoRA of columns": ({**two(), f"{KEY}.dora_scale": torch.ones(4, 8)}, "has magnitudes of"),
    "DoRA of magnitudes alone": ({f"unet.{LAYER}.lora_magnitude_vector": ONE}, "there without the two matrices"),
    "DoRA in part": (
        {**two(), **two(KEY.replace("to_q", "to_k")), f"unet.{LAYER}.lora_magnitude_vector.weight": torch.ones(32)},
        "without the magnitudes of some",
    ),
    "DoRA by its settings alone": ((two(), settings(use_dora=True)), "without the magnitudes of some"),
    "LoHa": (nothing(hada_w1_a=ONE, hada_w1_b=ONE, hada_w2_a=ONE, hada_w2_b=ONE), "is a LoHa"),
    "LoHa of many layers": ({f"lora_unet_{n}.hada_w1_a": ONE for n in range(3000)}, "is a LoHa"),
    "LoKr": (nothing(lokr_w1=ONE, lokr_w2_a=ONE, lokr_w2_b=ONE), "is a LoKr"),
    "OFT": (nothing(oft_blocks=ONE), "is an OFT"),
    "(IA)3": (nothing(on_input=ONE, weight=ONE), r"is an \(IA\)3"),
    "GLoRA": (nothing(a1__weight=ONE, a2__weight=ONE, b1__weight=ONE, b2__weight=ONE), "is a GLoRA"),
    "a text encoder, kohya": (
        {**two(), "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": ONE},
        "1 tensors of text enc",
    ),
    "SDXL's second, kohya": (two("lora_te2_text_model_encoder_layers_0_mlp_fc1"), "2 tensors of text encoders"),
    "a text encoder, diffusers": ({**two(), "text_encoder.text_model.x.lora_A.weight": ONE}, "text encoders"),
    "a second one, diffusers": (
        {**two(), "text_encoder_2.text_model.x.lora_linear_layer.up.weight": ONE},
        "text encod",
    ),
    "a text encoder, ComfyUI": ({**two(), "text_encoders.clip_l.transformer.x.lora_up.weight": ONE}, "text encoders"),
    "a text encoder, OneTrainer": ({**two(), "clip_g.text_model.x.lora_up.weight": ONE}, "text encoders"),
    "an embedding, OneTrainer": (
        {**two(), "bundle_emb.me.string_to_param": ONE},
        "bundle_emb.me.string_to_param, whose",
    ),
    "a weight": ({**two(), f"unet.{LAYER}.weight": ONE}, "whose meaning is not known"),
    "a bias of the first matrix": ({**two(), f"unet.{LAYER}.lora_A.bias": ONE}, "whose meaning is not known"),
    "a weight to be set": ({**two(), f"{KEY}.set_weight": ONE}, "whose meaning is not known"),
    "a shape to be given": ({**two(), f"{KEY}.reshape_weight": ONE}, "whose meaning is not known"),
    "a scalar": ({**two(), f"{KEY}.scalar": ONE}, "whose meaning is not known"),
    "a name of nothing": ({"hello": ONE}, "holds more than a LoRA of a UNet: hello"),
    "a very long name": ({"hello" * 500: ONE}, "holds more than a LoRA of a UNet: hellohello"),
    "a very long layer": (two("lora_unet_" + "hello" * 500), "has no layer hello"),
    "a whole model": ({"model.diffusion_model.input_blocks.0.0.weight": ONE}, "whose meaning is not known"),
    "what PEFT calls it inside": ({f"{LAYER}.lora_A.default.weight": ONE}, "whose meaning is not known"),
    "no tensor": ({}, "is empty"),
    "no up": ({f"{KEY}.lora_down.weight": torch.ones(2, 32)}, "lora_down.weight is there without its lora_up"),
    "no down": ({f"{KEY}.lora_up.weight": torch.ones(32, 2)}, "lora_up.weight is there without its lora_down"),
    "no A": ({f"unet.{LAYER}.lora_B.weight": torch.ones(32, 2)}, "lora_B.weight is there without its lora_down"),
    "alpha alone": ({**two(), "lora_unet_conv_in.alpha": ONE}, "conv_in.alpha is there without the two matrices"),
    "mid alone": ({**two(), "lora_unet_conv_in.lora_mid.weight": ONE}, "is there without the two matrices"),
    "a bias alone": ({**two(), "unet.conv_in.lora_B.bias": ONE}, "is there without the two matrices"),
    "one layer twice": (
        {**two(), f"unet.{LAYER}.lora.down.weight": torch.ones(2, 32)},
        "two tensors for one: .* and .*",
    ),
    "a whole file twice": ({**two(), **two(f"unet.{LAYER}")}, "two tensors for one: .* and .*"),
    "a change beside": ({**two(), f"{KEY}.diff": torch.ones(32, 32)}, "loaders differ in which they take"),
    "ranks that differ": ({**two(), f"{KEY}.lora_up.weight": torch.ones(32, 3)}, "have ranks 2 and 3"),
    "rank 0": (
        {f"{KEY}.lora_down.weight": torch.ones(0, 32), f"{KEY}.lora_up.weight": torch.ones(32, 0)},
        "ranks 0 and 0",
    ),
    "no matrices": ({f"{KEY}.lora_down.weight": ONE, f"{KEY}.lora_up.weight": ONE}, "have ranks 1 and none"),
    "another width": (
        {**two(), f"{KEY}.lora_down.weight": torch.ones(2, 64)},
        r"takes \(64,\) and gives 32 .* here \(32,\)",
    ),
    "another height": ({**two(), f"{KEY}.lora_up.weight": torch.ones(64, 2)}, "belongs to another base model"),
    "another kernel": (
        {
            "lora_unet_conv_in.lora_down.weight": torch.ones(2, 4, 1, 1),
            "lora_unet_conv_in.lora_up.weight": torch.ones(16, 2),
        },
        "belongs to another base model",
    ),
    "a norm": ({**two("lora_unet_conv_norm_out")}, "a layer that takes none"),
    "a change of another size": (
        {"unet.conv_norm_out.diff": torch.ones(5)},
        r"conv_norm_out.weight is \(5,\), here .*16",
    ),
    "a bias of another size": ({**two(), f"{KEY}.diff_b": torch.ones(5)}, r"to_q.bias is \(5,\), here .*32"),
    "a middle of another size": (
        {**two(), f"{KEY}.lora_mid.weight": torch.ones(3, 3, 3, 3)},
        "lora_mid of .* does not fit",
    ),
    "another block": (two("lora_unet_down_blocks_7_resnets_0_conv1"), "no layer down_blocks_7_resnets_0_conv1"),
    "another block, SGM": (two("lora_unet_input_blocks_11_0_in_layers_2"), "no layer input_blocks_11"),
    "a transformer's": (two("transformer.blocks.0.attn.to_q"), "belongs to another base model"),
    "a transformer's, kohya": (two("lora_unet_double_blocks_0_img_attn_qkv"), "belongs to another base model"),
    "not a number": ({**two(), f"{KEY}.lora_up.weight": torch.full((32, 2), math.nan)}, "lora_up.weight is not finite"),
    "infinite": ({**two(), f"{KEY}.lora_down.weight": torch.full((2, 32), math.inf).half()}, "is not finite"),
    "integers": ({**two(), f"{KEY}.lora_down.weight": torch.ones(2, 32, dtype=torch.int8)}, "as torch.int8"),
    "alpha not a number": ({**two(), f"{KEY}.alpha": torch.tensor(math.nan)}, "alpha is not finite"),
    "alpha 0": ({**two(), f"{KEY}.alpha": torch.tensor(0.0)}, "the alpha of .* is 0.0, not one positive number"),
    "alpha below 0": ({**two(), f"{KEY}.alpha": torch.tensor(-1.0)}, "not one positive number"),
    "two alphas": ({**two(), f"{KEY}.alpha": torch.ones(2)}, "not one positive number"),
    "alphas that contradict": (
        ({**two(), f"{KEY}.alpha": torch.tensor(1.0)}, settings()),
        "has alpha 1, its settings say 2",
    ),
    "another rank in the settings": ((two(), settings(r=4)), "has rank 2, but its settings say 4"),
    "another rank in a pattern": ((two(), settings(rank_pattern={"to_q": 4})), "has rank 2, but its settings say 4"),
    "settings without alpha": ((two(), settings(lora_alpha=None)), "must give lora_alpha"),
    "alpha as a word": ((two(), settings(lora_alpha="two")), "must give lora_alpha"),
    "a pattern of words": ((two(), settings(alpha_pattern={"to_q": "two"})), "as positive numbers"),
    "patterns in a list": ((two(), settings(alpha_pattern=[1])), "as positive numbers"),
    "alphas that were lost": ((two(), {"ss_network_alpha": "1.0"}), "lost its alphas: its metadata says 1.0"),
    "no pattern": ((two(), settings(alpha_pattern={"(": 1})), "is no pattern"),
    "PiSSA": ((two(), settings(init_lora_weights="pissa_niter_4")), "init_lora_weights=pissa_niter_4"),
    "biases that were trained": ((two(), settings(bias="lora_only")), "bias=lora_only"),
    "a setting of the future": ((two(), settings(use_magic={"strength": 3})), "use_magic="),
    "settings that are no JSON": ((two(), {"lora_adapter_metadata": "{"}), "lora_adapter_metadata is no JSON object"),
    "settings in a list": ((two(), {"lora_adapter_metadata": "[1]"}), "lora_adapter_metadata is no JSON object"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_read_is_refused_in_one_line(unets: dict[str, Any], tmp_path: Path, case: str) -> None:
    given, message = REFUSED[case]
    tensors, metadata = given if isinstance(given, tuple) else (given, None)
    file = tmp_path / ("a long way " * 10) / "lora.safetensors"
    file.parent.mkdir()
    save_file({name: value.clone() for name, value in tensors.items()}, file, metadata=metadata)
    for read in (lambda: read_file(file, unets["sdxl"]), lambda: apply_lora(file, unets["sdxl"])):
        with pytest.raises(ValueError, match=message) as error:
            read()
        assert "lora.safetensors" in str(error.value) and len(str(error.value)) <= 300 and "\n" not in str(error.value)


def test_every_tensor_of_a_file_matters(unets: dict[str, Any], tmp_path: Path) -> None:
    """In every style: whichever is taken out, the file is refused, or its alpha is another."""
    unet = unets["sdxl"]
    for style in STYLES:
        whole, down_name, up_name = named(style, LAYER, unet)
        state = {down_name: torch.ones(2, 32), up_name: torch.ones(32, 2), f"{whole}.alpha": torch.tensor(1.0)}
        for left_out in state:
            save_file({n: v for n, v in state.items() if n != left_out}, tmp_path / "lora.safetensors")
            if left_out.endswith("alpha"):
                assert read_file(tmp_path / "lora.safetensors", unet).layers[LAYER].scale == 1
                continue
            with pytest.raises(ValueError, match="is there without its"):
                read_file(tmp_path / "lora.safetensors", unet)
        save_file({**state, f"{whole}.strength": torch.ones(1)}, tmp_path / "lora.safetensors")
        with pytest.raises(ValueError, match="whose meaning is not known"):
            read_file(tmp_path / "lora.safetensors", unet)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ("LoHaConfig", {}, "is a LoHa"),
        ("LoKrConfig", {}, "is a LoKr"),
        ("OFTConfig", {"r": 0, "oft_block_size": 4}, "is an OFT"),
        ("LoraConfig", {"init_lora_weights": "olora", "target_modules": ["to_q"]}, "init_lora_weights=olora"),
        ("LoraConfig", {"modules_to_save": ["conv_out"]}, "conv_out.* is not known|modules_to_save="),
        ("LoraConfig", {"bias": "lora_only"}, "bias"),
    ],
)
def test_what_peft_itself_writes_of_other_kinds(
    unets: dict[str, Any], tmp_path: Path, config: str, options: dict[str, Any], message: str
) -> None:
    import peft

    settings = getattr(peft, config)(**{"target_modules": ["conv1", "to_q", "proj_in"], **options})
    peft.get_peft_model(copy.deepcopy(unets["sdxl"]).float(), settings).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        read_file(find_lora(tmp_path), unets["sdxl"])


def test_peft_without_its_settings_is_refused(unets: dict[str, Any], tmp_path: Path) -> None:
    save_file(two(f"base_model.model.{LAYER}"), tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="adapter_config.json beside it, where alpha stands: it is missing"):
        read_file(tmp_path / "adapter_model.safetensors", unets["sdxl"])


# ---------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("style", STYLES)
def test_training_starts_from_every_style(unets: dict[str, Any], tmp_path: Path, style: str) -> None:
    """The matrices as they are in the file, and its alpha asked of --lora_alpha."""
    from spo_fast.models.policy import Policy

    unet, state = unets["sdxl"], {}
    made = matrices(unet, lambda n: 4, OLD[0])  # attention: the default --lora_targets
    for layer, (down, up) in made.items():
        whole, down_name, up_name = named(style, layer, unet)
        state |= {down_name: down, up_name: up, f"{whole}.alpha": torch.tensor(2.0)}
    save_file(state, tmp_path / "lora.safetensors")
    adapter = AdapterConfig(rank=4, lora_alpha=2.0, lora_path=str(tmp_path))
    policy = Policy(copy.deepcopy(unet), adapter, seed=0)
    held = policy.state_dict()
    assert len(held) == 2 * len(made)
    for layer, (down, up) in made.items():
        assert torch.equal(held[f"{layer}.lora_A.default.weight"].float(), down)
        assert torch.equal(held[f"{layer}.lora_B.default.weight"].float(), up)
    truth = merged(unet, {f"{layer}.weight": product(*pair, 0.5) for layer, pair in made.items()})
    assert close(output(policy.network), truth)
    with pytest.raises(ValueError, match="has alpha 2, but here it is 4: use --lora_alpha 2"):
        Policy(copy.deepcopy(unet), AdapterConfig(rank=4, lora_path=str(tmp_path)), seed=0)
    some = {name: value for name, value in state.items() if "attn2" not in name}
    save_file(some, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="is on other layers than"):
        read_lora(tmp_path, policy.network, adapter)
    save_file({**state, "unet.conv_in.diff_b": torch.ones(16)}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="changes conv_in.bias: only the two matrices"):
        read_lora(tmp_path, policy.network, adapter)


# ------------------------------------------------------------------------------------------------------------ finding

SPO_FILE = "spo_sdxl_10ep_4k-data_lora_diffusers.safetensors"


def in_cache(root: Path, source: str, *files: str) -> Path:
    """A snapshot of the hub's client."""
    folder = root / f"models--{source.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    for file in files:
        (folder / "snapshots" / "abc" / file).parent.mkdir(parents=True, exist_ok=True)
        save_file(two(), folder / "snapshots" / "abc" / file)
    return folder / "snapshots" / "abc"


def found(source: str | Path) -> Any:
    return find.find_contender(str(source), "sdxl", "--lora")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("spo_fast.models.files.find.offline_reason", lambda: "the hub cannot be reached")
    return tmp_path / "hub"


def test_the_only_file_of_a_cached_repository(cache: Path) -> None:
    """As SPO's own LoRA is published."""
    source = "SPO-Diffusion-Models/SPO-SDXL_4k-p_10ep_LoRA"
    assert "not in the hub cache" in found(source).why
    assert found(source).why.count("cannot be reached") == 1
    snapshot = in_cache(cache, source, SPO_FILE)
    assert found(source) == ("lora", snapshot / SPO_FILE)
    save_file(two(), snapshot / "pytorch_lora_weights.safetensors")
    assert found(source)[1].name == "pytorch_lora_weights.safetensors"
    snapshot = in_cache(cache, "me/several", *(f"{c}.safetensors" for c in "abcd"))
    why = found("me/several").why
    assert "has 4: a.safetensors, b.safetensors, c.safetensors, ..." in why and "the hub cannot be reached" in why
    in_cache(cache, "me/below", "folder/a.safetensors")
    assert "not in the hub cache" in found("me/below").why


def test_a_repository_is_downloaded(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repositories = {
        "me/one": [SPO_FILE, "README.md", "sample.png"],
        "me/peft": ["adapter_config.json", "adapter_model.safetensors"],
        "me/several": ["a.safetensors", "b.safetensors"],
        "me/whole": ["unet/config.json", "unet/diffusion_pytorch_model.safetensors", "model.safetensors"],
        "me/none": ["README.md"],
    }
    taken: list[str] = []

    def download(source: str, allow_patterns: list[str], **_: Any) -> str:
        taken.extend(allow_patterns)
        snapshot = in_cache(cache, source, *(n for n in allow_patterns if n.endswith("safetensors")))
        for name in allow_patterns:
            if name.endswith("json"):
                (snapshot / name).write_text("{}")
        return str(snapshot)

    monkeypatch.setattr("spo_fast.models.files.find.offline_reason", lambda: None)
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda self, source, **_: repositories[source])
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert found("me/one")[1].name == SPO_FILE and taken == [SPO_FILE]
    taken.clear()
    assert found("me/peft")[1].name == "adapter_model.safetensors" and sorted(taken) == sorted(repositories["me/peft"])
    taken.clear()
    assert found("me/whole")[0] == "unet" and sorted(taken) == sorted(repositories["me/whole"][:2])
    assert "it has 2: a.safetensors, b.safetensors" in found("me/several").why
    assert "pytorch_lora_weights.safetensors or one .safetensors" in found("me/none").why


def test_the_only_file_of_a_folder(tmp_path: Path, cache: Path) -> None:
    save_file(two(), tmp_path / "mine.safetensors")
    (tmp_path / "README.md").write_text("mine")
    assert found(tmp_path) == ("lora", tmp_path / "mine.safetensors")
    for n in range(30):
        save_file(two(), tmp_path / f"step-{n:02}.safetensors")
    with pytest.raises(FileNotFoundError, match="it has 31: mine.safetensors, step-00.*, ..") as error:
        found(tmp_path)
    assert len(str(error.value)) <= 300 + len(str(tmp_path))
    save_file(two(), tmp_path / "pytorch_lora_weights.safetensors")
    assert found(tmp_path) == ("lora", tmp_path / "pytorch_lora_weights.safetensors")
