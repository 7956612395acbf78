"""What a user names as module:name: Python of their own, beside the command or installed."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from spo_fast.config.errors import UsageError

LOADED: dict[str, str] = {}
"""File -> the name under which a user's module was loaded: errors in it are theirs to mend."""
IN_PYTHON = " (What was handed to spo_fast in Python must be handed to it again.)"


def is_outside(name: str) -> bool:
    """my_file:my_name, and not a weight or a path."""
    module, _, attribute = name.partition(":")
    return attribute.isidentifier() and all(part.isidentifier() for part in module.split("."))


def load_outside(flag: str, name: str, hint: str = "") -> Any:
    """What stands under this name, from the working directory or installed. Raises UsageError, in one line."""
    module, _, attribute = name.partition(":")
    more = IN_PYTHON if module == "__main__" else ""
    if module.endswith(".py"):
        raise UsageError(f"{flag} {name}: a module's name has no .py: {module.removesuffix('.py')}:{attribute}.")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module + ".").startswith(error.name + "."):
            raise UsageError(f"{flag} {name}: {module} needs {error.name}, which is not installed.") from error
        here = f"no module {module} in {os.getcwd()}, and none is installed"
        raise UsageError(f"{flag} {name}: {here}. Start where {module}.py is.{hint or more}") from error
    except Exception as error:  # whatever the user's own code raises
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise UsageError(f"{flag} {name}: importing {module} ends in {what:.150}. Mend that file.") from error
    if file := getattr(found, "__file__", None):
        LOADED[file] = name
    if not hasattr(found, attribute):
        raise UsageError(f"{flag} {name}: {found.__name__} has no {attribute}. Name one of its own.{more}")
    return getattr(found, attribute)
