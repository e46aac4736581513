"""Import diffusers' and transformers' models without what they pull in but these stages never call.

``torch.compiler.disable`` imports ``torch._dynamo`` (and with it sympy, fsdp and symbolic shapes) at class definition,
diffusers imports transformers and scipy wherever they are installed, and transformers distributed tensors, its losses
(scipy) and its image processors (torchvision): 145 to 165 MB of RES and 3 s per process. While they are imported,
decorators meet an identity instead, and the rest looks as if it were not installed (which both libraries support);
afterwards all can be imported as ever.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, ClassVar
from unittest.mock import patch

from stages.memory.trim import drop_clean_pages


def _identity(fn: Any = None, *_: Any, **__: Any) -> Any:
    return fn if callable(fn) else lambda decorated: decorated


class _CompilerStandIn(ModuleType):
    """What decorators at import time ask ``torch._dynamo`` for."""

    disable = allow_in_graph = assume_constant_result = disallow_in_graph = mark_static_address = staticmethod(
        _identity
    )
    __path__: ClassVar[list[str]] = []

    @staticmethod
    def is_compiling() -> bool:
        return False


class _TransformGetItemToIndex:
    """A context that transformers' masks enter where they are made with vmap, which these stages' models do not."""

    def __enter__(self) -> None:
        raise RuntimeError("masks by vmap need torch._dynamo: import transformers without light_imports")

    def __exit__(self, *_: object) -> None:
        pass


# diffusers and transformers run without them; some releases of the latter import sklearn, which needs scipy
_OPTIONAL = ("transformers", "peft", "scipy", "sklearn", "torchvision")


@contextmanager
def light_imports(*needed: str) -> Iterator[None]:
    """Import classes of diffusers, or of ``needed`` (transformers), inside; what is loaded already stays as it is."""
    import torch
    import torch.distributed

    drop_clean_pages()  # so that importing one library does not come on top of importing the one before
    stand_ins: dict[str, Any] = {}
    if "torch._dynamo" not in sys.modules:
        wrapped = ModuleType("torch._dynamo._trace_wrapped_higher_order_op")
        wrapped.TransformGetItemToIndex = _TransformGetItemToIndex  # type: ignore[attr-defined]
        compiler = _CompilerStandIn("torch._dynamo")
        stand_ins = {compiler.__name__: compiler, wrapped.__name__: wrapped}
        torch._dynamo = compiler  # type: ignore[attr-defined]
    hidden = [name for name in _OPTIONAL if name not in needed and name not in sys.modules]
    sys.modules |= {**stand_ins, **dict.fromkeys(hidden)}  # type: ignore[arg-type]
    try:
        with patch.object(torch.distributed, "is_available", lambda: False):
            yield
    finally:
        for name in (*hidden, *stand_ins):
            del sys.modules[name]
        if stand_ins:
            del torch._dynamo  # type: ignore[attr-defined]
