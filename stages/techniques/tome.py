"""``technique.tome.ratio``: tokens that are alike are merged before self-attention and spread out again behind it.

Token Merging for Stable Diffusion (arXiv 2303.17604): of every 2x2 tokens one, drawn at random, is a destination; of
the others those that are most like a destination join it. Only the finest level that attends merges, as published.

The draw is a function of (seed, step, tile), so it is the same in both halves of guidance, in groups of any size and in
a run that was interrupted. Sums are products with a matrix: adding up with atomics would round in any order on a GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from stages.config import ConfigError
from stages.families.facts import facts_of
from stages.techniques.base import SAMPLING, Technique

if TYPE_CHECKING:
    from torch import Tensor, nn

KEY = "technique.tome.ratio"
MOST = 0.75  # one of four is a destination
BLOCK = "BasicTransformerBlock"
_STEP, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15  # of splitmix64, as signed


class ToMe(Technique):
    """A share ``ratio`` of the tokens is merged."""

    name = "tome"
    keys = (KEY,)
    whole = frozenset({BLOCK})  # what is alike is asked of a block's input, sample by sample of a micro-batch

    @classmethod
    def of(cls, config: DictConfig) -> ToMe | None:
        return cls(config) if config.technique.tome.ratio else None

    def __init__(self, config: DictConfig) -> None:
        self.ratio, self._config = float(config.technique.tome.ratio), config

    @classmethod
    def check(cls, config: DictConfig) -> None:
        ratio = config.technique.tome.ratio
        if not 0 <= ratio <= MOST:
            raise ConfigError(KEY, ratio, f"0 (off) to {MOST}, a share of the tokens")
        if ratio and not facts_of(config).unet:
            raise ConfigError(KEY, ratio, "0 for a transformer", "It merges the tokens of a UNet's finest level.")

    def fingerprint(self, cache: Path) -> Mapping[str, Any]:
        return {KEY: self.ratio}

    def touches(self, stage: str) -> bool:
        return stage in SAMPLING

    def on_model(self, network: nn.Module, component: str) -> None:
        level = _finest(network)
        if level is None:
            raise ConfigError(
                KEY, self.ratio, "0", f"The {component} of this checkpoint has no self-attention to merge for."
            )
        places = (f"down_blocks.{level}.", f"up_blocks.{len(_blocks(network, 'up_blocks')) - 1 - level}.")
        for name, module in network.named_modules():
            if type(module).__name__ == BLOCK:
                _wrap(module, self.ratio if name.startswith(places) else 0.0)
        forward: Any = network.forward

        def seeded(*, sample: Tensor, tome: Tensor, **inputs: Any) -> Any:
            sides = [-(-side // 2**level) for side in sample.shape[-2:]]
            return forward(sample=sample, cross_attention_kwargs={"tome": tome, "tome_sides": sides}, **inputs)

        network.forward = seeded

    def before_call(self, batch: Any, step: Tensor, inputs: dict[str, Tensor]) -> None:
        import torch

        device, found = inputs["sample"].device, [0] * len(batch.tiles)
        if not step.is_meta:  # a look draws nothing
            seed, now = self._config.seed, float(step)
            found = [_hash(seed, now, tile.top, tile.left) for tile in batch.tiles]
        inputs["tome"] = torch.tensor(found, dtype=torch.int64, device=device)


def _hash(*values: float) -> int:
    """63 bits of these numbers."""
    return int.from_bytes(blake2b(repr(values).encode(), digest_size=8).digest(), "little") >> 1


def _blocks(network: nn.Module, name: str) -> Any:
    return getattr(network, name)


def _finest(network: nn.Module) -> int | None:
    """The first level of a UNet with transformer blocks."""
    levels = enumerate(_blocks(network, "down_blocks"))
    return next((level for level, stage in levels if any(type(m).__name__ == BLOCK for m in stage.modules())), None)


def _wrap(block: Any, ratio: float) -> None:
    """Have a block's self-attention see merged tokens; with a ratio of 0 it is only not told of them."""
    whole, attend = block.forward, block.attn1.forward
    now = threading.local()  # of a lane

    def merging(hidden_states: Tensor, *args: Any, cross_attention_kwargs: Any = None, **inputs: Any) -> Any:
        rest = dict(cross_attention_kwargs or {})
        seeds, sides = rest.pop("tome"), rest.pop("tome_sides")
        now.merge = Merge(hidden_states, seeds, sides, ratio) if ratio else None
        try:
            return whole(hidden_states, *args, cross_attention_kwargs=rest or None, **inputs)
        finally:
            now.merge = None

    def attending(hidden_states: Tensor, *args: Any, **inputs: Any) -> Tensor:
        merge: Merge | None = getattr(now, "merge", None)
        if merge is None:
            return attend(hidden_states, *args, **inputs)
        return merge.spread(attend(merge.merged(hidden_states), *args, **inputs))

    block.forward, block.attn1.forward = merging, attending


class Merge:
    """Which of ``N`` tokens join which.

    Args:
        metric: ``[B, N, C]``, by which tokens are alike (their cosine).
        seeds: ``[B]`` int64, of each sample's draw.
        sides: (height, width) with ``height * width = N``.
        ratio: the share of tokens that join another.
    """

    def __init__(self, metric: Tensor, seeds: Tensor, sides: tuple[int, int], ratio: float) -> None:
        import torch

        count, to = metric.shape[1], destinations(seeds, sides)
        taken = torch.zeros((len(metric), count), dtype=torch.uint8, device=metric.device).scatter(1, to, 1)
        rest = taken.argsort(dim=1, stable=True)[:, : count - to.shape[1]]
        metric = metric / metric.norm(dim=-1, keepdim=True)
        best, target = (_rows(metric, rest) @ _rows(metric, to).transpose(1, 2)).max(dim=-1)
        order = best.argsort(dim=-1, descending=True, stable=True)
        joined = min(rest.shape[1], int(count * ratio))
        self.to = to  # [B, D]
        self.joining = rest.gather(1, order[:, :joined])
        self.alone = rest.gather(1, order[:, joined:])
        self.target = target.gather(1, order[:, :joined])  # which of the D

    def merged(self, tokens: Tensor) -> Tensor:
        """``[B, N, C]`` to fewer: those that stay alone, then the destinations as means of what joined them."""
        import torch

        numbers = torch.arange(self.to.shape[1], device=tokens.device)
        shares = (numbers[None, :, None] == self.target[:, None, :]).to(tokens.dtype)
        sums = _rows(tokens, self.to) + shares @ _rows(tokens, self.joining)
        return torch.cat([_rows(tokens, self.alone), sums / (1 + shares.sum(dim=-1, keepdim=True))], dim=1)

    def spread(self, tokens: Tensor) -> Tensor:
        """What ``merged`` made fewer, ``[B, N, C]`` again."""
        import torch

        alone, met = tokens.split([self.alone.shape[1], self.to.shape[1]], dim=1)
        places = torch.cat([self.alone, self.to, self.joining], dim=1)[..., None].expand(-1, -1, tokens.shape[-1])
        return torch.empty_like(places, dtype=tokens.dtype).scatter(
            1, places, torch.cat([alone, met, _rows(met, self.target)], dim=1)
        )


def destinations(seeds: Tensor, sides: tuple[int, int]) -> Tensor:
    """``[B, D]``: the token of each 2x2 that others may join, drawn by ``seeds [B]``; a hash, so any device agrees."""
    import torch

    down, across = sides[0] // 2, sides[1] // 2
    cells = torch.arange(down * across, device=seeds.device)
    drawn = seeds[:, None] + (cells + 1)[None] * _STEP
    drawn = (drawn ^ (drawn >> 30)) * _FIRST
    drawn = (drawn ^ (drawn >> 27)) * _SECOND
    drawn = (drawn ^ (drawn >> 31)) & 3
    return (2 * (cells // across) + (drawn >> 1)) * sides[1] + 2 * (cells % across) + (drawn & 1)


def _rows(tokens: Tensor, places: Tensor) -> Tensor:
    """``[B, M, C]`` of ``[B, N, C]``."""
    return tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[-1]))
