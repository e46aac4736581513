"""Weights of every kind, read as a stage reads them: bytes, numbers a second of one thread, peak of the process.

    python -m benchmarks quantised                      # layers of FLUX.1's width, in bf16
    python -m benchmarks quantised --kinds BF16,Q4_K --dtype float32

Each kind is read in a process of its own, layer by layer into the same buffer, out of the page cache.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from safetensors.torch import save_file
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks._measure import measure
from stages.memory.layout import Layout
from stages.memory.source import CheckpointSource
from stages.memory.tensors import read_header
from stages.memory.trim import drop_clean_pages

KINDS = ("BF16", "F8_E4M3", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0")
LAYERS, ROWS, WIDTH = 4, 12288, 3072  # of FLUX.1: 75 MB in bf16


def write(path: Path, kind: str) -> None:
    """Layers of random bytes."""
    generator = np.random.default_rng(0)
    names = [f"{index}.weight" for index in range(LAYERS)]
    if kind == "F8_E4M3":
        raw = torch.from_numpy(generator.integers(0, 256, (ROWS, WIDTH), dtype=np.uint8))
        save_file({name: raw.clone().view(torch.float8_e4m3fn) for name in names}, path)
        return
    known = GGMLQuantizationType[kind]
    numbers, size = GGML_QUANT_SIZES[known]
    raw = generator.integers(0, 256, (ROWS, WIDTH // numbers * size), dtype=np.uint8)
    writer = GGUFWriter(path, "flux")
    for name in names:
        writer.add_tensor(name, raw, raw_dtype=known)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read(path: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Bytes and seconds of all layers, the second time: the file is in the page cache then."""
    torch.set_num_threads(1)
    network = nn.ModuleList(nn.Linear(WIDTH, ROWS, bias=False, device="meta") for _ in range(LAYERS))
    layout = Layout(network, dtype, channels_last=False)
    drop_clean_pages()
    source = CheckpointSource(read_header(path), keep_cached=True)
    slots = list(layout.slots.values())
    packed = torch.empty(layout.nbytes // LAYERS, dtype=torch.uint8)
    for _ in range(2):
        begin, before = time.perf_counter(), source.nbytes
        for slot in slots:
            source.read([slot], slot.offset, packed)
    return {"nbytes": source.nbytes - before, "seconds": time.perf_counter() - begin}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.read:
        print(json.dumps(read(options.read, getattr(torch, options.dtype))))
        return
    numbers = LAYERS * ROWS * WIDTH
    print(f"| kind | read, MB | million numbers a second, {options.dtype} | peak RES, MB |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for kind in options.kinds.split(","):
            path = Path(folder) / kind
            write(path, kind)
            command = [sys.executable, __file__, "--read", str(path), "--dtype", options.dtype]
            done = measure(command).check()
            found = json.loads(done.output.strip().splitlines()[-1])
            rate = numbers / found["seconds"] / 1e6
            print(f"| {kind} | {found['nbytes'] / 1e6:.0f} | {rate:.0f} | {done.kernel_peak / 1e6:.0f} |", flush=True)
            path.unlink()


if __name__ == "__main__":
    main()
