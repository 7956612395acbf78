"""A world of captioned pictures whose quality is known: what is drawn, and two scores that say how well.

A scene is two shapes on grey, "a red square left of a blue ring", 16x16 pixels. Besides what its caption says, a
picture has a look the caption never mentions: stripes of their own strength in each quadrant, grain, and vividness of
the colours. `layout` scores the first, `aesthetics` the second, both straight from the pixels. Training sees neither:
it sees pictures with captions (`draw`) and pairs labelled by somebody who cares for both, with noise (`draw_pairs`).

A larger picture (`enlarged`) shows the same scene with a square of pixels for each pixel; scores see their means.

Colours are pure chroma and stripes pure brightness, so neither score is moved by what the other measures.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

SIZE = 16
COLOURS = {"red": (1, 0), "green": (-1, 0), "yellow": (0, 1), "blue": (0, -1)}  # in the plane of CHROMA
SHAPES = {
    "square": ("#####", "#####", "#####", "#####", "#####"),
    "ring": ("#####", "#...#", "#...#", "#...#", "#####"),
    "cross": ("..#..", "..#..", "#####", "..#..", "..#.."),
}
RELATIONS = ("left of", "right of", "above", "below")

CHROMA = torch.tensor([[1.0, -1.0, 0.0], [1.0, 1.0, -2.0]]) / torch.tensor([[2**0.5], [6**0.5]])
"""(2, 3) orthonormal: red against green, yellow against blue; both without brightness."""

GREY = 0.15  # backgrounds are uniform in [-GREY, GREY], of pixels in [-1, 1]
MAX_STRIPES = 0.25  # amplitude, uniform from 0 in each quadrant
MAX_GRAIN = 0.12  # standard deviation of each colour channel, uniform from 0
VIVIDNESS = (0.3, 0.85)  # uniform; a pixel of colour c is grey + vividness * sqrt(2) * c
BEST_VIVIDNESS, WORST_VIVIDNESS = 0.68, 0.35  # what guidance 2 gives, and how far from it costs the full share:
BEST_GRAIN, WORST_GRAIN = 0.05, 0.07  # both two-sided, so that neither guidance nor a blurred model looks better
CORRUPTION = 0.4  # probability that a picture of a labelled pair has one thing in it wrong


@dataclass(frozen=True)
class Caption:
    """Indices into COLOURS, SHAPES and RELATIONS; `first` stands `relation` `second`."""

    first: tuple[int, int]
    relation: int
    second: tuple[int, int]

    def __str__(self) -> str:
        (a, b), (c, d) = self.first, self.second
        colours, shapes = list(COLOURS), list(SHAPES)
        return f"a {colours[a]} {shapes[b]} {RELATIONS[self.relation]} a {colours[c]} {shapes[d]}"


def _all_captions() -> dict[str, Caption]:
    things = [(c, s) for c in range(len(COLOURS)) for s in range(len(SHAPES))]
    captions = [
        Caption(first, relation, second)
        for first in things
        for relation in range(len(RELATIONS))
        for second in things
        if first[0] != second[0]
    ]
    # an order that has nothing to do with the meaning and is the same everywhere
    return {str(c): c for c in sorted(captions, key=lambda c: hashlib.sha256(str(c).encode()).digest())}


CAPTIONS = _all_captions()
"""All 432 by their text."""
_texts = list(CAPTIONS)
TEST, TUNE, TRAIN = _texts[:64], _texts[64:112], _texts[112:]
"""Prompts: 64 to report on, 48 to choose settings on, 320 to train on. The base model is pretrained on pictures of all
432; preference pairs and preference optimisation see TRAIN only."""


def random_captions(texts: list[str], n: int, generator: torch.Generator) -> list[str]:
    """n of the texts, drawn with replacement."""
    return [texts[i] for i in torch.randint(len(texts), (n,), generator=generator).tolist()]


# ---------------------------------------------------------------------------------------------------- drawing

TEMPLATES = torch.tensor([[[float(c == "#") for c in row] for row in rows] for rows in SHAPES.values()])  # (3, 5, 5)
STRIPES = torch.cos(torch.pi / 2 * (torch.arange(SIZE)[:, None] + torch.arange(SIZE)))
"""(16, 16) diagonal, 4 pixels a period, mean 0 over every quadrant."""


@dataclass(frozen=True)
class Scenes:
    """B pictures before they are drawn."""

    things: Tensor  # (B, 2, 2) int64 (colour, shape) of both objects
    corners: Tensor  # (B, 2, 2) int64 (row, column) of their 5x5 boxes
    grey: Tensor  # (B,)
    stripes: Tensor  # (B, 2, 2) amplitude in each quadrant
    grain: Tensor  # (B,)
    vividness: Tensor  # (B,)
    noise: Tensor  # (B, 3, 16, 16) standard normals for the grain

    def pixels(self) -> Tensor:  # (B, 3, 16, 16) in [-1, 1]
        """The scenes, drawn."""
        at = torch.arange(SIZE)
        row = at[:, None] - self.corners[:, :, 0, None, None]  # (B, 2, 16, 1): where a pixel lies in each box
        column = at - self.corners[:, :, 1, None, None]
        inside = (row >= 0) & (row < 5) & (column >= 0) & (column < 5)
        shape = self.things[:, :, 1, None, None]
        mask = TEMPLATES[shape, row.clamp(0, 4), column.clamp(0, 4)] * inside  # (B, 2, 16, 16)
        palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32) @ CHROMA * math.sqrt(2)  # (4, 3)
        colour = palette[self.things[:, :, 0]] * self.vividness[:, None, None]  # (B, 2, 3)
        x = torch.einsum("bnyx,bnc->bcyx", mask, colour) + self.grey[:, None, None, None]
        amplitude = self.stripes.repeat_interleave(SIZE // 2, 1).repeat_interleave(SIZE // 2, 2)
        x = x + (amplitude * STRIPES)[:, None] + self.grain[:, None, None, None] * self.noise
        return x.clamp(-1, 1)

    def where(self, condition: Tensor, other: Scenes) -> Scenes:  # (B,) bool
        """These scenes where the condition holds, the other ones elsewhere."""

        def choose(a: Tensor, b: Tensor) -> Tensor:
            return torch.where(condition.view(-1, *[1] * (a.ndim - 1)), a, b)

        return Scenes(*(choose(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)))


def scenes(captions: list[str], generator: torch.Generator) -> Scenes:
    """Pictures of these captions, with everything a caption leaves open drawn at random."""
    n = len(captions)
    known = [CAPTIONS[text] for text in captions]
    things = torch.tensor([(c.first, c.second) for c in known])
    relation = torch.tensor([c.relation for c in known])

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    near = torch.randint(0, 4, (n,), generator=generator)  # along the axis of the relation: boxes 0-7 and 8-15
    far = torch.randint(8, 12, (n,), generator=generator)
    across = torch.randint(4, 8, (n, 2), generator=generator)
    first_is_near = (relation % 2 == 0)[:, None]  # left of, above
    along = torch.where(first_is_near, torch.stack([near, far], 1), torch.stack([far, near], 1))  # (B, 2)
    vertical = (relation >= 2)[:, None]
    corners = torch.stack([torch.where(vertical, along, across), torch.where(vertical, across, along)], dim=-1)
    low, high = VIVIDNESS
    return Scenes(
        things,
        corners,
        grey=GREY * (2 * uniform(n) - 1),
        stripes=MAX_STRIPES * uniform(n, 2, 2),
        grain=MAX_GRAIN * uniform(n),
        vividness=low + (high - low) * uniform(n),
        noise=torch.randn(n, 3, SIZE, SIZE, generator=generator),
    )


def draw(captions: list[str], generator: torch.Generator) -> Tensor:  # (B, 3, 16, 16) in [-1, 1]
    """Pictures true to their captions, of every aesthetic quality: what the base model is pretrained on."""
    return scenes(captions, generator).pixels()


def enlarged(pixels: Tensor, scale: int) -> Tensor:  # (..., 16, 16) -> (..., 16 scale, 16 scale)
    """Every pixel as a square of its own."""
    return pixels.repeat_interleave(scale, -2).repeat_interleave(scale, -1)


# ---------------------------------------------------------------------------------------------------- scores


def cells(pixels: Tensor) -> Tensor:  # (B, C, 16 s, 16 s) -> (B, C, 16, 16) float32 means; s = 1 changes nothing
    """Pictures of any size in the world's own."""
    scale = pixels.shape[-1] // SIZE
    return pixels.float() if scale == 1 else F.avg_pool2d(pixels.float(), scale)


FOUND = 0.6  # correlation from which on a thing counts as there
BORDER = 7  # templates with one pixel of background around them
EPSILON = 0.1  # chroma under which nothing is seen


def chroma(pixels: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, 2, H, W)
    """Two coordinates of the colour, without its brightness."""
    return torch.einsum("kc,bchw->bkhw", CHROMA.to(pixels), pixels)


def correlations(pixels: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, 4, 3, 12, 12) by colour, shape, corner of the box
    """Normalised cross-correlation of each shape in each colour with each place, from -1 to 1."""
    x = F.pad(chroma(cells(pixels)), (1, 1, 1, 1))
    template = F.pad(TEMPLATES, (1, 1, 1, 1))
    template = template - template.mean((1, 2), keepdim=True)
    template = (template / template.norm(dim=(1, 2), keepdim=True)).to(x)
    ones = torch.ones(1, 1, BORDER, BORDER, dtype=x.dtype, device=x.device)
    B = len(x)
    planes = x.flatten(0, 1)[:, None]
    total, square = F.conv2d(planes, ones), F.conv2d(planes**2, ones)
    energy = (square - total**2 / BORDER**2).unflatten(0, (B, 2)).sum(1)  # (B, 1, 12, 12) of both planes, mean removed
    match = F.conv2d(planes, template[:, None]).unflatten(0, (B, 2))  # (B, 2, 3, 12, 12)
    signs = torch.tensor(list(COLOURS.values()), dtype=x.dtype, device=x.device)  # (4, 2)
    by_colour = torch.einsum("ck,bkshw->bcshw", signs, match)
    return by_colour / (energy[:, None] + (EPSILON * BORDER) ** 2).sqrt()


def layout(pixels: Tensor, captions: list[str]) -> Tensor:  # (B, 3, H, W) -> (B, 3) bool
    """What is as the caption says: the first thing, the second thing, where they stand.

    A thing is there if, where its shape in its colour correlates best, that is at least FOUND and no other shape or
    colour correlates better. Where they stand can only be right if both are there.
    """
    known = [CAPTIONS[text] for text in captions]
    things = torch.tensor([(c.first, c.second) for c in known], device=pixels.device)  # (B, 2, 2)
    relation = torch.tensor([c.relation for c in known], device=pixels.device)
    c = correlations(pixels).flatten(1, 2).flatten(2)  # (B, 12, 144)
    wanted = things[..., 0] * len(SHAPES) + things[..., 1]  # (B, 2)
    best, place = c.gather(1, wanted[..., None].expand(-1, -1, c.shape[2])).max(-1)  # (B, 2)
    strongest = c.amax(1).gather(1, place)
    there = (best >= FOUND) & (best >= strongest)
    row, column = place // 12, place % 12
    down, right = row[:, 1] - row[:, 0], column[:, 1] - column[:, 0]  # from the first to the second
    offsets = torch.stack([right, -right, down, -down], dim=1)  # left of, right of, above, below
    across = torch.where(relation >= 2, right, down).abs()
    stands = there.all(1) & (offsets.gather(1, relation[:, None])[:, 0] > across)
    return torch.cat([there, stands[:, None]], dim=1)


def looks(pixels: Tensor) -> dict[str, Tensor]:  # (B, 3, H, W) -> (B,) each
    """stripes: mean amplitude over quadrants; grain: standard deviation a channel; vividness: as VIVIDNESS."""
    x = cells(pixels)
    quadrants = x.mean(1).unflatten(2, (2, 8)).unflatten(1, (2, 8)).transpose(2, 3)  # (B, 2, 2, 8, 8)
    pattern = STRIPES[:8, :8].to(x)  # the same in every quadrant: 8 pixels are two periods
    stripes = ((quadrants * pattern).sum((-1, -2)) / (pattern**2).sum()).abs().mean((1, 2))
    c = chroma(x)
    neighbours = (c[..., :-2, 1:-1] + c[..., 2:, 1:-1] + c[..., 1:-1, :-2] + c[..., 1:-1, 2:]) / 4
    # the lower third of |c - neighbours|: edges of things, a third of the pixels, lie above it. For normal noise of
    # standard deviation s the difference has s sqrt(1.25), and a third of its absolute values lie below 0.4307 of that
    residual = (c[..., 1:-1, 1:-1] - neighbours).abs().flatten(1)
    grain = residual.quantile(1 / 3, dim=1) / (0.4307 * 1.25**0.5)
    # what stands out most: both things have at least 9 pixels each
    strongest = c.square().sum(1).sqrt().flatten(1).topk(16, dim=1).values.mean(1)
    return {"stripes": stripes, "grain": grain, "vividness": strongest / math.sqrt(2)}


def aesthetics(pixels: Tensor) -> Tensor:  # (B, 3, H, W) -> (B,) in 0..10
    """10 for no stripes, the best grain and the best vividness; too much and too little of these cost alike.

    Blind to the caption.
    """
    seen = looks(pixels)
    ugly = (
        0.6 * seen["stripes"] / MAX_STRIPES
        + 0.2 * (seen["grain"] - BEST_GRAIN).abs() / WORST_GRAIN
        + 0.2 * (seen["vividness"] - BEST_VIVIDNESS).abs() / WORST_VIVIDNESS
    )
    return (10 * (1 - ugly)).clamp(0, 10)


# ---------------------------------------------------------------------------------------------------- preferences

LAYOUT_WEIGHT = 12.0  # of the share of (first, second, relation) that is right
AESTHETICS_WEIGHT = 0.8  # of a point of aesthetics


def corrupted(texts: list[str], generator: torch.Generator) -> list[str]:
    """Captions of what is really drawn: with probability CORRUPTION one colour, one shape or the relation differs."""
    out = []
    for text in texts:
        caption = CAPTIONS[text]
        chance, kind, other = torch.rand(3, generator=generator).tolist()
        if chance < CORRUPTION:
            caption = _changed(caption, int(kind * 5), other)
        out.append(str(caption))
    return out


def _changed(caption: Caption, kind: int, other: float) -> Caption:
    """kind: 0, 1 the first's or second's colour, 2, 3 its shape, 4 the relation; other in [0, 1) picks what to."""
    if kind == 4:
        return Caption(caption.first, (caption.relation + 1 + int(other * 3)) % 4, caption.second)
    things = [caption.first, caption.second]
    (colour, shape), (taken, _) = things[kind % 2], things[1 - kind % 2]
    if kind < 2:
        colours = [c for c in range(len(COLOURS)) if c not in (colour, taken)]
        things[kind] = (colours[int(other * len(colours))], shape)
    else:
        things[kind - 2] = (colour, (shape + 1 + int(other * 2)) % 3)
    return Caption(things[0], caption.relation, things[1])


@dataclass(frozen=True)
class LabelledPairs:
    """N pairs as people would give them: two pictures of one prompt and which they like better."""

    prompts: list[str]
    pixels: Tensor  # (2, N, 3, 16, 16) in [-1, 1]
    labels: Tensor  # (N,) 1 if the first picture is preferred, else 0


def utility(pixels: Tensor, prompts: list[str]) -> Tensor:  # (B,)
    """What the labeller goes by, before noise."""
    share = layout(pixels, prompts).float().mean(1)
    return LAYOUT_WEIGHT * share + AESTHETICS_WEIGHT * aesthetics(pixels)


def draw_pairs(n: int, generator: torch.Generator, texts: list[str] = TRAIN) -> LabelledPairs:
    """Generic preferences: the first picture wins with probability sigmoid(difference of utilities)."""
    prompts, pixels = _pictures_of_pairs(n, generator, texts)
    gap = utility(pixels[0], prompts) - utility(pixels[1], prompts)
    labels = (torch.rand(n, generator=generator) < gap.sigmoid()).float()
    return LabelledPairs(prompts, pixels, labels)


def _pictures_of_pairs(n: int, generator: torch.Generator, texts: list[str]) -> tuple[list[str], Tensor]:
    prompts = random_captions(texts, n, generator)
    return prompts, torch.stack([draw(corrupted(prompts, generator), generator) for _ in range(2)])


def conflict_pairs(n: int, generator: torch.Generator, texts: list[str] = TRAIN, *, share: float) -> LabelledPairs:
    """Pairs of which just this share has a label that contradicts aesthetics, and does so because of the layout.

    The labeller makes no mistakes: more of the layout wins, and of equal layouts the more beautiful picture. What is
    chosen are the pairs: round(share n) opposed ones, where the picture with more of its layout right is the less
    beautiful one, and for the rest pairs of equal layouts. Pairs whose better layout is also more beautiful are left
    out, so at 0 labels are aesthetics alone, and at every share they would be told whole by who sees both scores.
    Of `draw_pairs`, .27 of the labels contradict aesthetics and agree with a difference in layout.
    """
    left = [n - round(share * n), round(share * n)]  # of equal layouts, opposed
    prompts: list[str] = []
    pixels, labels = [], []
    while any(left):
        drawn, x = _pictures_of_pairs(n, generator, texts)
        right = [layout(picture, drawn).float().mean(1) for picture in x]
        better, nicer = right[0] - right[1], aesthetics(x[0]) - aesthetics(x[1])
        for kind, rows in enumerate(((better == 0) & (nicer != 0), better * nicer < 0)):
            taken = rows.nonzero()[: left[kind], 0]
            left[kind] -= len(taken)
            prompts += [drawn[i] for i in taken.tolist()]
            pixels.append(x[:, taken])
            labels.append((torch.where(better == 0, nicer, better) > 0)[taken].float())
    order = torch.randperm(n, generator=generator)
    return LabelledPairs([prompts[i] for i in order.tolist()], torch.cat(pixels, 1)[:, order], torch.cat(labels)[order])
