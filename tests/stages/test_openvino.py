"""``technique.attention=openvino``: torch's up to rounding, the same bytes in any group, memory as planned."""

from __future__ import annotations

import subprocess
import sys
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from in_process import Work
from test_techniques import LEAVES, MODEL, ONE, TILES, denoised, made, peak, refused

from stages.config import ROOT, ConfigError
from stages.memory.lanes import Lanes
from stages.memory.planner import Line
from stages.openvino_attention import POOL, Attending, Kernels, Shape, attend_by
from stages.techniques import attention
from stages.techniques.attention import OPENVINO, Attention, chosen
from stages.workflow.complete import complete

ON = {**TILES, "technique.attention": "openvino"}
there = pytest.mark.skipif(attention.find_spec("openvino") is None, reason="pip install -e '.[openvino]'")


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of the queries that OpenVINO has had."""
    found: list[torch.Size] = []
    call = Kernels.__call__
    monkeypatch.setattr(Kernels, "__call__", lambda self, *given: found.append(given[0].shape) or call(self, *given))
    return found


@there
def test_it_is_torchs_attention_and_the_same_bytes_in_any_group(work: Work, taken: list[torch.Size]) -> None:
    off = denoised(work, TILES)
    found = denoised(work, ON)
    assert {len(shape) for shape in taken} == {4}
    assert 0 < (found - off).abs().max() < 1e-4
    assert torch.equal(denoised(work, ON, models={"unet": LEAVES}, group_size=100), found)


@there
def test_attention_without_masks_is_taken(taken: list[torch.Size]) -> None:
    query, text = torch.randn(2, 48, 4, 8).transpose(1, 2), torch.randn(2, 7, 4, 8).transpose(1, 2)
    lying = torch.randn(2, 4, 48, 8)  # as no processor gives it: copied
    many, words = torch.randn(1, 4096, 2, 8).transpose(1, 2), torch.randn(1, 64, 2, 8).transpose(1, 2)
    masked = {"attn_mask": torch.ones(2, 1, 1, 48, dtype=torch.bool)}
    for given, more, own in (
        ((query, query, query), {}, True),
        ((lying, query, lying), {}, True),
        ((many, words, words), {}, True),
        ((query, text, text), {}, False),
        ((many, words, words[..., :4]), {}, False),  # no width of the keys
        ((many, words[:, :1], words[:, :1]), {"enable_gqa": True}, False),  # heads that share keys
        ((query, query, query), masked, False),
    ):
        taken.clear()
        with Attending(Kernels()):
            found = F.scaled_dot_product_attention(*given, **more)
            named = F.scaled_dot_product_attention(query=given[0], key=given[1], value=given[2], **more)
        assert bool(taken) == own and torch.equal(found, named)
        assert torch.allclose(found, F.scaled_dot_product_attention(*given, **more), atol=1e-5)


@there
def test_each_lane_has_kernels_of_its_own() -> None:
    query, kernels, lanes = torch.randn(6, 48, 4, 8).transpose(1, 2), Kernels(), Lanes(2)
    together, found, asked = threading.Barrier(2, timeout=20), dict[int, torch.Tensor](), set[int]()

    def attend(sample: int) -> None:
        if sample < 2:
            together.wait()  # both are at it
        asked.add(id(kernels.request(Shape(48, 48, 4, 8), torch.float32)))
        found[sample] = kernels(*[query[sample : sample + 1]] * 3)

    lanes.each(range(6), attend)
    lanes.close()
    expected = F.scaled_dot_product_attention(query, query, query)
    assert len(asked) == 2
    assert torch.allclose(torch.cat([found[sample] for sample in range(6)]), expected, atol=1e-5)


@there
def test_a_transformers_attention_is_taken(taken: list[torch.Size]) -> None:
    from diffusers import FluxTransformer2DModel

    sides: dict[str, Any] = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2}
    network = FluxTransformer2DModel(**sides, joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4))
    given = {"hidden_states": torch.randn(1, 16, 64), "encoder_hidden_states": torch.randn(1, 3, 8)}
    given |= {"pooled_projections": torch.randn(1, 8), "timestep": torch.ones(1)}
    given |= {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(3, 3)}
    with torch.inference_mode():
        expected = network(**given, return_dict=False)[0]
        attend_by(Kernels(), [one for one in network.modules() if type(one).__name__ in Attention.whole])
        found = network(**given, return_dict=False)[0]
    assert taken == [torch.Size((1, 2, 19, 8))] * 2 and torch.allclose(found, expected, atol=1e-5)


@there
def test_a_processor_without_a_kernel_is_refused_by_the_look(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    from openvino import CompiledModel

    class Written(str):
        def get_rt_info(self) -> dict[str, Any]:
            return {"layerType": self}

        def astype(self, kind: type) -> str:
            return str(self)

    class Graph:
        def get_ops(self) -> list[Written]:
            return [Written("MatMul"), Written("Softmax")]

    monkeypatch.setattr(CompiledModel, "get_runtime_model", lambda self: Graph())
    network, sample = made(work, ON), torch.empty(2, 4, 32, 32, device="meta")
    text = torch.empty(2, 77, 32, device="meta")
    with pytest.raises(ConfigError, match=r"technique.attention: got 'openvino', expected auto: .* in f32"):
        peak(network, lambda unet: unet(sample, torch.empty((), device="meta"), encoder_hidden_states=text), 2)


def test_what_cannot_act_is_refused(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    on = {"technique.attention": "openvino"}
    refused(work, {**on, "device": "cuda"}, r"technique.attention: got 'openvino', .*GPU.*device=cpu")
    refused(work, {**on, "technique.dtype": "fp16"}, "expected fp32 or bf16 on a CPU")
    monkeypatch.setattr(attention, "find_spec", lambda name: None)
    refused(work, {**on}, r"a package that is installed. pip install .*\[openvino\]")
    monkeypatch.setattr(attention, "find_spec", lambda name: name)
    compiled = {**on, "technique.compile": "trace", "technique.offload": "none"}
    refused(work, compiled, "technique.compile: got 'trace', expected none with technique.attention=openvino")


PAYS = {"denoise.tile_size": 512, "technique.dtype": "bf16"}
VECTORS, MATRICES = "fpu avx512f avx512_bf16", "fpu avx512f avx512_bf16 amx_bf16"
ELSEWHERE: dict[str, tuple[dict[str, Any], str, bool]] = {
    "few tokens": ({"denoise.tile_size": 256}, VECTORS, True),
    "half of the side": ({"model.family": "sdxl"}, VECTORS, True),
    "a transformer": ({"model.family": "flux"}, VECTORS, True),
    "float32": ({"technique.dtype": "fp32"}, VECTORS, True),
    "another one is said": ({"technique.attention": "sdpa"}, VECTORS, True),
    "a GPU": ({"device": "cuda"}, VECTORS, True),
    "compiled": ({"technique.compile": "trace"}, VECTORS, True),
    "linear attention": ({"technique.linfusion.path": "anywhere"}, VECTORS, True),
    "products of matrices": ({}, MATRICES, True),
    "no bf16": ({}, "fpu avx512f", True),
    "not installed": ({}, VECTORS, False),
}


@pytest.mark.parametrize("case", ELSEWHERE)
def test_auto_takes_it_where_it_pays(case: str, make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    values, flags, installed = ELSEWHERE[case]
    given: list[tuple[dict[str, Any], str, bool]] = [({}, VECTORS, True), (values, flags, installed)]
    found = []
    for more, has, there in given:
        monkeypatch.setattr(attention, "cpu_field", lambda *_, has=has: has)
        monkeypatch.setattr(attention, "find_spec", lambda _, there=there: there or None)
        found.append(chosen(make_config({**PAYS, **more})))
    assert found == ["openvino", values.get("technique.attention", "auto")]
    sdxl = make_config({**PAYS, "model.family": "sdxl", "denoise.tile_size": 1024})
    monkeypatch.setattr(attention, "cpu_field", lambda *_: VECTORS)
    monkeypatch.setattr(attention, "find_spec", lambda _: True)
    assert chosen(sdxl) == "openvino"


def test_a_run_says_which_it_takes(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "cpu_field", lambda *_: VECTORS)
    monkeypatch.setattr(attention, "find_spec", lambda _: True)
    config = complete(make_config(PAYS, derive=False)).config
    assert config.technique.attention == "openvino"
    assert complete(make_config({**PAYS, "memory.budget": "8GB"}, derive=False)).config.technique == config.technique


def test_the_library_is_planned_for() -> None:
    line = Line(unit="mid.a", fixed=3, slope=2, workspace=1)
    model = replace(MODEL, cuts=(replace(MODEL.cuts[0], lines=(line,)),))
    assert Attention("openvino").planned(model).cuts[0].peak(2) == line.peak(2) + OPENVINO
    assert Attention("math").planned(model) == model


@there
def test_what_kernels_keep_is_in_the_look(work: Work) -> None:
    def activations(kind: str) -> int:
        sample, text = torch.empty(2, 4, 64, 64, device="meta"), torch.empty(2, 77, 32, device="meta")
        found = made(work, {**ONE, "technique.attention": kind})
        return peak(found, lambda unet: unet(sample, torch.empty((), device="meta"), encoder_hidden_states=text), 2)

    stock = activations("auto")
    assert stock <= activations("openvino") <= stock + POOL[torch.float32] * 64**2 * 32 * 4


@there
def test_memory_is_as_planned_and_importing_is_left_to_those_that_use_it() -> None:
    """In a process of its own, for its peak."""
    script = """
import os
import sys
from pathlib import Path
import torch
from stages.memory.monitor import own_peak_rss, usage
from stages.memory.trim import drop_clean_pages
from stages.openvino_attention import POOL, Kernels
from stages.techniques.attention import OPENVINO
assert not any(name.split(".")[0] == "openvino" for name in sys.modules)
tokens = torch.randn(2, 2048, 8, 40).transpose(1, 2)
drop_clean_pages()
torch.nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)
Path("/proc/self/clear_refs").write_text("5")
before = usage(os.getpid()).rss
found = Kernels()(tokens, tokens, tokens)
took = own_peak_rss() - before - found.nbytes
assert not [name for name in sys.modules if "telemetry" in name]
print(took, OPENVINO + POOL[tokens.dtype] * tokens[0].nbytes)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    took, planned = map(int, done.stdout.split())
    assert 0.3 * planned < took <= planned
