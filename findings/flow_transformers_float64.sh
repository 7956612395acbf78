#!/usr/bin/env bash
# diffusers 0.42.1, torch 2.13.0 on a CPU: a float64 SD3 or FLUX transformer is not float64 throughout. diffusers' RMSNorm
# (SD3's qk_norm="rms_norm") takes its variance in float32, apply_rotary_emb (FLUX) multiplies in float32, and the sines of
# the timestep are taken in float32 in both. FLUX's norms are torch.nn.RMSNorm, exact in float64. Each against the formula
# in float64: seen, relative, RMSNorm 6e-8, rotary 4e-8, sines 6e-6 (timesteps 875 and 300), torch's norm 8e-17. A tiny
# random network's output moves, when one of them is replaced, by 2e-8 (SD3's norm), 1e-8 (FLUX's rotary), 3e-7 to 4e-7
# (the sines).
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/v"
"$dir/v/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$dir/v/bin/pip" install --quiet diffusers==0.42.1
cat > "$dir/run.py" <<'PY'
import math
from unittest import mock

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.models import embeddings, normalization
from diffusers.models.transformers import transformer_flux


def normed(self, x):
    return self.weight * x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt()


def rotated(x, tables, sequence_dim):
    cos, sin = (table.to(x.dtype)[None, :, None, ::2] for table in tables)
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


TIME = torch.tensor([875.0, 300.0])
WAVES = dict(flip_sin_to_cos=True, downscale_freq_shift=0, scale=1)  # as both networks set them


def waves(timesteps, dim, **settings):  # cosines first, frequencies 10000 ** (-2 i / dim)
    assert settings == WAVES
    angles = timesteps.double()[:, None] * torch.exp(-math.log(10000) * torch.arange(dim // 2).double() / (dim // 2))
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def apart(seen, truth):
    return ((seen - truth).norm() / truth.norm()).item()


def sd3():
    network = SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=3, num_attention_heads=4, attention_head_dim=8,
        caption_projection_dim=32, joint_attention_dim=16, pooled_projection_dim=16, pos_embed_max_size=8,
        qk_norm="rms_norm",
    )  # fmt: skip
    given = dict(hidden_states=torch.randn(2, 4, 8, 8), timestep=TIME)
    return network, given


def flux():
    network = FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, num_attention_heads=2, attention_head_dim=16,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
    given = dict(hidden_states=torch.randn(2, 16, 16), timestep=TIME / 1000)
    return network, given | dict(img_ids=places, txt_ids=torch.zeros(7, 3))


def sharpen(network):
    """Norms of q and k with weights of 2 to 4, not the 1 they begin at: attention is then far from even."""
    for name, weight in network.named_parameters():
        if name.split(".")[-2] in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            weight.data.uniform_(2, 4)


def check(what, error, low, high):
    print(what, f"{error:.1e}", "as said" if low < error < high else f"not in {low:.0e} to {high:.0e}")
    return low < error < high


torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
x, angles = torch.randn(3, 7, 2, 16), torch.randn(7, 8).repeat_interleave(2, dim=-1)
tables = angles.cos().float(), angles.sin().float()
theirs, torchs = normalization.RMSNorm(16, eps=1e-6), torch.nn.RMSNorm(16, eps=1e-6)
turned = embeddings.apply_rotary_emb(x, tables, sequence_dim=1)
sines = embeddings.get_timestep_embedding(TIME, 256, **WAVES)
right = [
    check("diffusers' RMSNorm", apart(theirs(x), normed(theirs, x)), 1e-9, 1e-6),
    check("torch.nn.RMSNorm", apart(torchs(x), normed(torchs, x)), -1, 1e-14),
    check("apply_rotary_emb", apart(turned, rotated(x, tables, 1)), 1e-9, 1e-6),
    check("get_timestep_embedding", apart(sines, waves(TIME, 256, **WAVES)), 1e-7, 1e-3),
]
swaps = {
    sd3: ((normalization.RMSNorm, "forward", normed), (embeddings, "get_timestep_embedding", waves)),
    flux: ((transformer_flux, "apply_rotary_emb", rotated), (embeddings, "get_timestep_embedding", waves)),
}
for kind, replaced in swaps.items():
    network, given = kind()
    given |= dict(encoder_hidden_states=torch.randn(2, 7, 16), pooled_projections=torch.randn(2, 16))
    sharpen(network)
    with torch.no_grad():
        seen = network(**given).sample
        assert seen.dtype == torch.float64
        for where, name, formula in replaced:
            with mock.patch.object(where, name, formula):
                what = f"{type(network).__name__} without {getattr(where, '__name__', '').split('.')[-1]}.{name}"
                right.append(check(what, apart(seen, network(**given).sample), 1e-10, 1e-5))
assert all(right)
PY
"$dir/v/bin/python" "$dir/run.py"
