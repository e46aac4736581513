"""Import diffusers' and transformers' models without what they pull in but these stages never call.

``torch.compiler.disable`` imports ``torch._dynamo`` (and with it sympy, fsdp and symbolic shapes) at class definition,
diffusers imports transformers and scipy wherever they are installed, and transformers distributed tensors, its losses
(scipy) and its image processors (torchvision): 145 to 165 MB of RES and 3 s per process. While they are imported,
decorators meet an identity instead, and the rest looks as if it were not installed (which both libraries support);
afterwards all can be imported as ever.

It leans on what the installed releases import, so it is the first thing to break when they change:
``HIGHRES_LIGHT_IMPORTS=0`` imports everything plainly, for that much more memory and time.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, ClassVar
from unittest.mock import patch

from stages.memory.trim import drop_clean_pages

SWITCH = "HIGHRES_LIGHT_IMPORTS"
_HINT = f"{SWITCH}=0 in the environment imports the libraries whole (about 150 MB more a process): try it with that."


class LightImportError(ImportError):
    """A library could not be imported without what these stages do not need; says how to import it whole."""


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
        raise RuntimeError(f"masks by vmap need torch._dynamo, which was left out. {_HINT}")

    def __exit__(self, *_: object) -> None:
        pass


# diffusers and transformers run without them; some releases of the latter import sklearn, which needs scipy
_OPTIONAL = ("transformers", "peft", "scipy", "sklearn", "torchvision")


def _importing(error: BaseException) -> bool:
    """Whether ``error``, caught at the ``yield`` below, was raised while a module was being imported."""
    inside = traceback.extract_tb(error.__traceback__)[2:]  # without this file's frame and that of the with statement
    if isinstance(error, ImportError) or any(frame.name == "<module>" for frame in inside):
        return True
    return error.__cause__ is not None and _importing(error.__cause__)  # lazy imports wrap what went wrong


_lightly: set[str] = set()  # libraries that were imported here first


@contextmanager
def light_imports(*needed: str) -> Iterator[None]:
    """Import classes of diffusers, or of ``needed`` (transformers), inside; what is loaded already stays as it is.

    Raises:
        LightImportError: an import inside failed.
    """
    import torch
    import torch.distributed

    drop_clean_pages()  # so that importing one library does not come on top of importing the one before
    if os.environ.get(SWITCH, "1") == "0":
        yield
        return
    stand_ins: dict[str, Any] = {}
    if "torch._dynamo" not in sys.modules:
        wrapped = ModuleType("torch._dynamo._trace_wrapped_higher_order_op")
        wrapped.TransformGetItemToIndex = _TransformGetItemToIndex  # type: ignore[attr-defined]
        compiler = _CompilerStandIn("torch._dynamo")
        stand_ins = {compiler.__name__: compiler, wrapped.__name__: wrapped}
        torch._dynamo = compiler  # type: ignore[attr-defined]
    # of a diffusers that was imported whole, what is still to come asks for what it saw then
    whole = "diffusers" in sys.modules and "diffusers" not in _lightly
    hidden = [] if whole else [name for name in _OPTIONAL if name not in needed and name not in sys.modules]
    sys.modules |= {**stand_ins, **dict.fromkeys(hidden)}  # type: ignore[arg-type]
    try:
        with patch.object(torch.distributed, "is_available", lambda: False):
            yield
    except LightImportError:
        raise
    except Exception as error:
        if not _importing(error):
            raise
        raise LightImportError(f"{type(error).__name__}: {error}. {_HINT}") from error
    finally:
        if "diffusers" in sys.modules and not whole:
            _lightly.add("diffusers")
        for name in (*hidden, *stand_ins):
            del sys.modules[name]
        if stand_ins:
            del torch._dynamo  # type: ignore[attr-defined]
