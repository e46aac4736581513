"""Import torch, and diffusers' and transformers' models, without what they pull in but these stages never call.

``import torch`` registers a Python kernel of the meta device for every operation: a quarter of its time and 18 MB. Only
the passes of a look need them (``memory/trace.py`` imports them); what makes networks on meta is in C++.

``torch.compiler.disable`` imports ``torch._dynamo`` (and with it sympy, fsdp and symbolic shapes) at class definition,
diffusers imports transformers and scipy wherever they are installed, and transformers distributed tensors, its losses
(scipy) and its image processors (torchvision): 145 to 165 MB of RES and 3 s per process. While they are imported,
decorators meet an identity instead, and the rest looks as if it were not installed (which both libraries support);
afterwards all can be imported as ever. What they import and seldom use (``requests``, the map from modules to packages,
a hundred other models: 0.25 s and 10 MB) comes at its first use.

It leans on what the installed releases import, so it is the first thing to break when they change:
``HIGHRES_LIGHT_IMPORTS=0`` imports everything plainly, for that much more memory and time.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
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


class _Later(ModuleType):
    """Stands for a module until something is asked of it: that imports it, after the ``group`` that it belongs to.
    With the ``folder`` of a package its modules can be imported before.

    It may stay in ``sys.modules``: what walks through all modules asks for names of two underscores, which it has not.
    """

    def __init__(self, name: str, group: Sequence[str] = (), folder: Path | None = None) -> None:
        super().__init__(name)
        self._group = (*group, name)
        if folder is not None:
            self.__path__ = [str(folder)]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":
            raise AttributeError(name)
        return getattr(self.import_now(), name)

    def import_now(self) -> ModuleType:
        for one in self._group:
            if isinstance(sys.modules.get(one), _Later):
                del sys.modules[one]
        *_, found = [importlib.import_module(one) for one in self._group]
        for name, module in vars(self).items():
            if isinstance(module, ModuleType):  # one of a package's
                vars(found).setdefault(name, module)
        return found


class _Packages(Mapping[str, list[str]]):
    """``importlib.metadata.packages_distributions()``, which reads the list of files of every package, when asked."""

    def __init__(self, read: Callable[[], Mapping[str, list[str]]]) -> None:
        self._read = cache(read)

    def __getitem__(self, name: str) -> list[str]:
        return self._read()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())


@contextmanager
def light_torch() -> Iterator[None]:
    """Whoever imports torch first inside gets it without the Python kernels of the meta device.

    Raises:
        LightImportError: torch has them elsewhere.
    """
    if "torch" in sys.modules or not _light():
        yield
        return
    folders = {"torch._prims": _folder("torch", "_prims")}
    stand_ins = {name: _Later(name, _META, folders.get(name)) for name in _META}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        torch = sys.modules.get("torch")
        for name, stand_in in stand_ins.items():
            if torch is None:
                del sys.modules[name]
            elif sys.modules[name] is stand_in:
                setattr(torch, name.rpartition(".")[2], stand_in)
    if torch is not None:
        try:
            importlib.import_module("torch._prims.rng_prims")  # since 2.13 no torch.Generator can be made before
        except Exception as error:
            raise LightImportError(f"{type(error).__name__}: {error}. {_HINT}") from error


def meta_kernels() -> None:
    """See to it that torch has all its kernels of the meta device."""
    if isinstance(kernels := sys.modules.get(_META[-1]), _Later):
        kernels.import_now()


def _packages_of_models() -> None:
    """diffusers' packages of models import a hundred models: until somebody wants one of them whole, only those modules
    are imported that a class needs."""
    for kind in _KINDS:
        name, folder = f"diffusers.models.{kind}", _folder("diffusers", f"models/{kind}")
        if folder is not None and name not in sys.modules:
            sys.modules[name] = _Later(name, folder=folder)


def _folder(package: str, inside: str) -> Path | None:
    """Of a package that has not been imported; None where there is none."""
    spec = find_spec(package)
    roots = spec.submodule_search_locations or () if spec else ()
    return next((folder for root in roots if (folder := Path(root, inside)).is_dir()), None)


def _light() -> bool:
    return os.environ.get(SWITCH, "1") != "0"


# diffusers and transformers run without them; some releases of the latter import sklearn, which needs scipy
_OPTIONAL = ("transformers", "peft", "scipy", "sklearn", "torchvision", "gguf", "psutil")
_MANY = 50  # modules: as many new ones are a library
_KINDS = ("autoencoders", "controlnets", "transformers", "unets")
# make kernels of the meta device, and can be imported in this order only
_META = ("torch._prims", "torch._meta_registrations", "torch._decomp", "torch._refs")


def _importing(error: BaseException) -> bool:
    """Whether ``error``, caught at the ``yield`` below, was raised while a module was being imported."""
    inside = traceback.extract_tb(error.__traceback__)[2:]  # without this file's frame and that of the with statement
    if isinstance(error, ImportError) or any(frame.name == "<module>" for frame in inside):
        return True
    return error.__cause__ is not None and _importing(error.__cause__)  # lazy imports wrap what went wrong


_lightly: set[str] = set()  # libraries that were imported here first
_dropped = 0  # modules that were there when pages were dropped last


@contextmanager
def light_imports(*needed: str) -> Iterator[None]:
    """Import classes of diffusers, or of ``needed`` (transformers), inside; what is loaded already stays as it is.

    Raises:
        LightImportError: an import inside failed.
    """
    import torch
    import torch.distributed

    global _dropped
    if len(sys.modules) >= _dropped + _MANY:  # importing one library does not come on top of importing the one before
        drop_clean_pages()
        _dropped = len(sys.modules)
    if not _light():
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
    if "diffusers" not in sys.modules:
        _packages_of_models()
    if "requests" not in sys.modules:
        stand_ins["requests"] = _Later("requests")
    sys.modules |= {**stand_ins, **dict.fromkeys(hidden)}  # type: ignore[arg-type]
    packages = partial(_Packages, importlib.metadata.packages_distributions)
    try:
        with (
            patch.object(torch.distributed, "is_available", lambda: False),
            patch.object(importlib.metadata, "packages_distributions", packages),
        ):
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
        models = sys.modules.get("diffusers.models")
        for kind in _KINDS if models else ():
            if package := sys.modules.get(f"diffusers.models.{kind}"):
                vars(models).setdefault(kind, package)
        for name in hidden:
            del sys.modules[name]
        for name, stand_in in stand_ins.items():
            if sys.modules[name] is stand_in:  # somebody may have asked for it meanwhile
                del sys.modules[name]
        if "torch._dynamo" in stand_ins:
            del torch._dynamo  # type: ignore[attr-defined]
