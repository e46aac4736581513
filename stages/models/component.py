"""One model of a checkpoint: its stock class made on ``meta``, and whether its tensors are the ones that it takes."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from stages.memory.copies import skip_copies
from stages.memory.ggml import READABLE
from stages.memory.imports import light_imports
from stages.memory.refs import FLOATS, TensorRef
from stages.memory.tensors import read_tensor
from stages.models.locate import CheckpointError
from stages.models.positions import CROPPED, keep_in_file, tables_unmade

_OTHERS = ("text_projection", "logit_scale", "vision_model.", "visual_projection.", "lm_head.")  # than text encoders'
_PREFIXES = ("text_model.", "model.")


@dataclass(frozen=True, kw_only=True)
class Component:
    """One model of a checkpoint. ``tensors`` are named as ``build()``'s ``state_dict()`` names them."""

    name: str
    class_name: str
    config: dict[str, Any] = field(repr=False)
    tensors: dict[str, TensorRef] = field(repr=False)
    identities: tuple[str, ...] = ()  # modules that its file has no weights of, because they do nothing
    controlnets: tuple[Component, ...] = ()  # that run in its pass: children of its network
    condition_shift: float = 0.0  # of a ControlNet: what is added to the latents that it is shown

    @property
    def every_tensor(self) -> dict[str, TensorRef]:
        """Those of the ControlNets too, as ``build()``'s parameters are named."""
        found = dict(self.tensors)
        for number, one in enumerate(self.controlnets):
            found |= {f"controlnets.{number}.{name}": ref for name, ref in one.tensors.items()}
        return found

    def build(self, *, optional: Iterable[str] = ()) -> nn.Module:
        """The stock diffusers or transformers model, parameters on ``meta``, buffers real; eval, no gradients.

        ``optional``: name prefixes that may be missing from the file (``("encoder.",)`` of a VAE that only decodes).
        CheckpointError when names or shapes differ from the file's.
        """
        model = construct(self.class_name, self.config)
        for name in self.identities:
            model.set_submodule(name, nn.Identity())
        wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        missing = [name for name in wanted if name not in self.tensors and not name.startswith(tuple(optional))]
        unexpected = [name for name in self.tensors if name not in wanted]
        shapes = [
            f"{name}: file {list(self.tensors[name].shape)}, model {list(shape)}"
            for name, shape in wanted.items()
            if name in self.tensors and self.tensors[name].shape != shape
        ]
        if self.tensors and not self.tensors.keys() & wanted.keys():
            first, ref = next(iter(self.tensors.items()))
            raise CheckpointError(
                f"{self.name}: got {ref.file} with {len(self.tensors)} tensors such as {first}, expected those of a "
                f"{self.class_name}, in its original layout or as diffusers names them."
            )
        kinds = [
            f"{name} {self.tensors[name].kind}"
            for name, tensor in model.state_dict().items()
            if name in self.tensors and tensor.is_floating_point() and not self.tensors[name].readable
        ]
        if kinds:
            raise CheckpointError(
                f"{self.name}: {len(kinds)} tensors of a kind that is not read here ({some(kinds)}); expected one of "
                f"{', '.join((*FLOATS, *READABLE))}. Take the model in another format."
            )
        wrong = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
        if any(wrong.values()):
            text = "; ".join(f"{len(v)} {k} ({some(v)})" for k, v in wrong.items() if v)
            raise CheckpointError(
                f"{self.name}: the weights do not fit the config of its {self.class_name}: {text}. If the model is not "
                "of a stock size, give a diffusers folder with its configs (weights are not needed): model.config=DIR."
            )
        for name, buffer in model.named_buffers():  # persistent ones (few and small) come from the file
            if name in self.tensors and not buffer.is_meta:
                buffer.copy_(read_tensor(self.tensors[name]))
        if self.class_name in CROPPED:
            keep_in_file(model, self.tensors)
        if self.controlnets:
            model.controlnets = nn.ModuleList([one.build() for one in self.controlnets])
            net: Any
            for net, one in zip(model.controlnets, self.controlnets, strict=True):
                net.condition_shift = one.condition_shift
        return skip_copies(model.eval().requires_grad_(False))


def construct(class_name: str, config: dict[str, Any]) -> nn.Module:
    """An instance of a stock class, its parameters on ``meta``. The class is looked up by name in its library.

    Raises:
        CheckpointError: no such class, or a config that it cannot be made from.
    """
    try:
        return _constructed(class_name, config)
    except (CheckpointError, ImportError):
        raise
    except Exception as error:  # of whatever kind: the values in a config are anybody's
        said = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]:.200}"
        raise CheckpointError(
            f"{class_name}: cannot be made from its config ({said}); expected that of a stock model. Download it again."
        ) from error


def _constructed(class_name: str, config: dict[str, Any]) -> nn.Module:
    library = "diffusers" if "_class_name" in config else "transformers"
    with light_imports(library):
        from accelerate import init_empty_weights

        model_class = getattr(importlib.import_module(library), class_name, None)
    if model_class is None:
        raise CheckpointError(f"{library} has no class {class_name}, which the checkpoint's config names.")
    if library == "diffusers":
        with init_empty_weights(), tables_unmade() if class_name in CROPPED else nullcontext():
            return model_class.from_config(config)
    from transformers.initialization import no_init_weights

    described = model_class.config_class.from_dict(config)
    with init_empty_weights(), no_init_weights():  # random numbers for a meta tensor would import torch._dynamo
        return model_class(described)


def renamed(model: nn.Module, tensors: dict[str, TensorRef]) -> dict[str, TensorRef]:
    """Names of older files to those of the installed classes, as the libraries themselves do when they load.

    diffusers: VAE attention ``query/key/value/proj_attn``. transformers: the ``text_model.`` prefix, which came and
    went, ``model.`` of a language model with its head, and ``position_ids``, once saved and now made. Of a whole CLIP
    or language model, what is not the text encoder's is left out, and so is what nothing uses and nobody can read.
    """
    names = model.state_dict()
    found: dict[str, TensorRef] = {}
    for name, ref in tensors.items():
        odd = name.endswith("position_ids") or name.startswith(_OTHERS) or ref.blocks not in ("", *READABLE)
        if name not in names and odd:
            continue
        others = [name, *(name.removeprefix(prefix) for prefix in _PREFIXES), *(prefix + name for prefix in _PREFIXES)]
        own = next((other for other in others if other in names), name)
        found[own] = _with_ones(ref, tuple(names[own].shape)) if own in names else ref
    tied = getattr(model, "_tied_weights_keys", None)
    for pair in tied.items() if isinstance(tied, dict) else ():
        for name, other in (pair, pair[::-1]):
            if name in names and name not in found and other in found:
                found[name] = found[other]
    fix = getattr(model, "_fix_state_dict_keys_on_load", None)
    if fix is not None:  # moves keys only, so it works on references as on tensors
        fix(found)
    return found


def _with_ones(ref: TensorRef, shape: tuple[int, ...]) -> TensorRef:
    """``ref`` in ``shape``, if they differ by sides of 1 in front: GGML forgets those."""
    own, wanted = (next((n for n, side in enumerate(s) if side != 1), len(s)) for s in (ref.shape, shape))
    same = ref.shape != shape and ref.shape[own:] == shape[wanted:]
    return (ref.piece(0, shape) or ref) if same else ref


def some(names: list[str], count: int = 4) -> str:
    """The first of many names."""
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
