"""The embedded world: its pictures, its two scores, its labeller, its pipeline and how that is pretrained."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from spo_fast.data import toy_world
from spo_fast.data.prompts import TOY_PROMPTS, load_prompts
from spo_fast.data.toy_world import CAPTIONS, SIZE, TEST, TRAIN, TUNE, aesthetics, layout, looks
from spo_fast.models.files import toy
from spo_fast.toy import build


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scenes(captions: list[str], **plain: float) -> toy_world.Scenes:
    """Random pictures of the captions with some of their looks fixed."""
    drawn = toy_world.scenes(captions, generator())
    fixed = {name: torch.full_like(getattr(drawn, name), value) for name, value in plain.items()}
    return toy_world.Scenes(**{**vars(drawn), **fixed})


# ---------------------------------------------------------------------------------------------------- captions, drawing


def test_prompt_sets() -> None:
    assert len(CAPTIONS) == 432 == 4 * 3 * 4 * 3 * 3
    assert (len(TRAIN), len(TUNE), len(TEST)) == (320, 48, 64)
    assert set(TRAIN) | set(TUNE) | set(TEST) == set(CAPTIONS)
    assert load_prompts(TOY_PROMPTS) == TRAIN
    for part in (TRAIN, TUNE, TEST):  # no set lacks a word
        assert {word for text in part for word in text.split()} == {word for text in CAPTIONS for word in text.split()}
    assert all(str(caption) == text for text, caption in CAPTIONS.items())


def test_a_picture_by_hand() -> None:
    """A red square at rows 4-8, columns 0-4, left of a blue cross at rows 5-9, columns 10-14."""
    text = "a red square left of a blue cross"
    s = scenes([text], grey=0.1, stripes=0.0, grain=0.0, vividness=0.5)
    s = toy_world.Scenes(**{**vars(s), "corners": torch.tensor([[[4, 0], [5, 10]]])})
    expected = torch.full((3, SIZE, SIZE), 0.1)
    expected[:, 4:9, 0:5] += 0.5 * torch.tensor([1.0, -1.0, 0.0])[:, None, None]
    blue = 0.5 * torch.tensor([-1.0, -1.0, 2.0]) / math.sqrt(3)
    expected[:, 7, 10:15] += blue[:, None]
    expected[:, 5:10, 12] += blue[:, None]
    expected[:, 7, 12] -= blue  # the arms of the cross share a pixel
    assert torch.allclose(s.pixels()[0], expected, atol=1e-6)
    assert layout(expected[None], [text]).all()


def test_stripes_of_a_quadrant() -> None:
    s = scenes(TRAIN[:1], grey=0.0, grain=0.0, vividness=0.0)
    s = toy_world.Scenes(**{**vars(s), "stripes": torch.tensor([[[0.1, 0.0], [0.2, 0.05]]])})
    x = s.pixels()[0]
    assert torch.equal(x[0], x[1]) and torch.equal(x[0], x[2])  # brightness only
    assert torch.allclose(x[0, 0, :8], 0.1 * torch.tensor([1, 0, -1, 0, 1, 0, -1, 0.0]), atol=1e-6)
    assert float(x[0, :8, 8:].abs().max()) == 0
    assert abs(float(x[0, 8:, :8].max()) - 0.2) < 1e-6
    assert abs(float(looks(x[None])["stripes"]) - (0.1 + 0.0 + 0.2 + 0.05) / 4) < 1e-6


def test_drawing_is_seeded() -> None:
    a, b = (toy_world.draw(TRAIN[:8], generator(3)) for _ in range(2))
    assert torch.equal(a, b) and not torch.equal(a, toy_world.draw(TRAIN[:8], generator(4)))
    assert a.shape == (8, 3, SIZE, SIZE) and a.abs().max() <= 1


# ---------------------------------------------------------------------------------------------------- layout


def test_layout_knows_what_was_drawn() -> None:
    texts = toy_world.random_captions(list(CAPTIONS), 2000, generator(1))
    assert layout(toy_world.draw(texts, generator(2)), texts).all(1).float().mean() > 0.995


@pytest.mark.parametrize(
    ("drawn", "right"),
    [
        ("a red square left of a blue ring", [True, True, True]),
        ("a red square right of a blue ring", [True, True, False]),
        ("a red square above a blue ring", [True, True, False]),
        ("a green square left of a blue ring", [False, True, False]),
        ("a red cross left of a blue ring", [False, True, False]),
        ("a red square left of a blue square", [True, False, False]),
        ("a blue square left of a red ring", [False, False, False]),
        ("a blue ring left of a red square", [True, True, False]),
    ],
)
def test_layout_says_what_is_wrong(drawn: str, right: list[bool]) -> None:
    asked = "a red square left of a blue ring"
    assert layout(toy_world.draw([drawn] * 16, generator()), [asked] * 16).tolist() == [right] * 16


def test_layout_of_nothing_and_of_noise() -> None:
    blank, noise = torch.zeros(64, 3, SIZE, SIZE), torch.randn(64, 3, SIZE, SIZE, generator=generator())
    assert not layout(blank, TRAIN[:64]).any()
    assert layout(noise, TRAIN[:64]).float().mean() < 0.02


def test_layout_is_blind_to_looks() -> None:
    texts = TRAIN[:256]
    best = scenes(texts, stripes=0.0, grain=0.0)
    worst = toy_world.Scenes(**{**vars(best), "stripes": best.stripes + 0.25, "grain": best.grain + 0.1})
    assert layout(best.pixels(), texts).float().mean() - layout(worst.pixels(), texts).float().mean() < 0.005


# ---------------------------------------------------------------------------------------------------- aesthetics


def test_aesthetics_by_hand() -> None:
    # stripes of 0.1 in all quadrants, no grain at all, vividness at its best:
    # 10 (1 - 0.6 * 0.1 / 0.25 - 0.2 * 0.05 / 0.07) = 6.1714
    x = scenes(TRAIN[:64], grain=0.0, vividness=0.68, stripes=0.1, grey=0.0).pixels()
    assert torch.allclose(aesthetics(x), torch.full((64,), 6.1714), atol=1e-3)
    # no stripes, vividness 0.14 off on either side: 10 (1 - 0.2 * 0.14 / 0.35 - 0.2 * 0.05 / 0.07) = 7.7714
    for vividness in (0.54, 0.82):
        x = scenes(TRAIN[:64], grain=0.0, vividness=vividness, stripes=0.0, grey=0.0).pixels()
        assert torch.allclose(aesthetics(x), torch.full((64,), 7.7714), atol=1e-3)
    # of more and less grain than the best, the best is best
    means = [float(aesthetics(scenes(TRAIN[:64], grain=g, stripes=0.0).pixels()).mean()) for g in (0.0, 0.04, 0.12)]
    assert means[1] > means[0] + 0.5 and means[1] > means[2] + 0.5


def test_looks_measure_what_was_drawn() -> None:
    texts = toy_world.random_captions(list(CAPTIONS), 2000, generator(1))
    drawn = toy_world.scenes(texts, generator(2))
    seen = looks(drawn.pixels())
    true = {"stripes": drawn.stripes.mean((1, 2)), "grain": drawn.grain, "vividness": drawn.vividness}
    for name, values in true.items():
        assert torch.corrcoef(torch.stack([seen[name], values]))[0, 1] > 0.97, name
        assert (seen[name] - values).abs().mean() < 0.05, name


def test_aesthetics_is_blind_to_the_caption() -> None:
    """Among real pictures nothing in the caption tells anything about the looks."""
    texts = list(CAPTIONS) * 8
    a = aesthetics(toy_world.draw(texts, generator())).view(8, -1)
    spread = a.mean(0).std() / (a.std(0).mean() / math.sqrt(8))  # 1 if captions do not matter
    assert spread < 1.25
    assert 4 < a.mean() < 6 and 1 < a.std() < 2  # room above and below


# ---------------------------------------------------------------------------------------------------- labels


def test_corruption_changes_one_thing() -> None:
    texts = toy_world.random_captions(TRAIN, 4000, generator())
    changed = toy_world.corrupted(texts, generator(1))
    kinds: Counter[int] = Counter()
    for asked, drawn in zip(texts, changed, strict=True):
        a, b = CAPTIONS[asked], CAPTIONS[drawn]
        parts = [(*a.first, a.relation, *a.second), (*b.first, b.relation, *b.second)]
        different = [i for i in range(5) if parts[0][i] != parts[1][i]]
        assert len(different) <= 1
        kinds.update(different)
    assert abs(kinds.total() / 4000 - toy_world.CORRUPTION) < 0.03
    assert len(kinds) == 5 and max(kinds.values()) < 1.3 * min(kinds.values())


def test_labels_follow_the_stated_utility() -> None:
    """P(first) = sigmoid(12 (difference of layout shares) + 0.8 (difference of aesthetics))."""
    pairs = toy_world.draw_pairs(6000, generator())
    x = pairs.pixels
    share = torch.stack([layout(v, pairs.prompts).double().mean(1) for v in x])
    looks_ = torch.stack([aesthetics(v).double() for v in x])
    p = torch.sigmoid(12 * (share[0] - share[1]) + 0.8 * (looks_[0] - looks_[1]))
    error = (pairs.labels - p) / (p * (1 - p)).clamp_min(1e-9).sqrt()
    middle = (p > 0.05) & (p < 0.95)
    assert middle.sum() > 2000 and abs(float(error[middle].mean())) < 4 / middle.sum() ** 0.5
    assert abs(float(error[middle].std()) - 1) < 0.05
    # the labels conflict: layout decides most pairs, aesthetics alone is a poor guide
    first = pairs.labels.bool()
    decided = share[0] != share[1]
    assert ((share[0] > share[1]) == first)[decided].float().mean() > 0.95
    assert 0.55 < ((looks_[0] > looks_[1]) == first).float().mean() < 0.66
    assert set(pairs.prompts) <= set(TRAIN)


@pytest.mark.parametrize("asked", [0.0, 0.125, 0.5])
def test_just_this_share_of_labels_contradicts_aesthetics_and_follows_the_layout(asked: float) -> None:
    """Each picture by itself, in float64: who goes by the layout, then by aesthetics, would label all of them so."""
    pairs = toy_world.conflict_pairs(64, generator(), share=asked)
    against = 0
    for i, text in enumerate(pairs.prompts):
        one, other = pairs.pixels[:, i, None].double()
        a, b = ((int(layout(x, [text]).sum()), float(aesthetics(x))) for x in (one, other))
        assert (a > b) == bool(pairs.labels[i]) and a[1] != b[1]
        contradicts = (a[1] > b[1]) != bool(pairs.labels[i])
        assert contradicts == (a[0] != b[0])  # only where the layout differs, and everywhere there
        against += contradicts
    assert against == round(asked * 64) and set(pairs.prompts) <= set(TRAIN) and len(pairs.prompts) == 64
    assert 0.25 < float(pairs.labels.mean()) < 0.75  # no side wins
    again, other = (toy_world.conflict_pairs(64, generator(seed), share=asked) for seed in (0, 1))
    assert torch.equal(again.pixels, pairs.pixels) and not torch.equal(other.pixels, pairs.pixels)


# ---------------------------------------------------------------------------------------------------- pipeline


def test_vae_is_the_identity() -> None:
    vae = toy.identity_vae()
    x = toy_world.draw(TRAIN[:32], generator()) * 1.3
    with torch.no_grad():
        latents = vae.encode(x).latent_dist.sample(generator()) * vae.config.scaling_factor
        assert (latents / toy.SCALING - x).abs().max() < 2e-4
        assert (vae.decode(latents / vae.config.scaling_factor).sample - x).abs().max() < 2e-4


def test_every_caption_fits() -> None:
    parts = toy.toy_parts(0)
    for tokenizer in (parts["tokenizer"], parts["tokenizer_2"]):
        for text in CAPTIONS:
            ids = tokenizer(text).input_ids
            extra = 3 * text.count("green")  # the merges of red come first and leave green in four
            assert len(ids) == len(text.split()) + 2 + extra <= toy.MAX_LENGTH
            assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text


def shipped(pattern: str) -> list[Path]:
    return sorted(p for p in toy.WEIGHTS.rglob(pattern) if p.is_file())


def test_what_is_shipped_is_small_and_in_16_bits() -> None:
    assert sum(p.stat().st_size for p in shipped("*")) <= 4_000_000
    assert len(shipped("*.safetensors")) == 6
    for path in shipped("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}, path  # noqa: SIM118


def test_the_record_of_the_build_is_shipped() -> None:
    record = json.loads((toy.WEIGHTS / "build.json").read_text())
    assert record["pretraining"]["pictures"] == record["pretraining"]["steps"] * build.BATCH
    assert {"cpu_minutes", "final_loss", "seed", "versions"} <= record["pretraining"].keys()
    assert {"pickscore", "spm"} <= record.keys() and "base" in record


def test_diffusers_loads_what_is_shipped() -> None:
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(toy.WEIGHTS, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    texts = TEST[:8]
    x = pipe(texts, num_inference_steps=20, guidance_scale=2.0, generator=generator(), output_type="pt").images * 2 - 1
    assert x.shape == (8, 3, SIZE, SIZE) and x.isfinite().all()
    assert layout(x, texts).float().mean() > 0.5  # of 24 things, so the text conditions: by chance it is under 0.05


# ---------------------------------------------------------------------------------------------------- pretraining


def tensors(run: build.Pretraining) -> list[Tensor]:
    return [*(p.detach() for p in run.parameters), *run.average]


def test_pretraining_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "BATCH", 2)
    whole = build.Pretraining(0, 300)
    for _ in range(4):
        whole.advance()
    stopped = build.Pretraining(0, 300)
    for _ in range(2):
        stopped.advance()
    stopped.save(tmp_path / "state.pt")
    resumed = build.Pretraining(0, 300)
    resumed.load(tmp_path / "state.pt")
    for _ in range(2):
        resumed.advance()
    assert resumed.step == 4
    assert all(torch.equal(a, b) for a, b in zip(tensors(whole), tensors(resumed), strict=True))
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]
    with pytest.raises(ValueError, match="work_dir"):
        build.Pretraining(1, 300).load(tmp_path / "state.pt")


def test_pretraining_learns_v(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of a UNet that answers with diffusers' own velocity is zero."""
    from diffusers import DDPMScheduler

    monkeypatch.setattr(build, "BATCH", 4)
    run = build.Pretraining(0, 300)
    scheduler = DDPMScheduler.from_config(run.parts["scheduler"].config)
    seen = {}

    class Oracle:
        def __call__(self, x_t, timestep, encoder_hidden_states, added_cond_kwargs):
            t, embeds = timestep, encoder_hidden_states
            g = generator(7)  # the draws of loss(), in its order
            captions = toy_world.random_captions(list(CAPTIONS), 4, g)
            x0 = toy_world.draw(captions, g) * toy.SCALING
            assert torch.equal(t, torch.randint(1000, (4,), generator=g))
            noise = torch.randn(x0.shape, generator=g)
            assert torch.allclose(x_t, scheduler.add_noise(x0, noise, t), atol=1e-5)
            seen["zeroed"] = (embeds == 0).flatten(1).all(1) == (added_cond_kwargs["text_embeds"] == 0).all(1)

            class Output:
                sample = scheduler.get_velocity(x0, noise, t)

            return Output

    run.parts["unet"] = Oracle()
    assert float(run.loss(generator(7))) < 1e-10
    assert seen["zeroed"].all()


def test_the_public_names_are_the_rooms():
    from spo_fast.data import toy_world
    from spo_fast.models.files import toy
    from spo_fast.toy import pipeline, world

    for door, room in ((pipeline, toy), (world, toy_world)):
        assert door.__all__ and all(getattr(door, name) is getattr(room, name) for name in door.__all__)
