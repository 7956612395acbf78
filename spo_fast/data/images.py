"""An image file's bytes to a square of pixels, whatever stands in them."""

from __future__ import annotations

import io

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from spo_fast.data.pair_rows import BadRowError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # not EPS: Pillow would start Ghostscript
MAX_PIXELS = 1 << 26  # 8192 x 8192: 200 MB decoded, in each worker
MAX_ASPECT = 32


def decode_image(data: bytes) -> Image.Image:
    """The first frame in 8-bit RGB, turned as its EXIF data say; transparency shows white. Raises BadRowError.

    The published code drops alpha instead, which shows whatever colour lies under it, and does not turn; Pick-a-Pic's
    files have neither. 16 bits are cut to their upper 8; of wider numbers the range is not known.
    """
    if not data:
        raise BadRowError("the image is empty (0 bytes)")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as stored:
            width, height = stored.size
            if not 0 < width * height <= MAX_PIXELS:
                raise BadRowError(f"the image has {width} x {height} pixels, of at most {MAX_PIXELS}")
            if stored.mode == "F":
                raise BadRowError("the image holds floating-point numbers, whose range is not known")
            if stored.mode == "I" and stored.format == "TIFF":  # I;16 otherwise; of PNG and PPM files I are 16 bits too
                raise BadRowError("the image holds 32-bit or signed numbers, whose range is not known")
            image = upright(stored)
            clear = image.info.get("transparency")  # of PNG without alpha: the value that is not to be seen
            if image.mode.startswith("I"):  # Pillow's own conversion clips at 255
                values = np.asarray(image)
                grey = np.where(values == clear, 255, (values >> 8).clip(0, 255))  # == None: nowhere
                return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
            if stored.format == "PNG" and clear is not None and image.mode in ("L", "RGB"):  # Pillow scales pixels only
                image.info["transparency"] = in_8_bits(clear, depth=data[24])
            if "A" in image.mode.upper() and image.mode != "LAB" or "transparency" in image.info:
                white = Image.new("RGBA", image.size, "white")
                return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
            image.load()  # whole, while the data are open
            return image if image.mode == "RGB" else image.convert("RGB")  # which copies
    except BadRowError:
        raise
    except UnidentifiedImageError:  # its own message holds a memory address
        raise BadRowError(f"not an image of a known format ({', '.join(FORMATS)})") from None
    except Exception as error:  # Pillow's decoders raise whatever the damage leads to
        raise BadRowError(f"the image cannot be decoded ({type(error).__name__}: {error})") from None


def upright(image: Image.Image) -> Image.Image:
    """Turned and mirrored as its EXIF data say; damaged ones are ignored, as viewers do."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # whatever the damage leads to
        return image
    return ImageOps.exif_transpose(image) if orientation in range(2, 9) else image


def in_8_bits(value: int | tuple[int, ...], depth: int) -> int | tuple[int, ...]:
    """A PNG file's own sample value, or three, as the 8 bits that Pillow makes of its pixels; depth: bits a sample."""
    if isinstance(value, tuple):
        return tuple(v >> (depth - 8) for v in value)
    return value * 255 // (2**depth - 1)


RESIZER = "PyTorch" if torch.backends.cpu.get_cpu_capability().startswith("AVX") else "Pillow"
"""PyTorch's loops over 8-bit pixels take a third of Pillow's time where they are vectorised, more than it elsewhere."""


def resized(image: Image.Image, width: int, height: int) -> Tensor:  # (3, height, width) uint8, not contiguous
    """Bicubic, antialiased; width first, rounded to 8 bits after either axis.

    PyTorch's weights have 16 bits where Pillow's have 24: fewer than 1 in 100 values differ, by 1 of 255, very few
    by 2. Pillow is called for either axis: by itself its version 13 shrinks pictures more than twice as high as wide
    height first, which changes more values.
    """
    if RESIZER == "Pillow":
        for size in (width, image.height), (width, height):
            image = image.resize(size, Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    if pixels.shape[1:] == (height, width):
        return pixels
    return F.interpolate(pixels[None], (height, width), mode="bicubic", antialias=True)[0]


def to_square(image: Image.Image, size: int) -> Tensor:  # (3, size, size) float32 in [-1, 1]
    """Shortest side to `size` (`resized`), centre crop: CLIPImageProcessor without its normalisation."""
    width, height = image.size
    short = min(width, height)
    if max(width, height) > MAX_ASPECT * short:
        raise BadRowError(f"the image is {width} x {height}: more than {MAX_ASPECT} times as long as wide")
    width, height = int(size * width / short), int(size * height / short)
    left, top = (width - size) // 2, (height - size) // 2
    pixels = resized(image, width, height)[:, top : top + size, left : left + size]
    # in place: a pass over new memory costs several over old; x / 127.5 is 2 (x / 255) to the bit
    return pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1)
