#!/usr/bin/env bash
# diffusers 0.42.1, a kohya file whose layers are named partly by diffusers' blocks (lora_unet_down_blocks_*) and partly by
# the original network's (lora_unet_output_blocks_*, as SGM and kohya's sdxl scripts name them): one name of the first kind
# is taken for the whole file's, and every layer of the second kind is dropped without an error. Seen: 8 layers in the
# file, 1 applied; all 8 if all are named in one way.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/v"
"$dir/v/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$dir/v/bin/pip" install --quiet diffusers==0.42.1 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0
cat > "$dir/run.py" <<'PY'
import sys
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin as Loader
from safetensors.torch import save_file

sizes = dict(sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32, norm_num_groups=8)
blocks = dict(down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
unet = UNet2DConditionModel(**sizes, **blocks, attention_head_dim=8)


def original(layer):
    block, *rest = layer.split(".")
    if block == "mid_block":
        return "middle_block_1_" + "_".join(rest[2:])
    number = 2 * int(rest[0]) + int(rest[2]) + (block == "down_blocks")
    return f"{'input' if block == 'down_blocks' else 'output'}_blocks_{number}_1_" + "_".join(rest[3:])


layers = [(n, m) for n, m in unet.named_modules() if n.endswith("to_q")]
for what in ("mixed", "original"):
    tensors = {}
    for i, (layer, module) in enumerate(layers):
        name = "lora_unet_" + (layer.replace(".", "_") if what == "mixed" and i == 0 else original(layer))
        tensors[f"{name}.lora_down.weight"] = torch.randn(4, module.in_features)
        tensors[f"{name}.lora_up.weight"] = torch.randn(module.out_features, 4)
        tensors[f"{name}.alpha"] = torch.tensor(4.0)
    save_file(tensors, f"{sys.argv[1]}/{what}.safetensors")
    state, alphas = Loader.lora_state_dict(f"{sys.argv[1]}/{what}.safetensors", unet_config=unet.config)
    Loader.load_lora_into_unet(state, alphas, unet)
    print(what, "file", len(layers), "applied", sum(hasattr(m, "scaling") for m in unet.modules()))
    unet.unload_lora()
PY
seen=$("$dir/v/bin/python" "$dir/run.py" "$dir" 2> /dev/null | grep applied)
echo "$seen"
diff <(echo "$seen") - <<'TXT'
mixed file 8 applied 1
original file 8 applied 8
TXT
