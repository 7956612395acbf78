"""What the authors of each method published for it, and with which settings it cannot run. Read by its record."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from spo_fast.config.sections import FLOWS, TOYS

Given = Mapping[str, Any]
"""All settings given so far, the model's name among them."""


def _by_model(given: Given, everywhere: Given, **models: Given) -> dict[str, Any]:
    kind = "toy" if given["model"] in TOYS else given["model"]  # both toys are of one world
    return {**everywhere, **models.get(kind, {})}


def mspo_method(given: Given) -> dict[str, Any]:
    """The SDXL run of the published code: three denoising steps an optimised step, two candidates."""
    return {"num_inner_steps": 3, "num_candidates": 2}


def d3po(given: Given) -> dict[str, Any]:
    """config/base.py of yk7333/d3po: 20 steps, a step sees the 20 transitions of a pair; nothing published for SDXL."""
    settings = {"num_candidates": 2, "branch_start": 0, "threshold": 0.0, "beta": 0.1}
    return _by_model(
        given,
        settings,
        sd15={"learning_rate": 3e-5, "train_batch_size": 10, "gradient_accumulation_steps": 2, "max_grad_norm": 1.0},
        sdxl={"learning_rate": 1e-5, "train_batch_size": 2, "gradient_accumulation_steps": 10, "max_grad_norm": 1.0},
        toy={"beta": 10.0, "train_batch_size": 32, "max_grad_norm": 1.0},
    )


def lpo(given: Given) -> dict[str, Any]:
    """lpo/configs of Kwai-Kolors/LPO. The toy ships no latent reward model: give --lrm_path."""
    settings = {"scorer": ("lrm",), "num_candidates": 4, "num_inner_steps": 0, "branch_start": 0, "num_train_epochs": 5}
    return _by_model(
        given,
        {**settings, "beta": 500.0},
        sd15={"threshold": 0.35, "threshold_max": 0.5, "sample_batch_size": 5},
        sdxl={"threshold": 0.45, "threshold_max": 0.6, "sample_batch_size": 4, "train_batch_size": 4}
        | {"gradient_accumulation_steps": 1},
        toy={"beta": 10.0, "num_train_epochs": 1},
    )


def gradspo(given: Given) -> dict[str, Any]:
    """configs of JoshuaTTJ/GradSPO: SPO's, and for SDXL k = 4 without inner steps."""
    return _by_model(
        given,
        {"num_candidates": 4, "last_step": "keep"},
        sdxl={"train_batch_size": 1, "gradient_accumulation_steps": 4},
    )


def ddpo(given: Given) -> dict[str, Any]:
    """config/dgx.py of kvablack/ddpo-pytorch (aesthetic): 256 trajectories a rollout, 2 steps of 128 of them, each with
    all of its 50 transitions. SDXL: the same with fewer trajectories; nothing is published for it.
    """
    settings = {"branch_start": 0, "clip": 1e-4, "num_candidates": 16, "max_grad_norm": 1.0}
    return _by_model(
        given,
        {**settings, "num_steps": 50, "learning_rate": 3e-4},
        sd15={"sample_batch_size": 16, "train_batch_size": 4, "gradient_accumulation_steps": 1600}
        | {"max_train_steps": 200},
        sdxl={"sample_batch_size": 2, "train_batch_size": 2, "gradient_accumulation_steps": 400}
        | {"max_train_steps": 200},
        toy={"num_steps": 20, "num_candidates": 8, "train_batch_size": 1280, "states_per_forward": 256}
        | {"learning_rate": 1e-3},
    )


def dpok(given: Given) -> dict[str, Any]:
    """google-research/dpok: learning rate 1e-5, gradients clipped at 0.1, guidance 7.5, KL weight 0.01."""
    if given["model"] in TOYS:
        return ddpo(given)
    return ddpo(given) | {"learning_rate": 1e-5, "max_grad_norm": 0.1, "guidance_scale": 7.5, "adam_weight_decay": 0.0}


def stepgrpo(given: Given) -> dict[str, Any]:
    """No code is public: SPO's rollouts, with Flow-GRPO's clip and without a KL."""
    settings = {"num_inner_steps": 0, "num_candidates": 4, "clip": 1e-4, "kl_weight": 0.0, "max_grad_norm": 1.0}
    return {**settings, **({"learning_rate": 1e-3} if given["model"] in TOYS else {})}


def grpo(given: Given) -> dict[str, Any]:
    """config/grpo.py of yifan123/flow_grpo (PickScore): 24 trajectories a prompt, two steps an iteration, KL .01, of
    FLUX none. UNets, of which nothing is published: DDPO's settings, and the rest."""
    if given["model"] not in FLOWS:
        return ddpo(given) | {"kl_weight": 0.01}
    settings = {"branch_start": 0, "sampler": "flow_sde", "num_candidates": 24, "clip": 1e-4, "max_grad_norm": 1.0}
    if given["model"] in TOYS:
        return {**settings, **_toy_groups(given), "kl_weight": 0.01}
    eta, kl_weight, steps = (0.9, 0.0, 6) if given["model"] == "flux" else (0.7, 0.01, 10)
    terms = 4 * 24 * steps // 2
    sizes = {"sample_batch_size": 4, "train_batch_size": 4, "gradient_accumulation_steps": terms // 4}
    return {**settings, **sizes, "eta": eta, "kl_weight": kl_weight, "learning_rate": 3e-4}


def _toy_groups(given: Given) -> dict[str, Any]:
    """8 pictures of a prompt, and all steps of an iteration in two optimizer steps."""
    steps = 10 if given["model"] in FLOWS else 20
    return {"num_steps": steps, "num_candidates": 8, "train_batch_size": 64 * steps, "states_per_forward": 256} | {
        "learning_rate": 1e-3
    }


def _pictures(given: Given) -> dict[str, Any]:
    """What NFT and AWM share: no guidance, all of 10 steps, 24 pictures a prompt, rate 3e-4."""
    settings = {"branch_start": 0, "guidance_scale": 1.0, "num_candidates": 24, "num_steps": 10, "max_grad_norm": 1.0}
    if given["model"] in TOYS:
        return {**settings, **_toy_groups(given), "num_steps": 10, "train_batch_size": 640}
    sizes = {"sample_batch_size": 4, "train_batch_size": 4, "gradient_accumulation_steps": 120}
    return {**settings, **sizes, "learning_rate": 3e-4}


def nft(given: Given) -> dict[str, Any]:
    """NVlabs/DiffusionNFT: beta 1 (.1 for OCR), weight of the reference 1e-4."""
    return {**_pictures(given), "beta": 1.0, "kl_weight": 1e-4}


def awm(given: Given) -> dict[str, Any]:
    """scxue/advantage_weighted_matching (PickScore): clip 1, weight of the reference 1e-4, deviation of all scores."""
    steps = {} if given["model"] in TOYS else {"num_steps": 14}
    return {**_pictures(given), **steps, "kl_weight": 1e-4, "advantage_std": "global"}


def dense(given: Given) -> dict[str, Any]:
    """parse_args.py of Shentao-YANG/Dense_Reward_T2I (many prompts: temperature 12.5); its rollouts have 1000 prompts,
    which here would have to fit into memory."""
    settings = {"branch_start": 0, "clip": 1e-4, "num_candidates": 5, "max_grad_norm": 1.0}
    published = {"beta": 12.5, "num_steps": 50, "guidance_scale": 7.5, "learning_rate": 3e-5, "adam_weight_decay": 2e-3}
    sizes = {"sample_batch_size": 16, "train_batch_size": 1, "gradient_accumulation_steps": 4}
    return _by_model(
        given,
        settings,
        sd15={**published, **sizes},
        sdxl={**published, **sizes, "sample_batch_size": 4, "learning_rate": 1e-5},
        toy={"clip": 0.1, "train_batch_size": 32},
    )


def dpo(given: Given) -> dict[str, Any]:
    """launchers/ of SalesforceAIResearch/DiffusionDPO: all weights, 2000 steps of 2048 pairs, 1e-8 x 2048.

    Of flows the highest of Flow-DPO's betas, 100 to 2000.
    """
    steps = {"max_train_steps": 2000, "num_train_epochs": 10_000, "sample_batch_size": 2048, "checkpointing_steps": 500}
    optim = {"learning_rate": 2.048e-5, "adam_weight_decay": 0.01, "max_grad_norm": 1.0}
    schedule = {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 500}
    published = {"full_finetune": True, "scorer": ("pickscore",), "prompt_dropout": 0.2, **steps, **optim, **schedule}
    return _by_model(
        given,
        {"beta": 2000.0 if given["model"] in FLOWS else 5000.0, "branch_start": 0},
        sd15={**published, "train_batch_size": 16, "gradient_accumulation_steps": 128},
        sdxl={**published, "train_batch_size": 4, "gradient_accumulation_steps": 512, "lr_warmup_steps": 200}
        | {"optimizer": "adamw8bit"},  # published: Adafactor, to save memory too
        toy={"sample_batch_size": 256, "train_batch_size": 64, "learning_rate": 1e-4},
    )


def mapo(given: Given) -> dict[str, Any]:
    """README.md of mapo-t2i/mapo, its LoRA run (SDXL; nothing is published for SD-1.5): 16 pairs a step, 2000 steps."""
    steps = {"max_train_steps": 2000, "num_train_epochs": 10_000, "sample_batch_size": 16, "checkpointing_steps": 500}
    optim = {"learning_rate": 1e-5, "adam_weight_decay": 0.01, "max_grad_norm": 1.0, "optimizer": "adamw8bit"}
    sizes = {"train_batch_size": 8, "gradient_accumulation_steps": 2, "rank": 8}
    published = {"scorer": ("pickscore",), **steps, **optim, **sizes}
    toy = {"sample_batch_size": 256, "train_batch_size": 64, "learning_rate": 1e-4}
    settings = {"beta": 0.1, "branch_start": 0}
    return _by_model(given, settings, sd15=published, sdxl=published, toy=toy)


def published_code(given: Given) -> dict[str, Any]:
    """SPO's code, on which lpo and gradspo build: accumulation across rollouts, no clipping."""
    return {"accumulation": "published", "max_grad_norm": None}


def published_spo(given: Given) -> dict[str, Any]:
    """The same, and its SDXL's last-step rule."""
    last_step = "extend" if given["model"] in ("sdxl", "toy") else "compare"
    return {**published_code(given), "last_step": last_step}


# ---------------------------------------------------------------------------------------------- what does not fit


def unlike_siblings(settings: Given) -> str:
    """GradSPO's target and step-wise GRPO's group are of children of one x_t, a step apart from it."""
    if settings["num_inner_steps"]:
        return "compares children of one x_t: num_inner_steps must be 0."
    if settings["last_step"] == "extend":
        return "compares children of one x_t: last_step=extend joins two steps. Use keep or compare."
    return ""


def too_few_to_rank(settings: Given) -> str:
    """DenseReward draws the trajectories that a term ranks from those of the prompt."""
    ranked, drawn = settings["num_ranked"], settings["num_candidates"]
    if ranked <= drawn:
        return ""
    return f"cannot draw num_ranked={ranked} trajectories from num_candidates={drawn}: lower it, or raise the other."


def no_latent_judge(settings: Given) -> str:
    """LPO's judges are parts of the UNets whose latents they see."""
    if settings["model"] not in FLOWS:
        return ""
    return (
        f"is judged by a latent reward model, a UNet of SD-1.5 or SDXL: there is none of {settings['model']}. Use spo"
        f"{'.' if settings['model'] == 'flux' else ', with scorer=dina for a judge of latents.'}"
    )


def not_of_velocities(settings: Given) -> str:
    """MaPO's f(l) is of errors of predicted noise, which has unit variance; a velocity's error has another size."""
    if settings["model"] not in FLOWS:
        return ""
    return f"weighs errors of predicted noise; no paper has it for the velocities of {settings['model']}. Use dpo."


def bad_window(settings: Given) -> str:
    """grpo_window must be steps that are trained."""
    window, moves = settings["grpo_window"], settings["window_moves"]
    if window is None:
        return "" if moves is None else "has no --grpo_window for window_moves to move: give one, as 0:4."
    found = re.fullmatch(r"(\d+):(\d+)", window)
    least, most = settings["branch_start"] or 0, settings["branch_end"] or settings["num_steps"]
    if found and least <= int(found[1]) < int(found[2]) <= most:
        return ""
    return (
        f"trains the steps {least} to {most}: grpo_window={window!s:.40} must be FIRST:END of them, as {least}:{most}."
    )


def guided_or_noisy(settings: Given) -> str:
    """Their losses are of predictions without guidance, their samples the probability flow's."""
    if settings["guidance_scale"] > 1:
        return f"samples and trains without guidance: guidance_scale={settings['guidance_scale']:g} must be 1."
    if settings["sampler"] != "ddim":
        return f"adds no noise to its steps: leave out --sampler {settings['sampler']}."
    return ""
