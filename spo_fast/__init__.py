"""Step-by-step preference optimisation of text-to-image diffusion models. Start: `python -m spo_fast.train --help`."""

import logging

__version__ = "0.1.0"

# PEFT imports bitsandbytes, which warns on every start that a 4-bit kernel is missing that nothing here uses
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
