"""Linear attention for the embedded model: what ships predicts what the stock network does; the whole command."""

import argparse
import copy
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from linfusions import published
from transformers import CLIPTextModel

from benchmarks.linfusion import mounted
from training.linfusion import MODEL, distil, error, main, write
from training.models import LATENT_CHANNELS, make_unet
from training.vocabulary import encode


def test_what_ships_predicts_what_the_stock_network_does() -> None:
    unet: Any = UNet2DConditionModel.from_pretrained(MODEL, subfolder="unet", torch_dtype=torch.float32)
    text: Any = CLIPTextModel.from_pretrained(MODEL, subfolder="text_encoder", torch_dtype=torch.float32)
    tokens = torch.tensor([encode(prompt) for prompt in ("a castle at night", "a lighthouse on a cliff at sunset")])
    noise = torch.randn(2, LATENT_CHANNELS, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        inputs = noise, torch.tensor(999), text(tokens).last_hidden_state  # all noise: what a picture begins with
        stock = unet(*inputs).sample
        mounted(MODEL / "linfusion")(unet)
        linear = unet(*inputs).sample
    assert len(published(MODEL / "linfusion")) == 11
    assert 0 < (linear - stock).square().mean() / stock.square().mean() < 0.01


class Inputs:
    """In the place of ``training.linfusion.Work``: noise."""

    alphas = torch.zeros(1)

    def draw(self, batch: int) -> dict[str, Any]:
        sample, states = torch.randn(batch, LATENT_CHANNELS, 8, 8), torch.randn(batch, 77, 160)
        return {
            "sample": sample,
            "timestep": torch.full((batch,), 9),
            "encoder_hidden_states": states,
            "return_dict": False,
        }


def test_pupils_learn_and_nothing_else_changes(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    stock = make_unet(tiny=True).eval().requires_grad_(False)
    unet, before = copy.deepcopy(stock), {name: value.clone() for name, value in stock.state_dict().items()}
    work: Any = Inputs()
    found = distil(unet, stock, work, argparse.Namespace(minutes=0.05, batch=4, lr=2e-3, resume=None))
    assert all(torch.equal(before[name], value) for name, value in stock.state_dict().items())
    kept = {name: value for name, value in unet.state_dict().items() if "attn1" not in name}
    assert kept and all(torch.equal(before[name], value) for name, value in kept.items())
    after = error(unet, stock, work, 2)
    write(tmp_path, found)
    again = copy.deepcopy(stock)
    mounted(tmp_path)(again)
    assert error(again, stock, work, 2) == pytest.approx(after, rel=0.3)
    assert [part.name for part, _ in published(tmp_path)] == list(found)
    gone_on = copy.deepcopy(stock)
    distil(gone_on, stock, work, argparse.Namespace(minutes=0.0, batch=4, lr=2e-3, resume=tmp_path))
    assert error(gone_on, stock, work, 2) == pytest.approx(after, rel=0.3)  # and no step was taken


@pytest.mark.slow
def test_the_whole_command(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    small = "--device cpu --minutes 0.05 --batch 2 --groups 2 --per-group 2 --fill 2 --pool 8 --size 64"
    main(["--out", str(tmp_path), *small.split()])
    assert "error of predictions" in capsys.readouterr().out
    assert len(published(tmp_path)) == 11
