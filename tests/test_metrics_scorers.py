"""The scorers that tables are made with, on random tiny weights in the published layouts, against float64 formulas and
transformers' own classes: pictures of five shapes, prompts over the token limit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from runs import default_float64
from safetensors.torch import load_file
from tiny import tiny_detector
from torch import Tensor

from spo_fast.data.files import read_json
from spo_fast.data.prompt_sets import CLASSES
from spo_fast.method.experience import Candidates, repeat_text
from spo_fast.scorers.clip import Clip, ClipConfig, TowerConfig
from spo_fast.scorers.clip_files import load_clip, save_clip
from spo_fast.scorers.geneval import COLOURS, Found, instances
from spo_fast.scorers.image_reward import vision_name
from spo_fast.scorers.registry import load_metric, load_scorer
from spo_fast.scorers.spm import _random_tensor, make_tiny_spm

SHAPES = {"square": (40, 40), "wide": (24, 60), "tall": (61, 23), "tiny": (3, 5), "huge": (700, 900)}
PROMPTS = ["a cat", "two dogs and " * 40]
SIZE = 32  # of the tiny towers
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073], dtype=torch.float64)[:, None, None]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711], dtype=torch.float64)[:, None, None]
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def tokenize(prompts: list[str]) -> Tensor:  # (P, 16): a start, one id a letter, cut, ends
    return torch.tensor([[0, *prompt.encode()[:14], *[255] * 16][:16] for prompt in prompts])


def pictures(shape: tuple[int, int]) -> Tensor:  # (2, 3, H, W), beyond [-1, 1] here and there
    return 0.6 * torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(sum(shape)))


# -------------------------------------------------------------------------------------------------- truth in float64


def resize_matrix(source: int, target: int) -> Tensor:
    """(target, source) float64: Pillow's bicubic, a = -0.5, the kernel as wide as a target pixel when it shrinks."""
    scale = max(source / target, 1.0)

    def kernel(x: float) -> float:
        x = abs(x)
        if x < 1:
            return 1.5 * x**3 - 2.5 * x**2 + 1
        return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0

    matrix = torch.zeros(target, source, dtype=torch.float64)
    for i in range(target):
        centre = (i + 0.5) * source / target
        for j in range(source):
            matrix[i, j] = kernel((j + 0.5 - centre) / scale)
    return matrix / matrix.sum(1, keepdim=True)


def resized64(pixels: Tensor, height: int, width: int) -> Tensor:
    x = (pixels.double() / 2 + 0.5).clamp(0, 1)
    x = resize_matrix(x.shape[-2], height) @ x @ resize_matrix(x.shape[-1], width).T
    return x.clamp(0, 1)


def cropped64(pixels: Tensor) -> Tensor:
    h, w = pixels.shape[-2:]
    h, w = (SIZE, SIZE * w // h) if h <= w else (SIZE * h // w, SIZE)
    x = resized64(pixels, h, w)
    top, left = round((h - SIZE) / 2), round((w - SIZE) / 2)
    return (x[..., top : top + SIZE, left : left + SIZE] - MEAN) / STD


def padded64(pixels: Tensor) -> Tensor:
    h, w = pixels.shape[-2:]
    scale = SIZE / max(h, w)
    h, w = round(h * scale), round(w * scale)
    whole = torch.zeros(len(pixels), 3, SIZE, SIZE, dtype=torch.float64)
    top, left = (SIZE - h) // 2, (SIZE - w) // 2
    whole[..., top : top + h, left : left + w] = resized64(pixels, h, w)
    return (whole - MEAN) / STD


@default_float64()
def cosines64(clip: Any, x: Tensor) -> Tensor:  # transformers' CLIPModel in float64
    image = clip.visual_projection(clip.vision_model(pixel_values=x).pooler_output)
    ids = tokenize(PROMPTS)
    hidden = clip.text_model(input_ids=ids).last_hidden_state
    text = clip.text_projection(hidden[torch.arange(2), ids.argmax(1)])
    return torch.cosine_similarity(image, text)


# ------------------------------------------------------------------------------------------------------ tiny weights


@pytest.fixture(scope="module")
def clip_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain CLIP in transformers' layout."""
    text = TowerConfig(width=32, mlp_width=64, num_layers=2, num_heads=4, activation="gelu")
    vision = TowerConfig(width=48, mlp_width=96, num_layers=2, num_heads=4, activation="gelu")
    sizes = dict(vocab_size=256, max_length=16, image_size=SIZE, patch_size=8, projection_dim=24)
    config = ClipConfig(text=text, vision=vision, time_conditioned=False, **sizes)
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in Clip(config).state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    tensors = {key: _random_tensor(key, shapes[key], generator) for key in sorted(shapes)}
    tensors["logit_scale"] = torch.tensor(3.3)  # so that 100 cos is something else
    return save_clip(
        load_clip(tensors, time_conditioned=False, hf_config=config.to_hf()), tmp_path_factory.mktemp("clip")
    )


@pytest.fixture(scope="module")
def theirs(clip_dir: Path) -> Any:
    from transformers import CLIPConfig, CLIPModel

    model = CLIPModel(CLIPConfig(**read_json(clip_dir / "config.json"))).double().eval()
    model.load_state_dict(load_file(clip_dir / "model.safetensors"))
    return model


@pytest.fixture(scope="module")
def hps_file(clip_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same CLIP as open_clip saves it, half of it in float16 no less, beside what a training leaves."""
    hf, out = load_file(clip_dir / "model.safetensors"), {}
    for tower, prefix in (("text_model", ""), ("vision_model", "visual.")):
        for n in range(2):
            old, new = f"{tower}.encoder.layers.{n}.", f"{prefix}transformer.resblocks.{n}."
            for kind in ("weight", "bias"):
                qkv = [hf[f"{old}self_attn.{x}_proj.{kind}"] for x in "qkv"]
                out[f"{new}attn.in_proj_{kind}"] = torch.cat(qkv)
                out[f"{new}attn.out_proj.{kind}"] = hf[f"{old}self_attn.out_proj.{kind}"]
                for a, b in (("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"), ("mlp.fc1", "mlp.c_fc")):
                    out[f"{new}{b}.{kind}"] = hf[f"{old}{a}.{kind}"]
                out[f"{new}mlp.c_proj.{kind}"] = hf[f"{old}mlp.fc2.{kind}"]
    for kind in ("weight", "bias"):
        out[f"ln_final.{kind}"] = hf[f"text_model.final_layer_norm.{kind}"]
        out[f"visual.ln_pre.{kind}"] = hf[f"vision_model.pre_layrnorm.{kind}"]
        out[f"visual.ln_post.{kind}"] = hf[f"vision_model.post_layernorm.{kind}"]
    out["token_embedding.weight"] = hf["text_model.embeddings.token_embedding.weight"]
    out["positional_embedding"] = hf["text_model.embeddings.position_embedding.weight"]
    out["visual.positional_embedding"] = hf["vision_model.embeddings.position_embedding.weight"]
    out["visual.class_embedding"] = hf["vision_model.embeddings.class_embedding"]
    out["visual.conv1.weight"] = hf["vision_model.embeddings.patch_embedding.weight"]
    out["visual.proj"] = hf["visual_projection.weight"].T.contiguous()
    out["text_projection"] = hf["text_projection.weight"].T.contiguous()
    out["logit_scale"], out["attn_mask"] = hf["logit_scale"], torch.zeros(16, 16)
    directory = tmp_path_factory.mktemp("hps")
    torch.save({"epoch": 3, "name": "hps", "state_dict": out}, directory / "HPS_v2_compressed.pt")
    (directory / "config.json").write_bytes((clip_dir / "config.json").read_bytes())
    return directory / "HPS_v2_compressed.pt"


def random_head(width: int, prefix: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    sizes = {0: (width, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
    tensors = {}
    for place, (a, b) in sizes.items():
        tensors[f"{prefix}{place}.weight"] = torch.randn(b, a, generator=generator) / a**0.5
        tensors[f"{prefix}{place}.bias"] = torch.randn(b, generator=generator)
    return tensors


def apply_head64(tensors: dict[str, Tensor], prefix: str, x: Tensor) -> Tensor:
    for place in (0, 2, 4, 6, 7):
        x = x @ tensors[f"{prefix}{place}.weight"].double().T + tensors[f"{prefix}{place}.bias"].double()
    return x[:, 0]


@pytest.fixture(scope="module")
def aesthetic_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("aesthetic") / "sac+logos+ava1-l14-linearMSE.pth"
    torch.save(random_head(24, "layers."), file)
    return file


def score(name: str, paths: dict[str, Path], pixels: Tensor) -> Tensor:
    scorer = load_metric(name, paths, tokenize, "cpu", torch.float32)
    return scorer.score_pixels(pixels, torch.tensor(0), scorer.encode(PROMPTS))


@pytest.mark.parametrize("shape", SHAPES)
def test_clip_metrics_equal_transformers_in_float64(
    shape: str, clip_dir: Path, hps_file: Path, aesthetic_file: Path, theirs: Any
) -> None:
    x = pictures(SHAPES[shape])
    crop, pad = cropped64(x), padded64(x)
    with torch.no_grad():
        image = theirs.visual_projection(theirs.vision_model(pixel_values=crop).pooler_output)
        unit = image / image.norm(dim=1, keepdim=True)
        truth = {
            "clip": 100 * cosines64(theirs, crop),
            "pickscore": theirs.logit_scale.exp() * cosines64(theirs, crop),
            "hpsv2": 100 * cosines64(theirs, pad),
            "hpsv21": 100 * cosines64(theirs, pad),
            "aesthetic": apply_head64(torch.load(aesthetic_file), "layers.", unit),
        }
    paths = {"clip": clip_dir, "pickscore": clip_dir, "hpsv2": hps_file, "hpsv21": hps_file}
    paths["aesthetic"] = aesthetic_file
    for name, expected in truth.items():
        found = score(name, paths, x)
        assert found.dtype == torch.float32 and found.shape == (2,)
        assert (found.double() - expected).abs().max() < 1e-4, name
        assert (found[0] - found[1]).abs() > 5e-3


@pytest.mark.parametrize("shape", [(35, 32), (32, 39), (64, 70), (37, 32)])
def test_pickscore_crops_as_its_processor(shape: tuple[int, int], clip_dir: Path) -> None:
    """transformers rounds half a pixel of margin down; torchvision, whose crop the others have, to even."""
    from transformers import CLIPImageProcessor

    bytes_ = torch.randint(0, 256, (3, *shape), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    theirs = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    truth = theirs(Image.fromarray(bytes_.permute(1, 2, 0).numpy()), return_tensors="pt")["pixel_values"]
    scorer = load_metric("pickscore", {"pickscore": clip_dir}, tokenize, "cpu", torch.float32)
    found = scorer.preprocess(bytes_[None] / 127.5 - 1, SIZE, torch.float32)
    # theirs is rounded to bytes after each pass of the resize; a row off would be tens of levels on this noise
    assert (found - truth).abs().max() <= 2.5 / 255 / STD.min()


def test_hps_reads_prompts_as_open_clip_mends_them(hps_file: Path) -> None:
    scorer = load_metric("hpsv2", {"hpsv2": hps_file}, tokenize, "cpu", torch.float32)
    curly, entity, plain = scorer.encode(["\u201cI\u2019m\u201d &amp; you", '"I\'m" &amp;amp; you', '"I\'m" & you'])
    assert torch.equal(curly, plain) and torch.equal(entity, plain)
    other = load_metric("hpsv2", {"hpsv2": hps_file}, lambda p: tokenize([q[1:] for q in p]), "cpu", torch.float32)
    assert not torch.equal(other.encode(['"I\'m" & you'])[0], plain)


def test_one_tower_serves_spm_pickscore_and_hps(clip_dir: Path, hps_file: Path, tmp_path: Path) -> None:
    paths = {"pickscore": clip_dir, "hpsv2": hps_file, "spm": make_tiny_spm(tmp_path / "spm")}
    scorers = [load_scorer([(name, 1)], paths, lambda p: tokenize(p).clamp(max=255)) for name in paths]
    assert {type(scorer.model) for scorer in scorers} == {Clip}


def test_a_prompt_is_cut_at_the_limit_and_read_before_it(clip_dir: Path) -> None:
    scorer = load_metric("clip", {"clip": clip_dir}, tokenize, "cpu", torch.float32)
    long = scorer.encode(["two dogs and " * 40, "two dogs and ants", "two cats and ants"])
    assert torch.equal(long[0, :], scorer.encode(["two dogs and t" + "x" * 900])[0])
    assert not torch.allclose(long[1], long[2], atol=1e-2)


# ------------------------------------------------------------------------------------------------------ ImageReward


@pytest.fixture(scope="module")
def image_reward(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], dict[str, Tensor], Any]:
    """(paths, the published layout's tensors, transformers' two networks in float64)."""
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    directory = tmp_path_factory.mktemp("reward")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "two", "dogs", "and"]
    (directory / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    vision = BlipVisionConfig(
        hidden_size=128, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, image_size=SIZE,
        patch_size=8, layer_norm_eps=1e-6,
    )  # fmt: skip
    text = BlipTextConfig(
        vocab_size=12, hidden_size=64, encoder_hidden_size=128, intermediate_size=80, num_hidden_layers=2,
        num_attention_heads=1, max_position_embeddings=40,
    )  # fmt: skip
    networks = BlipVisionModel(vision).double().eval(), BlipTextModel(text, add_pooling_layer=False).double().eval()
    for network in networks:
        for parameter in network.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    old = {new: old for old, new in PUBLISHED_NAMES.items()}
    tensors = random_head(64, "mlp.layers.")
    for name, value in networks[0].state_dict().items():
        first, _, rest = name.partition("encoder.layers.")
        if rest:
            number, _, part = rest.partition(".")
            stem, _, kind = part.rpartition(".")
            theirs = f"blocks.{number}.{old.get(stem, stem)}.{kind}"
        else:
            theirs = old.get(name, name)
        tensors[f"blip.visual_encoder.{theirs}"] = value.float()
    for name, value in networks[1].state_dict().items():
        tensors[f"blip.text_encoder.{name}"] = value.float() if value.is_floating_point() else value
    tensors["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    torch.save(tensors, directory / "ImageReward.pt")
    return {"image_reward": directory / "ImageReward.pt", "bert": directory / "vocab.txt"}, tensors, networks


PUBLISHED_NAMES = {  # BLIP's -> transformers'
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
    "norm.weight": "post_layernorm.weight",
    "norm.bias": "post_layernorm.bias",
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
}


@pytest.mark.parametrize("shape", SHAPES)
def test_image_reward_equals_transformers_in_float64(shape: str, image_reward: Any) -> None:
    paths, tensors, (vision, text) = image_reward
    x = pictures(SHAPES[shape])
    # [CLS] a cat [SEP], padded to 35; and a prompt of 120 words cut to 33 of them between the two
    ids = torch.zeros(2, 35, dtype=torch.long)
    ids[0, :4] = torch.tensor([2, 5, 6, 3])
    ids[1] = torch.tensor([2, *[7, 8, 9] * 11, 3])
    with torch.no_grad():
        seen = vision(pixel_values=cropped64(x)).last_hidden_state
        mask = (torch.arange(35) < torch.tensor([[4], [35]])).long()
        read = text(
            input_ids=ids, attention_mask=mask, encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long),
        ).last_hidden_state  # fmt: skip
        truth = (apply_head64(tensors, "mlp.layers.", read[:, 0]) - 0.16717362830052426) / 1.0333394966054072
    scorer = load_metric("image_reward", paths, tokenize, "cpu", torch.float32)
    assert torch.equal(scorer.encode(PROMPTS), ids)
    found = scorer.score_pixels(x, torch.tensor(0), scorer.encode(PROMPTS))
    assert (found.double() - truth).abs().max() < 1e-4
    assert (found[0] - found[1]).abs() > 1e-2


def test_vision_names_cover_the_published_ones() -> None:
    for old, new in PUBLISHED_NAMES.items():
        if "." in new and not new.startswith(("self_attn", "layer")):
            assert vision_name(old) == new
    assert vision_name("blocks.7.attn.proj.bias") == "encoder.layers.7.self_attn.projection.bias"


# ---------------------------------------------------------------------------------------------------------- GenEval


def bilinear_matrix(source: int, target: int) -> Tensor:
    """(target, source) float64: between the two nearest centres, no antialias, the border repeated."""
    places = ((torch.arange(target, dtype=torch.float64) + 0.5) * source / target - 0.5).clamp(0, source - 1)
    return (1 - (places[:, None] - torch.arange(source)).abs()).clamp(min=0)


def bilinear64(x: Tensor, height: int, width: int) -> Tensor:
    return bilinear_matrix(x.shape[-2], height) @ x @ bilinear_matrix(x.shape[-1], width).T


@pytest.fixture(scope="module")
def detectors(tmp_path_factory: pytest.TempPathFactory, clip_dir: Path) -> tuple[Any, Any]:
    """(ours, transformers' network in float64)."""
    path = tiny_detector(tmp_path_factory.mktemp("detector"))
    paths = {"geneval": path, "clip": clip_dir}
    return [load_metric("geneval", paths, tokenize, "cpu", torch.float32, {}) for _ in range(2)]


@pytest.mark.parametrize("shape", SHAPES)
def test_geneval_equals_transformers_in_float64(shape: str, detectors: Any, theirs: Any) -> None:
    ours, network = detectors[0], detectors[1].detector.double()
    x = pictures(SHAPES[shape])[:1].clamp(-1, 1)
    H, W = x.shape[-2:]
    scale = min(800 / min(H, W), 1333 / max(H, W))
    h, w = round(H * scale), round(W * scale)
    whole = torch.zeros(1, 3, -(-h // 32) * 32, -(-w // 32) * 32, dtype=torch.float64)
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in IMAGENET)
    whole[..., :h, :w] = (bilinear64(x.double() / 2 + 0.5, h, w) - mean) / std
    with torch.no_grad():
        out = network(pixel_values=whole)
        classes, masks = ours.logits(x)
    expected = bilinear64(bilinear64(out.masks_queries_logits, *whole.shape[-2:])[0, :, :h, :w], H, W)
    assert masks.shape == (5, H, W) and (masks.sigmoid().double() - expected.sigmoid()).abs().max() < 1e-4
    probabilities = out.class_queries_logits[0].softmax(-1)[:, :80]
    assert (classes.softmax(-1)[:, :80].double() - probabilities).abs().max() < 1e-4
    # detections: the 100 likeliest pairs of a query and a class, times the mean of the mask inside itself
    found = {name: [f.score for f in group] for name, group in instances(classes, masks, 0.006).items()}
    truth: dict[str, list[float]] = {}
    chosen = classes.softmax(-1)[:, :80].flatten().topk(100).indices  # near ties can be either's
    assert probabilities.flatten()[chosen].min() > probabilities.flatten().topk(100).values[-1] - 1e-4
    for place in chosen:
        p = probabilities.flatten()[place]
        mask = expected[place // 80].sigmoid()
        score = float(p * mask[mask > 0.5].mean()) if (mask > 0.5).any() else 0.0
        if p > 0.006 and score > 0.006:
            truth.setdefault(CLASSES[place % 80], []).append(score)
    assert truth.keys() == found.keys() and len(truth) > 5
    for name, scores in truth.items():
        assert found[name] == pytest.approx(sorted(scores, reverse=True)[:16], abs=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_colours_equal_transformers_in_float64(shape: str, detectors: Any, theirs: Any) -> None:
    """Of an object in the left half; the prompts of colours are over this tokenizer's limit."""
    x = pictures(SHAPES[shape])[:1].clamp(-1, 1)
    H, W = x.shape[-2:]
    mask = torch.zeros(H, W, dtype=torch.bool)
    mask[:, : W // 2 + 1] = True
    seen = torch.where(mask, x.double(), 2 * 0x99 / 255 - 1)[..., : W // 2 + 1]
    with torch.no_grad():
        image = theirs.visual_projection(theirs.vision_model(pixel_values=cropped64(seen)).pooler_output)
        likeness = []
        for colour in COLOURS:
            texts = (
                f"a photo of a {colour} cat",
                f"a photo of a {colour}-colored cat",
                f"a photo of a {colour} object",
            )
            ids = tokenize(list(texts))
            with default_float64():
                hidden = theirs.text_model(input_ids=ids).last_hidden_state[torch.arange(3), ids.argmax(1)]
            text = theirs.text_projection(hidden)
            mean = (text / text.norm(dim=1, keepdim=True)).mean(0)
            likeness.append(float(torch.cosine_similarity(image[0], mean, dim=0)))
    found = Found((0, 0, W // 2 + 1, H), 1.0, mask)
    assert detectors[0].colours(x, [found], "cat") == [COLOURS[max(range(10), key=likeness.__getitem__)]]
    classifiers = detectors[0]._classifiers["cat"].double()
    ours = detectors[0].clip.get_image_features(cropped64(seen).float()).double()
    ours = torch.cosine_similarity(ours, classifiers)
    assert (ours - torch.tensor(likeness, dtype=torch.float64)).abs().max() < 1e-4


# ------------------------------------------------------------------------------------------------------- in training


def test_new_scorers_judge_candidates_and_join_sums(
    clip_dir: Path, hps_file: Path, aesthetic_file: Path, image_reward: Any
) -> None:
    paths = {"clip": clip_dir, "hpsv21": hps_file, "aesthetic": aesthetic_file, **image_reward[0]}
    specs = [("hpsv21", 1.0), ("aesthetic", 0.5), ("clip", 2.0), ("image_reward", -1.0)]
    x0 = pictures((20, 24)).repeat(3, 1, 1, 1)  # 3 candidates of 2 prompts

    def judged(specs: list[tuple[str, float]]) -> Tensor:
        scorer = load_scorer(specs, paths, tokenize)
        text = repeat_text(scorer.encode(PROMPTS), 3)
        return scorer(Candidates(None, x0, torch.tensor(0), text, 3, lambda z: z, decode_chunk=4))

    whole = judged(specs)
    parts = sum(weight * judged([(name, 1.0)]) for name, weight in specs)
    assert whole.shape == (6,) and (whole - parts).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("name", "file", "message"),
    [
        ("aesthetic", "clip_dir", "10 missing: 0.bias.*78 unexpected.*Give sac.logos"),
        ("image_reward", "clip_dir", "is no ImageReward"),
        ("hpsv2", "aesthetic_file", "is no CLIP"),
    ],
)
def test_another_file_is_named(name: str, file: str, message: str, clip_dir: Path, request: Any) -> None:
    paths = {name: request.getfixturevalue(file), "clip": clip_dir, "bert": clip_dir / "config.json"}
    with pytest.raises(ValueError, match=message):
        load_metric(name, paths, tokenize, "cpu", torch.float32)
