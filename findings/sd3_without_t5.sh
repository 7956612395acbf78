#!/usr/bin/env bash
# diffusers 0.42.1 (transformers 5.23.0), StableDiffusion3Pipeline without T5: it is built, called and saved with
# text_encoder_3=None and tokenizer_3=None, and model_index.json says [null, null] for both; but from_pretrained of that
# directory raises a ValueError, "expected [...], but only {...} were passed", unless both are given as None once more.
# In a call the positions of T5 are not left out but zeros: 256 behind CLIP's, or max_sequence_length; 0 gives none.
# Seen, with CLIPs of 16 tokens: 272 positions that the network attends to, 256 of them zero; 16 with 0.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/v"
"$dir/v/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$dir/v/bin/pip" install --quiet diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0
cat > "$dir/run.py" <<'PY'
import json
import sys
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

letters = "abcdefghijklmnopqrstuvwxyz"
words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
vocab = {word: i for i, word in enumerate(words)}


def clip():
    ids = dict(bos_token_id=len(vocab) - 2, eos_token_id=len(vocab) - 1, pad_token_id=len(vocab) - 1)
    sizes = dict(hidden_size=16, intermediate_size=32, projection_dim=16, num_hidden_layers=2, num_attention_heads=2)
    return CLIPTextModelWithProjection(
        CLIPTextConfig(vocab_size=len(vocab), max_position_embeddings=16, **sizes, **ids)
    )


torch.manual_seed(0)
tokenizer = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=16)
transformer = SD3Transformer2DModel(
    sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
    num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=32, pooled_projection_dim=32,
    pos_embed_max_size=8,
)  # fmt: skip
vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, scaling_factor=1.5, shift_factor=0.1)
parts = dict(tokenizer=tokenizer, tokenizer_2=tokenizer, text_encoder=clip(), text_encoder_2=clip())
parts |= dict(transformer=transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
without = dict(text_encoder_3=None, tokenizer_3=None)

folder = Path(sys.argv[1])
StableDiffusion3Pipeline(**parts, **without).save_pretrained(folder)
index = json.loads((folder / "model_index.json").read_text())
print("saved", *(f"{name} {json.dumps(index[name])}" for name in without))
for what, given in (("as saved", {}), ("with one None", {"text_encoder_3": None}), ("with both None", without)):
    try:
        pipe = StableDiffusion3Pipeline.from_pretrained(folder, **given)
        print("load", what, "works")
    except ValueError as error:
        missing = [name for name in without if f"'{name}'" not in str(error).split("but only")[1]]
        print("load", what, "ValueError, not passed:", *missing)

attended = []
pipe.transformer.register_forward_pre_hook(
    lambda _, args, kwargs: attended.append(kwargs["encoder_hidden_states"]), with_kwargs=True
)
pipe.set_progress_bar_config(disable=True)
for what, length in (("default", {}), ("0", {"max_sequence_length": 0})):
    call = dict(height=8, width=8, num_inference_steps=1, guidance_scale=1.0, output_type="pt")
    image = pipe("a cat", generator=torch.Generator().manual_seed(0), **call, **length).images
    text = attended[-1][0]
    zeros = int((text == 0).all(-1).sum())
    print("max_sequence_length", what, "positions", len(text), "zero", zeros, "image", *image.shape[-2:])
PY
seen=$("$dir/v/bin/python" "$dir/run.py" "$dir/sd3" 2> "$dir/said") || { cat "$dir/said"; exit 1; }
echo "$seen"
diff <(echo "$seen") - <<'TXT'
saved text_encoder_3 [null, null] tokenizer_3 [null, null]
load as saved ValueError, not passed: text_encoder_3 tokenizer_3
load with one None ValueError, not passed: tokenizer_3
load with both None works
max_sequence_length default positions 272 zero 256 image 8 8
max_sequence_length 0 positions 16 zero 0 image 8 8
TXT
