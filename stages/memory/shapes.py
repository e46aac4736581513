"""What operations on the meta device give, remembered: most have a kernel in Python, and a pass repeats its blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

Made = tuple[Callable[[], Tensor], ...]


class Shapes:
    """Results by what went in. Operations that give or change what they were given, or read numbers, always run."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[type, Made]] = {}

    def run(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """``func(*args, **kwargs)`` of an operation's overload; where it ran before with the same shapes, new tensors
        of the shapes that it gave."""
        given = list(_tensors((args, tuple(kwargs.values()))))
        if not (_gives_new(func) and all(tensor.is_meta for tensor in given)):
            return func(*args, **kwargs)
        key = (func, _key(args), _key(kwargs))
        if key in self._known:
            kind, made = self._known[key]
            return made[0]() if kind is Tensor else tuple(one() for one in made)
        result = func(*args, **kwargs)
        storages = {tensor.untyped_storage()._cdata for tensor in given}  # ``_unsafe_view`` says that it gives new ones
        found = (result,) if type(result) is Tensor else result
        if isinstance(found, tuple) and all(_is_whole(one) for one in found):
            own = {one.untyped_storage()._cdata for one in found}
            if len(own) == len(found) and not own & storages:
                self._known[key] = type(result), tuple(map(_maker, found))
        return result


@cache
def _gives_new(func: Any) -> bool:
    schema = func._schema
    return not any(one.alias_info for one in (*schema.arguments, *schema.returns))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)


def _is_whole(value: Any) -> bool:
    """Whether it is a tensor with all of its storage."""
    return (
        type(value) is Tensor
        and value.is_meta
        and _maker(value)().untyped_storage().nbytes() == (value.untyped_storage().nbytes())
    )


def _maker(tensor: Tensor) -> Callable[[], Tensor]:
    shape, stride, dtype = tuple(tensor.shape), tensor.stride(), tensor.dtype
    return lambda: torch.empty_strided(shape, stride, dtype=dtype, device="meta")


def _key(value: Any) -> Any:
    """What a result's shape can hang on. Numbers of different kinds are not equal: they decide about its dtype."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return tuple([_key(one) for one in value])
    if isinstance(value, dict):
        return tuple([(name, _key(one)) for name, one in value.items()])
    return type(value), value
