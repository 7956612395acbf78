#!/usr/bin/env bash
# diffusers 0.42.1 (peft 0.21.2): load_lora_weights of an SD-1.5 pipeline reads a DoRA whole from a file with PEFT's names
# (lora_magnitude_vector); from kohya's (lora_unet_*.dora_scale, what sd-scripts and ComfyUI use) it takes the LoRA, leaves
# the magnitudes out and warns, though its converter of names has a case for them. So the same adapter changes the UNet's
# weights in two ways. Seen, magnitudes doubled: layers with a magnitude 1 from PEFT's file, 0 from kohya's, one warning.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/v"
"$dir/v/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$dir/v/bin/pip" install --quiet diffusers==0.42.1 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0
cat > "$dir/run.py" <<'PY'
import sys

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file

LAYER, RANK = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q", 2


def pipeline():
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 32), cross_attention_dim=16, norm_num_groups=8, attention_head_dim=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    none = dict.fromkeys(("vae", "text_encoder", "tokenizer", "scheduler", "safety_checker", "feature_extractor"))
    return StableDiffusionPipeline(unet=unet, requires_safety_checker=False, **none)


weight = pipeline().unet.get_submodule(LAYER).weight.detach()
down, up, magnitude = torch.randn(RANK, 32), torch.randn(32, RANK), 2 * weight.norm(dim=1)
peft = {"lora_A.weight": down, "lora_B.weight": up, "lora_magnitude_vector": magnitude}
save_file({f"unet.{LAYER}.{name}": value for name, value in peft.items()}, f"{sys.argv[1]}/peft.safetensors")
kohya = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(float(RANK))}
kohya["dora_scale"] = magnitude[:, None].contiguous()
name = f"lora_unet_{LAYER.replace('.', '_')}"
save_file({f"{name}.{key}": value for key, value in kohya.items()}, f"{sys.argv[1]}/kohya.safetensors")
for file in ("peft", "kohya"):
    pipe = pipeline()
    pipe.load_lora_weights(sys.argv[1], weight_name=f"{file}.safetensors")
    layers = [m for m in pipe.unet.modules() if len(getattr(m, "lora_A", ())) > 0]
    whole = sum(len(m.lora_magnitude_vector) > 0 for m in layers)
    print(file, "layers", len(layers), "with a magnitude", whole)
PY
seen=$("$dir/v/bin/python" "$dir/run.py" "$dir" 2> "$dir/said") || { cat "$dir/said"; exit 1; }
echo "$seen"
echo "warnings of DoRA: $(grep -c 'DoRA checkpoint that is not compatible' "$dir/said")"
grep -qx 'peft layers 1 with a magnitude 1' <<< "$seen"
grep -qx 'kohya layers 1 with a magnitude 0' <<< "$seen"
[ "$(grep -c 'DoRA checkpoint that is not compatible' "$dir/said")" = 1 ]
