"""Scorers against the published code's numbers (tests/golden), transformers' CLIPModel, and formulas in float64."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spo_fast.config.scorers import SCORER_SOURCES
from spo_fast.method.experience import Candidates, repeat_text
from spo_fast.ops.backend import available_backends, use_backend
from spo_fast.scorers.clip import KNOWN_CLIPS, Clip, ClipConfig, TowerConfig, timestep_embedding, unit
from spo_fast.scorers.clip_files import config_from_state_dict, init_identity_time_conditioning, load_clip, save_clip
from spo_fast.scorers.preprocess import CLIP_MEAN, CLIP_STD
from spo_fast.scorers.registry import load_scorer
from spo_fast.scorers.spm import (
    ClipScorer,
    load_pickscore,
    load_spm,
    make_tiny_spm,
    preprocess_for_scoring,
    preprocess_for_spm_training,
)
from spo_fast.scorers.weighted import WeightedSum

GOLDEN = Path(__file__).parent / "golden"
CASES = ["s32", "s64", "s16", "s45", "s48x64", "s70x33", "s64_f16", "same_image_all_t"]


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return load_file(GOLDEN / f"{name}.safetensors"), json.loads((GOLDEN / f"{name}.json").read_text())


def golden_clip(name: str, time_conditioned: bool) -> Clip:
    tensors, info = golden(name)
    return load_clip(tensors, time_conditioned=time_conditioned, hf_config=info["clip_config"])


def tokenize(prompts: list[str], end: int = 520) -> Tensor:  # (P, 12): a start, one id a character, ends
    return torch.tensor([[0, *prompt.encode()[:10], *[end] * 12][:12] for prompt in prompts])


def tokenize_tiny(prompts: list[str]) -> Tensor:  # for make_tiny_spm's 256 ids
    return tokenize(prompts, end=255)


def max_error(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).abs().max().item()


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def enlarge(z: Tensor) -> Tensor:  # (N, 4, h, w) -> (N, 3, 8h, 8w): a decoder that costs nothing
    return torch.nn.functional.interpolate(z[:, :3], scale_factor=8)


def make_candidates(
    scorer: Any, num_candidates: int = 3, chunk: int = 4, t: int = 551, decode: Callable[[Tensor], Tensor] = enlarge
) -> Candidates:
    prompts = ["a cat", "two dogs", "a red hat"]
    text = repeat_text(scorer.encode(prompts), num_candidates)
    x0 = randn(num_candidates * len(prompts), 4, 6, 6, seed=1)
    return Candidates(None, x0, torch.tensor(t), text, num_candidates, decode, chunk)


@pytest.fixture(scope="module")
def spm() -> ClipScorer:
    return ClipScorer(golden_clip("models_spm", time_conditioned=True), tokenize)


# ---------------------------------------------------------------------------------------------------- published numbers


@pytest.fixture(params=available_backends("resize_normalize"))
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("case", CASES)
def test_pixels_match_published_code(case: str, backend: str) -> None:
    data, _ = golden("spm")
    pixels = preprocess_for_scoring(data[f"{case}.images"], 32)
    assert pixels.dtype == torch.float32
    # the definition rounds halves after each operation, as published, and places taps in float32; kernels do neither
    tolerance = 1e-5 if backend == "eager" else 3e-3 if case == "s64_f16" else 2e-5
    assert max_error(pixels, data[f"{case}.pixel_values"]) < tolerance


@pytest.mark.parametrize("case", CASES)
def test_step_aware_model_matches_published_code(spm: ClipScorer, case: str) -> None:
    data, _ = golden("spm")
    images, t = data[f"{case}.images"], data[f"{case}.timesteps"]
    pixels = data[f"{case}.pixel_values"]
    with torch.no_grad():
        # t reaches 999, where float32 angles are 6e-5 apart: machines whose exp differs in its last bit differ so much
        assert max_error(spm.model.t_embedder(t), data[f"{case}.time_emb"]) < 1e-4
        assert max_error(spm.model.get_image_features(pixels, t), data[f"{case}.image_embeds"]) < 1e-4
    ids = data["input_ids"]
    ids = ids[:1].expand_as(ids) if case == "same_image_all_t" else ids
    text = spm.encode_ids(ids)
    # the scorer takes one timestep for all images: score them one by one
    with use_backend("eager"):
        scores = [spm.score_pixels(images[i : i + 1], t[i], text[i : i + 1]) for i in range(len(images))]
    assert max_error(torch.cat(scores), data[f"{case}.scores"]) < 1e-3
    image, text = spm.model(pixels, ids, t)  # the trainer's path: one timestep an image
    assert max_error(spm.model.logit_scale.exp() * (image * text).sum(-1), data[f"{case}.scores"]) < 1e-3


def test_call_is_k_major_and_judges_at_its_timestep(spm: ClipScorer) -> None:
    data, _ = golden("spm")
    images = data["s32.images"]  # as 2 candidates of 3 prompts
    text = repeat_text(spm.encode_ids(data["input_ids"][:3]), 2)
    scores = [
        spm(Candidates(None, images, data["s32.timesteps"][row], text, 2, decode=lambda z: z, decode_chunk=4))
        for row in range(3)
    ]
    for row in range(3):  # candidate 0 of prompt `row` is golden row `row`
        assert max_error(scores[row][row], data["s32.scores"][row]) < 1e-3
    image = unit(spm.model.get_image_features(data["s32.pixel_values"][5:], data["s32.timesteps"][:1]))
    expected = 100 * (image[0] @ unit(data["text_embeds_unnormalised"])[2])  # candidate 1 of prompt 2
    assert max_error(scores[0][5], expected) < 1e-2


@pytest.mark.parametrize(
    ("ids", "features"), [("input_ids", "text_embeds_unnormalised"), ("ids_eos_at5", "text_embeds_eos_at5")]
)
def test_text_is_pooled_at_the_first_largest_id(spm: ClipScorer, ids: str, features: str) -> None:
    data, _ = golden("spm")
    assert max_error(data["text_embeds_unnormalised"], data["text_embeds_eos_at5"]) > 0.1
    with torch.no_grad():
        assert max_error(spm.model.get_text_features(data[ids]), data[features]) < 1e-5
    assert max_error(spm.encode_ids(data[ids]), unit(data[features])) < 1e-5


def test_padding_after_the_end_token_is_of_no_consequence(spm: ClipScorer) -> None:
    prompt = [519, 320, 343, 520]
    alone = spm.encode_ids(torch.tensor([prompt]))
    for padding in (0, 7, 520):
        assert max_error(spm.encode_ids(torch.tensor([prompt + [padding] * 8])), alone) < 1e-6
    assert max_error(spm.encode_ids(torch.tensor([[519, 320, 344, 520]])), alone) > 1e-2


def test_timestep_sinusoid(spm: ClipScorer) -> None:
    data, _ = golden("spm")
    t = data["timestep_sinusoid.t"]
    assert max_error(timestep_embedding(t), data["timestep_sinusoid.emb256"]) < 2e-4  # two float32 angles apart
    angle = t.double()[:, None] * 10000 ** -(torch.arange(128).double() / 128)
    assert max_error(timestep_embedding(t), torch.cat([angle.cos(), angle.sin()], -1)) < 1e-4
    assert timestep_embedding(t).dtype == timestep_embedding(t.bfloat16()).dtype == torch.float32


def test_published_size() -> None:
    """The published checkpoints hold 980 tensors, 1306.2 M parameters."""
    config = ClipConfig(
        text=TowerConfig(width=1024, mlp_width=4096, num_layers=24, num_heads=16, activation="gelu"),
        vision=TowerConfig(width=1280, mlp_width=5120, num_layers=32, num_heads=16, activation="gelu"),
        vocab_size=49408,
        max_length=77,
        image_size=224,
        patch_size=14,
        projection_dim=1024,
        time_conditioned=True,
    )
    with torch.device("meta"):
        state = Clip(config).state_dict()
    assert len(state) == 980
    assert round(sum(value.numel() for value in state.values()) / 1e6, 1) == 1306.2
    assert state["vision_model.encoder.layers.31.adaLN_modulation.1.weight"].shape == (7680, 1280)
    assert state["vision_model.adaLN_modulation.1.weight"].shape == (2560, 1280)
    assert config_from_state_dict(state, time_conditioned=True) == config  # from shapes and the table alone


# --------------------------------------------------------------------------------------------------------- transformers


def test_plain_clip_matches_transformers() -> None:
    from transformers import CLIPConfig, CLIPModel

    tensors, info = golden("models_pickscore")
    theirs = CLIPModel(CLIPConfig(**info["clip_config"])).eval()
    theirs.load_state_dict(tensors)
    ours = golden_clip("models_pickscore", time_conditioned=False)
    ids, pixels = golden("spm")[0]["input_ids"], randn(6, 3, 32, 32)
    with torch.no_grad():
        truth = theirs(input_ids=ids, pixel_values=pixels)
        image, text = ours(pixels, ids)
        assert max_error(image, truth.image_embeds) < 1e-5
        assert max_error(text, truth.text_embeds) < 1e-5
        assert max_error(ours.logit_scale.exp() * image @ text.T, truth.logits_per_image) < 1e-3
        # the scorer: same preprocessing as the SPM, any t
        scorer = ClipScorer(ours, tokenize)
        images, values = golden("spm")[0]["s64.images"], golden("spm")[0]["s64.pixel_values"]
        logits = theirs(input_ids=ids, pixel_values=values).logits_per_image
        for t in (0, 951):
            scores = scorer.score_pixels(images, torch.tensor(t), scorer.encode_ids(ids))
            assert max_error(scores, logits.diagonal()) < 1e-3


def test_reads_what_transformers_writes(tmp_path: Path) -> None:
    """quick_gelu and head counts that no shape shows, from a config.json that leaves out transformers' defaults."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    torch.manual_seed(0)
    text = dict(vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, max_position_embeddings=9)
    vision = dict(hidden_size=48, intermediate_size=40, num_hidden_layers=3, image_size=24, patch_size=8)
    theirs = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=10)).eval()  # 8 and 12 heads
    theirs.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    for part, defaults in (
        ("text_config", CLIPTextConfig().to_dict()),
        ("vision_config", CLIPVisionConfig().to_dict()),
    ):
        saved[part] = {key: value for key, value in saved[part].items() if value != defaults[key]}
        assert not {"num_attention_heads", "hidden_act", "layer_norm_eps"} & saved[part].keys()
    (tmp_path / "config.json").write_text(json.dumps(saved))
    ours = load_clip(tmp_path, time_conditioned=False)
    assert (ours.config.text.num_heads, ours.config.vision.num_heads) == (8, 12)
    assert ours.config.vision.activation == "quick_gelu"
    for model in (theirs, ours):  # the default initialisation is too small for an activation to matter
        for parameter in model.parameters():
            parameter.data *= 3 if parameter.ndim > 1 else 1
    pixels, ids = randn(2, 3, 24, 24), torch.tensor([[3, 5, 98, 1], [4, 98, 2, 98]])
    with torch.no_grad():
        truth, (image, text_features) = theirs(input_ids=ids, pixel_values=pixels), ours(pixels, ids)
    # transformers 5 pools where its config's eos_token_id (49407) says; there is none here: compare at the largest id
    assert max_error(image, truth.image_embeds) < 1e-5
    with torch.no_grad():
        hidden = theirs.text_model(input_ids=ids).last_hidden_state[[0, 1], [2, 1]]
        assert max_error(text_features, unit(theirs.text_projection(hidden))) < 1e-5


# -------------------------------------------------------------------------------------------------------- preprocessing


def cubic_matrix(source: int, target: int) -> Tensor:
    """(target, source) float64: Keys' cubic convolution, a = -0.75, half-pixel centres, edges repeated."""
    a = -0.75

    def kernel(x: float) -> float:
        x = abs(x)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    matrix = torch.zeros(target, source, dtype=torch.float64)
    for i in range(target):
        centre = (i + 0.5) * source / target - 0.5
        for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
            matrix[i, min(max(j, 0), source - 1)] += kernel(centre - j)
    return matrix


def normalise64(x: Tensor) -> Tensor:
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073], dtype=torch.float64)[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711], dtype=torch.float64)[:, None, None]
    return (x - mean) / std


SIZES = [(24, 24), (16, 16), (45, 45), (70, 33), (37, 61), (24, 25)]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_preprocess_for_scoring_float64(height: int, width: int) -> None:
    size = 24
    images = 1.3 * randn(2, 3, height, width)
    short = min(height, width)
    h, w = math.floor(height * size / short + 0.5), math.floor(width * size / short + 0.5)
    resized = cubic_matrix(height, h) @ images.double() @ cubic_matrix(width, w).T
    # halves go to the even side
    top, left = ({0: 0, 1: 0, 15: 8, 16: 8, 27: 14}[side - size] for side in (h, w))
    cropped = resized[..., top : top + size, left : left + size]
    truth = normalise64((cropped / 2 + 0.5).clamp(0, 1))
    assert max_error(preprocess_for_scoring(images.double(), size), truth) < 1e-6
    assert max_error(preprocess_for_scoring(images, size), truth) < 1e-4  # float32 coordinates: 70 has an ulp of 8e-6


@pytest.mark.parametrize(("height", "top"), [(32, 0), (33, 0), (34, 1), (35, 2), (37, 2)])
def test_centre_crop_rounds_half_to_even(height: int, top: int) -> None:
    images = 0.5 * randn(1, 3, height, 32)
    expected = normalise64((images[:, :, top : top + 32].double() / 2 + 0.5).clamp(0, 1))
    assert max_error(preprocess_for_scoring(images, 32), expected) < 1e-5
    transposed = preprocess_for_scoring(images.transpose(2, 3), 32)
    assert max_error(transposed.transpose(2, 3), expected) < 1e-5


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_preprocess_for_spm_training_float64(height: int, width: int) -> None:
    images = 1.3 * randn(2, 3, height, width)
    clamped = (images.double() / 2 + 0.5).clamp(0, 1)
    resized = cubic_matrix(height, 24) @ clamped @ cubic_matrix(width, 24).T
    assert max_error(preprocess_for_spm_training(images, 24), normalise64(resized.clamp(0, 1))) < 1e-4


def test_the_two_preprocessings_differ() -> None:
    images = 1.3 * randn(1, 3, 64, 64)
    assert max_error(preprocess_for_scoring(images, 32), preprocess_for_spm_training(images, 32)) > 0.1


def test_statistics_are_the_published_ones() -> None:
    _, info = golden("spm")
    assert [list(CLIP_MEAN), list(CLIP_STD)] == [info["mean"], info["std"]]


# --------------------------------------------------------------------------------------------------------------- scorer


def test_scores_do_not_depend_on_the_chunk(spm: ClipScorer) -> None:
    whole = spm(make_candidates(spm, chunk=9))
    assert whole.shape == (9,) and whole.dtype == torch.float32 and not whole.requires_grad
    assert whole.std() > 0.1
    for chunk in (1, 2, 4, 20):
        assert max_error(spm(make_candidates(spm, chunk=chunk)), whole) < 1e-4


def test_the_timestep_matters_to_the_spm_only(spm: ClipScorer) -> None:
    pickscore = ClipScorer(golden_clip("models_pickscore", time_conditioned=False), tokenize)
    assert max_error(spm(make_candidates(spm, t=1)), spm(make_candidates(spm, t=751))) > 0.1
    assert torch.equal(pickscore(make_candidates(pickscore, t=1)), pickscore(make_candidates(pickscore, t=751)))
    with pytest.raises(ValueError, match="timesteps"):
        spm.model.get_image_features(randn(1, 3, 32, 32))


def test_each_prompt_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def counting(prompts: list[str]) -> Tensor:
        seen.extend(prompts)
        return tokenize(prompts)

    scorer = ClipScorer(golden_clip("models_spm", time_conditioned=True), counting)
    monkeypatch.setattr("spo_fast.scorers.spm.TEXT_BATCH", 2)
    rows = 0
    forward = scorer.model.text_model.forward

    def counted(ids: Tensor) -> Tensor:
        nonlocal rows
        rows += len(ids)
        return forward(ids)

    monkeypatch.setattr(scorer.model.text_model, "forward", counted)
    first = scorer.encode(["a", "b", "a", "c"])
    second = scorer.encode(["c", "d", "b"])
    # (a, b), (c, padding), (d, padding): each prompt once, and always in batches of one shape
    assert sorted(prompt for prompt in seen if prompt) == ["a", "b", "c", "d"] and rows == 6
    other = ClipScorer(golden_clip("models_spm", time_conditioned=True), tokenize).encode(["c", "x"])
    assert torch.equal(first[3], other[0])  # bit for bit in other company: a resumed run meets its prompts so
    truth = scorer.encode_ids(tokenize(["a", "b", "a", "c", "c", "d", "b"]))
    assert max_error(torch.cat([first, second]), truth) < 1e-6
    assert max_error(truth.norm(dim=-1), torch.ones(7)) < 1e-6

    monkeypatch.setattr("spo_fast.scorers.spm.MAX_CACHED_PROMPTS", 2)  # the oldest go, this call's included
    assert max_error(scorer.encode(["a", "e", "f"])[1:], scorer.encode_ids(tokenize(["e", "f"]))) < 1e-6
    assert list(scorer._text_features) == ["e", "f"]


def test_too_many_tokens_is_an_error(spm: ClipScorer) -> None:
    with pytest.raises(ValueError, match="13 tokens.* 12 positions"):
        spm.encode_ids(torch.ones(1, 13, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_towers_keep_float32_where_it_counts(spm: ClipScorer, dtype: torch.dtype) -> None:
    half = ClipScorer(golden_clip("models_spm", time_conditioned=True), tokenize, dtype=dtype)
    assert {p.dtype for n, p in half.model.named_parameters() if n != "logit_scale"} == {dtype}
    assert torch.equal(half.model.logit_scale, spm.model.logit_scale)  # 4.6052 is 4.59375 in bfloat16
    scores, truth = half(make_candidates(half)), spm(make_candidates(spm))
    assert scores.dtype == torch.float32
    assert max_error(scores, truth) < 100 * 2**-6  # cosines to a few ulp of bfloat16
    sharp = spm.model.t_embedder(torch.tensor([949, 951]))
    blunt = half.model.t_embedder(torch.tensor([949, 951])).float()
    assert max_error(sharp, blunt) < 0.1 * max_error(sharp[:1], sharp[1:])  # bfloat16 holds neither 949 nor 951


def test_score_is_differentiable_in_pixels(spm: ClipScorer) -> None:
    pixels = (0.3 * randn(2, 3, 40, 40)).requires_grad_()
    spm.score_pixels(pixels, torch.tensor(51), spm.encode(["a", "b"])).sum().backward()
    assert pixels.grad is not None and pixels.grad.abs().max() > 0
    assert not any(p.requires_grad for p in spm.model.parameters())


def test_runs_under_fake_tensors() -> None:
    """No value is looked at, so nothing can wait for the device."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    real = ClipScorer(golden_clip("models_spm", time_conditioned=True), tokenize)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = ClipScorer(Clip(real.model.config), tokenize, dtype=torch.bfloat16)  # as a dry run would build it
        for scorer in (real, fake):
            text = scorer.encode_ids(torch.zeros(3, 12, dtype=torch.int64))
            t, x0 = torch.zeros((), dtype=torch.int64), torch.zeros(6, 4, 8, 9)
            scores = scorer(Candidates(None, x0, t, repeat_text(text, 2), 2, enlarge, decode_chunk=4))
            assert scores.shape == (6,) and scores.dtype == torch.float32


@pytest.mark.gpu
def test_scoring_never_waits_for_the_gpu(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    scorer = load_spm(make_tiny_spm(tmp_path), tokenize_tiny, "cuda", torch.bfloat16)
    candidates = make_candidates(scorer)
    candidates = replace(candidates, x0=candidates.x0.cuda(), t=candidates.t.cuda())
    scorer(candidates)  # first use allocates handles
    torch.cuda.set_sync_debug_mode("error")
    try:
        scores = scorer(candidates)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    reference = load_spm(tmp_path, scorer.tokenize)
    assert max_error(scores.cpu(), reference(make_candidates(reference))) < 100 * 2**-6


# --------------------------------------------------------------------------------------------------------- weighted sum


class LatentScorer:
    """Judges latents: the mean of x0, plus its prompt's length."""

    def encode(self, prompts: list[str]) -> Tensor:
        return torch.tensor([[float(len(prompt))] for prompt in prompts])

    def __call__(self, candidates: Any) -> Tensor:
        return candidates.x0.mean(dim=(1, 2, 3)) + candidates.text[:, 0]


def test_weighted_sum_decodes_once(spm: ClipScorer) -> None:
    decoded = 0

    def decode(z: Tensor) -> Tensor:
        nonlocal decoded
        decoded += len(z)
        return enlarge(z)

    pickscore = ClipScorer(golden_clip("models_pickscore", time_conditioned=False), tokenize)
    latent = LatentScorer()
    total = WeightedSum([spm, latent, pickscore], [0.5, 3.0, -2.0])
    candidates = make_candidates(total, decode=decode)
    assert [part.shape for part in candidates.text] == [(9, 20), (9, 1), (9, 20)]
    scores = total(candidates)
    assert decoded == 9
    parts = [scorer(make_candidates(scorer)) for scorer in (spm, latent, pickscore)]
    assert max_error(scores, 0.5 * parts[0] + 3 * parts[1] - 2 * parts[2]) < 1e-4
    assert scores.dtype == torch.float32 and not scores.requires_grad

    decoded = 0
    only_latent = WeightedSum([latent], [2.0])
    assert max_error(only_latent(make_candidates(only_latent, decode=decode)), 2 * parts[1]) < 1e-5
    assert decoded == 0

    with pytest.raises(ValueError, match="as many weights"):
        WeightedSum([latent], [1.0, 2.0])


def test_repeat_text_is_k_major() -> None:
    text = torch.tensor([[1.0], [2.0]])
    assert repeat_text(text, 3).tolist() == [[1], [2], [1], [2], [1], [2]]
    assert [part.tolist() for part in repeat_text((text, text), 2)] == [[[1], [2], [1], [2]]] * 2


def test_load_scorer(tmp_path: Path, spm: ClipScorer) -> None:
    tensors, info = golden("models_spm")
    for name in ("spm", "pickscore"):
        (tmp_path / name).mkdir()
        save_file(golden(f"models_{name}")[0], tmp_path / name / "weights.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps(info["clip_config"]))
    paths = {name: tmp_path / name / "weights.safetensors" for name in SCORER_SOURCES}
    alone = load_scorer([("spm", 1.0)], paths, tokenize)
    assert isinstance(alone, ClipScorer) and alone.model.config.time_conditioned
    assert max_error(alone(make_candidates(alone)), spm(make_candidates(spm))) < 1e-5
    both = load_scorer([("spm", 1.0), ("pickscore", 0.25)], paths, tokenize)
    pickscore = load_pickscore(paths["pickscore"], tokenize)
    expected = alone(make_candidates(alone)) + 0.25 * pickscore(make_candidates(pickscore))
    assert max_error(both(make_candidates(both)), expected) < 1e-4
    doubled = load_scorer([("spm", 2.0)], paths, tokenize)
    assert max_error(doubled(make_candidates(doubled)), 2 * alone(make_candidates(alone))) < 1e-4

    with pytest.raises(ValueError, match="unknown scorer 'pikscore'.*spm, pickscore.*mean 'pickscore'"):
        load_scorer([("pikscore", 1.0)], paths, tokenize)
    with pytest.raises(ValueError, match="'spm' has no weights"):
        load_scorer([("spm", 1.0)], {}, tokenize)
    with pytest.raises(ValueError, match="No scorer"):
        load_scorer([], paths, tokenize)


# ---------------------------------------------------------------------------------------------------------------- files


def test_published_layout_loads_from_a_pickle(tmp_path: Path, spm: ClipScorer) -> None:
    tensors, info = golden("models_spm")
    tensors["model.text_model.embeddings.position_ids"] = torch.arange(12)[None]
    tensors["model.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    torch.save(tensors, tmp_path / "sd-v1-5_step-aware_preference_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(info["clip_config"]))
    scorer = load_spm(tmp_path / "sd-v1-5_step-aware_preference_model.bin", tokenize)
    assert max_error(scorer(make_candidates(scorer)), spm(make_candidates(spm))) < 1e-4
    with pytest.raises(FileNotFoundError, match="sd-v1-5_step-aware_preference_model.bin: give the file"):
        load_spm(tmp_path, tokenize)
    with pytest.raises(FileNotFoundError, match="absent does not exist. Expected a .bin of SPO-"):
        load_spm(tmp_path / "absent", tokenize)


def test_save_clip_round_trip(tmp_path: Path, spm: ClipScorer) -> None:
    save_clip(spm.model, tmp_path)
    again = load_clip(tmp_path, time_conditioned=True)
    assert again.config == spm.model.config
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), spm.model.parameters(), strict=True))
    assert set(load_file(tmp_path / "model.safetensors")) == set(golden("models_spm")[0])  # the published names
    torch.save(golden("models_spm")[0], tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    assert max_error(load_clip(tmp_path, time_conditioned=True).logit_scale, again.logit_scale) == 0


@pytest.mark.parametrize(
    "key",
    ["logit_scale", "t_embedder.mlp.2.bias", "text_model.encoder.layers.1.mlp.fc2.weight", "text_projection.weight"],
)
def test_missing_tensor_is_named(key: str) -> None:
    tensors, info = golden("models_spm")
    del tensors[f"model.{key}"]
    with pytest.raises(ValueError, match=f"1 missing: {key}. Download or convert it again"):
        load_clip(tensors, time_conditioned=True, hf_config=info["clip_config"])


def test_tensor_needed_for_the_sizes_is_named() -> None:
    tensors, info = golden("models_spm")
    del tensors["model.vision_model.embeddings.position_embedding.weight"]
    with pytest.raises(ValueError, match="no vision_model.embeddings.position_embedding.weight"):
        load_clip(tensors, time_conditioned=True, hf_config=info["clip_config"])


def test_unexpected_and_reshaped_tensors_are_named() -> None:
    tensors, info = golden("models_spm")
    tensors["model.extra.weight"] = torch.zeros(1)
    tensors["model.vision_model.post_layernorm.bias"] = torch.zeros(33)
    with pytest.raises(ValueError, match=r"1 unexpected: extra.weight.*post_layernorm.bias 33, not 32"):
        load_clip(tensors, time_conditioned=True, hf_config=info["clip_config"])


def test_plain_and_step_aware_are_not_taken_for_each_other() -> None:
    with pytest.raises(ValueError, match="12 missing: t_embedder.*cannot score as a step-aware"):
        golden_clip("models_pickscore", time_conditioned=True)
    with pytest.raises(ValueError, match="12 unexpected: t_embedder.*This is a step-aware model: use it as"):
        golden_clip("models_spm", time_conditioned=False)


class Bomb:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_pickle_with_code_is_refused(tmp_path: Path) -> None:
    torch.save({"model.logit_scale": Bomb(tmp_path / "exploded")}, tmp_path / "spm.bin")
    with pytest.raises(ValueError, match="refused"):
        load_clip(tmp_path / "spm.bin", time_conditioned=True)
    assert not (tmp_path / "exploded").exists()
    torch.save({"state_dict": {"a": torch.zeros(1)}}, tmp_path / "nested.bin")
    with pytest.raises(ValueError, match="no state dict"):
        load_clip(tmp_path / "nested.bin", time_conditioned=True)


def test_unknown_architecture_needs_its_config(tmp_path: Path) -> None:
    tensors, info = golden("models_spm")
    with pytest.raises(ValueError, match=r"\(32, 3, 8\).*config.json.*ViT-H/14"):
        load_clip(tensors, time_conditioned=True)
    info["clip_config"]["vision_config"]["hidden_size"] = 64
    with pytest.raises(ValueError, match="vision_config.hidden_size is 64, the weights have 32"):
        load_clip(tensors, time_conditioned=True, hf_config=info["clip_config"])
    save_file(tensors, tmp_path / "spm.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "unet"}')  # some other model's: none of ours
    with pytest.raises(ValueError, match="no known CLIP"):
        load_clip(tmp_path / "spm.safetensors", time_conditioned=True)


@pytest.mark.parametrize(
    ("change", "match"),
    [({"hidden_act": "relu"}, "'relu' is not known"), ({"num_attention_heads": 5}, "not a multiple of 5")],
)
def test_bad_tower_settings(change: dict[str, Any], match: str) -> None:
    tensors, info = golden("models_spm")
    info["clip_config"]["vision_config"].update(change)
    with pytest.raises(ValueError, match=match):
        load_clip(tensors, time_conditioned=True, hf_config=info["clip_config"])


def test_heads_of_known_clips_are_64_wide_or_as_published() -> None:
    """ViT-H's and bigG's vision heads are 80 and 104 wide; every other published head is 64."""
    widths = {key: (key[0] // clip.vision_heads) for key, clip in KNOWN_CLIPS.items()}
    assert widths == {(1280, 32, 14): 80, (1664, 48, 14): 104, (1024, 24, 14): 64, (768, 12, 16): 64, (768, 12, 32): 64}
    assert [clip.text_heads * 64 for clip in KNOWN_CLIPS.values()] == [1024, 1280, 768, 512, 512]


# ---------------------------------------------------------------------------------------- time conditioning, tiny model


def test_identity_start_is_the_plain_clip() -> None:
    plain = golden_clip("models_pickscore", time_conditioned=False)
    step_aware = init_identity_time_conditioning(plain, seed=3)
    pixels = randn(3, 3, 32, 32)
    with torch.no_grad():
        truth = plain.get_image_features(pixels)
        for t in (0, 400, 951):
            assert max_error(step_aware.get_image_features(pixels, torch.tensor([t])), truth) < 1e-6
    state = step_aware.state_dict()
    for i in range(3):
        bias = state[f"vision_model.encoder.layers.{i}.adaLN_modulation.1.bias"].view(6, -1)
        assert not bias[[0, 1, 3, 4]].any()  # shift, scale of attention, then of the MLP
        assert (bias[[2, 5]] == 1).all()  # their gates
    for i in (0, 2):
        assert abs(state[f"t_embedder.mlp.{i}.weight"].std() - 0.02) < 2e-3
    assert set(state) == {key.removeprefix("model.") for key in golden("models_spm")[0]}

    image, text = step_aware(pixels, tokenize(["a", "b", "c"]), torch.tensor([1, 51, 751]))  # it trains
    (image * text).sum().backward()
    assert all(p.grad is not None for p in step_aware.parameters() if p is not step_aware.logit_scale)
    layer = step_aware.vision_model.encoder.layers[0]
    assert layer.adaLN_modulation[1].weight.grad.abs().max() > 0  # type: ignore[index, union-attr]
    with pytest.raises(ValueError, match="step-aware already"):
        init_identity_time_conditioning(step_aware)


def test_tiny_spm(tmp_path: Path) -> None:
    paths = [make_tiny_spm(tmp_path / name, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    files = [(path / "model.safetensors").read_bytes() for path in paths]
    assert files[0] == files[1] != files[2]
    scorer = load_spm(paths[0], tokenize_tiny)
    assert scorer.model.config.image_size == 32
    early, late = scorer(make_candidates(scorer, t=751)), scorer(make_candidates(scorer, t=1))
    by_candidate = early.view(3, 3)
    assert by_candidate.std(dim=0).min() > 0.1  # candidates of a prompt are told apart
    assert max_error(early, late) > 0.5  # and the timestep matters
    text = scorer.encode(["a cat", "two dogs"])
    assert (text[0] @ text[1]) < 0.99
