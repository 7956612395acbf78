"""Training of preference models: against what the published code computed, float64 formulas, and whole runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_replay import load, networks
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from spo_fast.method.experience import Cond
from spo_fast.method.renoise import noised
from spo_fast.method.schedule import StepTable, full_table
from spo_fast.scorers.clip_files import load_clip
from spo_fast.training.pair_batches import Images
from spo_fast.training.preference_model import PixelReward, pair_loss


def scaled_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest error over 1 + |value|."""
    ours, theirs = ours.detach().double(), theirs.double()
    return float(((ours - theirs).abs() / (1 + theirs.abs())).max())


# ---------------------------------------------------------------------------------------------------- the criterion


@pytest.mark.parametrize("dtype", ["f64", "f32"])
@pytest.mark.parametrize("scale", [1, 100])
@pytest.mark.parametrize("in_batch", [0, 1])
def test_criterion_matches_published_code(in_batch: int, scale: int, dtype: str) -> None:
    data, _ = load("spm_criterion")
    case = f"inbatch{in_batch}.scale{scale}.{dtype}"
    kind, tolerance = (torch.float64, 1e-12) if dtype == "f64" else (torch.float32, 1e-4)
    text, img0, img1 = (data[n].to(kind).requires_grad_() for n in ("text", "img0", "img1"))
    weights = 1 / data["num_examples_per_prompt"]  # float32, as the published code has them whatever it computes in
    loss = pair_loss(
        text,
        torch.stack([img0, img1]),
        torch.tensor(float(scale), dtype=kind),
        data["label_0"].to(kind),
        weights / weights.sum(),
        bool(in_batch),
    )
    grads = torch.autograd.grad(loss, [text, img0, img1])
    assert 0.5 in data["label_0"]  # a tie among them
    assert scaled_error(loss, data[f"{case}.loss"]) < tolerance
    for grad, name in zip(grads, ("g_text", "g_img0", "g_img1"), strict=True):
        assert scaled_error(grad, data[f"{case}.{name}"]) < tolerance


def test_pair_loss_by_hand() -> None:
    # cosines .6 and .2, scale 5: gap 2; first preferred: log(1 + e^-2) = 0.126928; a tie at gap 0 costs nothing;
    # weights 1/1 and 1/3, normalised to 3/4 and 1/4: 0.75 * 0.126928 = 0.095196
    text = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    images = torch.tensor([[[0.6, 0.8], [0.5, 0.5]], [[0.2, 0.9], [0.5, 0.1]]], dtype=torch.float64)
    loss = pair_loss(text, images, torch.tensor(5.0), torch.tensor([1.0, 0.5]), torch.tensor([0.75, 0.25]))
    assert abs(float(loss) - 0.095196) < 1e-6


# ---------------------------------------------------------------------------------------------------- one step


class Recorded:
    """The golden networks in place of a DiffusionModel; counts UNet calls."""

    def __init__(self, prompts: Cond, ids: Tensor):
        self.network, self.decode = networks("sd15", torch.float32)
        _, config = load("models_sd15")
        self.device, self.table = torch.device("cpu"), full_table(load("ddim")[0]["alphas_cumprod"], "epsilon")
        self.prompts, self.ids, self.calls = prompts, ids, []
        self.network.register_forward_pre_hook(lambda _, args: self.calls.append(len(args[0])))

    def judged_table(self) -> StepTable:
        return self.table

    def cond(self, prompts: list[str]) -> Cond:
        return self.prompts

    def tokenize(self, prompts: list[str]) -> Tensor:
        return self.ids


def golden_step() -> tuple[dict[str, Tensor], dict[str, Any], Recorded, PixelReward, Images]:
    data, facts = load("spm_train_sd15")
    tensors, config = load("models_sd15")
    encoder = text_encoder(tensors, config)
    ids = data["in.sdv15_input_ids"]
    start, end = int(ids[0, 0]), int(ids.max())
    empty = torch.tensor([[start] + [end] * (ids.shape[1] - 1)])
    with torch.no_grad():
        cond = Cond({"prompt_embeds": encoder(ids)[0]}, {"prompt_embeds": encoder(empty)[0]})
    assert abs(float(cond.uncond["prompt_embeds"].abs().max()) - facts["neg_prompt_embeds_absmax"]) < 1e-5
    model = Recorded(cond, data["in.input_ids"])
    weights, clip_config = load("models_spm")
    clip = load_clip(weights, time_conditioned=True, hf_config=clip_config["clip_config"])
    reward = PixelReward(clip, model, facts["cfg_scale"], decode_chunk=3)  # type: ignore[arg-type]
    latents = []
    for j in range(2):
        mean, std = data[f"mid.enc_mean_std_{j}"]
        latents.append((mean + std * data[f"draw.00{j + 1}.normal"]) * config["vae"]["scaling_factor"])
    images = Images(facts["captions"], torch.stack(latents), None)
    return data, facts, model, reward, images


def text_encoder(tensors: dict[str, Tensor], config: dict[str, Any]) -> CLIPTextModel:
    encoder = CLIPTextModel(CLIPTextConfig(**config["text_encoder"]))
    state = {k.removeprefix("text_encoder."): v for k, v in tensors.items() if k.startswith("text_encoder.")}
    names = set(encoder.state_dict())
    state = {k if k in names else k.removeprefix("text_model."): v for k, v in state.items()}
    missing, unexpected = encoder.load_state_dict(state, strict=False)
    assert not missing and all("position_ids" in name for name in unexpected)
    return encoder.eval()


@pytest.mark.usefixtures("two_threads")
def test_a_training_step_matches_published_code() -> None:
    data, facts, model, reward, images = golden_step()
    t, noise = data["draw.000.randint"], data["draw.003.normal"]
    assert t.tolist() == facts["timesteps"]
    noise = torch.stack([noise, noise])
    x_t = noised(model.table, images.latents, 999 - t, noise)
    assert scaled_error(x_t, torch.stack([data["mid.x_t_0"], data["mid.x_t_1"]])) < 1e-5
    seen = reward.see(images, t, noise)
    assert model.calls == [4 * len(t)]  # both images and both guidance halves in one forward
    theirs = torch.cat([data["out.pixel_values_0"], data["out.pixel_values_1"]])
    assert scaled_error(seen, theirs) < 1e-4
    text, features, scale = reward.compare(seen, t, images.prompts)
    for ours, name in ((text, "text"), (features[0], "img0"), (features[1], "img1")):
        assert scaled_error(ours, data[f"mid.{name}_feat"]) < 1e-4
    weights = 1 / data["in.num_example_per_prompt"]
    loss = pair_loss(text, features, scale, data["in.label_0"], weights / weights.sum())
    assert scaled_error(loss, data["out.loss"]) < 1e-5
    loss.backward()
    names = [k.removeprefix("grad.") for k in data if k.startswith("grad.")]
    ours = {name: p.grad for name, p in reward.clip.named_parameters()}
    assert {n.removeprefix("model.") for n in names} == set(ours)
    for name in names:
        assert scaled_error(ours[name.removeprefix("model.")], data[f"grad.{name}"]) < 2e-4, name  # 1.1e-4 on an EPYC
    norm = torch.stack([g.norm() for g in ours.values()]).norm()
    assert abs(float(norm) / facts["grad_norm"] - 1) < 1e-4
