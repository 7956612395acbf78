"""The toy's pipeline under its public name; spo_fast/models/files/toy.py has it, since rooms below this one load it."""

from spo_fast.models.files.toy import SIZES, WEIGHTS, Size, flags_of, save_pipeline, toy_files, toy_parts

__all__ = ["SIZES", "WEIGHTS", "Size", "flags_of", "save_pipeline", "toy_files", "toy_parts"]
