"""Polishing the decoder: its terms, the canvases it sees, and the whole command on the CPU."""

import json

import pytest
import torch
from safetensors.torch import load_file

from training import polish
from training.library import Library
from training.losses import colour_loss, lattice_loss
from training.models import make_vae
from training.polish import MODEL, Canvases, main
from training.source import Source


class OneStep:
    """A phase of one step."""

    def __init__(self, *_: object):
        self.share, self.steps = 0.0, 0

    def go(self) -> bool:
        self.steps += 1
        return self.steps == 1

    def lr(self, peak: float, warmup: int) -> float:
        return peak

    def tick(self, *_: object, **__: object) -> None:
        return


def test_colour_loss_sees_areas_and_not_what_is_drawn_in_them() -> None:
    flat = torch.zeros(1, 3, 64, 64)
    drawn = flat.clone()
    drawn[..., ::2], drawn[..., 1::2] = 0.5, -0.5
    assert colour_loss(drawn, flat) == 0
    assert colour_loss(flat + 0.25, flat) == pytest.approx(0.25)


def test_lattice_loss_sees_steps_between_latents() -> None:
    smooth = torch.linspace(-1, 1, 64).expand(1, 3, 64, 64)
    steps = smooth.clone().unflatten(-1, (8, 8)).mean(-1, keepdim=True).expand(1, 3, 64, 8, 8).flatten(-2)
    smooth, steps = smooth + smooth.mT, steps + steps.mT
    assert lattice_loss(smooth, smooth) == 0
    assert lattice_loss(steps, smooth) > 1


def test_canvases_are_two_and_four_times_the_native_side() -> None:
    source = Source(Library.make(1, 2, 0, "cpu"), "cpu", 1, size=32)
    canvases = Canvases(source, 16)
    seen = {tuple(canvases.sample(64).shape) for _ in range(12)}
    assert seen == {(4, 3, 64, 64), (1, 3, 128, 128)}


def test_reach_says_how_far_along_what_was_learned(monkeypatch) -> None:
    monkeypatch.setattr(polish, "CANVAS_GROUP", 1)

    def learned(reach: float, origin: object = None) -> torch.Tensor:
        torch.manual_seed(0)
        vae = make_vae(tiny=True)
        before = vae.decoder.conv_out.weight.detach().clone()
        source = Source(Library.make(1, 2, 0, "cpu"), "cpu", 1, size=64)
        monkeypatch.setattr(polish, "Phase", OneStep)
        asked = {"seconds": 1.0, "batch": 2, "peak_lr": 1e-3, "weight": 0.0, "texture": 0.0, "pool": 2}
        torch.manual_seed(1)
        after = polish.polish(vae, source, **asked, noise=0.0, large=0.0, reach=reach, origin=origin)
        return after.decoder.conv_out.weight.detach() - before

    whole, half, beyond = (learned(reach) for reach in (1.0, 0.5, 1.5))
    assert whole.abs().max() > 0
    assert torch.allclose(half, 0.5 * whole, atol=1e-7)
    assert torch.allclose(beyond, 1.5 * whole, atol=1e-7)
    torch.manual_seed(0)
    same, other = make_vae(tiny=True), make_vae(tiny=True)
    apart = (other.decoder.conv_out.weight - same.decoder.conv_out.weight).detach()
    assert torch.allclose(learned(0.5, same), 0.5 * whole, atol=1e-7)
    assert torch.allclose(learned(0.25, other), 0.75 * apart + 0.25 * whole, atol=1e-6)


@pytest.mark.slow
def test_the_whole_command_keeps_the_encoder_and_moves_the_decoder(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(polish, "CANVAS_GROUP", 1)
    arguments = "--minutes 0.02 --device cpu --batch 4 --groups 2 --per-group 2 --held-groups 1 --size 64 --pool 48"
    main(["--out", str(tmp_path), *arguments.split()])
    before = load_file(MODEL / "vae" / "diffusion_pytorch_model.safetensors")
    after = load_file(tmp_path / "vae.safetensors")
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and changed <= {"decoder", "post_quant_conv"} and "decoder" in changed
    figures = json.loads((tmp_path / "polish.json").read_text())
    assert {"vae_psnr", "lattice", "drift"} <= figures["after"].keys()
