"""Single files in the original layout of Stable Diffusion, SDXL, SD 3 and FLUX, without loading them.

diffusers' own converters run on ``meta`` tensors made from the file's header. They only rename, slice, reshape,
transpose and join rows, so each tensor that they return is made of views of those in the file, and their storage and
offset tell where the bytes lie.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from stages.memory.imports import light_imports
from stages.memory.refs import TensorRef
from stages.memory.tensors import read_header
from stages.models.locate import CheckpointError
from stages.models.originals import PREFIXES, UNET, bare, original_of
from stages.models.scales import with_scales
from stages.paths import local_path

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

CONFIGS = Path(__file__).parent / "configs"
CLIP = "cond_stage_model.transformer."  # Stable Diffusion 1.x
OPEN_CLIP = "cond_stage_model.model."  # Stable Diffusion 2.x
SDXL_CLIPS = ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model.")
VAE = ("first_stage_model.", "vae.")
TEXT = "text_encoders.{}.transformer."  # of transformers' own names, in files of everything
CLIP_L, CLIP_G, T5 = (TEXT.format(name) for name in ("clip_l", "clip_g", "t5xxl"))
CLIP_VOCABULARY = "openai/clip-vit-large-patch14"  # of both: 2.x only pads with "!" (id 0) instead of the end token

SD3 = "SD3Transformer2DModel"

Tensors = dict[str, torch.Tensor]


class SingleFile:
    """One file: its header and the diffusers folder that describes its components, and holds those that it lacks."""

    def __init__(self, path: Path, refs: dict[str, TensorRef], layout: str, config_folder: Path) -> None:
        self.path = path
        self.refs = refs
        self.layout = layout  # sd15 | sd21 | sdxl, by the text encoders' names, else the denoiser's class
        self.config_folder = config_folder

    @classmethod
    def open(cls, path: Path, *, config: str | None = None) -> SingleFile:
        """Read the header of ``path``. ``config``: a diffusers folder to describe it; None: the built-in one.

        CheckpointError for a file without a denoiser (a LoRA, a lone VAE), one that lacks components and has no folder
        for them, or an inpainting model.
        """
        refs = with_scales(read_header(path))
        layout = _layout(path, refs, config)
        folder = CONFIGS / layout if config is None else local_path(config)
        if folder is None or not any((folder / name / "config.json").is_file() for name in ("unet", "transformer")):
            raise CheckpointError(
                f"model.config: got {config!r}, expected a diffusers folder with unet/config.json or "
                "transformer/config.json, vae/config.json, text_encoder/config.json and "
                "scheduler/scheduler_config.json."
            )
        return cls(path, refs, layout, folder)

    def holds(self, name: str) -> bool:
        """Whether component ``name`` is in the file."""
        return any(key.startswith(self._prefixes(name)) for key in self.refs) or self._lone(name)

    def _lone(self, name: str) -> bool:
        return name in ("unet", "transformer") and original_of(self.refs) is not None

    def _prefixes(self, name: str) -> tuple[str, ...]:
        """What the names of a component's tensors begin with."""
        if name in ("unet", "transformer"):
            return PREFIXES
        part = PARTS.get(self.layout, {}).get(name)
        return VAE if name == "vae" else (part.prefix,) if part else ()

    def tensors(self, name: str, class_name: str, config: dict[str, Any]) -> dict[str, TensorRef]:
        """The tensors of component ``name`` under their diffusers (transformers) names, located in the file."""
        if name in ("unet", "transformer"):
            return denoiser_tensors(self.path, self.refs, class_name, config)
        own = {key: ref for key, ref in self.refs.items() if key.startswith(self._prefixes(name))}
        part = Part("", converted_vae) if name == "vae" else PARTS[self.layout][name]
        if part.convert is None:
            return {key.removeprefix(part.prefix): ref for key, ref in own.items()}
        return relocate(own, partial(part.convert, config=config), self.path)

    def identities(self, name: str) -> tuple[str, ...]:
        """Modules of a component that do nothing: SD 3 takes the first CLIP's pooled states as they are."""
        return ("text_projection",) if (self.layout, name) == (SD3, "text_encoder") else ()

    def tokenizer(self, name: str) -> CLIPTokenizer:
        """CLIP's tokenizer from the hub or its cache: a single file does not hold the vocabulary."""
        with light_imports("transformers"):
            from transformers import CLIPTokenizer

        pad: dict[str, Any] = {"pad_token": "!"} if self.layout == "sd21" or name == "tokenizer_2" else {}
        try:
            return CLIPTokenizer.from_pretrained(CLIP_VOCABULARY, **pad)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.path}: a single file has no tokenizer, and {CLIP_VOCABULARY} is neither in the local cache nor "
                f"was it given by the hub. Get it once with: hf download {CLIP_VOCABULARY} vocab.json merges.txt "
                "tokenizer_config.json; or give a diffusers folder with tokenizer/ in it: model.config=DIR."
            ) from error


class _Views(TorchFunctionMode):
    """Copies stay views: on ``meta`` there is nothing to copy, and a copy would forget its place in the file.

    ``joined``: tensors that were put together, by their storage: (the result, of what).
    """

    def __init__(self) -> None:
        super().__init__()
        self.joined: dict[Any, tuple[torch.Tensor, Sequence[torch.Tensor]]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.clone, torch.Tensor.contiguous):
            return args[0]
        if func is torch.cat:
            return self._cat(*args, **(kwargs or {}))
        if func in (torch.split, torch.Tensor.split):
            args = (args[0], _in_proportion(args[1], len(args[0])), *args[2:])
        return func(*args, **(kwargs or {}))

    def _cat(self, tensors: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
        if len(tensors) == 1:
            return tensors[0]
        first, rows = tensors[0], sum(len(tensor) for tensor in tensors)
        made = torch.empty((rows, *first.shape[1:]), dtype=first.dtype, device="meta")
        if dim == 0:  # else it is found in no place
            self.joined[made.untyped_storage()._cdata] = made, tensors
        return made


def _in_proportion(sizes: Any, rows: int) -> Any:
    """diffusers' sizes are those of the usual width; ``rows`` may be of another."""
    total = sum(sizes) if isinstance(sizes, (tuple, list)) else rows
    return sizes if total == rows else [size * rows // total for size in sizes]


def relocate(refs: Mapping[str, TensorRef], convert: Callable[[Tensors], Tensors], path: Path) -> dict[str, TensorRef]:
    """Where the tensors that ``convert`` makes of the file's lie. CheckpointError if one is not made of whole pieces of
    the file, or if the file lacks what ``convert`` asks for."""
    metas = {name: torch.empty(ref.shape, dtype=ref.dtype, device="meta") for name, ref in refs.items()}
    origin = {meta.untyped_storage()._cdata: refs[name] for name, meta in metas.items()}
    views = _Views()
    try:
        with views:
            converted = convert(dict(metas))
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: not a whole model in the original layout: {type(error).__name__}: {error}. Download it again."
        ) from error

    def place(view: torch.Tensor) -> TensorRef | None:
        storage = view.untyped_storage()._cdata
        transposed = view.dim() == 2 and not view.is_contiguous() and view.t().is_contiguous()
        if storage in views.joined:
            made, tensors = views.joined[storage]
            parts = tuple(place(tensor) for tensor in tensors)
            if None in parts or view.shape != made.shape:
                return None
            return parts[0]._replace(shape=tuple(view.shape), parts=parts)  # type: ignore[union-attr,arg-type]
        ref = origin.get(storage)
        if ref is None or not (view.is_contiguous() or transposed) or view.dtype != ref.dtype:
            return None
        return ref.piece(int(view.storage_offset()), tuple(view.shape), transposed=transposed)

    placed = {name: place(view) for name, view in converted.items()}
    for name, ref in placed.items():
        if ref is None:
            raise CheckpointError(
                f"{path}: {name} is not made of whole pieces of the file, so it cannot be read in place. "
                "Convert the file to a diffusers folder: "
                'python -c "from diffusers import DiffusionPipeline as P; '
                f"P.from_single_file({str(path)!r}).save_pretrained('converted')\"  and then model.path=converted"
            )
    return placed  # type: ignore[return-value]


def denoiser_tensors(
    path: Path, refs: Mapping[str, TensorRef] | None, class_name: str, config: dict[str, Any]
) -> dict[str, TensorRef]:
    """A denoiser's tensors under their diffusers names, of a file in its original layout or in diffusers'.

    ``refs``: of the file, if its header has been read.

    Raises:
        CheckpointError: another denoiser than ``class_name``.
    """
    refs = with_scales(read_header(path)) if refs is None else refs
    own = {name: ref for name, ref in refs.items() if name.startswith(PREFIXES)} or refs
    original = original_of(own)
    if original is None:
        return {bare(name): ref for name, ref in own.items()}
    if original.class_name != class_name:
        raise CheckpointError(
            f"{path}: holds a {original.class_name}, expected a {class_name}, as the other components are of one. "
            "Give the model.path that belongs to it."
        )
    from diffusers.loaders import single_file_utils

    converter, prefix = getattr(single_file_utils, original.converter), UNET if class_name.startswith("UNet") else ""
    own = {prefix + bare(name): ref for name, ref in own.items()}
    return relocate(own, partial(converter, config=config), path)


def _layout(path: Path, refs: Mapping[str, TensorRef], config: str | None) -> str:
    def has(*prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in refs)

    sdxl, original = all(has(prefix) for prefix in SDXL_CLIPS), original_of(refs)
    first = f"(first key: {min(refs, default='none')})"
    if original is None and not has(UNET):
        raise CheckpointError(f"{path}: no denoiser in it {first}; expected a checkpoint in the original layout.")
    parts = {"VAE": has(*VAE), "text encoder": sdxl or has(CLIP, OPEN_CLIP, CLIP_L, CLIP_G, T5)}
    missing = ", ".join(part for part, there in parts.items() if not there)
    if missing and config is None:
        raise CheckpointError(
            f"{path}: no {missing} in it {first}. What a file lacks has to come from a diffusers folder: "
            "model.path=FOLDER model.denoiser=FILE, or model.path=FILE model.config=FOLDER."
        )
    if config is None and not (sdxl or has(CLIP, OPEN_CLIP)):
        raise CheckpointError(
            f"{path}: a single file has no configs and no tokenizers, and those of its family are not built in: give a "
            "diffusers folder with them (weights are not needed): model.config=FOLDER."
        )
    conv_in = refs.get(f"{UNET}input_blocks.0.0.weight")
    if conv_in is not None and conv_in.shape[1] != 4:
        raise CheckpointError(
            f"{path}: its UNet takes {conv_in.shape[1]} channels (an inpainting, depth or image-variation model), "
            "expected 4: give a text-to-image checkpoint as model.path."
        )
    if sdxl or has(CLIP, OPEN_CLIP):
        return "sdxl" if sdxl else "sd15" if has(CLIP) else "sd21"
    return original.class_name if original else ""


def converted_vae(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """Under diffusers' names."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    return convert_ldm_vae_checkpoint(tensors, config)


def _sd2_clip(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """Its output projection is not of a CLIPTextModel, and the last block is not used: 2.x stops one block earlier."""
    kept = {name: tensor for name, tensor in tensors.items() if name != f"{OPEN_CLIP}text_projection"}
    last = f"text_model.encoder.layers.{config['num_hidden_layers']}."
    converted = _open_clip(kept, config, OPEN_CLIP)
    return {name: tensor for name, tensor in converted.items() if not name.startswith(last)}


def _open_clip(tensors: Tensors, config: dict[str, Any], prefix: str = SDXL_CLIPS[1]) -> Tensors:
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    model = SimpleNamespace(config=SimpleNamespace(**config))  # the converter only asks for its hidden size
    return convert_open_clip_checkpoint(model, tensors, prefix=prefix)


class Part(NamedTuple):
    """Of a text encoder: what its names begin with, and what turns them into transformers' own; None: they are."""

    prefix: str
    convert: Callable[..., Tensors] | None = None


PARTS: Mapping[str, Mapping[str, Part]] = {
    "sd15": {"text_encoder": Part(CLIP)},
    "sd21": {"text_encoder": Part(OPEN_CLIP, _sd2_clip)},
    "sdxl": {"text_encoder": Part(SDXL_CLIPS[0]), "text_encoder_2": Part(SDXL_CLIPS[1], _open_clip)},
    SD3: {"text_encoder": Part(CLIP_L), "text_encoder_2": Part(CLIP_G), "text_encoder_3": Part(T5)},
    "FluxTransformer2DModel": {"text_encoder": Part(CLIP_L), "text_encoder_2": Part(T5)},
}
