"""The layouts that authors publish their denoisers in, in single files and GGUF files. No torch.

A new one is a line here: diffusers' own function knows the names.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

UNET = "model.diffusion_model."  # before a denoiser's names in a file of everything
PREFIXES = (UNET, "diffusion_model.")


class Original(NamedTuple):
    """One layout: of the stock class ``class_name``, known by the tensor ``mark``, read by ``converter``, a function of
    ``diffusers.loaders.single_file_utils``."""

    class_name: str
    mark: str
    converter: str


ORIGINALS = (
    Original("UNet2DConditionModel", "input_blocks.0.0.weight", "convert_ldm_unet_checkpoint"),
    Original(
        "FluxTransformer2DModel",
        "double_blocks.0.img_mod.lin.weight",
        "convert_flux_transformer_checkpoint_to_diffusers",
    ),
    Original(
        "Flux2Transformer2DModel",
        "double_stream_modulation_img.lin.weight",
        "convert_flux2_transformer_checkpoint_to_diffusers",
    ),
    Original(
        "SD3Transformer2DModel",
        "joint_blocks.0.x_block.attn.qkv.weight",
        "convert_sd3_transformer_checkpoint_to_diffusers",
    ),
    Original(
        "ZImageTransformer2DModel",
        "layers.0.attention.k_norm.weight",
        "convert_z_image_transformer_checkpoint_to_diffusers",
    ),
)


def bare(name: str) -> str:
    """The name of a denoiser's tensor without what stands before it in some files."""
    prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
    return name[len(prefix) :]


def original_of(names: Collection[str]) -> Original | None:
    """The layout of a file's denoiser; None where it has another, diffusers' own or none."""
    known = set(map(bare, names))
    return next((original for original in ORIGINALS if original.mark in known), None)
