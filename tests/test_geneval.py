"""GenEval's rules by hand-made detections, the detector's output by hand-made logits, the network tiny and random."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from runs import built, facts, flags, run_toy
from tiny import tiny_detector

from spo_fast import evaluate, train
from spo_fast.data import prompt_sets
from spo_fast.data.prompt_sets import CLASSES, geneval_records
from spo_fast.evaluation import score as evaluation_score
from spo_fast.models.files.toy import toy_files
from spo_fast.scorers.geneval import COLOURS, Found, GenEval, instances, is_right, load_geneval, relations, task_weights


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

    judge = GenEval(torch.nn.Identity(), Means(), tokenize, {})
    x = torch.full((1, 3, 20, 20), -1.0)
    x[0, 0, :, 10:], x[0, 2, :, :10] = 1.0, 1.0  # blue left, red right
    for box, colour in (((0, 0, 10, 20), "blue"), ((10, 0, 20, 20), "red")):
        mask = torch.zeros(20, 20, dtype=torch.bool)
        mask[:, box[0] : box[2]] = True
        assert judge.colours(x, [Found(box, 1.0, mask)], "dog") == [colour]


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_detector(tmp_path_factory.mktemp("detector"))


def test_the_detector_sees_its_published_input(detector: Path, tmp_path: Path) -> None:
    towers = mock.Mock(config=mock.Mock(vocab_size=9))
    wanted = {"a dog": {"tag": "single_object", "include": [{"class": "dog", "count": 1}]}}
    with mock.patch("spo_fast.scorers.geneval.load_clip", lambda *a, **k: towers):
        judge = load_geneval(detector, lambda prompts: torch.tensor([[8]]), clip=tmp_path, wanted=wanted)
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(ValueError, match="is no Mask2Former"):
            load_geneval(tmp_path, lambda prompts: torch.tensor([[8]]), clip=tmp_path, wanted=wanted)
    x = torch.rand(1, 3, 40, 30) * 2 - 1
    seen = judge.prepared(x)
    assert seen.shape == (1, 3, 1088, 800)  # 1067 x 800, padded
    assert seen[..., 1067:, :].abs().max() == 0
    assert judge.score_pixels(x, torch.tensor(0), judge.encode(["a dog"])).tolist() in ([0.0], [1.0])
    with pytest.raises(ValueError, match="does not know what to look for in pictures of 'a cat'"):
        judge.encode(["a dog", "a cat"])


def test_geneval_of_an_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its prompts, its own weights of tasks; the judge is replaced: a random one says nothing."""
    tags = ["counting"] * 500 + ["colors"] * 53
    lines = [{"tag": t, "include": [], "prompt": f"picture {n}"} for n, t in enumerate(tags)]
    file = tmp_path / "evaluation_metadata.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    cfg = evaluate.parse(["--model", "toy", "--prompts", f"geneval={file}", "--metrics", "geneval"])
    prompts, name = prompt_sets.prompts_of(cfg)
    assert len(prompts) == 553 and prompts[552] == "picture 552" and name == "GenEval's prompts"
    assert [record["tag"] for record in evaluation_score.wanted(cfg).values()] == tags


LINE = {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a dog"}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([LINE, {"prompt": "a"}], "line 2: lacks tag and include"),
        ([{**LINE, "include": [{"class": "unicorn", "count": 1}]}], "line 1: .*'unicorn'.* COCO's 80 classes"),
        ([LINE, {**LINE, "tag": "counting"}], "line 2: another line asks something else for the same prompt"),
        (["a dog"], "line 1: lacks tag and include"),
    ],
)
def test_bad_lines_are_named(lines: list[Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match=message):
        geneval_records(tmp_path / "a.jsonl")


# ------------------------------------------------------------------------------------------------------- in training


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    """What is asked for in two pictures."""
    cat = {"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}], "prompt": "a red cat"}
    (tmp_path / "asked.jsonl").write_text(f"{json.dumps(LINE)}\n{json.dumps(cat)}\n")
    return tmp_path / "asked.jsonl"


def settings(detector: Path, asked: Path) -> dict[str, Any]:
    """A run with tiny random weights; the toy's PickScore stands in for CLIP ViT-L/14."""
    return {
        "scorer": "geneval",
        "prompts": asked,
        "max_prompts": None,
        "geneval_path": detector,
        "clip_path": toy_files()["pickscore"],
        "max_train_steps": 1,
        "num_validation_images": 1,
    }


def test_a_run_is_trained_with_it(detector: Path, asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the command line; what the random network finds is replaced by a dog in every bright picture."""
    whole, dogs = GenEval.logits, []

    def logits(self: GenEval, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not dogs:  # once is enough of the network
            assert whole(self, pixels)[1].shape == (5, 8, 8)
        dogs.append(bool(pixels.mean() > 0))
        classes = torch.zeros(5, 81)
        classes[0, CLASSES.index("dog") if dogs[-1] else 80] = 30.0
        return classes, torch.full((5, 8, 8), 30.0)

    monkeypatch.setattr(GenEval, "logits", logits)
    out = run_toy(tmp_path / "run", **settings(detector, asked), validation_metrics="pickscore")
    (record,) = facts(out)
    assert record["images"] == 8 and record["pairs"] == 4  # threshold -1 keeps level pairs too
    judged = 2 + 8 + 2  # before, 2 comparisons of 2 candidates of 2 prompts, after
    assert len(dogs) == judged
    # a dog is right, a cat never is: the mean score is the share of dogs among the pictures that asked for one
    assert record["validation_score"] in (0, 0.5) and 0 <= record["score_mean"] <= 0.5
    assert "held_out_pickscore" in record and record["score_mean"] * 8 == round(record["score_mean"] * 8)


def test_what_is_not_known_is_told(
    detector: Path, asked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is loaded."""
    given, out = settings(detector, asked), tmp_path / "run"

    def told(**changed: Any) -> str:
        assert train.main(flags(out, **{**given, **changed})) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and not out.exists()
        return error

    assert "give --prompts evaluation_metadata.jsonl" in told(prompts=None)
    (tmp_path / "a.txt").write_text("a dog\n")
    assert "give --prompts evaluation_metadata.jsonl" in told(prompts=tmp_path / "a.txt")
    assert "pictures of 'a bird'" in told(validation_prompt="a bird")
    (tmp_path / "a.jsonl").write_text(f'{json.dumps(LINE)}\n{{"prompt": "a fox"}}\n')
    assert "a.jsonl, line 2: lacks tag and include" in told(prompts=tmp_path / "a.jsonl")


def test_no_graph_is_captured_of_it(detector: Path, asked: Path, tmp_path: Path) -> None:
    run = built(tmp_path / "run", **settings(detector, asked))
    run.record_graphs(lambda function: pytest.fail("captured"))
    assert "score_pixels" not in vars(run.scorer)
