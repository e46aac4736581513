"""From a training folder's flat files to the diffusers folder that ships: ``python -m training.export DIR FOLDER``."""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from .models import halves, make_text_encoder, make_unet, make_vae, save_folder, save_halves

PART_BYTES = 15_000_000  # of a flat file, so that each is small enough to be carried


def files_of(folder: Path, name: str) -> list[Path]:
    """The flat files of a part, in order; none where it was not written."""
    return sorted(folder.glob(f"{name}.safetensors")) or sorted(folder.glob(f"{name}-?.safetensors"))


def write_flat(folder: Path, name: str, module: nn.Module) -> None:
    """``<name>.safetensors`` in fp16, or ``<name>-0.safetensors`` and so on; each under a temporary name first."""
    groups: list[dict[str, torch.Tensor]] = [{}]
    room = PART_BYTES
    for key, half in halves(module).items():
        if half.nbytes > room and groups[-1]:
            groups.append({})
            room = PART_BYTES
        groups[-1][key] = half
        room -= half.nbytes
    for i, group in enumerate(groups):
        file = folder / (f"{name}-{i}.safetensors" if len(groups) > 1 else f"{name}.safetensors")
        save_halves(group, file)


def read_flat(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """The weights that ``write_flat`` wrote, as fp32. FileNotFoundError where there are none."""
    files = files_of(folder, name)
    if not files:
        raise FileNotFoundError(f"{folder}: no {name}.safetensors; `python -m training.train --out {folder}` makes it")
    return {k: v.float() for file in files for k, v in load_file(file).items()}


def export(source: Path, folder: Path) -> None:
    """Assemble ``folder`` from ``source``; the classifier goes beside this module, for the benchmark.

    Weights that lie in ``folder`` are removed: one old file would go before new ones in parts.
    """
    figures = json.loads((source / "figures.json").read_text())
    tiny = figures["tiny"]
    vae = make_vae(figures["scaling_factor"], tiny=tiny)
    text, unet = make_text_encoder(), make_unet(tiny=tiny)
    for name, module in (("vae", vae), ("text_encoder", text), ("unet", unet)):
        module.load_state_dict(read_flat(source, name))
        for old in (folder / name).glob("*.safetensors*"):
            old.unlink()
    save_folder(folder, vae, text, unet)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--classifier", type=Path, help="where to copy classifier.safetensors too")
    args = parser.parse_args()
    export(args.source, args.folder)
    if args.classifier:
        args.classifier.write_bytes((args.source / "classifier.safetensors").read_bytes())
    total = sum(f.stat().st_size for f in args.folder.rglob("*") if f.is_file())
    largest = max(f.stat().st_size for f in args.folder.rglob("*") if f.is_file())
    print(f"{args.folder}: {total / 1e6:.1f} MB in all, largest file {largest / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
