"""What fused UNets and transformers are made of: linear layers with their LoRA, and what they keep for a backward.

A fused module is one of diffusers' or PEFT's whose class became a subclass with another `forward`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from spo_fast.models.quantised import QuantisedLinear
from spo_fast.ops import backend
from spo_fast.ops.linear import is_plain, linear
from spo_fast.ops.lora_linear import lora_linear, lora_linears, lora_three
from spo_fast.ops.quantised import Quantised

# ---------------------------------------------------------------------------------------------------- memory


class _Context(FunctionCtx):
    saved_tensors: tuple[Tensor, ...]
    function: Callable[..., Tensor]


class _Recomputed(torch.autograd.Function):
    """function(*xs) that saves xs alone and runs again in the backward; the function's weights are frozen."""

    @staticmethod
    def forward(ctx: _Context, function: Callable[..., Tensor], *xs: Tensor) -> Tensor:
        ctx.save_for_backward(*xs)
        ctx.function = function
        return function(*xs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            xs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            return None, *torch.autograd.grad(ctx.function(*xs), xs, grad)


def saving_inputs(op: str, function: Callable[..., Tensor], *xs: Tensor) -> Tensor:
    """function(*xs), one of our ops, saving xs alone, as backends other than eager do. A compiler decides by itself."""
    if torch.is_grad_enabled() and backend.choose(op, xs[0]) == "eager" and not torch.compiler.is_compiling():
        return _Recomputed.apply(function, *xs)
    return function(*xs)


@contextlib.contextmanager
def made_again(recompute: bool, made: Sequence[Tensor], again: Callable[[], Sequence[Tensor]]) -> Iterator[None]:
    """Inside, if asked for, what the graph saves of `made` is left out, and `again` makes it in the backward."""
    if not recompute or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        yield
        return
    mine = {t.untyped_storage()._cdata: i for i, t in enumerate(made)}
    left: dict[int, Tensor] = {}  # made again, and not asked for yet

    def pack(t: Tensor) -> Tensor | tuple[int, torch.Size, tuple[int, ...], int]:
        number = mine.get(t.untyped_storage()._cdata)
        return t if number is None else (number, t.shape, t.stride(), int(t.storage_offset()))

    def unpack(saved: Tensor | tuple[int, torch.Size, tuple[int, ...], int]) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        number, shape, stride, offset = saved
        if number not in left:
            with torch.no_grad():
                left.update(enumerate(again()))
        return left.pop(number).as_strided(shape, stride, offset)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


# ---------------------------------------------------------------------------------------------------- linear layers


class FusedLora(lora.Linear):
    """A linear layer and its LoRA as one op."""

    @property
    def parts(self) -> tuple[Tensor | Quantised, Tensor | None, Tensor, Tensor] | None:
        """weight, bias, A, B; None while the LoRA is off."""
        if self.disable_adapters or self.merged:
            return None
        base = self.base_layer
        assert isinstance(base, nn.Linear)  # as plain_lora has it
        down, up = (loras["default"].weight for loras in (self.lora_A, self.lora_B))
        weight = base.frozen_weight if isinstance(base, QuantisedLinear) else base.weight
        return weight, base.bias, down, up  # type: ignore[return-value]

    def forward(self, x: Tensor, *_: object, **__: object) -> Tensor:
        """W x + scale B A x; W x while the LoRA is off."""
        parts = self.parts
        return self.base_layer(x) if parts is None else lora_linear(x, *parts, self.scaling["default"])


def plain_lora(m: lora.Linear) -> bool:
    """Whether FusedLora computes what this layer does."""
    adapter = list(m.lora_A) == ["default"] and not m.lora_variant and not m.lora_bias["default"]
    known = is_plain(m.base_layer) or type(m.base_layer) is QuantisedLinear
    frozen = known and not m.base_layer.weight.requires_grad
    return adapter and frozen and not m.fan_in_fan_out and isinstance(m.lora_dropout["default"], nn.Identity)


def linears(x: Tensor, layers: Sequence[nn.Module]) -> Sequence[Tensor]:
    """Each layer of the same x."""
    fused = [layer for layer in layers if isinstance(layer, FusedLora)]
    parts = [layer.parts for layer in fused]
    if len(fused) < len(layers) or any(p is None for p in parts) or len({m.scaling["default"] for m in fused}) > 1:
        return [layer(x) for layer in layers]
    return lora_linears(x, [p for p in parts if p is not None], fused[0].scaling["default"])


class Projections:
    """Queries, keys and values of one x, whose frozen weights lie one below the other: the layers' own are views.

    One product of three where no gradient is wanted, or no layer has a LoRA; never where it is off, for then the
    layers' weights may be others (merged.py).
    """

    def __init__(self, *layers: nn.Module):
        self.layers = layers
        self.weight: Tensor | None = None  # (3 D, D')
        self.bias: Tensor | None = None
        self._loras = [layer for layer in layers if isinstance(layer, FusedLora)]
        bases = [layer.base_layer if isinstance(layer, FusedLora) else layer for layer in layers]
        plain = [base for base in bases if is_plain(base) and not base.weight.requires_grad]
        if len(plain) < len(layers) or len(self._loras) not in (0, len(layers)):
            return
        if len({(layer.r["default"], layer.scaling["default"]) for layer in self._loras}) > 1:
            return  # a LoRA file may have a rank and an alpha for each layer
        if len({(base.weight.shape, base.bias is None) for base in plain}) == 1:
            self.weight = _one([base.weight for base in plain])
            self.bias = None if plain[0].bias is None else _one([base.bias for base in plain])

    def __call__(self, x: Tensor) -> Sequence[Tensor]:  # (..., D') -> (..., D) each
        """Of x."""
        parts = [layer.parts for layer in self._loras]
        if self.weight is None or any(p is None for p in parts) or (parts and torch.is_grad_enabled()):
            return linears(x, self.layers)
        if not parts:
            return linear(x, self.weight, self.bias).split(len(self.weight) // len(self.layers), -1)
        downs, ups = zip(*(p[2:] for p in parts if p is not None), strict=True)
        return lora_three(x, self.weight, downs, ups, self._loras[0].scaling["default"], self.bias)


def _one(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors in one, of which they become views."""
    whole = torch.cat([t.data for t in tensors])
    for t, place in zip(tensors, whole.split(len(tensors[0])), strict=True):
        t.data = place
    return whole
