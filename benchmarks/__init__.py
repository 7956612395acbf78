"""Measurements. `python benchmarks/gpu_run.py --out DIR` measures a CUDA machine, `pytest benchmarks/` any."""
