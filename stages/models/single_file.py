"""Single ``.safetensors`` files in the original layout of Stable Diffusion 1.x, 2.x and SDXL, without loading them.

diffusers' own converters run on ``meta`` tensors made from the file's header. They only rename, slice, reshape and
transpose, so each tensor that they return is a view of one in the file, and its storage and offset tell where its
bytes lie.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from stages.memory.imports import light_imports
from stages.memory.tensors import TensorRef, read_header
from stages.models.locate import CheckpointError
from stages.paths import local_path

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

CONFIGS = Path(__file__).parent / "configs"
CLIP = "cond_stage_model.transformer."  # Stable Diffusion 1.x
OPEN_CLIP = "cond_stage_model.model."  # Stable Diffusion 2.x
SDXL_CLIPS = ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model.")
UNET = "model.diffusion_model."
VAE = ("first_stage_model.", "vae.")
CLIP_VOCABULARY = "openai/clip-vit-large-patch14"  # of both: 2.x only pads with "!" (id 0) instead of the end token

Converter = Callable[[dict[str, torch.Tensor], dict[str, Any]], dict[str, torch.Tensor]]


class SingleFile:
    """One file: its header and the diffusers folder (without weights) that describes its components."""

    def __init__(self, path: Path, refs: dict[str, TensorRef], family: str, config_folder: Path) -> None:
        self.path = path
        self.refs = refs
        self.family = family  # sd15 | sd21 | sdxl, by the text encoders' layout
        self.config_folder = config_folder

    @classmethod
    def open(cls, path: Path, *, config: str | None = None) -> SingleFile:
        """Read the header of ``path``. ``config``: a diffusers folder to describe it; None: the built-in one.

        CheckpointError for another layout (SDXL's refiner, Flux, a lone UNet or LoRA) or an inpainting model.
        """
        refs = read_header(path)
        family = _family(path, refs)
        folder = CONFIGS / family if config is None else local_path(config)
        if folder is None or not (folder / "unet" / "config.json").is_file():
            raise CheckpointError(
                f"model.config: got {config!r}, expected a diffusers folder with unet/config.json, vae/config.json, "
                "text_encoder/config.json and scheduler/scheduler_config.json."
            )
        return cls(path, refs, family, folder)

    def tensors(self, name: str, config: dict[str, Any]) -> dict[str, TensorRef]:
        """The tensors of component ``name`` under their diffusers (transformers) names, located in the file."""
        converters: dict[str, Converter] = {"unet": _unet, "vae": _vae, "text_encoder": _text_encoder}
        if self.family == "sdxl":
            converters["text_encoder_2"] = _text_encoder_2
        if name not in converters:
            raise CheckpointError(f"{self.path}: no component {name}; it has {', '.join(converters)}.")
        return relocate(self.refs, lambda tensors: converters[name](tensors, config), self.path)

    def tokenizer(self, name: str) -> CLIPTokenizer:
        """CLIP's tokenizer from the hub or its cache: a single file does not hold the vocabulary."""
        with light_imports("transformers"):
            from transformers import CLIPTokenizer

        pad: dict[str, Any] = {"pad_token": "!"} if self.family == "sd21" or name == "tokenizer_2" else {}
        try:
            return CLIPTokenizer.from_pretrained(CLIP_VOCABULARY, **pad)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.path}: a single file has no tokenizer, and {CLIP_VOCABULARY} is neither in the local cache nor "
                f"was it given by the hub. Get it once with: hf download {CLIP_VOCABULARY} vocab.json merges.txt "
                "tokenizer_config.json; or give a diffusers folder with tokenizer/ in it: model.config=DIR."
            ) from error


class _Views(TorchFunctionMode):
    """Copies stay views: on ``meta`` there is nothing to copy, and a copy would forget its place in the file."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.clone, torch.Tensor.contiguous):
            return args[0]
        return func(*args, **(kwargs or {}))


def relocate(
    refs: dict[str, TensorRef], convert: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], path: Path
) -> dict[str, TensorRef]:
    """Where the tensors that ``convert`` makes of the file's lie. CheckpointError if one is not a piece of the file."""
    metas = {name: torch.empty(ref.shape, dtype=ref.dtype, device="meta") for name, ref in refs.items()}
    origin = {meta.untyped_storage()._cdata: refs[name] for name, meta in metas.items()}
    with _Views():
        converted = convert(dict(metas))
    placed: dict[str, TensorRef] = {}
    for name, view in converted.items():
        ref = origin.get(view.untyped_storage()._cdata)
        transposed = view.dim() == 2 and not view.is_contiguous() and view.t().is_contiguous()
        if ref is None or not (view.is_contiguous() or transposed) or view.dtype != ref.dtype:
            raise CheckpointError(
                f"{path}: {name} is not a contiguous piece of one tensor of the file, so it cannot be read in place. "
                "Convert the file to a diffusers folder: "
                'python -c "from diffusers import DiffusionPipeline as P; '
                f"P.from_single_file({str(path)!r}).save_pretrained('converted')\"  and then model.path=converted"
            )
        offset = ref.offset + int(view.storage_offset()) * ref.dtype.itemsize
        placed[name] = TensorRef(ref.file, offset, ref.dtype, tuple(view.shape), transposed)
    return placed


def _family(path: Path, refs: dict[str, TensorRef]) -> str:
    def has(*prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in refs)

    expected = "expected a checkpoint of Stable Diffusion 1.x, 2.x or SDXL with UNet, VAE and text encoders in it"
    sdxl = all(has(prefix) for prefix in SDXL_CLIPS)
    parts = {"UNet": has(UNET), "VAE": has(*VAE), "text encoder": sdxl or has(CLIP, OPEN_CLIP)}
    if not all(parts.values()):
        missing = ", ".join(part for part, there in parts.items() if not there)
        raise CheckpointError(f"{path}: no {missing} in it (first key: {min(refs, default='none')}); {expected}.")
    conv_in = refs.get(f"{UNET}input_blocks.0.0.weight")
    if conv_in is not None and conv_in.shape[1] != 4:
        raise CheckpointError(
            f"{path}: its UNet takes {conv_in.shape[1]} channels (an inpainting, depth or image-variation model), "
            "expected 4: give a text-to-image checkpoint as model.path."
        )
    return "sdxl" if sdxl else "sd15" if has(CLIP) else "sd21"


def _unet(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    return convert_ldm_unet_checkpoint({k: v for k, v in tensors.items() if k.startswith(UNET)}, config)


def _vae(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    return convert_ldm_vae_checkpoint({k: v for k, v in tensors.items() if k.startswith(VAE)}, config)


def _text_encoder(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint, convert_open_clip_checkpoint

    if any(name.startswith((CLIP, SDXL_CLIPS[0])) for name in tensors):
        return convert_ldm_clip_checkpoint(tensors)
    model = SimpleNamespace(config=SimpleNamespace(**config))  # the converter only asks for its hidden size
    # Its output projection is not of a CLIPTextModel, and the last block is not used: 2.x stops one block earlier.
    kept = {k: v for k, v in tensors.items() if k != f"{OPEN_CLIP}text_projection"}
    converted = convert_open_clip_checkpoint(model, kept, prefix=OPEN_CLIP)
    last = f"text_model.encoder.layers.{config['num_hidden_layers']}."
    return {k: v for k, v in converted.items() if not k.startswith(last)}


def _text_encoder_2(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    model = SimpleNamespace(config=SimpleNamespace(**config))
    return convert_open_clip_checkpoint(model, tensors, prefix=SDXL_CLIPS[1])
