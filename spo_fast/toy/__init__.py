"""The embedded world: captioned pictures with true scores, and a tiny SDXL pipeline, to try everything on a CPU."""
