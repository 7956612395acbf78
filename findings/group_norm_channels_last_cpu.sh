#!/usr/bin/env bash
# torch 2.13.0 on a CPU: group_norm of a channels-last tensor takes the variance as a mean of squares less a square of the mean, so
# that activations whose mean is large beside their spread come out wrong by whole units; the same values in NCHW do not.
# Mean 1000, standard deviation .01, 2 groups of 16 channels, float32; largest error against float64, of outputs up to about 5.
# Seen on 2026-11-29 on a CPU, Python 3.11: NCHW below .05, channels-last above 1.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
python="$work/venv/bin/python"
"$python" -m pip install --quiet torch==2.13.0 numpy

cat > "$work/norms.py" << 'CODE'
import torch
import torch.nn.functional as F

x = 1000 + 0.01 * torch.randn(2, 32, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
x = x.float()  # what both layouts and the truth are given
truth = F.group_norm(x.double(), 2)


def error(layout):
    y = F.group_norm(x.contiguous(memory_format=layout), 2)
    return float((y.double() - truth).abs().max())


first, last = error(torch.contiguous_format), error(torch.channels_last)
print(f"largest output {float(truth.abs().max()):.1f}; largest error: NCHW {first:.3f}, channels-last {last:.3f}")
assert first < 0.05 and last > 1
CODE
"$python" "$work/norms.py"
