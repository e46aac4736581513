"""What the tiles of a VAE share: GroupNorm statistics, keys and values of attention, from one small pass.

A tile that is normalised by its own statistics, and attends to itself only, drifts in colour from its neighbour. With
those of one small pass over the whole picture every tile is treated alike, whatever lies in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stages.files import atomic_path
from stages.memory.tensors import read_checked, write_tensors
from stages.vae.groupnorm import group_var_mean, normalise

_NORM, _ATTENTION = ("var", "mean"), ("key", "value")
Pair = tuple[Tensor, Tensor]


class _Calls(TorchFunctionMode):
    """Hands each ``F.group_norm`` call of ``module`` to ``norm(name, ...)``, each attention to ``attend(name, ...)``.

    The calls are caught, not the modules' ``forward``: that may be wrapped to stream its weights in, and they are there
    only while the call runs.
    """

    def __init__(self, module: nn.Module, norm: Callable[..., Tensor], attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.module = module
        self.handlers = {F.group_norm: norm, F.scaled_dot_product_attention: attend}
        self.inside: dict[Any, str] = {}  # the module that was entered last, by the call that it makes

    def _enter(self, call: Any, name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            self.inside[call] = name

        return hook

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.inside:
            return self.handlers[func](self.inside[func], *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    @contextmanager
    def active(self) -> Iterator[None]:
        hooks = []
        for name, module in self.module.named_modules():
            if isinstance(module, nn.GroupNorm):
                hooks.append(module.register_forward_pre_hook(self._enter(F.group_norm, name)))
            elif hasattr(module, "to_k"):  # an attention of diffusers
                hooks.append(module.register_forward_pre_hook(self._enter(F.scaled_dot_product_attention, name)))
        try:
            with self:
                yield
        finally:
            for hook in hooks:
                hook.remove()


@dataclass(kw_only=True)
class SharedStatistics:
    """``norms``: (variance, mean) ``[G]`` float32 of every GroupNorm of a module by its name there; ``attentions``:
    (key, value) ``[1, heads, tokens, d]`` of every attention."""

    norms: dict[str, Pair] = field(default_factory=dict)
    attentions: dict[str, Pair] = field(default_factory=dict)

    @contextmanager
    def collect(self, module: nn.Module) -> Iterator[None]:
        """Remember those of the one sample that ``module`` is run on inside."""

        def norm(name: str, x: Tensor, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
            if x.shape[0] != 1:
                raise ValueError(f"statistics are collected from one sample, got {x.shape[0]}.")
            var, mean = group_var_mean(x, groups)
            self.norms[name] = (var.cpu(), mean.cpu())
            return F.group_norm(x, groups, weight, bias, eps)

        def attend(name: str, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
            self.attentions[name] = (key.clone(), value.clone())
            return F.scaled_dot_product_attention(query, key, value, **options)

        with _Calls(module, norm, attend).active():
            yield

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Inside, every GroupNorm and attention of ``module`` uses these. KeyError for one that has none."""

        def norm(name: str, x: Tensor, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
            var, mean = self.norms[name]
            return normalise(x, var, mean, weight, bias, eps)

        def attend(name: str, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
            key, value = (
                seen.to(key.device, key.dtype).expand(len(query), -1, -1, -1) for seen in self.attentions[name]
            )
            return F.scaled_dot_product_attention(query, key, value, **options)

        with _Calls(module, norm, attend).active():
            yield

    def save(self, path: Path) -> None:
        """To a safetensors file (through ``atomic_path``), so that a resumed decode goes on with the same numbers."""
        tensors = {
            f"{name}.{part}": tensor
            for parts, pairs in ((_NORM, self.norms), (_ATTENTION, self.attentions))
            for name, pair in pairs.items()
            for part, tensor in zip(parts, pair, strict=True)
        }
        with atomic_path(path) as temporary:
            write_tensors(temporary, tensors, checked=True)

    @classmethod
    def load(cls, path: Path) -> SharedStatistics:
        """What ``save`` wrote. OSError without a file, ValueError for a torn or damaged one."""
        tensors = read_checked(path)

        def pairs(parts: tuple[str, str]) -> dict[str, Pair]:
            names = sorted({name for name, _, part in (key.rpartition(".") for key in tensors) if part == parts[0]})
            return {name: (tensors[f"{name}.{parts[0]}"], tensors[f"{name}.{parts[1]}"]) for name in names}

        return cls(norms=pairs(_NORM), attentions=pairs(_ATTENTION))
