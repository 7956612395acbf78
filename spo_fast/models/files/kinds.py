"""Whether a model's parts are of the kind that is trained here, told from their settings before anything is loaded.

diffusers' UNets take more inputs than SD-1.5's and SDXL's (masks, classes, guidance, other embeddings) and VAEs shift
latents in more ways than one: a model that needs what it is not given here would be trained on something else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spo_fast.data.files import shown
from spo_fast.models.files.single_file import vae_class
from spo_fast.models.files.sources import T5S

Config = Mapping[str, Any]

PURPOSES = {8: "it edits images (InstructPix2Pix)", 9: "it inpaints", 16: "it belongs to a 16-channel VAE"}
UNET_SETTINGS = {  # what a UNet of SD-1.5 or SDXL has, which diffusers takes for absent settings too
    "class_embed_type": None,
    "num_class_embeds": None,
    "encoder_hid_dim_type": None,
    "encoder_hid_dim": None,
    "time_cond_proj_dim": None,  # of guidance-distilled (LCM) networks, which are told the guidance scale
    "time_embedding_type": "positional",
    "attention_type": "default",
    "dual_cross_attention": False,
}
VAE_SETTINGS = {"latents_mean": None, "latents_std": None, "shift_factor": None}
SCALES = {"sd15": 0.18215, "sdxl": 0.13025}
FLOW_SCALES = {"sd35": (1.5305, 0.0609), "flux": (0.3611, 0.1159)}  # scaling_factor, shift_factor
TRANSFORMERS = {"sd35": "SD3Transformer2DModel", "flux": "FluxTransformer2DModel"}
FLUX_PURPOSES = {128: "it is led by depth or edges (FLUX.1-Depth, Canny)", 384: "it inpaints (FLUX.1-Fill)"}
FLOW_SCHEDULER = "FlowMatchEulerDiscreteScheduler"
TEXT_TYPES = ("clip_text_model", "clip")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
TIME_IDS = 6  # SDXL's original size, crop corner, target size; its refiner's are 5


def check_unet(config: Config, file: Path) -> None:
    """Raise ValueError unless the UNet takes noisy latents, a timestep, a prompt and, in SDXL, its sizes, no more."""
    name = config.get("_class_name", "UNet2DConditionModel")
    _need(name == "UNet2DConditionModel", file, f"_class_name={name}", "a UNet2DConditionModel is trained here")
    channels, out = config.get("in_channels", 4), config.get("out_channels", 4)
    purpose = PURPOSES.get(channels, "it takes more than noisy latents, or predicts more than their noise")
    _need(channels == out, file, f"in_channels={channels}, out_channels={out}", purpose)
    _check_settings(config, UNET_SETTINGS, file)
    added = config.get("addition_embed_type")
    _need(added in (None, "text_time"), file, f"addition_embed_type={added}", "only SDXL's text_time is known")
    size = config.get("sample_size")
    _need(type(size) is int and size > 0, file, f"sample_size={size}", "it must be one whole number, latents a side")


def check_transformer(config: Config, file: Path, kind: str) -> None:
    """Raise ValueError unless it is this kind's transformer, of noisy latents, a timestep and a prompt alone."""
    name, wanted = config.get("_class_name", TRANSFORMERS[kind]), TRANSFORMERS[kind]
    _need(name == wanted, file, f"_class_name={name}", f"models of kind {kind} have a {wanted}")
    channels = _count(config, "in_channels", 16 if kind == "sd35" else 64, file)
    out = channels if config.get("out_channels") is None else _count(config, "out_channels", channels, file)
    purpose = FLUX_PURPOSES.get(channels, "it takes more than noisy latents, or predicts more than their velocity")
    _need(channels == out, file, f"in_channels={channels}, out_channels={out}", purpose)
    if kind == "flux":
        patch = config.get("patch_size", 1)
        _need(patch == 1, file, f"patch_size={patch}", "FLUX.1's latents are packed outside of its transformer")
        guided = config.get("guidance_embeds", False)
        _need(type(guided) is bool, file, f"guidance_embeds={guided!r:.40}", "it is true (dev) or false (schnell)")


def check_flow_vae(config: Config, file: Path, kind: str) -> None:
    """Raise ValueError unless latents are (the encoder's output - shift) x scale, and not those of another kind."""
    name = vae_class(config, file)
    for setting in ("latents_mean", "latents_std"):
        _need(config.get(setting) is None, file, f"{setting}={config.get(setting)!s:.40}", f"{kind}'s VAE has none")
    scale, shift = config.get("scaling_factor", 1.0), config.get("shift_factor") or 0.0
    for setting, value in (("scaling_factor", scale), ("shift_factor", shift)):
        finite = isinstance(value, (int, float)) and math.isfinite(value) and (value > 0 or setting == "shift_factor")
        known = FLOW_SCALES[kind][setting == "shift_factor"]
        _need(finite, file, f"{setting}={value!r:.40}", f"it must be a number; {kind}'s is {known}", "Mend it")
    others = {k: (factor, 0.0) for k, factor in SCALES.items()} | FLOW_SCALES
    other = next((k for k, factors in others.items() if k != kind and factors == (scale, shift)), None)
    why = f"that is the VAE of {other}, whose latents mean nothing to a transformer of {kind}"
    found = f"scaling_factor={scale}, shift_factor={shift}"
    _need(other is None or name != "AutoencoderKL", file, found, why, "Give another VAE")
    for setting in ("in_channels", "out_channels"):
        _need(config.get(setting, 3) == 3, file, f"{setting}={config.get(setting)}", "pictures have 3")


def check_flow_scheduler(config: Config, file: Path) -> None:
    """Raise ValueError for a scheduler whose sigmas are not known here."""
    name = config.get("_class_name", FLOW_SCHEDULER)
    _need(name == FLOW_SCHEDULER, file, f"_class_name={name}", f"flows are sampled by {FLOW_SCHEDULER}'s sigmas", "")


def check_vae(config: Config, file: Path, kind: str, borrowed: bool) -> None:
    """Raise ValueError unless latents are the encoder's output times one scaling factor, which is known.

    borrowed: of another model than the UNet. The two kinds' latents have one shape, but their factors differ.
    """
    name = vae_class(config, file)
    _check_settings(config, VAE_SETTINGS, file)
    # of a missing one diffusers takes SD-1.5's, in SD-1.5's days the only one
    factor = config.get("scaling_factor", None if kind == "sdxl" and name == "AutoencoderKL" else 1.0)
    finite = isinstance(factor, (int, float)) and math.isfinite(factor) and factor > 0
    mend = "SDXL's is 0.13025, SD-1.5's 0.18215"
    _need(finite, file, f"scaling_factor={factor}", "it must be a positive number", mend)
    if borrowed and name == "AutoencoderKL":
        for other, scale in SCALES.items():
            why = f"that is the VAE of {other}, whose latents mean nothing to a UNet of {kind}"
            _need(other == kind or factor != scale, file, f"scaling_factor={factor}", why, "Give another VAE")
    for name in ("in_channels", "out_channels"):
        _need(config.get(name, 3) == 3, file, f"{name}={config.get(name)}", "pictures have 3")


def check_text(config: Config, file: Path, t5: bool = False) -> None:
    """Raise ValueError unless it is a CLIP, or a T5."""
    if t5:
        name = config.get("model_type", "t5")
        _need(name == "t5", file, f"model_type={name}", "the text encoder of this folder is a T5")
        return
    name = config.get("model_type", "clip_text_model")
    _need(name in TEXT_TYPES, file, f"model_type={name}", "the text encoders of these models are CLIPs")
    eps = config.get("layer_norm_eps", 1e-5)
    _need(isinstance(eps, float), file, f"layer_norm_eps={eps!r:.40}", "a CLIP's is a number such as 1e-05", "Mend it")


def check_tokenizer(max_length: int, tokens: int, config: Config, folder: Path, t5: bool = False) -> None:
    """Raise ValueError for a tokenizer whose prompts are too long for its text encoder, or that knows more tokens."""
    text = config.get("text_config") or config
    positions, vocabulary = text.get("max_position_embeddings", 77), text.get("vocab_size", 32128 if t5 else 49408)
    given = f"model_max_length={max_length}" if max_length < 10**9 else "no model_max_length"
    mend = f"Set it to {positions} in its tokenizer_config.json"
    fits = t5 or 0 < max_length <= positions  # T5 knows distances, no positions
    _need(fits, folder, given, f"its text encoder has {positions} positions", mend)
    why = f"its text encoder has embeddings of {vocabulary}"
    _need(tokens <= vocabulary, folder, f"{tokens} tokens", why, "Give the tokenizer that belongs to it")


def check_together(unet: Config, vae: Config, texts: Sequence[Config], unet_file: Path, vae_file: Path) -> None:
    """Raise ValueError unless the UNet takes the VAE's latents and the text encoders' embeddings."""
    latents, channels = _count(vae, "latent_channels", 4, vae_file), _count(unet, "in_channels", 4, unet_file)
    _need(
        latents == channels, vae_file, f"latent_channels={latents}",
        f"the UNet takes {channels} (in_channels). Use the VAE that the UNet was trained with", "",
    )  # fmt: skip
    own = [text.get("text_config") or text for text in texts]  # a whole CLIP's has two towers'
    widths = [_count(text, "hidden_size", 512, unet_file) for text in own]
    context = unet.get("cross_attention_dim", 1280)
    contexts = set(context) if isinstance(context, (list, tuple)) else {context}
    made = f"the text encoders make {' + '.join(map(str, widths))} channels"
    _need(contexts == {sum(widths)}, unet_file, f"cross_attention_dim={context}", made)
    if unet.get("addition_embed_type") == "text_time":
        pooled = _count(own[-1], "projection_dim", 512, unet_file)
        wanted = TIME_IDS * (unet.get("addition_time_embed_dim") or 0) + pooled
        dim = unet.get("projection_class_embeddings_input_dim")
        why = f"SDXL's {TIME_IDS} sizes and the pooled prompt make {wanted} (a refiner takes 5)"
        _need(dim == wanted, unet_file, f"projection_class_embeddings_input_dim={dim}", why)


def check_flow_together(
    kind: str, transformer: Config, vae: Config, texts: Mapping[str, Config], file: Path, vae_file: Path
) -> None:
    """Raise ValueError unless a flow's transformer takes the VAE's latents and the text encoders' embeddings.

    texts: settings by folder, T5's last; an SD3 may lack it.
    """
    packed = 1 if kind == "sd35" else 4  # FLUX's transformer sees squares of 2 x 2 latents as one token
    latents = _count(vae, "latent_channels", 4, vae_file)
    channels = _count(transformer, "in_channels", 16 * packed, file)
    _need(
        packed * latents == channels, vae_file, f"latent_channels={latents}",
        f"the transformer takes {channels // packed} (in_channels). Use the VAE that it was trained with", "",
    )  # fmt: skip
    t5 = [text for part, text in texts.items() if (kind, part) in T5S]
    clips = [text.get("text_config") or text for part, text in texts.items() if (kind, part) not in T5S]
    pools = "projection_dim" if kind == "sd35" else "hidden_size"
    pooled, wanted = sum(_count(text, pools, 512, file) for text in clips), transformer.get("pooled_projection_dim")
    made = f"the CLIPs' pooled prompts have {pooled} channels"
    _need(wanted in (None, pooled), file, f"pooled_projection_dim={wanted}", made)
    joint = _count(transformer, "joint_attention_dim", 4096, file)
    for text in t5:
        width = _count(text, "d_model", 512, file)
        _need(width == joint, file, f"joint_attention_dim={joint}", f"its T5 makes {width} channels")
    if kind == "sd35":  # which pads them to that width
        width = sum(_count(text, "hidden_size", 512, file) for text in clips)
        _need(width <= joint, file, f"joint_attention_dim={joint}", f"its CLIPs make {width} channels together")


def check_flow_size(transformer: Config, vae: Config, height: int | None, width: int | None) -> None:
    """Raise ValueError for a picture of a size in pixels that a flow's transformer cannot make.

    None: the default, which it can. Latents are taken in patches of 2 x 2, and SD3's have so many positions.
    """
    factor = 2 ** (len(vae.get("block_out_channels", (0,) * 4)) - 1)
    sd3 = transformer.get("_class_name") == TRANSFORMERS["sd35"]
    patch = transformer.get("patch_size", 2) if sd3 else 2
    most = transformer.get("pos_embed_max_size", 96) * patch * factor if sd3 else None
    for name, size in (("height", height), ("width", width)):
        if size is not None and size % (factor * patch):
            raise ValueError(
                f"{name}={size} must be a multiple of {factor * patch}: the VAE's factor {factor} x patches of {patch}."
            )
        if size is not None and most is not None and size > most:
            raise ValueError(
                f"{name}={size} is more than this SD3 has positions for (pos_embed_max_size): at most {most}."
            )


def check_guidance(transformer: Config, asked: Mapping[str, float | None], model: Path | str) -> None:
    """Raise ValueError for guidance of a network that was made to need or be told none.

    asked: embedded_guidance, which the network is told, and guidance_scale, of two halves.
    """
    guided = transformer.get("_class_name") == TRANSFORMERS["flux"] and transformer.get("guidance_embeds", False)
    told, scale = asked.get("embedded_guidance"), asked.get("guidance_scale")
    if told is not None and not guided:
        raise ValueError(
            f"embedded_guidance={told:g}: {shown(model, 90)} is told no guidance (it has no guidance_embeds, as "
            "FLUX.1-schnell and SD3.5). Leave it out."
        )
    if transformer.get("_class_name") == TRANSFORMERS["flux"] and not guided and scale is not None and scale > 1:
        raise ValueError(
            f"guidance_scale={scale:g}: {shown(model, 90)} was distilled to draw without guidance (guidance_embeds is "
            "false, as FLUX.1-schnell's). Use --guidance_scale 1."
        )


def check_prediction(scheduler: Config, file: Path) -> None:
    """Raise ValueError for a network that predicts what no table here knows."""
    kind = scheduler.get("prediction_type", "epsilon")
    _need(kind in PREDICTIONS, file, f"prediction_type={kind}", f"known are {', '.join(PREDICTIONS)}", "")


def _count(config: Config, name: str, default: int, file: Path) -> int:
    value = config.get(name, default)
    if type(value) is not int:
        raise ValueError(f"{shown(file)} or what belongs to it has {name}={value!r:.40}, which is no whole number.")
    return value


def _check_settings(config: Config, plain: Config, file: Path) -> None:
    for name, value in plain.items():
        found = config.get(name, value)
        fits = found == value or (name == "shift_factor" and found == 0)
        _need(fits, file, f"{name}={str(found)[:40]}", f"SD-1.5 and SDXL have {value}")


def _need(holds: bool, file: Path, found: str, why: str, mend: str = "Such models are not trained here") -> None:
    if not holds:
        raise ValueError(f"{shown(file)} has {found}: {why}. {f'{mend}.' if mend else ''}".rstrip())
