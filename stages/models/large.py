"""What is too large to be one load: vocabularies, whose rows are read as they are asked for, and wide linear layers.

Both hang on the checkpoint and the dtype alone, never on a plan: the same kernels run at every budget.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from stages.memory.layout import owner
from stages.memory.refs import TensorRef
from stages.memory.tensors import read_tensor

VOCABULARY = 1000  # rows: an embedding of so many has a row a token, of which a prompt has a few
WIDE = 96_000_000  # bytes of a weight that is cut
SLICE = 64_000_000  # bytes that a piece of it has at most


class RowEmbedding(nn.Module):
    """``nn.Embedding`` whose table stays in its file: the rows of the tokens at hand are read."""

    def __init__(self, ref: TensorRef, dtype: torch.dtype) -> None:
        super().__init__()
        self._ref, self._dtype = ref, dtype

    @property
    def weight(self) -> Tensor:
        """A table without bytes: models ask for its dtype and shape."""
        return torch.empty(self._ref.shape, dtype=self._dtype, device="meta")

    def forward(self, ids: Tensor) -> Tensor:
        """``[..., D]`` of ``ids [...]``."""
        width = self._ref.shape[1]
        if ids.is_meta:
            return torch.empty((*ids.shape, width), dtype=self._dtype, device="meta")
        places, inverse = ids.cpu().unique(return_inverse=True)
        found = torch.empty((len(places), width), dtype=self._ref.read_dtype)
        for place, row in zip(places.tolist(), found, strict=True):
            if not 0 <= place < self._ref.shape[0]:
                raise IndexError(f"token {place}, expected one of a vocabulary of {self._ref.shape[0]}.")
            own = self._ref.rows(place, place + 1)
            assert own is not None  # ``without_large`` has seen to it
            row.copy_(read_tensor(own)[0])
        return found.to(self._dtype)[inverse].to(ids.device)


class SlicedLinear(nn.Module):
    """``nn.Linear`` in pieces of its output, each loaded by itself."""

    def __init__(self, linear: nn.Linear, count: int) -> None:
        super().__init__()
        rows = linear.out_features
        edges = [rows * index // count for index in range(count + 1)]
        self.in_features, self.out_features, self._edges = linear.in_features, rows, edges
        self.slices = nn.ModuleList(
            nn.Linear(linear.in_features, end - start, bias=linear.bias is not None, device="meta")
            for start, end in pairwise(edges)
        ).requires_grad_(False)

    @property
    def weight(self) -> Tensor:
        """That of the first piece: models ask for its dtype."""
        return self.slices[0].weight  # type: ignore[return-value]

    def forward(self, inputs: Tensor) -> Tensor:
        """``[..., out_features]``."""
        found = inputs.new_empty((*inputs.shape[:-1], self.out_features))
        for (start, end), piece in zip(pairwise(self._edges), self.slices, strict=True):
            found[..., start:end] = piece(inputs)
        return found

    def refs(self, name: str, tensors: Mapping[str, TensorRef]) -> dict[str, TensorRef]:
        """Where the pieces of the layer ``name`` lie."""
        found = {}
        for kind in ("weight", "bias"):
            ref = tensors.get(f"{name}.{kind}")
            for index, (start, end) in enumerate(pairwise(self._edges)):
                part = ref and ref.rows(start, end)
                if part:
                    found[f"{name}.slices.{index}.{kind}"] = part
        return found


def without_large(network: nn.Module, tensors: Mapping[str, TensorRef], dtype: torch.dtype) -> dict[str, TensorRef]:
    """Put these in the place of ``network``'s vocabularies and wide layers; where the tensors of the result lie."""
    found = dict(tensors)
    for name, module in list(network.named_modules(remove_duplicate=False)):
        ref = tensors.get(f"{name}.weight")
        if ref is None or ref.rows(0, 1) is None:  # of blocks that hold more than a row
            continue
        if type(module) is nn.Embedding and module.num_embeddings >= VOCABULARY:
            made: nn.Module = RowEmbedding(ref, dtype)
        elif type(module) is nn.Linear and ref.numel * dtype.itemsize >= WIDE:
            made = SlicedLinear(module, -(-ref.numel * dtype.itemsize // SLICE))
            found |= made.refs(name, tensors)
        else:
            continue
        parent, own = owner(network, name)
        setattr(parent, own, made)
    return found
