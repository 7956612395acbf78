"""diffusers and PEFT without what they import only because it is installed."""

from __future__ import annotations

import importlib
import importlib.util
import sys

from spo_fast.config.command import without_collections

UNASKED = "bitsandbytes"
"""It imports Inductor: together longer than PyTorch itself. `--base_weights nf4` and 8-bit optimizers import it."""


def import_networks() -> None:
    """Import both while UNASKED seems not installed, which they find out once: from then on they do without it.

    Before any module that imports diffusers. Nothing is hidden from anybody afterwards.
    """
    with without_collections():
        if UNASKED in sys.modules or importlib.util.find_spec(UNASKED) is None:
            _import()
            return
        sys.modules[UNASKED] = None  # type: ignore[assignment]  # what the import system takes for "there is none"
        try:
            _import()
            from peft import import_utils

            import_utils.is_bnb_available()
            import_utils.is_bnb_4bit_available()
        finally:
            del sys.modules[UNASKED]


def _import() -> None:
    importlib.import_module("diffusers.models.unets.unet_2d_condition")
