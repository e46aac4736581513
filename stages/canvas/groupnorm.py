"""GroupNorm with statistics from elsewhere: collected in one pass, merged from parts, applied to every tile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stages.memory.tensors import read_tensors
from stages.workflow.store import atomic_path

_PARTS = ("var", "mean")


class _GroupNormHandler(TorchFunctionMode):
    """Hands each ``F.group_norm`` call of ``module``'s norms to ``handle(name, ...)``.

    The call is caught, not the module's ``forward``: that may be wrapped to stream its weights in, and they are there
    only while the call runs.
    """

    def __init__(self, module: nn.Module, handle: Callable[..., Tensor]) -> None:
        super().__init__()
        self.module, self.handle = module, handle
        self.name = ""

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            self.name = name

        return hook

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.group_norm and self.name:
            return self.handle(self.name, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    @contextmanager
    def active(self) -> Iterator[None]:
        norms = {name: m for name, m in self.module.named_modules() if isinstance(m, nn.GroupNorm)}
        hooks = [norm.register_forward_pre_hook(self._enter(name)) for name, norm in norms.items()]
        try:
            with self:
                yield
        finally:
            for hook in hooks:
                hook.remove()


def group_var_mean(sample: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """(variance, mean) of each group of channels of ``[1, C, ...]``, ``[G]`` float32; not the unbiased variance."""
    parts = [torch.var_mean(part.float(), correction=0) for part in sample[0].chunk(groups)]
    var, mean = zip(*parts, strict=True)
    return torch.stack(var), torch.stack(mean)


def merge_var_mean(counts: Tensor, variances: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
    """(variance, mean) of a whole from its parts, along the first axis, float64.

    ``mean = sum w m_i`` and ``var = sum w (v_i + (m_i - mean)^2)``: with the spread between the parts, which the
    mean of their variances would miss, and without the cancellation of ``sum w m_i^2 - mean^2``.
    """
    share = (counts.double() / counts.double().sum()).view(-1, *[1] * (means.dim() - 1))
    mean = (share * means.double()).sum(0)
    return (share * (variances.double() + (means.double() - mean) ** 2)).sum(0), mean


def normalise(
    sample: Tensor, var: Tensor, mean: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """GroupNorm of ``[N, C, ...]`` with given statistics of G groups, in the sample's dtype, computed in float32."""
    each = sample.shape[1] // len(mean)
    mean, var = (v.to(sample.device, torch.float32).repeat_interleave(each) for v in (mean, var))
    weight, bias = (None if v is None else v.float() for v in (weight, bias))
    return F.batch_norm(sample, mean, var, weight, bias, training=False, eps=eps)


@dataclass(kw_only=True)
class GroupNormStatistics:
    """(variance, mean) ``[G]`` float32 of every GroupNorm of a module, by its name there."""

    values: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @contextmanager
    def collect(self, module: nn.Module) -> Iterator[None]:
        """Remember the statistics of the one sample that ``module`` is run on inside."""

        def handle(
            name: str, x: Tensor, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
        ) -> Tensor:
            if x.shape[0] != 1:
                raise ValueError(f"statistics are collected from one sample, got {x.shape[0]}.")
            var, mean = group_var_mean(x, groups)
            self.values[name] = (var.cpu(), mean.cpu())
            return F.group_norm(x, groups, weight, bias, eps)

        with _GroupNormHandler(module, handle).active():
            yield

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Inside, every GroupNorm of ``module`` uses these statistics. KeyError for a norm that has none."""

        def handle(
            name: str, x: Tensor, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
        ) -> Tensor:
            var, mean = self.values[name]
            return normalise(x, var, mean, weight, bias, eps)

        with _GroupNormHandler(module, handle).active():
            yield

    def save(self, path: Path) -> None:
        """To a safetensors file (through ``atomic_path``), so that a resumed decode goes on with the same numbers."""
        tensors = {
            f"{name}.{part}": t for name, pair in self.values.items() for part, t in zip(_PARTS, pair, strict=True)
        }
        with atomic_path(path) as temporary:
            save_file(tensors, temporary)

    @classmethod
    def load(cls, path: Path) -> GroupNormStatistics:
        """What ``save`` wrote. OSError without a file, ValueError for a torn one."""
        tensors = read_tensors(path)
        names = sorted({key.rpartition(".")[0] for key in tensors})
        return cls(values={name: (tensors[f"{name}.var"], tensors[f"{name}.mean"]) for name in names})
