"""From a training folder's flat files to the diffusers folder that ships: ``python -m training.export DIR FOLDER``."""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from .models import make_text_encoder, make_unet, make_vae, save_folder

PARTS = ("vae", "text_encoder", "unet", "classifier")


def write_flat(folder: Path, name: str, module: nn.Module) -> None:
    """``<name>.safetensors`` in fp16, written under a temporary name first."""
    temporary = folder / f".{name}.safetensors"
    save_file({k: v.detach().to("cpu", torch.float16).contiguous() for k, v in module.state_dict().items()}, temporary)
    temporary.replace(folder / f"{name}.safetensors")


def read_flat(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """The weights that ``write_flat`` wrote, as fp32."""
    return {k: v.float() for k, v in load_file(folder / f"{name}.safetensors").items()}


def export(source: Path, folder: Path) -> None:
    """Assemble ``folder`` from ``source``; the classifier goes beside this module, for the benchmark."""
    figures = json.loads((source / "figures.json").read_text())
    tiny = figures["tiny"]
    vae = make_vae(figures["scaling_factor"], tiny=tiny)
    text, unet = make_text_encoder(), make_unet(tiny=tiny)
    for name, module in (("vae", vae), ("text_encoder", text), ("unet", unet)):
        module.load_state_dict(read_flat(source, name))
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
