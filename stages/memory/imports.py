"""Import diffusers' models without what they pull in but these stages never call: graph compiler, transformers, scipy.

``torch.compiler.disable`` imports ``torch._dynamo`` (and with it sympy, fsdp and symbolic shapes) at class definition,
and diffusers imports transformers and scipy wherever they are installed: together about 165 MB of RES and 3 s per
process. While diffusers is imported, decorators meet an identity instead and the two look as if they were not installed
(which diffusers supports); afterwards all can be imported as ever.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, ClassVar


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


_OPTIONAL = ("transformers", "peft", "scipy", "torchvision")  # diffusers runs without them


@contextmanager
def light_imports() -> Iterator[None]:
    """Import diffusers classes inside; what is loaded already stays as it is."""
    import torch

    name = "torch._dynamo"
    stand_in = None if name in sys.modules else _CompilerStandIn(name)
    hidden = [package for package in _OPTIONAL if package not in sys.modules]
    if stand_in is not None:
        sys.modules[name] = stand_in
        torch._dynamo = stand_in  # type: ignore[attr-defined]
    for package in hidden:
        sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for package in hidden:
            del sys.modules[package]
        if stand_in is not None:
            del sys.modules[name]
            del torch._dynamo  # type: ignore[attr-defined]
