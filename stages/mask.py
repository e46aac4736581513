"""What a stage sees of the config: what it declared, and what is part of no result. Reading anything else is an error.

A key that a stage reads and does not declare is not in its fingerprint: its result would be taken for that of another
value.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from omegaconf import DictConfig

from stages import Stage

# Keys that every stage may read: they are not part of a result, or are in its fingerprint by another name.
RUN_WIDE = (
    "output_dir",  # where results lie
    "run",  # the name of the run, for commands in messages
    "memory",  # the budget changes speed, never the picture
    "launch",  # threads, and how often memory is looked at
    "progress",  # what a person sees
    "preview",
    "device",  # in the fingerprint of every stage that opens a model
    "device_map",  # where a model's weights lie, never what they are
    "max_memory",
    "technique.dtype",  # likewise, resolved for each component
    "technique.component_dtype",
    "model.path",  # likewise, as the bytes of the checkpoint
    "model.revision",
    "model.denoiser",
    "model.vae",
    "model.config",
    "model.family",  # found from the checkpoint's classes
    "model.name",  # for messages
)


class UndeclaredRead(RuntimeError):
    """A stage read a key that it does not declare."""

    @classmethod
    def of(cls, stage: str, key: str) -> UndeclaredRead:
        return cls(
            f"{stage} reads {key}, which it does not declare: a result for another {key} would be taken for its own. "
            "Add it to the stage's parameters in stages/__init__.py."
        )


class _Masked(DictConfig):
    """A node that holds what may be read; reading what it ``hides`` is refused."""

    def __init__(self, shown: dict[str, Any], hidden: Iterable[str], stage: str, prefix: str) -> None:
        super().__init__({})
        content: dict[Any, Any] = vars(self)["_content"]
        for key, node in shown.items():
            node._set_parent(self)
            content[key] = node
        vars(self)["_hides"] = (frozenset(hidden), stage, prefix)
        self._set_flag("readonly", True)

    def _get_node(self, key: Any, *args: Any, **options: Any) -> Any:
        hidden, stage, prefix = vars(self).get("_hides", ((), "", ""))
        if key in hidden:
            raise UndeclaredRead.of(stage, f"{prefix}{key}")
        return super()._get_node(key, *args, **options)

    def _format_and_raise(self, key: Any, value: Any, cause: Exception, *args: Any, **options: Any) -> None:
        if isinstance(cause, UndeclaredRead):
            raise cause
        super()._format_and_raise(key, value, cause, *args, **options)


def masked(config: DictConfig, stage: Stage, also: Iterable[str] = ()) -> DictConfig:
    """``config``, read-only, as ``stage`` may read it: its ``parameters``, ``also`` and :data:`RUN_WIDE`.

    A node's name stands for all below it. Attributes, items, ``get``, ``in`` and ``OmegaConf.select`` refuse the rest
    with :class:`UndeclaredRead`, which names stage and key; iterating shows what may be read.
    """
    return _masked(config, {*stage.parameters, *also, *RUN_WIDE}, stage.name, "")


def _masked(node: DictConfig, declared: set[str], stage: str, prefix: str) -> DictConfig:
    shown, hidden = {}, []
    for key in node:
        full, below = f"{prefix}{key}", node._get_node(key)
        if full in declared:
            shown[key] = copy.deepcopy(below)
        elif isinstance(below, DictConfig) and any(name.startswith(f"{full}.") for name in declared):
            shown[key] = _masked(below, declared, stage, f"{full}.")
        else:
            hidden.append(str(key))
    return _Masked(shown, hidden, stage, prefix)
