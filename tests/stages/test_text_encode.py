"""Prompts to embeddings: what is written, what is warned about."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from in_process import Work, look
from torch import Tensor

from stages.families.sd import StableDiffusion
from stages.memory.tensors import read_header, read_tensors
from stages.models.tokenizers import LEFT, Room, room


def embeddings(work: Work, **values: object) -> dict[str, Tensor]:
    return read_tensors(work.run(values, until="text_encode")["text_encode"] / "embeddings.safetensors")


def test_shapes_and_names(work: Work) -> None:
    found = embeddings(work, prompt="a cat", negative_prompt="dog")
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {
        "prompt_embeds": (1, 77, 32),
        "negative_prompt_embeds": (1, 77, 32),
    }
    swapped = embeddings(work, prompt="dog", negative_prompt="a cat")
    assert torch.equal(found["prompt_embeds"], swapped["negative_prompt_embeds"])


def test_a_prompt_that_is_too_long_is_named_from_where_it_is_cut(work: Work) -> None:
    words = " ".join(f"w{index}" for index in range(60))
    short = embeddings(work, prompt=words[:70])
    assert work.notes == []
    long = embeddings(work, prompt=words, prompt_weighting="off")
    (note,) = work.notes
    assert note.startswith("warning: the prompt is longer than 77 tokens; not used: '") and note.endswith("w 5 9'")
    assert long["prompt_embeds"].shape == short["prompt_embeds"].shape


def test_a_negative_prompt_that_is_too_long_is_named_too(work: Work) -> None:
    embeddings(work, negative_prompt="x" * 90, prompt_weighting="off")
    assert len(work.notes) == 1


def test_unknown_words_of_a_closed_vocabulary(work: Work, tmp_path: Path) -> None:
    shutil.copytree(work.checkpoint, tmp_path / "model")
    (tmp_path / "model" / "tokenizer" / "known_words.json").write_text(json.dumps(["a", "cat", "no"]))
    other = Work(tmp_path / "other", tmp_path / "model")
    embeddings(other, prompt="A cat, no ZEBRA! a Zebra", negative_prompt="dogs 3d")
    (note,) = other.notes
    assert "does not know: zebra, dogs, d." in note and "model=sd15" in note


@pytest.mark.parametrize("prompt", ["", "  ", "\n", "😀", "介绍", "${x}", "a" * 10_000])
def test_hostile_prompts(work: Work, prompt: str) -> None:
    found = embeddings(work, prompt=prompt)
    assert found["prompt_embeds"].isfinite().all()


def test_the_file_is_the_same_bytes_every_time(work: Work) -> None:
    first = work.run(until="text_encode")["text_encode"] / "embeddings.safetensors"
    second = Work(work.output_dir.with_name("b"), work.checkpoint)
    assert (
        first.read_bytes() == (second.run(until="text_encode")["text_encode"] / "embeddings.safetensors").read_bytes()
    )
    assert list(read_header(first)) == ["negative_prompt_embeds", "prompt_embeds"]


@pytest.mark.parametrize("name", ["prompt_embeds", "negative_prompt_embeds"])
def test_embeddings_that_are_not_finite_end_the_stage(work: Work, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    original = StableDiffusion.encode

    def spoiled(*arguments: Any) -> dict[str, torch.Tensor]:
        embeds = original(*arguments)
        embeds[name][0, 1, 2] = float("nan")
        return embeds

    monkeypatch.setattr(StableDiffusion, "encode", spoiled)
    with pytest.raises(ValueError, match=rf"text_encode: {name}: 1 of \d+ numbers are NaN or infinite"):
        embeddings(work)
    assert not list((work.output_dir / ".store" / "text_encode").glob("*/manifest.json"))


def test_the_memory_of_tokenizers_is_planned(work: Work, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By the size of their files; CLIP's stays open beside its encoder, as weights of words are applied with it."""
    monkeypatch.setattr("stages.text_encode.room", lambda folder, unigram: Room(0, 0, 0))
    none = look(work.config(), "text_encode")["text_encode"]
    monkeypatch.setattr("stages.text_encode.room", lambda folder, unigram: Room(50_000_000, 900_000_000, LEFT))
    large = look(work.config(), "text_encode")["text_encode"]
    assert large.extra - none.extra == 50_000_000
    assert large.imports >= large.base + 800_000_000 > none.imports  # while it is opened, no weight is there
    (tmp_path / "merges.txt").write_bytes(bytes(500_000))
    (tmp_path / "vocab.json").write_bytes(bytes(1_000_000))
    words = room(tmp_path)
    assert words.held == 9 * 1_500_000 and words.left == LEFT
    (tmp_path / "tokenizer.json").write_bytes(bytes(2_400_000))  # read in the place of the two
    assert room(tmp_path).held == 9 * 2_400_000 < room(tmp_path, unigram=True).held
    assert room(tmp_path / "none") == Room(0, 0, 0)
