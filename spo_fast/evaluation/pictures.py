"""Picture files: single PNGs, grids with their prompts inside, and strips small enough for a page."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

# --------------------------------------------------------------------------------------------------------- pictures


def write_picture(file: Path, pixels: Tensor) -> None:  # (3, H, W) about [-1, 1]
    """As PNG, whole or not at all."""
    import torch
    from PIL import Image

    from spo_fast.data.files import write_atomically

    if not pixels.isfinite().all():
        raise ValueError(f"{file.name}: the picture is not finite, an fp16 overflow. Use --mixed_precision bf16 or no.")
    data = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    out = io.BytesIO()
    Image.fromarray(data.permute(1, 2, 0).numpy()).save(out, "png")
    write_atomically(file, out.getvalue())


def read_picture(file: Path) -> Tensor:  # (3, H, W) in [-1, 1]
    """Raises ValueError for a file that is no picture."""
    import numpy as np
    import torch
    from PIL import Image

    try:
        with Image.open(file) as image:
            data = np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(
            f"{file} is damaged ({error}). Delete it and run again: only its batch is drawn anew."
        ) from error
    return torch.from_numpy(data.copy()).permute(2, 0, 1).float() / 127.5 - 1


# ---------------------------------------------------------------------------------------------------- a run


SHEET_PIXELS = 80_000_000
PROMPTS_FILE = "prompts.json"  # beside a run's grids: their prompts


def write_grid(path: Path, rows: list[list[Tensor]], prompts: list[str] | None = None, smallest: int = 96) -> None:
    """PNG of images (3, H, W) in [-1, 1], one list a row; images under `smallest` pixels are enlarged.

    A sheet of more than SHEET_PIXELS, which image software refuses to open, is made smaller. The rows' prompts go into
    its text chunk "prompts", as a JSON list.
    """
    import torch
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = torch.stack([torch.stack(row) for row in rows])  # (R, N, 3, H, W)
    R, N, _, H, W = pixels.shape
    if (share := (SHEET_PIXELS / (R * N * (H + 4) * (W + 4))) ** 0.5) < 1:
        size = max(1, int(share * (H + 4)) - 4), max(1, int(share * (W + 4)) - 4)  # with borders of 2 pixels
        pixels = torch.nn.functional.interpolate(pixels.flatten(0, 1), size, mode="area").unflatten(0, (R, N))
    zoom = max(1, smallest // pixels.shape[-1])
    pixels = pixels.repeat_interleave(zoom, -1).repeat_interleave(zoom, -2)
    pixels = torch.nn.functional.pad(pixels, (2, 2, 2, 2), value=1.0)
    sheet = pixels.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    texts = PngInfo()
    if prompts:
        texts.add_text("prompts", json.dumps(prompts))
    image = Image.fromarray(((sheet / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).numpy())
    image.save(path, pnginfo=texts)


MAX_PROMPTS = 16
STRIP_WIDTHS = (1600, 1200, 800, 500, 300)  # pixels across the images of a prompt; the first that fits is taken
MAX_IMAGE_BYTES = 6_500_000  # before base64, which adds a third: the whole report stays under 10 MB

# ---------------------------------------------------------------------------------------------------- samples


def sheet_prompts(path: Path) -> list[str]:
    """The prompts of a grid's rows, which its PNG carries."""
    from PIL import Image

    with Image.open(path) as image:
        return json.loads(getattr(image, "text", {}).get("prompts", "[]"))


def cut_rows(path: Path, rows: int) -> list[Image.Image]:
    """A grid's first MAX_PROMPTS of `rows` rows as images, at most STRIP_WIDTHS[0] pixels wide."""
    from PIL import Image

    with Image.open(path) as sheet:
        whole, height = sheet.convert("RGB"), sheet.height / rows
    return [
        narrowed(whole.crop((0, round(i * height), whole.width, round((i + 1) * height))), STRIP_WIDTHS[0])
        for i in range(min(rows, MAX_PROMPTS))
    ]


def narrowed(image: Image.Image, width: int) -> Image.Image:
    """The image at this width, if it is wider."""
    size = (width, max(1, round(image.height * width / image.width)))
    return image if image.width <= width else image.resize(size, reducing_gap=3.0)


def encoded(image: Image.Image) -> tuple[str, bytes]:
    """(media type, bytes) as JPEG, or as PNG where that is smaller, as for the toy's enlarged pixels."""
    files = {}
    # PNGs of large photographs are slow to make and never the smaller ones
    for kind in ("jpeg", "png") if image.width * image.height <= 250_000 else ("jpeg",):
        out = io.BytesIO()
        image.save(out, kind, quality=88)
        files[kind] = out.getvalue()
    kind = min(files, key=lambda k: len(files[k]))
    return f"image/{kind}", files[kind]
