"""Write a checkpoint of random weights with the shapes of a published one, for benchmarks and tests.

    python benchmarks/random_checkpoint.py sd15 DIR                       # a diffusers folder, fp16, full size (2.1 GB)
    python benchmarks/random_checkpoint.py sd21 DIR --layout both         # and the same weights as DIR/sd21.safetensors
    python benchmarks/random_checkpoint.py sd15_controlnet DIR            # for its UNet: DIR is model.controlnets' path
    python benchmarks/random_checkpoint.py flux DIR                       # bf16, 33.8 GB
    python benchmarks/random_checkpoint.py flux DIR --layers transformer=2,text_encoder_2=4      # full width, 4.1 GB
    python benchmarks/random_checkpoint.py flux DIR --holes               # for stage=plan: zeros that take no disk
    python benchmarks/random_checkpoint.py sd15 DIR --small --dtype fp32  # tiny channel counts, for tests

Tensors are drawn and written one piece at a time, so the memory needed does not grow with the model. The weights of a
tensor depend on its name and the seed alone, so both layouts and both dtypes hold the same numbers. The scale of the
weights keeps activations finite in fp16; the pictures are noise.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks._checkpoint_configs import CONTROLNETS, KINDS, Configs, configs, scheduler_config
from benchmarks._checkpoint_tokenizers import write_tokenizer
from benchmarks.original_layout import Entry, Spec, entries_of
from stages.files import atomic_path, write_json
from stages.models.component import construct

DTYPES = {"fp16": (torch.float16, "F16"), "bf16": (torch.bfloat16, "BF16"), "fp32": (torch.float32, "F32")}
PIECE = 1 << 22  # numbers drawn at a time: 16 MB
SINGLE = ("sd15", "sd21", "sdxl", *CONTROLNETS)  # whose original layout is written too
PIPELINES: dict[str, dict[str, Any]] = {
    "sd15": {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False},
    "sd21": {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False},
    "sdxl": {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True},
    "sd3": {"_class_name": "StableDiffusion3Pipeline"},
    "flux": {"_class_name": "FluxPipeline"},
    "flux2_klein": {"_class_name": "Flux2KleinPipeline", "is_distilled": True},
    "z_image": {"_class_name": "ZImagePipeline"},
}
NOTHING = {  # what published folders name and leave out
    "sd15": ("safety_checker", "feature_extractor", "image_encoder"),
    "sd21": ("safety_checker", "feature_extractor", "image_encoder"),
    "sdxl": ("feature_extractor", "image_encoder"),
}
INTEGERS = ("position_ids", "num_batches_tracked")
# the last layer of a residual branch: small, so that the sum over many blocks stays near its start
RESIDUAL = re.compile(
    r"(conv2|to_out\.0|to_add_out|net\.2|proj_out|out_proj|fc2|[.]wo|[.]o|o_proj|down_proj|w2)\.weight$"
)


def numbers(spec: Spec, seed: int, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """The numbers of a tensor, in flat pieces of at most ``PIECE``."""
    count = math.prod(spec.shape)
    if spec.name.endswith(INTEGERS):
        yield torch.arange(count)
        return
    generator = torch.Generator().manual_seed(zlib.crc32(spec.name.encode()) + seed)
    norm = len(spec.shape) == 1 and spec.name.endswith((".weight", "running_var"))
    std = 0.02 if norm or spec.name.endswith((".bias", "running_mean")) else scale(spec)
    for start in range(0, count, PIECE):
        piece = torch.randn(min(PIECE, count - start), generator=generator).mul_(std)
        yield (piece.add_(1.0) if norm else piece).to(dtype)


def scale(spec: Spec) -> float:
    """The standard deviation of a weight: 1/sqrt(inputs), less where a residual branch ends."""
    if spec.name.endswith(("embedding.weight", "shared.weight", "embed_tokens.weight")):
        return 0.02
    return (0.3 if RESIDUAL.search(spec.name) else 1.0) / math.sqrt(math.prod(spec.shape[1:]))


def specs(name: str, config: dict[str, Any]) -> list[Spec]:
    """The tensors of a component, named as published diffusers folders name them; one under two names is there once."""
    kind = config.get("_class_name") or config["architectures"][0]
    model: Any = construct(kind, config)
    tied = getattr(model, "_tied_weights_keys", None) or ()
    prefix = "text_model." if kind == "CLIPTextModel" and name == "text_encoder" else ""
    return [
        Spec(f"{name}/{prefix}{key.removeprefix('text_model.') if prefix else key}", tuple(tensor.shape))
        for key, tensor in model.state_dict().items()
        if key not in tied
    ]


def write_safetensors(path: Path, entries: list[Entry], dtype: str, seed: int, *, holes: bool = False) -> None:
    """Stream ``entries`` into a safetensors file (https://github.com/huggingface/safetensors#format).

    ``holes``: the header alone is written, behind it a hole of the right size.
    """
    torch_dtype, code = DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        integer = entry.name.endswith(INTEGERS)
        start, end = end, end + math.prod(entry.shape) * (8 if integer else torch_dtype.itemsize)
        header[entry.name] = {
            "dtype": "I64" if integer else code,
            "shape": list(entry.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        if holes:
            file.truncate(8 + len(text) + end)
            return
        for entry in entries:
            for spec in entry.specs:
                for piece in numbers(spec, seed, torch_dtype):
                    file.write(piece.view(torch.uint8).numpy())


def write_small_files(folder: Path, kind: str, found: Configs) -> None:
    """model_index.json, scheduler, configs, and tokenizers whose ids the text encoders know."""
    scheduler = scheduler_config(kind)
    classes = {"scheduler": ["diffusers", scheduler["_class_name"]]}
    for name, config in found.items():
        if "encoder" in name:
            classes[name] = ["transformers", config["architectures"][0]]
            tokenizer = name.replace("text_encoder", "tokenizer")
            pad = "!" if kind == "sd21" or name.endswith("2") else "<|endoftext|>"
            classes[tokenizer] = ["transformers", write_tokenizer(folder / tokenizer, config, pad)]
        else:
            classes[name] = ["diffusers", config["_class_name"]]
        write_json(folder / name / "config.json", config)
    nothing = {name: [None, None] for name in NOTHING.get(kind, ())}
    write_json(folder / "model_index.json", {**PIPELINES[kind], **classes, **nothing})
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)


def depths(text: str) -> dict[str, int]:
    """``transformer=2,text_encoder_2=4`` as {component: layers}."""
    return {name: int(count) for name, _, count in (part.partition("=") for part in text.split(",") if part)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("kind", choices=(*KINDS, *CONTROLNETS))
    parser.add_argument("dir", type=Path, metavar="DIR", help="where the diffusers folder is written")
    parser.add_argument("--layout", choices=("folder", "single", "both"), default="folder")
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), help="default: bf16 for flux, flux2_klein, z_image; else fp16"
    )
    parser.add_argument("--small", action="store_true", help="tiny channel counts, for tests")
    parser.add_argument(
        "--layers", type=depths, default={}, metavar="COMPONENT=N,...", help="blocks of each sort, at most"
    )
    parser.add_argument("--holes", action="store_true", help="zeros that take no disk, to plan with")
    parser.add_argument("--variant", default="", help="in the folder's file names, as in fp16")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.layout != "folder" and options.kind not in SINGLE:
        parser.error(f"--layout: got {options.layout}, expected folder for {options.kind}")
    dtype = options.dtype or ("bf16" if options.kind in ("flux", "flux2_klein", "z_image") else "fp16")
    found = configs(options.kind, small=options.small, layers=options.layers)
    every = {name: specs(name, config) for name, config in found.items()}
    if options.kind in CONTROLNETS:
        write_json(options.dir / "config.json", found["controlnet"])
    else:
        write_small_files(options.dir, options.kind, found)  # a single file needs its configs and its tokenizer too
    how: dict[str, Any] = {"dtype": dtype, "seed": options.seed, "holes": options.holes}
    if options.layout != "single":
        for name in found:
            base = "model" if "encoder" in name else "diffusion_pytorch_model"
            entries = [Entry(spec.name.partition("/")[2], spec.shape, (spec,)) for spec in every[name]]
            variant = f".{options.variant}" if options.variant else ""
            folder = options.dir if options.kind in CONTROLNETS else options.dir / name
            write_safetensors(folder / f"{base}{variant}.safetensors", entries, **how)
    if options.layout != "folder":
        path = options.dir / f"{options.kind}.safetensors"
        write_safetensors(path, entries_of(options.kind, every, found), **how)
    count = sum(math.prod(spec.shape) for component in every.values() for spec in component)
    print(f"{options.dir}: {options.kind}, {dtype}, {count:,} weights")


if __name__ == "__main__":
    main()
