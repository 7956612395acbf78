"""GenEval's rules by hand-made detections, the detector's output by hand-made logits, the network tiny and random."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from spo_fast import evaluate
from spo_fast.scorers.geneval import (
    CLASSES,
    COLOURS,
    Found,
    GenEval,
    NoLoss,
    instances,
    is_right,
    load_geneval,
    relations,
    task_weights,
)


def thing(left: int, top: int, right: int, bottom: int, score: float = 0.95) -> Found:
    return Found((left, top, right, bottom), score, torch.ones(1, 1, dtype=torch.bool))


def no_colours(found: Any, name: str) -> list[str]:
    raise AssertionError("no colour was asked")


def test_relations_by_hand() -> None:
    a, b = thing(0, 0, 20, 20), thing(40, 0, 60, 20)
    assert relations(a, b) == {"left of"} and relations(b, a) == {"right of"}
    assert relations(thing(0, 40, 20, 60), thing(0, 0, 20, 20)) == {"below"}
    assert relations(thing(0, 0, 20, 20), thing(60, 60, 80, 80)) == {"left of", "above"}
    # centres 4 apart, and 0.1 (20 + 20) = 4 are the margin
    assert relations(thing(0, 0, 20, 20), thing(4, 0, 24, 20)) == set()
    # 7 right and 5 down: 3 and 1 beyond the margin, of a length of 8.6: 0.35 and 0.12
    assert relations(thing(7, 5, 27, 25), thing(0, 0, 20, 20)) == set()
    # 10 right: 6 of 10
    assert relations(thing(10, 0, 30, 20), thing(0, 0, 20, 20)) == {"right of"}


def test_clauses_by_hand() -> None:
    dogs, cat = [thing(0, 0, 9, 9), thing(20, 0, 29, 9)], [thing(60, 0, 69, 9)]
    objects = {"dog": dogs, "cat": cat}

    def right(**wanted: Any) -> bool:
        return is_right(objects, wanted, no_colours)

    assert right(include=[{"class": "dog", "count": 2}])
    assert not right(include=[{"class": "dog", "count": 3}])
    assert not right(include=[{"class": "dog", "count": 1}], exclude=[{"class": "dog", "count": 2}])
    assert right(include=[{"class": "dog", "count": 2}], exclude=[{"class": "dog", "count": 3}])
    cat_is = {"class": "cat", "count": 1, "position": ["right of", 0]}
    assert right(include=[{"class": "dog", "count": 1}, cat_is])
    assert not right(include=[{"class": "dog", "count": 1}, {**cat_is, "position": ["above", 0]}])
    assert not right(include=[{"class": "bus", "count": 1}, cat_is])  # no target
    blue = {"class": "dog", "count": 1, "color": "blue"}
    assert is_right(objects, {"include": [blue]}, lambda found, name: ["blue"] * len(found))
    assert not is_right(objects, {"include": [blue]}, lambda found, name: ["red"] * len(found))


def test_detections_by_hand() -> None:
    classes = torch.full((3, 81), -20.0)
    classes[0, CLASSES.index("cat")] = 20.0  # a cat for certain, its mask too
    classes[1, [CLASSES.index("dog"), 80]] = torch.tensor([20.0, 20.0])  # a dog to 0.5, its mask to 0.5 to 0.73
    classes[2, 80] = 20.0  # nothing
    masks = torch.full((3, 6, 8), -20.0)
    masks[0, 1:4, 2:7] = 20.0
    masks[1, :, :4] = 1.0
    found = instances(classes, masks, 0.3)
    assert found.keys() == {"cat", "dog"}
    assert found["cat"][0].box == (2, 1, 7, 4) and found["cat"][0].score == pytest.approx(1, abs=1e-4)
    assert found["dog"][0].score == pytest.approx(0.5 * torch.tensor(1.0).sigmoid().item(), abs=1e-4)
    assert instances(classes, masks, 0.9).keys() == {"cat"}


def test_every_task_weighs_the_same() -> None:
    tags = ["a", "a", "a", "b"]
    weights = task_weights(tags)
    right = [1.0, 0.0, 0.0, 1.0]
    mean = sum(w * r for w, r in zip(weights, right, strict=True)) / 4
    assert mean == pytest.approx((1 / 3 + 1) / 2)
    assert len(CLASSES) == 80 and len(COLOURS) == 10


def test_colours_are_told_on_the_object_alone() -> None:
    """A CLIP that sees the mean colour of its input and knows two words."""

    class Means:
        config = type("Config", (), {"image_size": 8})

        def get_text_features(self, ids: torch.Tensor) -> torch.Tensor:
            return ids.float()

        def get_image_features(self, x: torch.Tensor) -> torch.Tensor:
            return torch.where(x.mean((2, 3)) > 0, 1.0, 0.0) + 1e-3

    def tokenize(prompts: list[str]) -> torch.Tensor:
        return torch.tensor([["a red" in p, "a green" in p, "a blue" in p] for p in prompts]) + 0.01

    judge = GenEval(torch.nn.Identity(), Means(), tokenize)
    x = torch.full((1, 3, 20, 20), -1.0)
    x[0, 0, :, 10:], x[0, 2, :, :10] = 1.0, 1.0  # blue left, red right
    for box, colour in (((0, 0, 10, 20), "blue"), ((10, 0, 20, 20), "red")):
        mask = torch.zeros(20, 20, dtype=torch.bool)
        mask[:, box[0] : box[2]] = True
        assert judge.colours(x, [Found(box, 1.0, mask)], "dog") == [colour]


def test_the_detector_sees_its_published_input_and_gives_masks_of_the_picture(tmp_path: Path) -> None:
    mask2former = importlib.import_module("transformers.models.mask2former.modeling_mask2former")
    from transformers import Mask2FormerConfig, SwinConfig

    torch.manual_seed(0)
    backbone = SwinConfig(
        embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4, drop_path_rate=0.0,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, num_labels=80, num_queries=5, hidden_dim=32, mask_feature_size=32, feature_size=32,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16, encoder_feedforward_dim=16,
    )  # fmt: skip
    with mock.patch.object(mask2former, "Mask2FormerLoss", NoLoss):
        mask2former.Mask2FormerForUniversalSegmentation(config).save_pretrained(tmp_path)
    towers = mock.Mock(config=mock.Mock(vocab_size=9))
    with mock.patch("spo_fast.scorers.geneval.load_clip", lambda *a, **k: towers):
        judge = load_geneval(tmp_path, lambda prompts: torch.tensor([[8]]), "cpu", clip=tmp_path)
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(ValueError, match="is no Mask2Former"):
            load_geneval(tmp_path, lambda prompts: torch.tensor([[8]]), "cpu", clip=tmp_path)
    x = torch.rand(1, 3, 40, 30) * 2 - 1
    seen = judge.prepared(x)
    assert seen.shape == (1, 3, 1088, 800)  # 1067 x 800, padded
    assert seen[..., 1067:, :].abs().max() == 0
    wanted = {"tag": "single_object", "include": [{"class": "dog", "count": 1}]}
    assert judge.score(x, [wanted]).tolist() in ([0.0], [100.0])


def test_geneval_of_an_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its prompts, its own weights of tasks; the judge is replaced: a random one says nothing."""
    tags = ["counting"] * 500 + ["colors"] * 53
    lines = [{"tag": t, "include": [], "prompt": f"picture {n}"} for n, t in enumerate(tags)]
    file = tmp_path / "evaluation_metadata.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    cfg = evaluate.parse(["--model", "toy", "--prompts", f"geneval={file}", "--metrics", "geneval"])
    prompts, name = evaluate.load(cfg)
    assert len(prompts) == 553 and prompts[552] == "picture 552" and name == "GenEval's prompts"
    assert [r["tag"] for r in evaluate.geneval_records(cfg)] == tags
    file.write_text('{"prompt": "a"}')
    with pytest.raises(ValueError, match="lacks tag and include"):
        evaluate.geneval_records(cfg)
