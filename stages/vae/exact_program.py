"""The layers of a stock ``AutoencoderKL`` as steps from one canvas-wide activation to the next. Nothing is computed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import nn

from stages.tiles import Size

INPUT = "input"


@dataclass(kw_only=True, eq=False)
class Layer:
    """One step: ``target = (residual + conv(move(act(norm(source))))) / divide``, or an attention over the canvas.

    The activation that a layer makes is named as the layer. ``owners`` are the modules whose weights it uses.
    """

    name: str
    owners: tuple[nn.Module, ...]
    source: str
    channels: int  # of the target
    conv: nn.Conv2d | None = None
    norm: nn.GroupNorm | None = None
    act: nn.Module | None = None
    move: Literal["same", "up", "down"] = "same"
    residual: str | None = None
    shortcut: nn.Conv2d | None = None  # 1x1, of the residual
    divide: float = 1.0
    before: nn.Conv2d | None = None  # 1x1, of the source
    after: nn.Conv2d | None = None  # 1x1, of the target
    attention: Any = None

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.source,) if self.residual is None else (self.source, self.residual)


class Shape(NamedTuple):
    channels: int
    size: Size

    @property
    def axes(self) -> tuple[int, int, int]:
        return self.channels, self.size.height, self.size.width

    @property
    def numel(self) -> int:
        return self.channels * self.size.height * self.size.width


def _refuse(name: str, what: str) -> ValueError:
    return ValueError(f"exact VAE: {name} {what}, which it cannot cut in strips. Use decode.mode=shared.")


def _owners(*modules: nn.Module | None) -> tuple[nn.Module, ...]:
    return tuple(module for module in modules if module is not None)


def _resnet(name: str, block: Any, source: str) -> Iterator[Layer]:
    if type(block).__name__ != "ResnetBlock2D" or block.upsample or block.downsample or block.time_emb_proj:
        raise _refuse(name, f"is a {type(block).__name__} with resampling, time or spatial input")
    first = f"{name}.conv1"
    yield Layer(
        name=first,
        owners=_owners(block.norm1, block.conv1),
        source=source,
        act=block.nonlinearity,
        conv=block.conv1,
        norm=block.norm1,
        channels=block.conv1.out_channels,
    )
    yield Layer(
        name=f"{name}.conv2",
        owners=_owners(block.norm2, block.conv2, block.conv_shortcut),
        source=first,
        act=block.nonlinearity,
        conv=block.conv2,
        norm=block.norm2,
        channels=block.conv2.out_channels,
        residual=source,
        shortcut=block.conv_shortcut,
        divide=block.output_scale_factor,
    )


def _attention(name: str, block: Any, source: str, channels: int) -> Layer:
    known = block.spatial_norm is None and block.norm_q is None and block.norm_k is None
    if type(block).__name__ != "Attention" or not known or not block.residual_connection:
        raise _refuse(name, f"is an unknown kind of {type(block).__name__}")
    return Layer(
        name=name,
        owners=(block,),
        source=source,
        channels=channels,
        norm=block.group_norm,
        residual=source,
        divide=block.rescale_output_factor,
        attention=block,
    )


def _resampler(name: str, block: Any, source: str, move: Literal["up", "down"]) -> Layer:
    wanted = {"up": "Upsample2D", "down": "Downsample2D"}[move]
    if type(block).__name__ != wanted or not block.use_conv or block.norm is not None:
        raise _refuse(name, f"is an unknown kind of {type(block).__name__}")
    if move == "down" and block.padding != 0:
        raise _refuse(name, f"pads by {block.padding}")
    conv = block.conv
    return Layer(name=name, owners=(conv,), source=source, channels=conv.out_channels, conv=conv, move=move)


def program(vae: Any, direction: Literal["decode", "encode"]) -> list[Layer]:
    """The layers of the decoder or encoder, first to last, as the stock ``forward`` runs them.

    Raises:
        ValueError: blocks other than plain resnets, resamplers with a convolution, and mid-block attention.
    """
    coder = vae.decoder if direction == "decode" else vae.encoder
    prefix = f"{direction}r"
    before = vae.post_quant_conv if direction == "decode" else None
    after = vae.quant_conv if direction == "encode" else None
    layers = [
        Layer(
            name=f"{prefix}.conv_in",
            owners=_owners(before, coder.conv_in),
            source=INPUT,
            channels=coder.conv_in.out_channels,
            conv=coder.conv_in,
            before=before,
        )
    ]

    def mid() -> None:
        block = coder.mid_block
        for index, resnet in enumerate(block.resnets):
            attention = block.attentions[index - 1] if 0 < index <= len(block.attentions) else None
            if attention is not None:
                name = f"{prefix}.mid_block.attentions.{index - 1}"
                layers.append(_attention(name, attention, layers[-1].name, layers[-1].channels))
            layers.extend(_resnet(f"{prefix}.mid_block.resnets.{index}", resnet, layers[-1].name))

    def stack(kind: Literal["up", "down"]) -> None:
        for number, block in enumerate(getattr(coder, f"{kind}_blocks")):
            name = f"{prefix}.{kind}_blocks.{number}"
            if getattr(block, "attentions", None):
                raise _refuse(name, "has attention")
            for index, resnet in enumerate(block.resnets):
                layers.extend(_resnet(f"{name}.resnets.{index}", resnet, layers[-1].name))
            for index, sampler in enumerate(getattr(block, f"{kind}samplers") or ()):
                layers.append(_resampler(f"{name}.{kind}samplers.{index}", sampler, layers[-1].name, kind))

    if direction == "decode":
        mid()
        stack("up")
    else:
        stack("down")
        mid()
    out = coder.conv_out
    layers.append(
        Layer(
            name=f"{prefix}.conv_out",
            owners=_owners(coder.conv_norm_out, out, after),
            source=layers[-1].name,
            channels=out.out_channels if after is None else after.out_channels,
            conv=out,
            norm=coder.conv_norm_out,
            act=coder.conv_act,
            after=after,
        )
    )
    return layers


def shapes(layers: list[Layer], given: Shape) -> dict[str, Shape]:
    """The shape of the input and of every layer's activation."""
    found = {INPUT: given}
    for layer in layers:
        height, width = found[layer.source].size
        size = {"same": (height, width), "up": (2 * height, 2 * width), "down": (height // 2, width // 2)}[layer.move]
        found[layer.name] = Shape(layer.channels, Size(*size))
    return found
