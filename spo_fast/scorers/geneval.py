"""GenEval (arXiv 2310.11513): is what the prompt asks for in the picture? Its rules are those of evaluate_images.py.

The detector is Mask2Former (Swin-S, COCO instances) by transformers in place of mmdet; colours are told by CLIP
ViT-L/14 on each object, cut out along its mask. A picture is right or wrong; tables show the mean of six tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from spo_fast.data.files import DAMAGED, shown, some
from spo_fast.data.prompt_sets import CLASSES, Wanted
from spo_fast.data.weights import check_finite
from spo_fast.ops.linear import take_linear
from spo_fast.scorers.clip import Clip, unit
from spo_fast.scorers.clip_files import load_clip
from spo_fast.scorers.preprocess import PictureScorer, cropped
from spo_fast.scorers.spm import Tokenize, check_vocabulary

if TYPE_CHECKING:
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9  # of a detection's score
MAX_OBJECTS = 16  # of a class
MAX_DETECTIONS = 100  # of a picture
POSITION_MARGIN = 0.1  # of the sum of two boxes' sizes, by which centres must be apart
SHORT_SIDE, LONG_SIDE, DIVISOR = 800, 1333, 32  # the detector's input
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GREY = 2 * 0x99 / 255 - 1  # around an object whose colour is asked

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")


class Found(NamedTuple):
    """A detection."""

    box: tuple[int, int, int, int]  # left, top, right, bottom; the latter two outside
    score: float
    mask: Tensor  # (H, W) bool


Objects = Mapping[str, Sequence[Found]]
"""Class -> its detections, surest first."""


def instances(class_logits: Tensor, mask_logits: Tensor, threshold: float) -> dict[str, list[Found]]:
    """A picture's detections as mmdet makes them: (Q, 81) and (Q, H, W) at the picture's size."""
    probabilities = class_logits.float().softmax(-1)[:, :-1]  # the last is no object
    scores, places = probabilities.flatten().topk(min(MAX_DETECTIONS, probabilities.numel()))
    found: dict[str, list[Found]] = {}
    for probability, place in zip(scores.tolist(), places.tolist(), strict=True):
        if probability <= threshold:  # the mask's part only lowers it
            continue
        query, number = divmod(place, probabilities.shape[1])
        logits = mask_logits[query].float()
        mask = logits > 0
        if not mask.any():
            continue
        score = probability * float((logits.sigmoid() * mask).sum() / (mask.sum() + 1e-6))
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
        if score > threshold:
            found.setdefault(CLASSES[number], []).append(Found(box, score, mask))
    return {name: sorted(group, key=lambda f: -f.score)[:MAX_OBJECTS] for name, group in found.items()}


def relations(a: Found, b: Found) -> set[str]:
    """Where a stands seen from b: none, one or two of left of, right of, above, below."""
    offset, excess = [], []
    for axis in (0, 1):
        sides = [(f.box[axis], f.box[axis + 2]) for f in (a, b)]
        (low_a, high_a), (low_b, high_b) = sides
        apart = (low_a + high_a) / 2 - (low_b + high_b) / 2
        margin = POSITION_MARGIN * (abs(high_a - low_a) + abs(high_b - low_b))
        offset.append(apart)
        excess.append(max(abs(apart) - margin, 0) * (1 if apart > 0 else -1))
    if all(abs(e) < 1e-3 for e in excess):
        return set()
    length = (offset[0] ** 2 + offset[1] ** 2) ** 0.5
    dx, dy = excess[0] / length, excess[1] / length
    names = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}
    return {name for name, share in names.items() if share > 0.5}


def is_right(
    objects: Objects,
    wanted: Wanted,
    colours_of: Callable[[Sequence[Found], str], list[str]],  # (detections, class) -> a colour each
) -> bool:
    """Every include clause holds on the surest detections of its class, and no exclude clause does."""
    groups: list[Sequence[Found] | None] = []
    for clause in wanted.get("include", ()):
        found = objects.get(clause["class"], ())[: clause["count"]]
        good = len(found) == clause["count"]
        if good and "color" in clause:
            good = colours_of(found, clause["class"]).count(clause["color"]) >= clause["count"]
        if good and "position" in clause:
            relation, target = clause["position"]
            others = groups[target]
            good = others is not None and all(relation in relations(a, b) for a in found for b in others)
        groups.append(found if good else None)
    banned = any(len(objects.get(c["class"], ())) >= c["count"] for c in wanted.get("exclude", ()))
    return None not in groups and not banned


def task_weights(tags: Sequence[str]) -> list[float]:
    """A prompt's weight in a mean that gives every task the same."""
    return [len(tags) / (len(set(tags)) * tags.count(tag)) for tag in tags]


class GenEval(PictureScorer):
    """1 for a picture that is right, 0 for one that is wrong. Detections are read back: no CUDA graph holds this."""

    reads_device = True

    def __init__(
        self,
        detector: Mask2FormerForUniversalSegmentation,
        clip: Clip,
        tokenize: Tokenize,
        wanted: Mapping[str, Wanted],
    ):
        self.detector = take_linear(detector.eval().requires_grad_(False))
        self.clip, self.tokenize = clip, tokenize
        self.wanted = wanted  # prompt -> its line of evaluation_metadata.jsonl
        self._records, self._numbers = list(wanted.values()), {prompt: n for n, prompt in enumerate(wanted)}
        self._classifiers: dict[str, Tensor] = {}

    def encode(self, prompts: list[str]) -> Tensor:  # (P,) int64 numbers of their lines
        """Raises ValueError for a prompt of which it is not known what should be in the picture."""
        check_wanted(prompts, self.wanted)
        return torch.tensor([self._numbers[prompt] for prompt in prompts])

    @torch.no_grad()
    def score_pixels(self, pixels: Tensor, t: Tensor, text: Tensor) -> Tensor:  # (N, 3, H, W) -> (N,) float32
        """Picture by picture: 1 or 0."""
        shown = pixels.float().clamp(-1, 1)
        right = [self._right(x[None], self._records[n]) for x, n in zip(shown, text.tolist(), strict=True)]
        return torch.tensor(right, dtype=torch.float32, device=pixels.device)

    def _right(self, pixels: Tensor, wanted: Wanted) -> bool:
        threshold = COUNTING_THRESHOLD if wanted["tag"] == "counting" else THRESHOLD
        objects = instances(*self.logits(pixels), threshold)
        return is_right(objects, wanted, lambda found, name: self.colours(pixels, found, name))

    def logits(self, pixels: Tensor) -> tuple[Tensor, Tensor]:  # (1, 3, H, W) -> (Q, 81) classes, (Q, H, W) masks
        """The detector's, masks at the picture's own size."""
        out = self.detector(pixel_values=self.prepared(pixels))
        return out.class_queries_logits[0], self._at_size(out.masks_queries_logits, pixels)[0]

    @staticmethod
    def input_size(pixels: Tensor) -> tuple[int, int]:
        """Height and width that the detector sees: short side SHORT_SIDE unless the long one exceeds LONG_SIDE."""
        h, w = pixels.shape[-2:]
        scale = min(SHORT_SIDE / min(h, w), LONG_SIDE / max(h, w))
        return round(h * scale), round(w * scale)

    def prepared(self, pixels: Tensor) -> Tensor:  # (1, 3, H, W) in [-1, 1] -> padded to a multiple of DIVISOR
        """Resized without antialias and normalised by ImageNet's statistics; padding is 0."""
        mean, std = (torch.tensor(v, device=pixels.device)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
        h, w = self.input_size(pixels)
        x = F.interpolate(pixels / 2 + 0.5, size=(h, w), mode="bilinear", antialias=False)
        return F.pad((x - mean) / std, (0, -w % DIVISOR, 0, -h % DIVISOR))

    def _at_size(self, masks: Tensor, pixels: Tensor) -> Tensor:  # (1, Q, h, w) of the padded input -> (1, Q, H, W)
        h, w = self.input_size(pixels)
        whole = (h + -h % DIVISOR, w + -w % DIVISOR)
        masks = F.interpolate(masks, size=whole, mode="bilinear")[..., :h, :w]
        return F.interpolate(masks, size=pixels.shape[-2:], mode="bilinear")

    def colours(self, pixels: Tensor, found: Sequence[Found], name: str) -> list[str]:  # (1, 3, H, W)
        """The colour CLIP sees in each object, the rest of the picture greyed out."""
        if name not in self._classifiers:
            prompts = [template.format(colour, name) for colour in COLOURS for template in TEMPLATES]
            text = unit(self.clip.get_text_features(self.tokenize(prompts).to(pixels.device)))
            self._classifiers[name] = unit(text.unflatten(0, (len(COLOURS), -1)).mean(1))  # (10, D)
        seen = []
        for f in found:
            left, top, right, bottom = f.box
            cut = torch.where(f.mask, pixels, GREY)[..., top:bottom, left:right]
            image = unit(self.clip.get_image_features(cropped(cut, self.clip.config.image_size)))
            seen.append(COLOURS[int((image @ self._classifiers[name].T).argmax())])
        return seen


def check_wanted(prompts: Sequence[str], wanted: Collection[str]) -> None:
    """Raises ValueError for a prompt of which it is not known what should be in the picture."""
    if odd := next((prompt for prompt in prompts if prompt not in wanted), None):
        raise ValueError(
            f"geneval does not know what to look for in pictures of {odd!r:.80}: the file of --prompts must have a "
            "line with tag and include for it, as GenEval's evaluation_metadata.jsonl does."
        )


class NoLoss(torch.nn.Module):
    """In the place of Mask2Former's training loss, which a network is built with and which needs scipy."""

    def __init__(self, config: Mask2FormerConfig, weight_dict: Mapping[str, float] | None = None):
        super().__init__()
        assert config.num_labels is not None
        self.num_labels, self.eos_coef = config.num_labels, config.no_object_weight
        self.register_buffer("empty_weight", torch.ones(config.num_labels + 1))


def fake_detector(path: str | Path | None) -> Mask2FormerForUniversalSegmentation:
    """The detector without weights, on the meta device: a directory's, or the published one's (Swin-S)."""
    from transformers import Mask2FormerConfig
    from transformers.models.mask2former import modeling_mask2former as mask2former

    config = Mask2FormerConfig(num_labels=len(CLASSES))  # type: ignore[call-arg]  # its base class takes it
    if path is not None:
        config = Mask2FormerConfig.from_pretrained(path)
    with mock.patch.object(mask2former, "Mask2FormerLoss", NoLoss), torch.device("meta"):
        return mask2former.Mask2FormerForUniversalSegmentation(config)


def load_geneval(
    path: str | Path,
    tokenize: Tokenize,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,  # of other scorers: detections are made in float32
    *,
    clip: str | Path,
    wanted: Mapping[str, Wanted],
) -> GenEval:
    """facebook/mask2former-swin-small-coco-instance and CLIP ViT-L/14."""
    from transformers.models.mask2former import modeling_mask2former as mask2former

    with mock.patch.object(mask2former, "Mask2FormerLoss", NoLoss):
        try:
            # annotated without the report that output_loading_info adds
            load: Callable[..., tuple[Mask2FormerForUniversalSegmentation, dict[str, list[object]]]]
            load = mask2former.Mask2FormerForUniversalSegmentation.from_pretrained  # type: ignore[assignment]
            detector, told = load(str(path), local_files_only=True, output_loading_info=True)
        except (OSError, ValueError, RuntimeError) as error:
            what = " ".join(str(error).split())[:200]
            raise ValueError(f"{path} is no Mask2Former ({what}). Give its directory (--geneval_path).") from error
    if drawn := sorted(map(str, [*told["missing_keys"], *told["mismatched_keys"]])):  # at random
        raise ValueError(f"{shown(path)} lacks {len(drawn)} tensors of a Mask2Former: {some(drawn, 100)}. {DAMAGED}")
    check_finite(detector.state_dict(), path)
    if detector.config.num_labels != len(CLASSES):
        raise ValueError(f"{path} knows {detector.config.num_labels} classes, not COCO's 80 (--geneval_path).")
    towers = check_vocabulary(load_clip(clip, time_conditioned=False, device=device), tokenize, clip)
    detector = detector.to(device)  # type: ignore[arg-type]  # transformers' decorator hides what `to` takes
    return GenEval(detector, towers.requires_grad_(False), tokenize, wanted)
