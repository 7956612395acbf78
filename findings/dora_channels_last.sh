#!/usr/bin/env bash
# peft 0.21.2 on torch 2.13.0 (CPU): a convolution with a DoRA adapter that is moved to channels_last with its network, as
# UNets are for speed, raises a RuntimeError ("view size is not compatible ...") in its first forward: DoRA's norm takes
# views of the adapter's weights. LoRA of the same layer runs, and so does DoRA if the network is moved before the adapter
# is injected, whose own weights then stay contiguous. Seen: one error of four.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/v"
"$dir/v/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$dir/v/bin/pip" install --quiet peft==0.21.2 transformers==5.23.0 accelerate==1.15.0
cat > "$dir/run.py" <<'PY'
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

for kind in ("LoRA", "DoRA"):
    for moved in ("before", "after"):
        network = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1))
        if moved == "before":
            network.to(memory_format=torch.channels_last)
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"], use_dora=kind == "DoRA"), network)
        if moved == "after":
            network.to(memory_format=torch.channels_last)
        try:
            outcome = "runs" if network(torch.randn(1, 8, 4, 4)).isfinite().all() else "is not finite"
        except RuntimeError as error:
            outcome = f"RuntimeError: {str(error).split(' with ')[0].split(' (')[0]}"
        print(kind, "channels_last", moved, "injection:", outcome)
PY
seen=$("$dir/v/bin/python" "$dir/run.py" 2> "$dir/said") || { cat "$dir/said"; exit 1; }
echo "$seen"
[ "$(grep -c ': runs$' <<< "$seen")" = 3 ]
grep -q '^DoRA channels_last after injection: RuntimeError: view size is not compatible' <<< "$seen"
