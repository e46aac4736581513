"""More latent channels and layers: larger networks begin as those that were trained; captions name a sun that shows."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from training.autoencoder import _loss
from training.deepen import deeper_names
from training.export import read_flat
from training.library import Library, without_body
from training.models import LATENT_CHANNELS, make_unet, make_vae, parameter_count
from training.scenes import MATERIALS
from training.source import Source
from training.specs import Spec
from training.vocabulary import encode
from training.widen import DETAIL, scale_channels, settle, widen_unet, widen_vae

ROOT = Path(__file__).resolve().parents[2]
FEW = 4
IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1


@pytest.fixture(scope="module")
def vaes() -> tuple[Any, Any]:
    """An autoencoder of few channels, and it as a wide one."""
    torch.manual_seed(0)
    few, wide = make_vae(0.5, tiny=True, channels=FEW).eval(), make_vae(tiny=True).eval()
    widen_vae(wide, few)
    return few, wide


@torch.no_grad()
def test_a_wide_autoencoder_begins_as_the_narrow_one(vaes: tuple[Any, Any]) -> None:
    few, wide = vaes
    before, after = few.encode(IMAGES).latent_dist, wide.encode(IMAGES).latent_dist
    assert torch.equal(after.mean[:, :FEW], before.mean)
    assert torch.equal(after.logvar[:, :FEW], before.logvar)
    assert after.mean[:, FEW:].std(0).min() > 0
    assert torch.equal(wide.decode(after.mean).sample, few.decode(before.mean).sample)


@torch.no_grad()
def test_channels_are_scaled_and_pictures_stay(vaes: tuple[Any, Any]) -> None:
    torch.manual_seed(1)
    vae = make_vae(tiny=True).eval()
    before, factors = vae.encode(IMAGES).latent_dist, torch.linspace(0.3, 2, LATENT_CHANNELS)
    picture = vae.decode(before.mean).sample
    scale_channels(vae, factors)
    after, by = vae.encode(IMAGES).latent_dist, factors[:, None, None]
    torch.testing.assert_close(after.mean, before.mean * by)
    torch.testing.assert_close(after.std, before.std * by)
    torch.testing.assert_close(vae.decode(after.mean).sample, picture, rtol=1e-4, atol=1e-4)


def test_the_loss_holds_the_first_channels(vaes: tuple[Any, Any]) -> None:
    few, wide = vaes
    moved = make_vae(tiny=True).eval()
    moved.load_state_dict(wide.state_dict())
    with torch.no_grad():
        moved.quant_conv.bias[0] += 3.0

    def loss(vae: Any, anchor: Any | None) -> float:
        torch.manual_seed(2)
        return _loss(vae, IMAGES, torch.zeros(()), anchor)[0].item()

    assert loss(wide, few) == pytest.approx(loss(wide, None), abs=1e-5)
    assert loss(moved, few) - loss(moved, None) == pytest.approx(0.03 * 9 / FEW, rel=1e-3)


@torch.no_grad()
def test_new_channels_settle_at_their_share_of_the_spread(vaes: tuple[Any, Any]) -> None:
    few, wide = vaes
    source = Source(Library.make(1, 2, 0, "cpu"), "cpu", 1, size=32)
    assert settle(wide, few, source, rounds=2) == 0.5
    source = Source(source.library, "cpu", 1, size=32)
    found = torch.cat([wide.encode(source.draw(crops=False).images).latent_dist.mode() for _ in range(2)])
    torch.testing.assert_close(found.std((0, 2, 3))[FEW:], torch.full((LATENT_CHANNELS - FEW,), DETAIL / 0.5))


@torch.no_grad()
def test_a_wide_denoiser_begins_as_the_narrow_one() -> None:
    torch.manual_seed(0)
    few, wide = make_unet(tiny=True, channels=FEW).eval(), make_unet(tiny=True).eval()
    widen_unet(wide, few)
    noise, states = torch.randn(1, LATENT_CHANNELS, 8, 8), torch.randn(1, 77, 160)
    said = wide(noise, torch.tensor(500), states).sample
    torch.testing.assert_close(said[:, :FEW], few(noise[:, :FEW], torch.tensor(500), states).sample)
    assert said[:, FEW:].abs().max() == 0


@pytest.mark.parametrize(("few", "many"), [((1, 1, 1), (2, 3, 1)), ((2, 1, 2), (3, 3, 4))])
def test_a_deeper_denoiser_begins_as_the_one_that_was_trained_and_all_of_it_learns(few: Any, many: Any) -> None:
    torch.manual_seed(0)
    trained, deep = make_unet(tiny=True, layers=few).eval(), make_unet(tiny=True, layers=many).eval()
    for module in (trained, deep):  # biases too, which begin at 0
        torch.nn.utils.vector_to_parameters(
            torch.nn.utils.parameters_to_vector(module.parameters()) + 0.02 * torch.randn(parameter_count(module)),
            module.parameters(),
        )
    widen_unet(deep, trained)
    inputs = torch.randn(2, LATENT_CHANNELS, 8, 8), torch.tensor([500, 30]), torch.randn(2, 77, 160)
    said = deep(*inputs).sample
    torch.testing.assert_close(said, trained(*inputs).sample, rtol=1e-5, atol=1e-6)
    names = deeper_names(trained, deep)
    assert len(set(names.values())) == len(names)
    optimizer = torch.optim.SGD(deep.parameters(), lr=0.1)
    for _ in range(2):  # what lies before a weight of zero learns from the second step on
        optimizer.zero_grad()
        deep(*inputs).sample.square().mean().backward()
        optimizer.step()
    assert all(value.grad is not None and value.grad.abs().max() > 0 for value in deep.parameters())


def test_a_denoiser_with_more_layers_is_refused() -> None:
    deep, fewer = make_unet(tiny=True, layers=(2, 1, 1)), make_unet(tiny=True, layers=(1, 1, 1))
    with pytest.raises(ValueError, match=r"layers of the UNet: got \[2, 1, 1\], expected \[1, 1, 1\] or fewer"):
        widen_unet(fewer, deep)


@pytest.mark.slow
def test_the_command_writes_a_model_of_all_channels_as_it_is_for_training_to_resume(tmp_path: Path) -> None:
    model = ROOT / "models" / "embedded"
    command = [sys.executable, "-m", "training.widen", str(model), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    for part in ("vae", "unet"):
        written = read_flat(tmp_path, part)
        ships = {k: v for file in (model / part).glob("*.safetensors") for k, v in load_file(file).items()}
        assert written.keys() == ships.keys()
        assert all(torch.equal(value, ships[name].float()) for name, value in written.items())
    assert (tmp_path / "figures.json").is_file()


def test_captions_name_a_sun_that_shows() -> None:
    library = Library.make(40, 3, 5, "cpu")
    library.specs = [replace(spec, body="sun", time="sunset", weather="clear") for spec in library.specs]
    source, groups, hidden = Source(library, "cpu", 2, size=48), len(library.colours), 0
    for _ in range(40):
        batch = source.draw(crops=False)
        hides = without_body(batch.ids)
        hidden += int(hides.sum())
        assert torch.equal(batch.row >= groups, hides)
    assert 0 < hidden < 80
    assert len(library.tokens) == 2 * groups


def test_what_is_said_of_scenes_whose_sun_hides() -> None:
    named = {tuple(encode(word))[1] for word in ("sun", "moon", "crescent")}
    library = Library.make(60, 4, 7, "cpu")
    bodies = torch.tensor([spec.body != "none" for spec in library.specs]).repeat_interleave(4)
    says = torch.tensor([bool(named & set(row)) for row in library.tokens.tolist()])
    shown, hides = says.chunk(2)
    assert shown[bodies].float().mean() > 0.2
    assert hides.float().mean() < 0.1  # words of a time of day may have the sun in them


def test_a_disc_counts_when_enough_of_it_shows() -> None:
    ids = torch.zeros(3, 100, 100, dtype=torch.uint8)
    ids[1, :5, :4], ids[2, :6, :6] = MATERIALS.index("sun"), MATERIALS.index("moon")
    assert without_body(ids).tolist() == [True, True, False]
    assert Spec(body="sun") != Spec()
