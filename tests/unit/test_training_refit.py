"""The decoder's last convolution by least squares: no other weights return those scenes with less error."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from training.library import Library
from training.models import make_vae
from training.refit import MODEL, main, refit
from training.source import Source


def _source() -> Source:
    return Source(Library.make(3, 2, 0, "cpu"), "cpu", 1, size=32)


@torch.no_grad()
def _error(vae: Any) -> float:
    source, found = _source(), []
    for group in range(3):
        images = source.draw(crops=group % 4 == 3).images
        found.append((vae.decode(vae.encode(images).latent_dist.mode()).sample - images).square().mean())
    return torch.stack(found).mean().item()


def test_least_squares_is_best_and_a_share_of_the_way_is_between() -> None:
    errors = {}
    for share in (0.0, 0.5, 1.0):
        torch.manual_seed(0)
        vae: Any = make_vae(tiny=True).eval()
        refit(vae, _source(), 3, share)
        errors[share] = _error(vae)
    assert errors[1.0] < 0.5 * errors[0.5] < 0.25 * errors[0.0]
    with torch.no_grad():
        best = vae.decoder.conv_out.weight.clone()
        for seed in range(4):
            step = torch.randn(best.shape, generator=torch.Generator().manual_seed(seed)) * 0.02 * best.std()
            vae.decoder.conv_out.weight.copy_(best + step)
            assert _error(vae) > errors[1.0]


def test_the_command_moves_the_last_convolution_alone(tmp_path: Path) -> None:
    main(["--out", str(tmp_path / "vae.safetensors"), "--groups", "2", "--size", "64"])
    before = load_file(MODEL / "vae" / "diffusion_pytorch_model.safetensors")
    after = load_file(tmp_path / "vae.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert changed == {"decoder.conv_out.weight", "decoder.conv_out.bias"}
