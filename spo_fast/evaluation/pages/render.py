"""Pages from the templates beside this file, which escape what is handed in; a name that is not is an error."""

from __future__ import annotations

import base64
import functools
import re
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Environment


@functools.cache
def environment() -> Environment:
    """HTML escapes by itself. Markdown cannot: there each text that is not ours goes through `cell`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=select_autoescape(default=True, disabled_extensions=("md",)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters |= {"setting": value, "cell": cell, "number": number}
    return made


def render(template: str, **names: object) -> str:
    """A page's text."""
    return environment().get_template(template).render(names)


def value(setting: object) -> str:
    """A setting as people read it."""
    text = ", ".join(map(str, setting)) if isinstance(setting, list) else setting
    return "none" if text in (None, "") else str(text)


def cell(text: object) -> str:
    """Text that Markdown tables and lists leave as it is."""
    return re.sub(r"([\\`*_|\[\]#])", r"\\\1", escape(" ".join(value(text).split()), quote=False))


def number(found: float | None) -> str:
    """Four digits."""
    return "not on record" if found is None else f"{found:.4g}"


def data_url(kind: str, data: bytes) -> str:
    """A file as an address that holds it."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
