"""Step-by-step preference optimisation of text-to-image diffusion models. Start: `python -m spo_fast.train --help`."""

__version__ = "0.1.0"
