"""LoRA files: found, read in whatever style they name their tensors, checked against the network, and put on it.

A tensor's name is a layer's name between a prefix and an ending, both of which differ by the program that wrote it:
    diffusers        unet.down_blocks.0...to_q.lora.down.weight   (old: ...attn1.processor.to_q_lora.down.weight)
    PEFT             base_model.model.down_blocks.0...to_q.lora_A.weight
    kohya, LyCORIS   lora_unet_down_blocks_0_..._to_q.lora_down.weight, lycoris_...
    kohya's SDXL     lora_unet_input_blocks_1_1_..._to_q.lora_down.weight: LDM's blocks
    OneTrainer       unet.input_blocks.1.1...to_q.lora_down.weight, or as kohya; ComfyUI: diffusion_model.input...
    of flow models   transformer.transformer_blocks.0.attn.to_q.lora_A.weight; of kohya's for FLUX see _of_flux
So a layer is looked up by its name with underscores for dots, in a table of the network's own names and of LDM's for a
UNet's, and styles may mix. What of a file is not used is an error: other loaders skip it, and draw something else.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn, TypeAlias

from spo_fast.data.files import read_header, read_metadata, read_safetensors
from spo_fast.models.files.lora_files import find_lora
from spo_fast.models.files.lora_settings import Refuse, Told

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from torch import Tensor

    from spo_fast.models.files.load import FlowTransformer

    LoraNetwork: TypeAlias = UNet2DConditionModel | FlowTransformer
    from spo_fast.config.training import AdapterConfig

DOWN = r"(?:\.lora_down|[._]lora\.down|\.lora_linear_layer\.down|\.lora_A)"
UP = r"(?:\.lora_up|[._]lora\.up|\.lora_linear_layer\.up|\.lora_B)"
ENDINGS = {
    "down": DOWN + r"\.weight",
    "up": UP + r"\.weight",
    "up_bias": UP + r"\.bias",
    "mid": r"\.lora_mid\.weight",
    "alpha": r"(?:[._]lora)?\.alpha",
    "magnitude": r"\.(?:dora_scale|lora_magnitude_vector(?:\.weight)?)",
    "weight": r"\.(?:diff|w_norm)",  # ComfyUI's and LyCORIS' changes of what has no two matrices
    "bias": r"\.(?:diff_b|b_norm)",
}
OF_TWO = ("down", "up", "up_bias", "mid", "alpha", "magnitude")
"""Of these what belongs to two matrices."""
PREFIX = re.compile(
    r"(?:base_model\.model\.|model\.|diffusion_model\.|unet\.|transformer\.|lora_unet[._]|lora_transformer_|lycoris_)*"
)
TEXT = re.compile(r"(?:base_model\.model\.)?(?:lora_te\d*[._]|text_encoders?\w*\.|te\d?\.|clip_[lg]\.|text_model\.)")
OTHER_KINDS = {
    "a LoHa": r"\.hada_\w+$",
    "a LoKr": r"\.lokr_\w+$",
    "an OFT": r"\.b?oft_\w+",
    "an (IA)3": r"\.(?:on_input|ia3_l\b)",
    "a GLoRA": r"\.[ab][12]\.weight$",
}


class Layer(NamedTuple):
    """W + scale * up @ down."""

    down: Tensor  # (r, D) or (r, C, k, k)
    up: Tensor  # (D', r) or (C', r, 1, 1)
    scale: float


@dataclass(frozen=True)
class Lora:
    """All that a file changes."""

    layers: dict[str, Layer]  # by the layer's name in the network
    changes: dict[str, Tensor]  # what is added to weights and biases, by their names
    magnitudes: dict[str, Tensor]
    """Of a DoRA the norm of each row of a layer, (D') or (C'): V = W + scale * up @ down becomes magnitude V / |V|."""
    has_alpha: bool
    """Otherwise alpha is each layer's rank, as every loader has it."""

    def __str__(self) -> str:
        ranks = sorted({len(layer.down) for layer in self.layers.values()})
        alphas = sorted({float(f"{layer.scale * len(layer.down):.4g}") for layer in self.layers.values()})
        shown = [
            ", ".join(f"{n:g}" for n in found[:4]) + (", ..." if len(found) > 4 else "") for found in (ranks, alphas)
        ]
        text = f"a LoRA on {len(self.layers)} layers, rank {shown[0]}, alpha {shown[1]}"
        text += "" if self.has_alpha else " (the file gives none: the rank)"
        text = text.replace("a LoRA", "a DoRA", 1) if self.magnitudes else text
        return text + (f", and {len(self.changes)} changed weights and biases" if self.changes else "")


# ------------------------------------------------------------------------------------------------------------ reading


def ldm_names(unet: UNet2DConditionModel) -> dict[str, str]:
    """Blocks and single layers of a UNet2DConditionModel -> their names in the original (LDM, SGM) network."""
    found = {
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    number = 1  # of LDM's block: conv_in is the first one
    for i, block in enumerate(unet.down_blocks):
        for j, _ in enumerate(block.get_submodule("resnets").children()):
            found[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{number}.0"
            found[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{number}.1"
            number += 1
        if block.downsamplers is not None:
            found[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
            number += 1
    number = 0
    for i, block in enumerate(unet.up_blocks):
        has_attention = hasattr(block, "attentions")
        for j, _ in enumerate(block.get_submodule("resnets").children()):
            found[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{number}.0"
            found[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{number}.1"
            number += 1
        found[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{number - 1}.{1 + has_attention}.conv"
    return found


IN_A_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def _weights(network: LoraNetwork) -> dict[str, tuple[int, ...]]:
    """Layer -> its weight's shape; a network may wear an adapter already."""
    ends = ".weight"
    return {
        name.removesuffix(ends).removesuffix(".base_layer"): p.shape
        for name, p in network.named_parameters()
        if name.endswith(ends) and ".lora_" not in name
    }


def layer_names(network: LoraNetwork) -> dict[str, str]:
    """Every name of a layer that files use, with underscores for dots -> its name in the network."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    ldm = ldm_names(network) if isinstance(network, UNet2DConditionModel) else {}
    found = {}
    for name in _weights(network):
        block = next((b for b in ldm if name == b or name.startswith(b + ".")), None)
        found[name] = name
        if name.endswith(".to_out.0"):
            found[name.removesuffix(".0")] = name
        if block is not None:
            inside = name.removeprefix(block).strip(".")
            inside = IN_A_RESNET.get(inside, inside) if ".resnets." in block else inside
            for end in (inside, inside.removesuffix(".0")) if inside.endswith(".to_out.0") else (inside,):
                found[f"{ldm[block]}.{end}".strip(".")] = name
    return {name.replace(".", "_"): layer for name, layer in found.items()}


def read_file(file: Path, network: LoraNetwork) -> Lora:
    """All of a LoRA file, as the network's layers have it. Raises ValueError for what cannot be read, by name.

    The truth is W + alpha / rank * up @ down (alpha / sqrt(rank) of an rsLoRA), alpha from a tensor beside the matrices
    or from the metadata that diffusers and PEFT write; without one it is the rank.
    """

    def refuse(why: str) -> NoReturn:
        raise ValueError(f"{_shown(file, why)} {why}")

    known, weights = layer_names(network), _weights(network)
    _refuse_kinds(read_header(file), refuse)
    tensors, told = read_safetensors(file), Told.of(file, refuse)
    tensors = _of_flux(tensors, known, refuse)
    parts = _parts(tensors, known, refuse)
    layers: dict[str, Layer] = {}
    magnitudes: dict[str, Tensor] = {}
    changes: dict[str, Tensor] = {}
    for layer, names in parts.items():
        found = {what: tensors[name] for what, name in names.items()}
        _check_values(found, names, refuse)
        if "down" in found and "up" in found:
            layers[layer] = _layer(layer, found, weights[layer], told, refuse)
            magnitudes |= _magnitude(layer, found, weights[layer][0], refuse)
            if "up_bias" in found:
                changes[f"{layer}.bias"] = layers[layer].scale * found["up_bias"].double()
        elif lonely := next((what for what in OF_TWO if what in found), None):
            lack = {"down": "its lora_up", "up": "its lora_down"}.get(lonely, "the two matrices that belong to it")
            refuse(f"is damaged: {names[lonely]:.100} is there without {lack}. Save it again.")
        if "weight" in found and layer in layers:
            refuse(
                f"has {names['down']:.80} and {names['weight']:.80}: loaders differ in which they take. Leave one out."
            )
        if "weight" in found:
            weight = found["weight"]  # in its own type, for a whole UNet's changes; 8 bits cannot be added
            changes[f"{layer}.weight"] = weight.float() if weight.itemsize == 1 else weight
        if "bias" in found:
            changes[f"{layer}.bias"] = changes.get(f"{layer}.bias", 0) + found["bias"].double()
        _check_shapes(layer, changes, weights[layer], refuse)
    if len(magnitudes) < len(layers) and (magnitudes or told.is_dora):
        refuse("is a DoRA without the magnitudes of some of its layers. Save it again.")
    has_alpha = told.alpha is not None or any("alpha" in names for names in parts.values())
    kohya, ranks = read_metadata(file).get("ss_network_alpha", ""), {len(x.down) for x in layers.values()}
    if not has_alpha and re.fullmatch(r"\d+(\.\d+)?", kohya) and ranks - {float(kohya)}:
        refuse(
            f"lost its alphas: its metadata says {kohya:.20} (ss_network_alpha), its tensors none. Download it again."
        )
    return Lora(layers, changes, magnitudes, has_alpha)


def _check_shapes(layer: str, changes: dict[str, Tensor], weight: tuple[int, ...], refuse: Refuse) -> None:
    """Of the changes of a layer's weight and bias; weight: its shape."""
    for what, shape in (("weight", weight), ("bias", weight[:1])):
        if (change := changes.get(f"{layer}.{what}")) is not None and change.shape != shape:
            given = tuple(change.shape)
            refuse(f"belongs to another base model: its {layer}.{what} is {given}, here it is {tuple(shape)}.")


def _of_flux(tensors: dict[str, Tensor], known: Collection[str], refuse: Refuse) -> dict[str, Tensor]:
    """kohya's names are the original network's, whose q, k, v are one layer: diffusers' converter parts them.

    It multiplies alpha / rank into the matrices.
    """
    kohya = any(re.fullmatch(r"lora_unet_(?:double|single)_blocks_\d+_.*\.lora_down\.weight", name) for name in tensors)
    if not kohya or "single_transformer_blocks_0_proj_mlp" not in known:
        return tensors
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    try:
        return dict(_convert_kohya_flux_lora_to_diffusers(dict(tensors)))
    except Exception as error:  # whatever it makes of other layers, sizes or missing halves
        why = " ".join(str(error).split())[:80]
        refuse(f"is no LoRA of FLUX.1 in kohya's names that diffusers can read ({type(error).__name__}: {why}).")


def _shown(file: Path, beside: str) -> str:
    """The end of a path that leaves the whole line at 300 characters."""
    room = max(299 - len(beside), 40)
    return str(file) if len(str(file)) <= room else f"...{str(file)[3 - room :]}"


def _refuse_kinds(names: Collection[str], refuse: Refuse) -> None:
    """What is no LoRA, or more than one of a UNet, is named as what it is."""
    for kind, pattern in OTHER_KINDS.items():
        if odd := next((name for name in names if re.search(pattern, name)), None):
            refuse(f"is {kind} ({odd:.80}), which is not read here. Merge it into the network and give that.")
    if texts := [name for name in names if TEXT.match(name)]:
        refuse(
            f"holds more than a LoRA of a UNet: {len(texts)} tensors of text encoders, such as {texts[0]:.60}, which "
            "stay as they are here. Leave them out of the file."
        )


def _parts(header: Iterable[str], known: dict[str, str], refuse: Refuse) -> dict[str, dict[str, str]]:
    """Layer -> what of it -> the tensor's name."""
    parts: dict[str, dict[str, str]] = defaultdict(dict)
    for name in header:
        layer, what = _place(name, known, refuse)
        if what in parts[layer]:
            refuse(f"has two tensors for one: {parts[layer][what]:.80} and {name:.80}. Leave one of them out.")
        parts[layer][what] = name
    if not parts:
        refuse("is empty: it holds no tensor. Save it again.")
    return parts


def _check_values(found: Mapping[str, Tensor], names: Mapping[str, str], refuse: Refuse) -> None:
    """Of one layer: numbers with a point, all finite."""
    for what, value in found.items():
        if not value.dtype.is_floating_point and what != "alpha":
            refuse(f"holds {names[what]:.80} as {value.dtype}, not as numbers with a point. Convert it.")
        if not value.float().isfinite().all():
            refuse(f"is unsound: {names[what]:.80} is not finite. Train or download it again.")


def _place(name: str, known: dict[str, str], refuse: Refuse) -> tuple[str, str]:
    """(layer of the network, what of it) that a tensor belongs to."""
    for what, ending in ENDINGS.items():
        if m := re.fullmatch(rf"(.+?){ending}", name):
            bare = PREFIX.sub("", m[1], count=1).replace(".processor.", ".")
            if bare.replace(".", "_") not in known:
                refuse(f"belongs to another base model: this one has no layer {bare:.120}.")
            return known[bare.replace(".", "_")], what
    return refuse(f"holds more than a LoRA of a UNet: {name:.100}, whose meaning is not known here. Leave it out.")


def _layer(layer: str, found: dict[str, Tensor], weight: tuple[int, ...], told: Told, refuse: Refuse) -> Layer:
    """Its matrices in the weight's own number of dimensions; weight: its shape."""
    import torch

    down, up = found["down"], found["up"]
    rank = len(down) if down.ndim else 0
    if len(weight) not in (2, 4):
        refuse(f"has a LoRA on {layer}, a layer that takes none. Save it again.")
    if down.ndim < 2 or up.ndim < 2 or up.shape[1] != rank or not rank:
        ranks = f"{rank} and {up.shape[1] if up.ndim > 1 else 'none'}"
        refuse(f"is damaged: the two matrices of {layer} have ranks {ranks}. Save it again.")
    if "mid" in found:  # LoCon's: a convolution between the two
        mid = found["mid"]
        if mid.shape[:2] != (rank, rank) or math.prod(down.shape[2:]) != 1:
            refuse(f"is damaged: lora_mid of {layer} does not fit its matrices. Save it again.")
        down = torch.einsum("ij...,jc->ic...", mid.double(), down.flatten(1).double())
    # a 1 x 1 convolution may be saved as a linear layer, and the other way round
    down_shape, up_shape = (rank, *weight[1:]), (weight[0], rank, *[1] * (len(weight) - 2))
    for shape, value in ((down_shape, down), (up_shape, up)):
        if not _alike(value.shape, shape):
            refuse(
                f"belongs to another base model: its {layer} takes {tuple(down.shape[1:])} and gives {up.shape[0]} "
                f"channels, here {tuple(weight[1:])} and {weight[0]}."
            )
    alpha = None
    if "alpha" in found:
        if found["alpha"].numel() != 1 or not float(found["alpha"]) > 0:
            refuse(f"is unsound: the alpha of {layer} is {found['alpha'].tolist()!s:.40}, not one positive number.")
        alpha = float(found["alpha"])
    return Layer(down.reshape(down_shape), up.reshape(up_shape), told.scale(layer, rank, alpha, refuse))


def _magnitude(layer: str, found: dict[str, Tensor], rows: int, refuse: Refuse) -> dict[str, Tensor]:
    """layer -> its magnitudes, (rows), if it has some."""
    if (value := found.get("magnitude")) is None:
        return {}
    # LyCORIS can have one for each column, (1, D); PEFT has (1, C', 1, 1) of a convolution
    if value.numel() != rows or (value.ndim == 2 and len(value) != rows):
        refuse(f"has magnitudes of {tuple(value.shape)} on {layer}: one for each of {rows} rows is read. Merge it.")
    return {layer: value.flatten()}


def _alike(shape: Sequence[int], wanted: Sequence[int]) -> bool:
    """The same but for ones at the end."""
    longest = max(len(shape), len(wanted))
    return [*shape, *[1] * (longest - len(shape))] == [*wanted, *[1] * (longest - len(wanted))]


# -------------------------------------------------------------------------------------------------------- to be used


def apply_lora(file: Path, network: LoraNetwork) -> Lora:
    """Put a LoRA of any rank, alpha and layers on a network, for good; returns what it was. Raises as `read_file`."""
    import torch
    from peft import LoraConfig
    from torch import nn

    from spo_fast.models.merged import lora_layers

    lora = read_file(file, network)
    for name, change in lora.changes.items():
        layer, _, what = name.rpartition(".")
        module = network.get_submodule(layer)
        now = getattr(module, what)
        if now is None:
            module.bias = nn.Parameter(change.to(module.get_parameter("weight")))
        else:
            now.data = (now.data + change.to(now.device)).to(now.dtype)
    if lora.layers:
        ranks = {f"^{re.escape(name)}": len(layer.down) for name, layer in lora.layers.items()}
        config = LoraConfig(
            r=1,
            rank_pattern=ranks,
            target_modules=list(lora.layers),
            init_lora_weights=False,
            use_dora=bool(lora.magnitudes),
        )
        with torch.random.fork_rng(devices=[]):  # PEFT draws the matrices that are replaced here
            network.add_adapter(config)
        worn = dict(lora_layers(network))
        if worn.keys() != lora.layers.keys():  # PEFT matches names by their ends
            raise ValueError(f"{file}: {len(worn)} layers would take its LoRA, but it names {len(lora.layers)}.")
        for name, (down, up, scale) in lora.layers.items():
            for matrix, value in ((worn[name].lora_A, down), (worn[name].lora_B, up)):
                matrix["default"].weight.data = value.to(network.device, network.dtype)
            if name in lora.magnitudes:
                place = worn[name].lora_magnitude_vector["default"].get_parameter("weight")
                place.data = lora.magnitudes[name].to(network.device, network.dtype).view_as(place)
            worn[name].scaling["default"] = scale
    network.requires_grad_(False).eval()
    return lora


def read_lora(path: str | Path, network: LoraNetwork, adapter: AdapterConfig) -> dict[str, Tensor]:
    """The file's tensors by the names of the network's own LoRA, which it fits. Raises ValueError for what differs."""
    file = find_lora(path)
    lora = read_file(file, network)
    label = f"--lora_path {_shown(file, ' ' * 190)}"
    if lora.changes:
        raise ValueError(f"{label} changes {next(iter(lora.changes))}: only the two matrices of a LoRA are trained on.")
    found = {}
    for name, layer in lora.layers.items():
        found[f"{name}.lora_A.default.weight"], found[f"{name}.lora_B.default.weight"] = layer.down, layer.up
    for name, magnitude in lora.magnitudes.items():  # (D'), or (1, C', 1, 1) of a convolution
        shape = (-1,) if lora.layers[name].down.ndim == 2 else (1, -1, 1, 1)
        found[f"{name}.lora_magnitude_vector.default.weight"] = magnitude.view(shape)
    if bool(lora.magnitudes) != adapter.use_dora:
        raise ValueError(f"{label} is {'a DoRA: use' if lora.magnitudes else 'no DoRA: leave out'} --use_dora.")
    if (ranks := sorted({len(layer.down) for layer in lora.layers.values()})) != [adapter.rank]:
        raise ValueError(
            f"{label} has rank {', '.join(map(str, ranks))!s:.60}, but --rank is {adapter.rank}: use the same."
        )
    if found.keys() != {name for name, _ in network.named_parameters() if ".lora_" in name}:
        targets = " ".join(sorted({_ending(layer) for layer in lora.layers}))
        why = f"is on other layers than --lora_targets: use --lora_targets {targets:.190}, or another file."
        raise ValueError(f"--lora_path {_shown(file, f'--lora_path {why}')} {why}")
    alphas = sorted({layer.scale * adapter.alpha / adapter.scale for layer in lora.layers.values()})
    if not math.isclose(alphas[0], alphas[-1], rel_tol=1e-6):
        shown = f"{alphas[0]:g} to {alphas[-1]:g}"
        raise ValueError(f"{label} has alphas of {shown}: training goes on from one alpha for all layers only.")
    if not math.isclose(alphas[0], adapter.alpha, rel_tol=1e-6):
        raise ValueError(
            f"{label} has alpha {alphas[0]:.8g}, but here it is {adapter.alpha:g}: use --lora_alpha {alphas[0]:.8g}."
        )
    return found


def _ending(layer: str) -> str:
    """As --lora_targets has it: down_blocks.0.attn1.to_out.0 -> to_out.0; transformer_blocks.0.ff.net.2 -> ff.net.2."""
    if m := re.match(r"(?:single_)?transformer_blocks\.\d+\.", layer):
        return layer[m.end() :]
    parts = layer.split(".")
    return ".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:])
