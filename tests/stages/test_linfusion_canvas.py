"""Linear attention over the whole canvas from tiles: equal to the formula over all tokens, whatever the groups are."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import linfusions
import pytest
import torch
from diffusers import UNet2DConditionModel
from in_process import Work, look, stopped_at
from linfusions import features, published
from torch import Tensor

from stages.canvas.key_means import CanvasMeans
from stages.canvas.mixture import TileBatch, grid_views
from stages.canvas.turns import in_turns, meet
from stages.canvas.weights import grid_weights
from stages.config import ConfigError
from stages.families.opening import built, open_checkpoint
from stages.families.sd import FAMILY
from stages.families.unet import UNetDenoiser
from stages.linear_attention import LinearAttention
from stages.memory.disk import refusal
from stages.memory.parking import Parking
from stages.memory.tensors import read_tensors
from stages.plans import ModelPlan, StagePlan
from stages.tiles import Size, latent_grid

SCOPE, KEY = "technique.linfusion.scope", "technique.linfusion.path"
TILES = {
    "guide.mode": "none",
    "width": 192,
    "height": 192,
    "denoise.num_inference_steps": 2,
    "denoise.tile_size": 128,
    "denoise.overlap": 64,
    SCOPE: "canvas",
}
GRID = latent_grid(192, 192, 128, 64, 8)
SHARES = [weight.map() for weight in grid_weights(GRID, Size(24, 24), "gaussian")]
LEAVES = ModelPlan(resident=(), unit_limit=1, ring_bytes=1 << 23)


@pytest.fixture
def folder(work: Work, tmp_path: Path) -> Path:
    config = work.config(TILES)
    checkpoint = open_checkpoint(config, ("unet",), lambda _: None)
    return linfusions.write_random(tmp_path / "linfusion", built(config, FAMILY, checkpoint, "unet", "denoise").network)


def denoised(work: Work, values: dict[str, Any], **plan: Any) -> Tensor:
    """The canvas of a run, made now whatever lies in the store, in pairs."""
    stages = {"denoise": StagePlan(micro_batch=2, **plan)}
    found = work.run(values, until="denoise", plan=stages, force=True)
    return read_tensors(found["denoise"] / "canvas.safetensors")["latents"]


def test_tiles_attend_to_all_tokens_once(tmp_path: Path) -> None:
    """Overlapping tiles of one canvas against the layer over all of its tokens at once, with and without a prompt."""
    layer, canvas = LinearAttention(16, 4, 16), torch.randn(2, 24, 24, 16)
    with torch.no_grad():
        expected = layer(canvas.flatten(1, 2)).unflatten(1, (24, 24))
        layer.exchange = means = CanvasMeans(meet)
        found = torch.zeros_like(canvas)
        views = grid_views(GRID, Size(24, 24), blend="gaussian", guidance_scale=7.5)

        def attend(view: Any) -> Tensor:
            tokens = canvas[(slice(None), *view.tile.slices)]
            means.begin(
                TileBatch(
                    samples=tokens,
                    prompt_rows=(0, 0),
                    unconditional=(True, False),
                    tiles=(view.tile,) * 2,
                    weights=(view.weight,) * 2,
                )
            )
            return layer(tokens.flatten(1, 2)).unflatten(1, view.tile.size)

        parts = in_turns([partial(attend, view) for view in views], tmp_path / "waiting")
        for view, part in zip(views, parts, strict=True):
            found[(slice(None), *view.tile.slices)] += part * view.weight.map()[None, :, :, None]
    assert (found - expected).abs().max() < 1e-5
    assert not list(tmp_path.iterdir()), "nothing is left on the disk"


def test_coarser_tokens_have_the_mean_share_of_their_latents() -> None:
    means = CanvasMeans(meet)
    tile = next(index for index, one in enumerate(GRID) if one.top and one.left)
    weight = grid_weights(GRID, Size(24, 24), "gaussian")[tile]
    means.begin(
        TileBatch(
            samples=torch.empty(1, 4, 16, 16),
            prompt_rows=(0,),
            unconditional=(False,),
            tiles=(GRID[tile],),
            weights=(weight,),
        )
    )
    assert torch.equal(means.weights(torch.empty(1, 256, 8))[0], weight.map().flatten())
    found = means.weights(torch.empty(1, 16, 8))[0]
    assert torch.allclose(found, SHARES[tile].view(4, 4, 4, 4).mean(dim=(1, 3)).flatten())
    with pytest.raises(ValueError, match="17 tokens are no level of a tile of 16x16 latents"):
        means.weights(torch.empty(1, 17, 8))


def jointly(x: Tensor, weights: dict[str, Tensor], heads: int) -> Tensor:
    """The formula over the tokens of all tiles of a half together: ``[B, N, C]``, halves by turns; written out."""
    side = round(x.shape[1] ** 0.5)
    cells = 16 // side
    shares = torch.stack([share.view(side, cells, side, cells).mean(dim=(1, 3)).flatten() for share in SHARES])
    q, k, v = features(x, weights, "q"), features(x, weights, "k"), x @ weights["to_v.weight"].T
    found = torch.empty_like(x)
    for half in (0, 1):
        mine = slice(half, None, 2)
        for a, b, c, out in zip(*(one[mine].chunk(heads, -1) for one in (q, k, v, found)), strict=True):
            counted = b * shares[..., None] / shares.sum()
            values, keys = torch.einsum("tnd,tne->de", counted, c), counted.sum(dim=(0, 1))
            out.copy_(a @ values / ((a @ keys)[..., None] + 1e-4))
    return found @ weights["to_out.0.weight"].T + weights["to_out.0.bias"]


def test_a_step_is_that_of_the_whole_canvas_at_once(work: Work, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stock network over all tiles in one batch, its self-attention over the tokens of all of them: convolutions
    and norms see tiles in both."""
    seen: list[dict[str, Any]] = []
    predict = UNetDenoiser.predict

    def recorded(self: UNetDenoiser, **inputs: Tensor) -> Tensor:
        kept = {name: value.numpy().copy() for name, value in inputs.items()}  # in a turn a clone would be parked
        seen.append(kept)
        kept["found"] = (result := predict(self, **inputs)).numpy().copy()
        return result

    monkeypatch.setattr(UNetDenoiser, "predict", recorded)
    denoised(work, {**TILES, KEY: str(folder), "technique.channels_last": False}, group_size=4)
    seen = seen[: len(seen) // 2]  # of the first step
    assert len(seen) == 2
    unet: Any = UNet2DConditionModel.from_pretrained(work.checkpoint / "unet")
    modules = dict(unet.named_modules())
    for part, weights in published(folder):
        modules[part.name].forward = lambda x, weights=weights, part=part, **_: jointly(x, weights, part.heads)
    sample, embeds, found = (
        torch.cat([torch.from_numpy(one[name]) for one in seen])
        for name in ("sample", "encoder_hidden_states", "found")
    )
    with torch.no_grad():
        expected = unet(sample, torch.from_numpy(seen[0]["timestep"]), embeds, return_dict=False)[0]
    assert (found - expected).abs().max() < 1e-4 * max(1.0, float(expected.std()))


@pytest.mark.slow
def test_any_group_and_a_stop_give_the_same_bytes(work: Work, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on, ends = {**TILES, KEY: str(folder)}, []
    close = Parking.close
    monkeypatch.setattr(Parking, "close", lambda self: (ends.append(self._end), close(self)))
    whole = denoised(work, on, group_size=100)
    assert set(ends) == {0}, "nobody waits"
    assert torch.equal(denoised(work, on, group_size=4, models={"unet": LEAVES}), whole)
    assert ends[-1] > 0
    assert torch.equal(denoised(work, on, group_size=2), whole)
    steps = stopped_at(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        denoised(work, on, group_size=4)
    found = work.run(on, until="denoise", plan={"denoise": StagePlan(micro_batch=2, group_size=2)})["denoise"]
    assert torch.equal(read_tensors(found / "canvas.safetensors")["latents"], whole)
    assert steps == [0, 1, 1]


def test_one_tile_is_its_own_canvas(work: Work, folder: Path) -> None:
    one = {**TILES, KEY: str(folder), "denoise.tile_size": 192}
    assert (denoised(work, one) - denoised(work, {**one, SCOPE: "tile"})).abs().max() < 1e-4


def test_no_unit_has_a_meeting_inside_and_the_disk_is_planned_for(
    work: Work, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.models.measure.rungs", lambda network, layout, blocks: [layout.nbytes])
    config = work.config({**TILES, KEY: str(folder)})
    profile = look(config, "denoise")["denoise"]
    (model,) = profile.models
    assert "mid_block.resnets.0" in model.cuts[0].order
    for cut in model.cuts:
        units = set(cut.order)
        assert "mid_block.attentions.0.transformer_blocks.0.attn1.keys" in units
        assert not any(name.endswith((".attn1", "transformer_blocks.0", "attentions.0")) for name in units)
    assert profile.disk == max(line.slope for cut in model.cuts for line in cut.lines) * model.micro_batches > 0
    stage = work.states(config)["denoise"].stage
    assert "use technique.linfusion.scope=tile" in refusal(stage, 2 * 10**9, 10**9)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"launch.nproc": 2}, r"launch.nproc: got 2, expected 1 with technique.linfusion.scope=canvas"),
        (
            {"launch.nnodes": 2, "launch.rdzv_endpoint": "localhost:29500"},
            r"launch.nnodes: got 2, expected 1 with technique.linfusion.scope=canvas",
        ),
        ({"denoise.dilated.enabled": True}, r"dilated.enabled: got True, expected False with"),
        ({"technique.tome.ratio": 0.5}, r"tome.ratio: got 0.5, expected 0 with"),
        ({"technique.offload": "none"}, r"technique.offload: got 'none', expected stream with"),
        ({"device": "cuda"}, r"scope: got 'canvas', expected tile on a GPU"),
    ],
)
def test_where_tiles_cannot_wait_it_is_refused(work: Work, folder: Path, values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        work.config({**TILES, KEY: str(folder), **values})


def test_what_is_parked_comes_back_when_it_is_used(tmp_path: Path) -> None:
    parking = Parking(tmp_path / "waiting")
    with parking.turn("first"):
        one = torch.arange(2000.0)
        part, small = (one * 2)[5:].view(-1, 5), torch.ones(3)
    parking.park("first")
    assert one.untyped_storage().nbytes() == part.untyped_storage().nbytes() == 0 != small.untyped_storage().nbytes()
    with parking.turn("second"):
        found = part + 1
    assert one.untyped_storage().nbytes() == 0, "only what is used"
    assert torch.equal(found[0], torch.arange(11.0, 21.0, 2)) and torch.equal(part + 1, found)
    parking.park("second")
    before = parking._end
    del one, part, found
    with parking.turn("first"):
        again = torch.zeros(2000)
    parking.park("first")
    assert parking._end == before and again.untyped_storage().nbytes() == 0, "places are used again"
    parking.close()


def test_passes_that_meet_unequally_are_an_error(tmp_path: Path) -> None:
    def met(times: int) -> Callable[[], Tensor]:
        def call() -> Tensor:
            for _ in range(times):
                meet()
            return torch.tensor(times)

        return call

    assert [int(found) for found in in_turns([met(2), met(2)], tmp_path / "a")] == [2, 2]
    with pytest.raises(RuntimeError, match="1 of 2 passes met less often"):
        list(in_turns([met(1), met(2)], tmp_path / "b"))
