"""Write a checkpoint of random weights with the shapes of Stable Diffusion 1.5, 2.1 or SDXL, for benchmarks and tests.

    python benchmarks/random_checkpoint.py sd15 DIR                       # a diffusers folder, fp16, full size (2.1 GB)
    python benchmarks/random_checkpoint.py sd21 DIR --layout both         # and the same weights as DIR/sd21.safetensors
    python benchmarks/random_checkpoint.py sdxl DIR                       # 6.9 GB
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
from benchmarks.original_layout import Entry, Spec, entries_of
from stages.files import atomic_path
from stages.models.checkpoint import construct
from stages.models.single_file import CONFIGS

DTYPES = {"fp16": (torch.float16, "F16"), "fp32": (torch.float32, "F32")}
PIECE = 1 << 22  # numbers drawn at a time: 16 MB
KINDS = ("sd15", "sd21", "sdxl")
# the last layer of a residual branch: small, so that the sum over many blocks stays near its start
RESIDUAL = re.compile(r"(conv2|to_out\.0|net\.2|proj_out|out_proj|fc2)\.weight$")
SMALL: dict[str, dict[str, Any]] = {
    "unet": {
        "block_out_channels": [16, 32, 32, 32],
        "norm_num_groups": 8,
        "cross_attention_dim": 32,
        "sample_size": 16,
    },
    "vae": {"block_out_channels": [8, 16, 16, 16], "norm_num_groups": 4, "sample_size": 128},
    "text_encoder": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "vocab_size": 1024,
        "projection_dim": 16,
    },
}
SMALL["text_encoder_2"] = {**SMALL["text_encoder"], "hidden_size": 48}  # stock single files tell the two by it
SMALL_KINDS: dict[str, dict[str, dict[str, Any]]] = {
    "sd21": {"unet": {"attention_head_dim": [2, 4, 4, 4]}},
    "sdxl": {
        "unet": {
            "block_out_channels": [16, 32, 32],
            "attention_head_dim": [2, 4, 4],
            "transformer_layers_per_block": [1, 1, 2],
            "cross_attention_dim": 80,
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 64,
        }
    },
}


def numbers(spec: Spec, seed: int, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """The numbers of a tensor, in flat pieces of at most ``PIECE``."""
    count = math.prod(spec.shape)
    if spec.name.endswith("position_ids"):
        yield torch.arange(count)
        return
    generator = torch.Generator().manual_seed(zlib.crc32(spec.name.encode()) + seed)
    norm = len(spec.shape) == 1 and spec.name.endswith(".weight")
    std = 0.02 if norm or spec.name.endswith(".bias") else scale(spec)
    for start in range(0, count, PIECE):
        piece = torch.randn(min(PIECE, count - start), generator=generator).mul_(std)
        yield (piece.add_(1.0) if norm else piece).to(dtype)


def scale(spec: Spec) -> float:
    """The standard deviation of a weight: 1/sqrt(inputs), less where a residual branch ends."""
    if "embedding.weight" in spec.name:
        return 0.02
    return (0.3 if RESIDUAL.search(spec.name) else 1.0) / math.sqrt(math.prod(spec.shape[1:]))


def configs(kind: str, small: bool) -> dict[str, dict[str, Any]]:
    """The configs of the components (a folder with several keeps them apart by their names)."""
    paths = sorted((CONFIGS / kind).glob("*/config.json"))
    found = {path.parent.name: json.loads(path.read_text()) for path in paths}
    if small:
        for name, config in found.items():
            config |= SMALL[name] | SMALL_KINDS.get(kind, {}).get(name, {})
            if "encoder" in name:
                config["num_hidden_layers"] = 3
    return found


def specs(name: str, config: dict[str, Any]) -> list[Spec]:
    """The tensors of a component, named as published diffusers folders name them."""
    model = construct(config.get("_class_name") or config["architectures"][0], config)
    prefix = "text_model." if name == "text_encoder" else ""
    return [
        Spec(f"{name}/{prefix}{key.removeprefix('text_model.') if prefix else key}", tuple(tensor.shape))
        for key, tensor in model.state_dict().items()
    ]


def write_safetensors(path: Path, entries: list[Entry], dtype: str, seed: int) -> None:
    """Stream ``entries`` into a safetensors file (https://github.com/huggingface/safetensors#format)."""
    torch_dtype, code = DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        integer = entry.name.endswith("position_ids")
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
        for entry in entries:
            for spec in entry.specs:
                for piece in numbers(spec, seed, torch_dtype):
                    file.write(piece.numpy().tobytes())


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_small_files(folder: Path, kind: str, found: dict[str, dict[str, Any]]) -> None:
    """model_index.json, scheduler, configs, and byte-level tokenizers whose ids the text encoders know."""
    scheduler = json.loads((CONFIGS / kind / "scheduler" / "scheduler_config.json").read_text())
    classes = {"scheduler": ["diffusers", scheduler["_class_name"]]}
    for name, config in found.items():
        if "encoder" in name:
            classes[name] = ["transformers", config["architectures"][0]]
            tokenizer = name.replace("text_encoder", "tokenizer")
            classes[tokenizer] = ["transformers", "CLIPTokenizer"]
            pad = "!" if kind == "sd21" or name.endswith("2") else "<|endoftext|>"
            write_tokenizer(folder / tokenizer, config["vocab_size"], pad)
        else:
            classes[name] = ["diffusers", config["_class_name"]]
    if kind == "sdxl":
        more: dict[str, Any] = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True}
        nothing = ("feature_extractor", "image_encoder")
    else:
        more = {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False}
        nothing = ("safety_checker", "feature_extractor", "image_encoder")
    write_json(folder / "model_index.json", {**more, **classes, **{name: [None, None] for name in nothing}})
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    for name, config in found.items():
        write_json(folder / name / "config.json", config)


def write_tokenizer(folder: Path, size: int, pad: str) -> None:
    """A byte-level CLIP tokenizer of ``size`` ids."""
    alphabet = _byte_alphabet()
    vocabulary = {symbol: i for i, symbol in enumerate(alphabet + [s + "</w>" for s in alphabet])}
    vocabulary |= {"<|startoftext|>": size - 2, "<|endoftext|>": size - 1}  # the last ids, as in CLIP's
    write_json(folder / "vocab.json", vocabulary)
    options = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": pad}
    write_json(folder / "tokenizer_config.json", options)
    with atomic_path(folder / "merges.txt") as temporary:
        temporary.write_text("#version: 0.2\n")


def _byte_alphabet() -> list[str]:
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("dir", type=Path, metavar="DIR", help="where the diffusers folder is written")
    parser.add_argument("--layout", choices=("folder", "single", "both"), default="folder")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp16")
    parser.add_argument("--small", action="store_true", help="tiny channel counts, for tests")
    parser.add_argument("--variant", default="", help="in the folder's file names, as in fp16")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    found = configs(options.kind, options.small)
    every = {name: specs(name, config) for name, config in found.items()}
    write_small_files(options.dir, options.kind, found)  # a single file needs its configs and its tokenizer too
    if options.layout != "single":
        for name in found:
            base = "model" if "encoder" in name else "diffusion_pytorch_model"
            entries = [Entry(spec.name.partition("/")[2], spec.shape, (spec,)) for spec in every[name]]
            variant = f".{options.variant}" if options.variant else ""
            write_safetensors(options.dir / name / f"{base}{variant}.safetensors", entries, options.dtype, options.seed)
    if options.layout != "folder":
        path = options.dir / f"{options.kind}.safetensors"
        write_safetensors(path, entries_of(options.kind, every, found), options.dtype, options.seed)
    count = sum(math.prod(spec.shape) for component in every.values() for spec in component)
    print(f"{options.dir}: {options.kind}, {options.dtype}, {count:,} weights")


if __name__ == "__main__":
    main()
