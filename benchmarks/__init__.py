"""Measurements. `python benchmarks/gpu_run.py --out DIR` measures a CUDA machine (`--call 1` and `2` one lent for
minutes), `pytest benchmarks/` any."""
