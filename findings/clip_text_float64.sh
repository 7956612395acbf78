#!/usr/bin/env bash
# transformers 4.57.1: a CLIPTextModel in float64 raises "value cannot be converted to type float without overflow": its
# causal mask is made in torch's default type and filled with the least number of float64. With float64 as the default
# type it runs. transformers 5.23.0 runs either way.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
for version in 4.57.1 5.23.0; do
    python3 -m venv "$dir/$version"
    "$dir/$version/bin/pip" install --quiet torch==2.13.0 numpy==1.26.4
    "$dir/$version/bin/pip" install --quiet "transformers==$version"
done
cat > "$dir/run.py" <<'PY'
import torch
from transformers import CLIPTextConfig, CLIPTextModel, __version__

sizes = dict(vocab_size=99, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
model = CLIPTextModel(CLIPTextConfig(**sizes, bos_token_id=97, eos_token_id=98, pad_token_id=98)).double()
for default in (torch.float32, torch.float64):
    torch.set_default_dtype(default)
    try:
        seen = model(torch.arange(8)[None]).last_hidden_state.dtype
    except RuntimeError as error:
        seen = error
    print(__version__, default, seen)
PY
seen=$(for version in 4.57.1 5.23.0; do "$dir/$version/bin/python" "$dir/run.py" 2> /dev/null; done)
echo "$seen"
diff <(echo "$seen") - <<'TXT'
4.57.1 torch.float32 value cannot be converted to type float without overflow
4.57.1 torch.float64 torch.float64
5.23.0 torch.float32 torch.float64
5.23.0 torch.float64 torch.float64
TXT
