"""The embedded world: a tiny SDXL pipeline and what is needed to try the whole trainer on a CPU, without the hub."""
