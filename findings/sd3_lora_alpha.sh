#!/usr/bin/env bash
# diffusers 0.42.1 (peft 0.21.2), one LoRA file with PEFT's names (transformer.*.lora_A.weight) and an .alpha tensor beside
# each pair, for layers that an SD3 and a FLUX transformer both have: FLUX's load_lora_weights reads it and its alphas,
# SD3's raises "Invalid LoRA checkpoint" as `.alpha` has no "lora" in its name. Alpha in the file's metadata
# (lora_adapter_metadata) is read by both. Seen, rank 4, alpha 1: scale 0.25, or SD3's error.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/v"
"$dir/v/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$dir/v/bin/pip" install --quiet diffusers==0.42.1 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0
cat > "$dir/run.py" <<'PY'
import json
import sys

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import save_file

WIDTH, RANK, ALPHA = 32, 4, 1
LAYERS = [f"transformer_blocks.{block}.attn.{name}" for block in range(2) for name in ("to_q", "to_k", "to_v")]


def sd3():
    network = SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=4, attention_head_dim=8,
        caption_projection_dim=WIDTH, joint_attention_dim=16, pooled_projection_dim=16, pos_embed_max_size=8,
    )  # fmt: skip
    none = dict.fromkeys(f"{part}{i}" for part in ("text_encoder", "tokenizer") for i in ("", "_2", "_3"))
    return StableDiffusion3Pipeline(transformer=network, vae=None, scheduler=None, **none)


def flux():
    network = FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=1, num_attention_heads=2, attention_head_dim=16,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    none = dict.fromkeys(f"{part}{i}" for part in ("text_encoder", "tokenizer") for i in ("", "_2"))
    return FluxPipeline(transformer=network, vae=None, scheduler=None, **none)


pairs = {f"transformer.{layer}.lora_A.weight": torch.randn(RANK, WIDTH) for layer in LAYERS}
pairs |= {f"transformer.{layer}.lora_B.weight": torch.randn(WIDTH, RANK) for layer in LAYERS}
alphas = {f"transformer.{layer}.alpha": torch.tensor(float(ALPHA)) for layer in LAYERS}
config = {"transformer.r": RANK, "transformer.lora_alpha": ALPHA, "transformer.target_modules": LAYERS}
save_file(pairs | alphas, f"{sys.argv[1]}/tensors.safetensors")
save_file(pairs, f"{sys.argv[1]}/metadata.safetensors", {"format": "pt", "lora_adapter_metadata": json.dumps(config)})
for where in ("tensors", "metadata"):
    for pipe in (flux(), sd3()):
        print(type(pipe).__name__, "alpha in", where, end=" ")
        try:
            pipe.load_lora_weights(f"{sys.argv[1]}/{where}.safetensors")
        except ValueError as error:
            print("ValueError", error)
            continue
        scales = [float(s) for m in pipe.transformer.modules() if hasattr(m, "scaling") for s in m.scaling.values()]
        print("layers", len(scales), "scale", *sorted(set(scales)))
PY
seen=$("$dir/v/bin/python" "$dir/run.py" "$dir" 2> "$dir/said") || { cat "$dir/said"; exit 1; }
echo "$seen"
diff <(echo "$seen") - <<'TXT'
FluxPipeline alpha in tensors layers 6 scale 0.25
StableDiffusion3Pipeline alpha in tensors ValueError Invalid LoRA checkpoint. Make sure all LoRA param names contain `'lora'` substring.
FluxPipeline alpha in metadata layers 6 scale 0.25
StableDiffusion3Pipeline alpha in metadata layers 6 scale 0.25
TXT
