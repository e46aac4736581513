"""Layers in 8-bit integers: what they compute, to the bit, and how far that is from floats."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from stages import int8_blocks
from stages.blocked import blocked, taken
from stages.int8 import LEVELS, Int8Conv2d, Int8Linear, Scaled, exact, gated, quantised, share
from stages.int8_blocks import FEWER, UNSIGNED
from stages.techniques.quantize import Quantize

pytestmark = pytest.mark.skipif(not exact(), reason="no 8-bit dot products")

CONVOLUTIONS = {
    "3x3": nn.Conv2d(12, 20, 3, padding=1),
    "1x1": nn.Conv2d(12, 20, 1),
    "down": nn.Conv2d(12, 20, 3, stride=2, padding=1),
    "edge": nn.Conv2d(12, 20, 3, stride=2),
    "patch": nn.Conv2d(12, 20, 2, stride=2, bias=False),
    "wide": nn.Conv2d(12, 20, (1, 5), padding=(0, 2)),
}


def filled(layer: nn.Module, *, samples: bool = True) -> Int8Linear | Int8Conv2d:
    """The integer layer of a float one."""
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    made = (Int8Linear if isinstance(layer, nn.Linear) else Int8Conv2d)(layer, samples=samples)  # type: ignore[arg-type]
    for name, values in quantised(layer.weight.detach(), layer.weight.dtype).items():
        laid = lying(values, made.block) if name == "weight" and made.block else values
        setattr(made, name, nn.Parameter(laid, requires_grad=False))
    return made


def lying(weight: Tensor, block: tuple[int, int]) -> Tensor:
    """A weight in blocks, in the bytes of the plain one."""
    image = weight if weight.dim() == 4 else weight[..., None, None]
    found = torch.empty_like(image, memory_format=torch.channels_last)
    found.permute(0, 2, 3, 1).view(-1).copy_(blocked(image, *block).flatten())
    return found.view(weight.shape) if weight.dim() == 2 else found


def reference(layer: nn.Module, made: Int8Linear | Int8Conv2d, sample: Tensor) -> Tensor:
    """In float64: the float layer with weights and one sample that are rounded as integers are."""
    least, greatest = min(float(sample.min()), 0.0), max(float(sample.max()), 0.0)
    scale = (greatest - least) / LEVELS
    zero = round(-127 - least / scale)
    rounded = ((sample.double() / scale + zero).round() - zero) * scale
    options = {"bias": None if made.bias is None else made.bias.double()}
    weight = made.floats(torch.float64)
    if isinstance(layer, nn.Linear):
        return nn.functional.linear(rounded, weight, **options)
    assert isinstance(layer, nn.Conv2d)
    return nn.functional.conv2d(rounded, weight, stride=layer.stride, padding=layer.padding, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", CONVOLUTIONS)
@torch.inference_mode()
def test_a_convolution(kind: str) -> None:
    torch.manual_seed(0)
    layer, sample = CONVOLUTIONS[kind], torch.randn(1, 12, 17, 13) + 0.3
    made = filled(layer)
    for layout in (torch.channels_last, torch.contiguous_format):
        found = made(sample.to(memory_format=layout))
        assert (found - reference(layer, made, sample)).abs().max() < 1e-4
    expected = layer(sample)
    assert found.shape == expected.shape and (found - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("shape", [(1, 32), (1, 7, 32), (1, 3, 700, 32)])
@torch.inference_mode()
def test_a_linear_layer(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer, sample = nn.Linear(32, 24), torch.randn(shape).clamp_min(-0.2)  # as after an activation
    made = filled(layer)
    found = made(sample)
    assert found.shape == layer(sample).shape
    assert (found - reference(layer, made, sample)).abs().max() < 1e-4


@pytest.mark.parametrize("layer", [nn.Linear(40, 300), CONVOLUTIONS["3x3"]])
@torch.inference_mode()
def test_a_sample_depends_on_no_other_and_on_no_threads(layer: nn.Module) -> None:
    torch.manual_seed(0)
    shape = (3, 900, 40) if isinstance(layer, nn.Linear) else (3, 12, 30, 30)
    samples = torch.randn(shape) * torch.tensor([1.0, 30.0, 0.1]).view(3, *[1] * (len(shape) - 1))
    made, threads = filled(layer), torch.get_num_threads()
    together = made(samples)
    try:
        torch.set_num_threads(1)
        assert torch.equal(torch.cat([made(one) for one in samples.split(1)]), together)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("layer", [nn.Linear(32, 24), CONVOLUTIONS["3x3"]])
@torch.inference_mode()
def test_weights_only(layer: nn.Module) -> None:
    torch.manual_seed(0)
    sample = torch.randn((2, 5, 32) if isinstance(layer, nn.Linear) else (2, 12, 9, 9))
    made, expected = filled(layer, samples=False), layer(sample)
    assert made.weight.dtype is torch.int8 and (made(sample) - expected).norm() < 0.01 * expected.norm()


@torch.inference_mode()
def test_other_precisions() -> None:
    torch.manual_seed(0)
    layer, sample = nn.Linear(64, 48), torch.randn(2, 300, 64)
    half = filled(layer.to(torch.bfloat16))(sample.bfloat16())
    assert half.dtype is torch.bfloat16
    expected = layer.float()(sample)
    assert (half.float() - expected).norm() < 0.02 * expected.norm()


IN_BLOCKS = {
    "3x3": (nn.Conv2d(128, 64, 3, padding=1), (3, 128, 20, 12)),
    "down": (nn.Conv2d(128, 64, 3, stride=2, padding=1, bias=False), (3, 128, 20, 12)),
    "1x1": (nn.Conv2d(640, 64, 1), (3, 640, 8, 9)),
    "linear": (nn.Linear(640, 128), (3, 700, 640)),
}


@pytest.mark.parametrize("kind", IN_BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_weights_in_blocks_give_what_plain_ones_do(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, shape = IN_BLOCKS[kind]
    samples = torch.randn(shape) * torch.tensor([1.0, 30.0, 0.1]).view(3, *[1] * (len(shape) - 1))
    samples = (samples.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else samples).to(dtype)
    made, plain, threads = filled(layer), filled(layer), torch.get_num_threads()
    if made.blocks is None:
        pytest.skip("oneDNN wants no blocks here")
    plain.blocks, plain.weight = (
        None,
        nn.Parameter(quantised(layer.weight, torch.float32)["weight"], requires_grad=False),
    )
    found = made(samples)
    assert found.dtype is dtype and found.stride() == plain(samples).stride()
    for one, other in zip(found, plain(samples), strict=True):
        assert (one - other).norm() < 3e-4 * other.norm()  # half of a level may be rounded otherwise
    try:
        torch.set_num_threads(1)
        assert torch.equal(torch.cat([made(one) for one in samples.split(1)]), found)
    finally:
        torch.set_num_threads(threads)
    samples[1][0, 5] = torch.nan
    broken = made(samples)
    assert torch.equal(broken[0], found[0]) and not broken[1].isfinite().any()


@torch.inference_mode()
def test_a_gated_layer_in_blocks() -> None:
    torch.manual_seed(0)
    proj, inputs = nn.Linear(640, 512), torch.randn(2, 530, 640)
    made = filled(proj)
    values, gate = made(inputs).chunk(2, dim=-1)
    found = gated(made, lambda given: torch.zeros(()), inputs)  # type: ignore[arg-type]
    assert torch.allclose(found, values * nn.functional.gelu(gate), atol=1e-6)


@pytest.mark.parametrize("rows", [3, 900])
@torch.inference_mode()
def test_unsigned_integers_are_the_signed_ones_moved(rows: int) -> None:
    torch.manual_seed(0)
    numbers = torch.randn(rows, 640).bfloat16() + 0.3
    sample = Scaled(numbers)
    signed, unsigned = (torch.empty(numbers.shape, dtype=dtype) for dtype in (torch.int8, torch.uint8))
    sample.rounds(signed)
    sample.rounds(unsigned)
    assert torch.equal(signed.int() + UNSIGNED, unsigned.int())
    assert torch.equal(signed.float(), (numbers.float() * (1 / sample.scale) + sample.zero).round())
    assert signed.int().min() == -127 and signed.int().max() >= 125


@torch.inference_mode()
def test_a_range_is_of_numbers_however_they_lie() -> None:
    torch.manual_seed(0)
    plain = torch.randn(64, 96, 40)
    plain[63, 95, 39], plain[0, 1, 2] = 9, -7
    for numbers in (plain, plain.transpose(0, 1).contiguous().transpose(0, 1), torch.cat([plain, plain], -1)[..., :40]):
        found = Scaled(numbers)
        assert (found.scale, found.zero) == (16 / LEVELS, round(-127 + 7 * LEVELS / 16))


@torch.inference_mode()
def test_projections_make_integers_of_their_input_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    attention = nn.Module()
    layers = {name: filled(nn.Linear(640, 128)) for name in ("to_q", "to_k", "to_v")}
    if any(layer.blocks is None for layer in layers.values()):
        pytest.skip("oneDNN wants no blocks here")
    for name, layer in layers.items():
        setattr(attention, name, layer)
    inputs, text, made = torch.randn(2, 70, 640), torch.randn(2, 7, 640), []
    given = {"to_q": (inputs, inputs), "to_k": (inputs, text), "to_v": (inputs, text)}
    expected = [[layer(given[name][call]) for name, layer in layers.items()] for call in (0, 1)]
    rounds = Scaled.rounds
    monkeypatch.setattr(Scaled, "rounds", lambda self, given: made.append(1) or rounds(self, given))
    share(attention)
    for call, many in ((0, 2), (1, 4), (0, 2)):  # of two samples: an input of three, one of its own and one of two
        found = [layer(given[name][call]) for name, layer in layers.items()]
        assert all(map(torch.equal, found, expected[call])) and len(made) == many
        made.clear()
    inputs.mul_(2)  # what the last one had is forgotten
    assert not torch.equal(layers["to_q"](inputs), expected[0][0])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@torch.inference_mode()
def test_what_is_not_finite_stays_so(bad: float) -> None:
    linear, convolution = filled(nn.Linear(8, 8)), filled(CONVOLUTIONS["3x3"])
    numbers, picture = torch.ones(2, 3, 8), torch.ones(2, 12, 5, 5)
    numbers[1, 1, 1] = picture[1, 1, 1, 1] = bad
    for found in (linear(numbers), convolution(picture)):
        assert found[0].isfinite().all() and not found[1].isfinite().any()


@torch.inference_mode()
def test_nothing_and_the_same_everywhere() -> None:
    layer = nn.Linear(16, 4)
    made = filled(layer)
    assert torch.equal(made(torch.zeros(1, 2, 16)), layer.bias.expand(1, 2, 4))
    for number in (3.5, -2.0):
        same = torch.full((1, 2, 16), number)
        assert (made(same) - layer(same)).abs().max() < 0.02 * abs(number)


def test_weights_of_zeros_and_what_a_scale_is_rounded_to() -> None:
    weight = torch.randn(6, 50) * torch.tensor([[1.0], [0.0], [1e-3], [100.0], [1.0], [1.0]])
    found = quantised(weight, torch.bfloat16)
    assert found["weight_scale"].dtype is torch.bfloat16
    back = found["weight"].float() * found["weight_scale"].float()[:, None]
    # a scale that was rounded down leaves the greatest number at 127
    assert ((back - weight).abs() <= 0.51 * found["weight_scale"].float()[:, None] + 0.004 * weight.abs()).all()
    assert not found["weight"][1].any() and torch.equal(found["weight_sum"], found["weight"].sum(1).int())


def test_a_gated_layer_of_samples_one_by_one_gives_the_same_numbers() -> None:
    torch.manual_seed(0)
    gated = FeedForward(64, activation_fn="geglu").eval().requires_grad_(False)
    network = nn.ModuleDict({"block": nn.ModuleDict({"ff": gated})})
    weights = {name: layer.weight for name, layer in network.named_modules() if isinstance(layer, nn.Linear)}
    whole = gated.forward
    Quantize("int8").on_model(network, "unet")
    for name, weight in weights.items():
        for key, values in quantised(weight, torch.float32).items():
            setattr(network.get_submodule(name), key, nn.Parameter(values, requires_grad=False))
    inputs = torch.randn(3, 16, 64)
    assert gated.forward is not whole
    assert torch.equal(gated(inputs), whole(inputs))
    last: Any = network.get_submodule("block.ff.net.2")
    calls, product = [], last.forward
    last.forward = lambda given: calls.append(len(given)) or product(given)  # as if it were a unit of its own
    assert torch.equal(gated(inputs), whole(inputs)) and calls[0] == 3, "it is called once"


@pytest.mark.parametrize("rows", [1, 16, 77, 300, 512, 1100])
@pytest.mark.parametrize("layer", [nn.Linear(2560, 64), nn.Conv2d(2560, 64, 1)], ids=["linear", "1x1"])
@torch.inference_mode()
def test_every_number_of_rows(layer: nn.Module, rows: int) -> None:
    """OneDNN wants weights otherwise for some: rows are split, or filled up, and the numbers are the same."""
    torch.manual_seed(0)
    made, plain = filled(layer), filled(layer)
    if made.blocks is None:
        pytest.skip("oneDNN wants no blocks here")
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    plain.blocks, plain.weight = None, nn.Parameter(quantised(layer.weight.detach(), torch.float32)["weight"], False)
    sample = torch.randn(1, rows, 2560) + 0.3 if isinstance(layer, nn.Linear) else torch.randn(1, 2560, 1, rows) + 0.3
    expected, found = reference(layer, plain, sample), made(sample)
    assert found.shape == expected.shape and (found - expected).abs().max() < 1e-3


def test_products_take_the_weight_as_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    """In turns that give each row once, of which oneDNN lays no weight out anew where some would do."""
    made = filled(nn.Linear(2560, 640))
    if made.blocks is None:
        pytest.skip("oneDNN wants no blocks here")
    for rows in (1, 16, 77, 300, 512, 1100, 4096):
        turns = list(int8_blocks._turns(made.blocks, 640, 2560, rows, 512))
        assert sum(count for count, _ in turns) == rows and all(count <= size for count, size in turns)

        def lies(size: int) -> bool:
            return taken(made.blocks, (640, 2560, 1, 1), int8_blocks._image(size), torch.get_num_threads())

        if any(map(lies, FEWER)):
            assert all(lies(size) for _, size in turns)

    def few(blocks: Any, shape: Any, image: tuple[int, int], threads: int) -> bool:
        return image[0] * image[1] == 128

    monkeypatch.setattr(int8_blocks, "taken", few)
    assert list(int8_blocks._turns(made.blocks, 640, 2560, 300, 512)) == [(128, 128), (128, 128), (44, 128)]
    monkeypatch.setattr(int8_blocks, "taken", lambda *_: False)
    assert list(int8_blocks._turns(made.blocks, 640, 2560, 300, 256)) == [(256, 256), (44, 44)]
