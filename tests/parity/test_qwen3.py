"""Qwen3 as a text encoder against what the stock pipelines make of it: same weights, float32; its layers on meta."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline, ZImagePipeline
from qwen import letters_tokenizer, save_qwen3, tiny_qwen3

from stages.families.encoders import Encoders
from stages.families.qwen3 import QWEN3, encode_qwen3, qwen3_call, qwen3_tokenizer, qwen3_unused
from stages.memory.layout import Layout
from stages.memory.tensors import read_header
from stages.memory.units import split_units
from stages.models import checkpoint as checkpoint_module
from stages.models.checkpoint import Checkpoint
from stages.models.component import construct
from stages.models.loading import Streamer, build, open_model
from stages.models.locate import CheckpointError
from stages.models.measure import cuts
from stages.plans import ModelPlan

LAYERS = 6
TEXTS = ("a cat", "", "the sea at night, " * 40)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "with a head"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Path:
    torch.manual_seed(5)
    to = tmp_path_factory.mktemp("qwen3")
    save_qwen3(to, tiny_qwen3(LAYERS, tie_word_embeddings=request.param))
    assert ("lm_head.weight" in read_header(to / "text_encoder" / "model.safetensors")) is not request.param
    return to


@pytest.fixture
def checkpoint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    monkeypatch.setattr(checkpoint_module, "known_classes", lambda *_: ("Qwen3ForCausalLM",))
    return Checkpoint.open(str(folder), components=("text_encoder",))


def encode(checkpoint: Checkpoint, layers: tuple[int, ...], notes: list[str], **options: bool) -> dict[str, Any]:
    unused = qwen3_unused(checkpoint.config("text_encoder"), layers)

    def opened(name: str) -> AbstractContextManager[Streamer]:
        plan = ModelPlan(resident=(), unit_limit=0, ring_bytes=100_000)
        return open_model(checkpoint.component(name), dtype=torch.float32, blocks=QWEN3, plan=plan, drop=unused)

    encoders = Encoders(
        checkpoint=checkpoint,
        open=opened,
        device="cpu",
        start=lambda count: None,
        advance=lambda count: None,
        note=notes.append,
    )
    return encode_qwen3(encoders, TEXTS, layers, **options)


def test_states_of_several_layers(checkpoint: Checkpoint) -> None:
    """Padded, thinking off, as ``Flux2KleinPipeline``; a text that is too long is said."""
    notes: list[str] = []
    got = encode(checkpoint, (1, 3, 5), notes, thinking=False, padded=True)
    model = tiny_qwen3(LAYERS).from_pretrained(checkpoint.folder / "text_encoder")
    want = Flux2KleinPipeline._get_qwen3_prompt_embeds(
        model, letters_tokenizer(), list(TEXTS), hidden_states_layers=[1, 3, 5]
    )
    for text, states in zip(TEXTS, want, strict=True):
        assert states.std() > 0.1
        torch.testing.assert_close(got[text], states, rtol=0, atol=5e-5 * float(states.detach().std()))
    assert len(notes) == 1 and notes[0].endswith("he sea at night, '")


def test_states_of_the_last_layer_but_one(checkpoint: Checkpoint) -> None:
    """Without padding, thinking on, as ``ZImagePipeline``."""
    got = encode(checkpoint, (LAYERS - 1,), [], thinking=True, padded=False)
    model = tiny_qwen3(LAYERS).from_pretrained(checkpoint.folder / "text_encoder")
    pipeline: Any = SimpleNamespace(text_encoder=model, tokenizer=letters_tokenizer())
    want = ZImagePipeline._encode_prompt(pipeline, list(TEXTS), device=torch.device("cpu"))
    for text, states in zip(TEXTS, want, strict=True):
        torch.testing.assert_close(got[text], states, rtol=0, atol=5e-5 * float(states.detach().std()))
    assert len(got["a cat"]) < len(got[TEXTS[2]]) == 512


def test_what_no_state_passes_is_not_read(checkpoint: Checkpoint) -> None:
    unused = qwen3_unused(checkpoint.config("text_encoder"), (1, 3))
    found = build(checkpoint.component("text_encoder"), dtype=torch.float32, blocks=QWEN3, drop=unused)
    names = [name for name, _ in found.network.named_parameters()]
    assert not any("lm_head" in name or "embed_tokens" in name for name in names)
    assert {name.split(".")[1] for name in names if name.startswith("layers.")} == {"0", "1", "2"}
    weights, ways, _ = cuts(found, lambda network, _: qwen3_call((1, 3))[0](network))
    assert weights == found.layout.nbytes and len(ways) > 1


def test_a_tokenizer_that_says_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no vocabulary in it, expected tokenizer\.json"):
        qwen3_tokenizer(tmp_path)
    tokenizer = letters_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no chat template in it"):
        qwen3_tokenizer(tmp_path)


def test_units_of_the_full_size() -> None:
    """Qwen3-4B in bf16: 36 layers of 202 MB."""
    sizes = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_key_value_heads": 8}
    network = construct("Qwen3Model", {"vocab_size": 151936, "num_attention_heads": 32, "head_dim": 128, **sizes})
    layout = Layout(network, torch.bfloat16, channels_last=False)
    units = {unit.name: unit.nbytes for unit in split_units(network, layout, QWEN3, 210_000_000)}
    assert 201e6 < units["layers.0"] < 203e6 and len(units) == 38
    assert max(unit.nbytes for unit in split_units(network, layout, QWEN3, 0) if unit.name != "embed_tokens") < 51e6
