"""The official models and their quantizers, written again from the papers' formulas, to check the
importer against.

Nothing here is shared with quest_deploy: a CompVis UNetModel under its own parameter names, and the
official quantizers working on the official checkpoint's tensors, by their official names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Arithmetic:
    """How layers and attention products compute: in float here. ``outputs`` keeps each layer's
    output by its name.
    """

    def __init__(self) -> None:
        self.outputs: dict[str, Tensor] = {}

    def layer(self, module: Any, x: Tensor, split: int = 0) -> Tensor:
        y = compute(module, x, module.weight)
        self.outputs[module.path] = y
        return y

    def operand(self, path: str, x: Tensor) -> Tensor:
        return x


def compute(module: Any, x: Tensor, weight: Tensor) -> Tensor:
    if isinstance(module, nn.Linear):
        return F.linear(x, weight, module.bias)
    convolve = F.conv1d if isinstance(module, nn.Conv1d) else F.conv2d
    return convolve(x, weight, module.bias, module.stride, module.padding)


class Block(nn.Module):
    root: list[UNetModel]
    path: str

    def run(self, module: nn.Module, x: Tensor, split: int = 0) -> Tensor:
        return self.root[0].arithmetic.layer(module, x, split)

    def quantized(self, name: str, x: Tensor) -> Tensor:
        return self.root[0].arithmetic.operand(f"{self.path}.{name}", x)


class ResBlock(Block):
    """A ResBlock.

    Attributes:
        resample: between the first activation and its convolution, and on the shortcut: "up",
            "down" or "".
        scale_shift: whether the embedding scales and shifts the second norm's result; else it is
            added before that.
    """

    def __init__(
        self, channels: int, emb: int, out: int, *, scale_shift: bool = False, resample: str = ""
    ) -> None:
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.in_layers = nn.ModuleList(
            [nn.GroupNorm(32, channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1)]
        )
        self.emb_layers = nn.ModuleList(
            [nn.SiLU(), nn.Linear(emb, 2 * out if scale_shift else out)]
        )
        self.out_layers = nn.ModuleList(
            [nn.GroupNorm(32, out), nn.SiLU(), nn.Dropout(0), nn.Conv2d(out, out, 3, padding=1)]
        )
        self.skip_connection = nn.Identity() if out == channels else nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor, emb: Tensor, split: int) -> Tensor:
        h = F.silu(self.in_layers[0](x))
        if self.resample == "up":
            h, x = (F.interpolate(values, scale_factor=2, mode="nearest") for values in (h, x))
        elif self.resample == "down":
            h, x = (F.avg_pool2d(values, kernel_size=2, stride=2) for values in (h, x))
        h = self.run(self.in_layers[2], h)
        embedded = self.run(self.emb_layers[1], F.silu(emb))[..., None, None]
        if self.scale_shift:
            scale, shift = embedded.chunk(2, dim=1)
            h = self.out_layers[0](h) * (1 + scale) + shift
        else:
            h = self.out_layers[0](h + embedded)
        h = self.run(self.out_layers[3], F.silu(h))
        skip = (
            x
            if isinstance(self.skip_connection, nn.Identity)
            else self.run(self.skip_connection, x, split)
        )
        return skip + h


class CrossAttention(Block):
    def __init__(self, dim: int, context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (
            nn.Linear(size, dim, bias=False) for size in (dim, context, context)
        )
        self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Dropout(0)])

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        def split(t: Tensor) -> Tensor:
            return t.unflatten(-1, (self.heads, -1)).transpose(1, 2).flatten(0, 1)

        q, k, v = (
            split(self.run(m, t))
            for m, t in ((self.to_q, x), (self.to_k, context), (self.to_v, context))
        )
        q, k = self.quantized("act_quantizer_q", q), self.quantized("act_quantizer_k", k)
        weights = (torch.einsum("bid,bjd->bij", q, k) * q.shape[-1] ** -0.5).softmax(-1)
        weights, v = (
            self.quantized("act_quantizer_w", weights),
            self.quantized("act_quantizer_v", v),
        )
        mixed = (
            torch.einsum("bij,bjd->bid", weights, v)
            .unflatten(0, (-1, self.heads))
            .transpose(1, 2)
            .flatten(2)
        )
        return self.run(self.to_out[0], mixed)


class GEGLU(Block):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 8 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.run(self.proj, x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(Block):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GEGLU(dim), nn.Dropout(0), nn.Linear(4 * dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.net[2], self.net[0](x))


class TransformerBlock(nn.Module):
    def __init__(self, dim: int, context: int, heads: int) -> None:
        super().__init__()
        self.attn1, self.ff = CrossAttention(dim, dim, heads), FeedForward(dim)
        self.attn2 = CrossAttention(dim, context, heads)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        y = self.norm1(x)
        x = self.attn1(y, y) + x
        x = self.attn2(self.norm2(x), context) + x
        return self.ff(self.norm3(x)) + x


class SpatialTransformer(Block):
    def __init__(self, dim: int, context: int, heads: int, depth: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, dim, eps=1e-6)
        self.proj_in, self.proj_out = nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, dim, 1)
        self.transformer_blocks = nn.ModuleList(
            [TransformerBlock(dim, context, heads) for _ in range(depth)]
        )

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.run(self.proj_in, self.norm(x)).flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            h = block(h, context)
        return self.run(self.proj_out, h.transpose(1, 2).unflatten(2, x.shape[2:])) + x


class AttentionBlock(Block):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.proj_out = (
            nn.GroupNorm(32, dim),
            nn.Conv1d(dim, 3 * dim, 1),
            nn.Conv1d(dim, dim, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        qkv = self.run(self.qkv, self.norm(flat))
        q, k, v = qkv.unflatten(1, (self.heads, -1)).flatten(0, 1).chunk(3, dim=1)
        root = 1 / math.sqrt(math.sqrt(q.shape[1]))
        q = self.quantized("attention.qkv_matmul.act_quantizer_q", q * root)
        k = self.quantized("attention.qkv_matmul.act_quantizer_k", k * root)
        weights = torch.einsum("bct,bcs->bts", q, k).softmax(-1)
        weights = self.quantized("attention.smv_matmul.act_quantizer_w", weights)
        v = self.quantized("attention.smv_matmul.act_quantizer_v", v)
        mixed = (
            torch.einsum("bts,bcs->bct", weights, v).unflatten(0, (-1, self.heads)).flatten(1, 2)
        )
        return (flat + self.run(self.proj_out, mixed)).view(x.shape)


class Downsample(Block):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.op, x)


class Upsample(Block):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.conv, F.interpolate(x, scale_factor=2, mode="nearest"))


class UNetModel(Block):
    """CompVis's UNetModel for the configurations of Stable Diffusion v1 and of latent diffusion.

    Attributes:
        arithmetic: how its layers compute; float unless set.
        split: whether shortcut convolutions are told where the concatenation's first half ends.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: list[int],
        channel_mult: list[int],
        num_heads: int = -1,
        num_head_channels: int = -1,
        use_spatial_transformer: bool = False,
        context_dim: int = 0,
        transformer_depth: int = 1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        **_: Any,
    ) -> None:
        super().__init__()
        self.channels, emb = model_channels, 4 * model_channels

        def res(channels: int, out: int, resample: str = "") -> nn.Module:
            return ResBlock(channels, emb, out, scale_shift=use_scale_shift_norm, resample=resample)

        def attention(channels: int) -> nn.Module:
            heads = num_heads if num_head_channels == -1 else channels // num_head_channels
            if use_spatial_transformer:
                return SpatialTransformer(channels, context_dim, heads, transformer_depth)
            return AttentionBlock(channels, heads)

        self.time_embed = nn.ModuleList(
            [nn.Linear(model_channels, emb), nn.SiLU(), nn.Linear(emb, emb)]
        )
        self.input_blocks = nn.ModuleList(
            [nn.ModuleList([nn.Conv2d(in_channels, model_channels, 3, padding=1)])]
        )
        skips, ch, ds = [model_channels], model_channels, 1
        for level, mult in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                layers: list[nn.Module] = [res(ch, mult * model_channels)]
                ch = mult * model_channels
                layers += [attention(ch)] if ds in attention_resolutions else []
                self.input_blocks.append(nn.ModuleList(layers))
                skips.append(ch)
            if level + 1 < len(channel_mult):
                self.input_blocks.append(
                    nn.ModuleList([res(ch, ch, "down") if resblock_updown else Downsample(ch)])
                )
                skips.append(ch)
                ds *= 2
        self.middle_block = nn.ModuleList([res(ch, ch), attention(ch), res(ch, ch)])
        self.output_blocks = nn.ModuleList()
        for level, mult in list(enumerate(channel_mult))[::-1]:
            for i in range(num_res_blocks + 1):
                layers = [res(ch + skips.pop(), mult * model_channels)]
                ch = mult * model_channels
                layers += [attention(ch)] if ds in attention_resolutions else []
                if level and i == num_res_blocks:
                    layers.append(res(ch, ch, "up") if resblock_updown else Upsample(ch))
                    ds //= 2
                self.output_blocks.append(nn.ModuleList(layers))
        self.out = nn.ModuleList(
            [nn.GroupNorm(32, ch), nn.SiLU(), nn.Conv2d(model_channels, out_channels, 3, padding=1)]
        )
        self.arithmetic, self.split = Arithmetic(), False
        for path, module in self.named_modules():
            module.path = path  # type: ignore[assignment]
            module.root = [self]  # type: ignore[assignment]  # in a list: not a submodule

    def forward(self, sample: Tensor, timestep: Tensor, context: Tensor | None = None) -> Tensor:
        half = self.channels // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
        arguments = timestep[:, None].float() * frequencies[None]
        emb = self.run(
            self.time_embed[0], torch.cat([torch.cos(arguments), torch.sin(arguments)], dim=-1)
        )
        emb = self.run(self.time_embed[2], F.silu(emb))

        def block(layers: Any, h: Tensor, split: int = 0) -> Tensor:
            for layer in layers:
                if isinstance(layer, nn.Conv2d):
                    h = self.run(layer, h)
                elif isinstance(layer, ResBlock):
                    h = layer(h, emb, split)
                else:
                    h = layer(h, context) if isinstance(layer, SpatialTransformer) else layer(h)
            return h

        h, skips = sample, []
        for layers in self.input_blocks:
            h = block(layers, h)
            skips.append(h)
        h = block(self.middle_block, h)
        for layers in self.output_blocks:
            split = h.shape[1] if self.split else 0
            h = block(layers, torch.cat([h, skips.pop()], dim=1), split)
        return self.run(self.out[2], F.silu(self.out[0](h)))


@dataclass(frozen=True)
class OfficialSettings:
    """What the official command line sets, and its checkpoint does not hold."""

    timesteps: tuple[int, ...]
    weight_bits: int = 4
    activation_bits: int = 4
    first_last_bits: int = 8
    softmax_bits: int = 8
    symmetric: bool = False

    def code_range(self, quantizer: str) -> tuple[int, int]:
        """The clamp of an activation quantizer, its zero-point included."""
        bits, symmetric = self.activation_bits, self.symmetric
        if quantizer in ("model.input_blocks.0.0.act_quantizer", "model.out.2.act_quantizer"):
            # QuEST's scripts overwrite the number of levels of these two, symmetric or not,
            # whatever the others' bits.
            return (-257, 256) if symmetric else (0, 2**self.first_last_bits - 1)
        if quantizer.endswith("act_quantizer_w"):
            bits, symmetric = self.softmax_bits, symmetric and "smv_matmul" not in quantizer
        return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)


@dataclass
class Quantized(Arithmetic):
    """The official quantizers, working on an official state dict at one timestep.

    Attributes:
        inputs, codes, ratios: of each activation quantizer that ran, by its name in the state dict;
            codes without the zero-point.
    """

    state: dict[str, Tensor]
    settings: OfficialSettings
    timestep: int = 0
    outputs: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    codes: dict[str, Tensor] = field(default_factory=dict)
    ratios: dict[str, Tensor] = field(default_factory=dict)

    def layer(self, module: Any, x: Tensor, split: int = 0) -> Tensor:
        name = f"model.{module.path}"
        halves = (
            [("", slice(0, split)), ("_0", slice(split, None))] if split else [("", slice(None))]
        )
        quantized = [
            self.quantize(f"{name}.act_quantizer{suffix}", x[:, half] if split else x)
            for suffix, half in halves
        ]
        weights = [
            self.round_weight(f"{name}.weight_quantizer{suffix}", module.weight[:, half])
            for suffix, half in halves
        ]
        y = (
            compute(module, torch.cat(quantized, 1), torch.cat(weights, 1))
            if split
            else compute(module, quantized[0], weights[0])
        )
        self.outputs[module.path] = y
        return y

    def operand(self, path: str, x: Tensor) -> Tensor:
        return self.quantize(f"model.{path}", x)

    def tables(self, quantizer: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero-point at this timestep; scalars where the file is Q-Diffusion's."""
        if f"{quantizer}.delta" in self.state:
            return self.state[f"{quantizer}.delta"], self.state[f"{quantizer}.zero_point"]
        row = self.settings.timesteps.index(self.timestep)
        return self.state[f"{quantizer}.delta_list"][row], self.state[
            f"{quantizer}.zero_point_list"
        ][row]

    def quantize(self, quantizer: str, x: Tensor) -> Tensor:
        """(clamp(round(x / delta) + z, low, high) - z) * delta."""
        delta, zero = self.tables(quantizer, x)
        ratio = x / delta
        codes = torch.clamp(torch.round(ratio) + zero, *self.settings.code_range(quantizer)) - zero
        self.inputs[quantizer], self.codes[quantizer], self.ratios[quantizer] = x, codes, ratio
        return codes * delta

    def round_weight(self, quantizer: str, weight: Tensor) -> Tensor:
        """AdaRound's: floor, plus one where alpha is not negative."""
        delta, zero = self.state[f"{quantizer}.delta"], self.state[f"{quantizer}.zero_point"]
        raised = (
            torch.floor(weight / delta) + (self.state[f"{quantizer}.alpha"] >= 0).float() + zero
        )
        return (torch.clamp(raised, 0, 2**self.settings.weight_bits - 1) - zero) * delta


class Calibrating(Quantized):
    """Writes the tables that are missing, from what it sees, as the official initialisation does.

    Weights round at random, not to the nearest, so that alpha counts.
    """

    per_channel: bool = False
    timewise: bool = True

    def tables(self, quantizer: str, x: Tensor) -> tuple[Tensor, Tensor]:
        suffix = "_list" if self.timewise else ""
        if not self.timewise and f"{quantizer}.delta" in self.state:
            return super().tables(quantizer, x)
        axis = -1 if x.dim() == 3 else 1
        low, high = self.settings.code_range(quantizer)
        rows = x.transpose(axis, -1).flatten(0, -2) if self.per_channel else x.flatten()[:, None]
        smallest, largest = rows.amin(0).clamp(max=0), rows.amax(0).clamp(min=0)
        if low < 0:
            delta, zero = torch.maximum(-smallest, largest) / high, torch.zeros_like(largest)
        else:
            delta = ((largest - smallest) / high).clamp(min=1e-8)
            zero = torch.round(-smallest / delta)
        delta = delta.clamp(min=1e-8)
        if not self.timewise:
            self.state[f"{quantizer}.delta"], self.state[f"{quantizer}.zero_point"] = (
                delta[0],
                zero[0],
            )
            return super().tables(quantizer, x)
        shape = {2: (x.shape[1],), 3: (1, x.shape[-1]), 4: (x.shape[1], 1, 1)}[x.dim()]
        for table, values in ((f"delta{suffix}", delta), (f"zero_point{suffix}", zero)):
            whole = self.state.setdefault(
                f"{quantizer}.{table}", torch.zeros(len(self.settings.timesteps), *shape)
            )
            whole[self.settings.timesteps.index(self.timestep)] = (
                values.view(-1, *[1] * (len(shape) - 1)) if x.dim() == 4 else values
            )
        return super().tables(quantizer, x)

    def round_weight(self, quantizer: str, weight: Tensor) -> Tensor:
        if f"{quantizer}.alpha" not in self.state:
            flat, shape = weight.flatten(1), (-1, *[1] * (weight.dim() - 1))
            smallest, largest = flat.amin(1).clamp(max=0), flat.amax(1).clamp(min=0)
            delta = (largest - smallest) / (2**self.settings.weight_bits - 1)
            self.state[f"{quantizer}.alpha"] = torch.randn(weight.shape)
            self.state[f"{quantizer}.delta"], self.state[f"{quantizer}.zero_point"] = (
                values.view(shape) for values in (delta, torch.round(-smallest / delta))
            )
        return super().round_weight(quantizer, weight)


def make_model(params: dict[str, Any], *, split: bool, seed: int = 0) -> UNetModel:
    """A random UNet whose norms, too, are not what they start as."""
    torch.manual_seed(seed)
    model = UNetModel(**params).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.split = split
    return model


@torch.no_grad()
def make_checkpoint(
    model: UNetModel,
    settings: OfficialSettings,
    inputs: dict[int, tuple[Tensor, ...]],
    *,
    per_channel: bool,
    timewise: bool = True,
) -> dict[str, Tensor]:
    """The official state dict of ``model``, calibrated on ``inputs`` by timestep, then moved as by
    finetuning.
    """
    state = {f"model.{name}": value.clone() for name, value in model.state_dict().items()}
    for timestep, args in inputs.items():
        model.arithmetic = calibrating = Calibrating(state, settings, timestep)
        calibrating.per_channel, calibrating.timewise = per_channel, timewise
        model(*args)
    for name, value in state.items():
        if "act_quantizer" in name and name.endswith("delta_list"):
            value.mul_(1 + 0.02 * torch.randn(len(value)).view(-1, *[1] * (value.dim() - 1)))
        elif name.endswith("emb_layers.1.weight"):
            value.add_(torch.randn(value.shape) * 0.002)
    for name, value in [item for item in state.items() if timewise and "act_quantizer" in item[0]]:
        if name.endswith("delta_list"):
            state[name.replace("delta_list", "current_delta")] = value[-1:].clone()
    model.load_state_dict({name: state[f"model.{name}"] for name in model.state_dict()})
    return state
