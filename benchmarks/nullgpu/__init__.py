"""A null GPU: PyTorch's CUDA build runs where there is no GPU, and what is asked of the device is counted.

`make nullgpu` makes .venv-nullgpu: the CUDA wheel of torch without NVIDIA's libraries, stubs of those in their place.
Under them the caching allocator, streams, events, CUDA graphs, Triton's launches and Inductor are the real ones;
kernels do nothing, and memory holds zeros or what was copied there. What an H200 would refuse is a FAULT.

    .venv-nullgpu/bin/python -m benchmarks.nullgpu.rows sdxl ours+all 1.0     a row of iteration.py at full size
    .venv-nullgpu/bin/python -m benchmarks.nullgpu.fit sdxl 24                does what a run chooses fit the card?
    .venv-nullgpu/bin/python -m benchmarks.nullgpu.command spo_fast.train --model toy --device cuda
"""
