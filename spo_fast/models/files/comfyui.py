"""What other programs show of a LoRA: metadata (SAI's model spec, as kohya's tools write it), a ComfyUI workflow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

ARCHITECTURES = {
    "sd15": "stable-diffusion-v1/lora",
    "sdxl": "stable-diffusion-xl-v1-base/lora",
    "sd35": "stable-diffusion-3/lora",
    "flux": "flux-1-dev/lora",
}
CHECKPOINTS = {
    "sd15": "v1-5-pruned-emaonly-fp16.safetensors",
    "sdxl": "sd_xl_base_1.0.safetensors",
    "sd35": "sd3.5_medium_incl_clips_t5xxlfp8scaled.safetensors",
}
"""The names under which ComfyUI's own examples have the base models; FLUX's parts are in `_flux`."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What a picture of the run is drawn with."""

    prompt: str
    height: int
    width: int
    steps: int
    guidance_scale: float
    seed: int


def model_spec(kind: str, title: str, size: tuple[int, int]) -> dict[str, str]:
    """A file's metadata; size: height, width. https://github.com/Stability-AI/ModelSpec, without a date: the same run
    writes the same file."""
    height, width = size
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": title,
        "modelspec.architecture": ARCHITECTURES[kind],
        "modelspec.implementation": "diffusers",
        "modelspec.resolution": f"{width}x{height}",
        "modelspec.trigger_phrase": "none",
    }


Node = dict[str, object]


def workflow(kind: str, lora: str, shown: Shown) -> dict[str, Node]:
    """The nodes of a workflow in ComfyUI's API format, by their numbers; lora: a file's name in models/loras.

    An input that is [number, i] is output i of that node.
    """
    latent = "EmptyLatentImage" if kind in ("sd15", "sdxl") else "EmptySD3LatentImage"
    nodes = (_flux if kind == "flux" else _checkpoint)(kind, lora, shown)
    size = {"width": shown.width, "height": shown.height, "batch_size": 1}
    sampling = {"seed": shown.seed, "steps": shown.steps, "cfg": 1.0 if kind == "flux" else shown.guidance_scale}
    diffusion = kind in ("sd15", "sdxl")
    nodes["6"] = _node(latent, size)
    nodes["7"] = _node(
        "KSampler",
        {
            "model": ["2", 0],
            "positive": ["4", 0],
            "negative": ["5", 0],
            "latent_image": ["6", 0],
            **sampling,
            "sampler_name": "ddim" if diffusion else "euler",
            "scheduler": "ddim_uniform" if diffusion else "simple",
            "denoise": 1.0,
        },
    )
    nodes["8"] = _node("VAEDecode", {"samples": ["7", 0], "vae": ["10", 0] if kind == "flux" else ["1", 2]})
    nodes["9"] = _node("SaveImage", {"images": ["8", 0], "filename_prefix": lora.removesuffix(".safetensors")})
    return nodes


def _node(kind: str, inputs: Mapping[str, object]) -> Node:
    return {"class_type": kind, "inputs": dict(inputs)}


def _checkpoint(kind: str, lora: str, shown: Shown) -> dict[str, Node]:
    """One file with network, text encoders and VAE."""
    return {
        "1": _node("CheckpointLoaderSimple", {"ckpt_name": CHECKPOINTS[kind]}),
        "2": _node("LoraLoaderModelOnly", {"model": ["1", 0], "lora_name": lora, "strength_model": 1.0}),
        "4": _node("CLIPTextEncode", {"text": shown.prompt, "clip": ["1", 1]}),
        "5": _node("CLIPTextEncode", {"text": "", "clip": ["1", 1]}),
    }


def _flux(kind: str, lora: str, shown: Shown) -> dict[str, Node]:
    """Network, text encoders and VAE in files of their own; guidance is told, and there is no negative prompt."""
    clips = {"clip_name1": "t5xxl_fp16.safetensors", "clip_name2": "clip_l.safetensors", "type": kind}
    return {
        "1": _node("UNETLoader", {"unet_name": "flux1-dev.safetensors", "weight_dtype": "default"}),
        "2": _node("LoraLoaderModelOnly", {"model": ["1", 0], "lora_name": lora, "strength_model": 1.0}),
        "3": _node("DualCLIPLoader", clips),
        "4": _node("FluxGuidance", {"conditioning": ["11", 0], "guidance": shown.guidance_scale}),
        "5": _node("ConditioningZeroOut", {"conditioning": ["11", 0]}),
        "10": _node("VAELoader", {"vae_name": "ae.safetensors"}),
        "11": _node("CLIPTextEncode", {"text": shown.prompt, "clip": ["3", 0]}),
    }
