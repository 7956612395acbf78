"""The toy's world under its public name; spo_fast/data/toy_world.py has it, since rooms below this one score by it."""

from spo_fast.data.toy_world import CAPTIONS, SIZE, TEST, TRAIN, aesthetics, draw, draw_pairs, layout, looks, utility

__all__ = ["CAPTIONS", "SIZE", "TEST", "TRAIN", "aesthetics", "draw", "draw_pairs", "layout", "looks", "utility"]
