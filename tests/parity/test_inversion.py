"""Textual inversion against diffusers' ``load_textual_inversion``: same files, float32, tiny encoders."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from in_process import Work, look
from omegaconf import OmegaConf
from safetensors.torch import save_file

from stages.config import ROOT, ConfigError
from stages.families import inversion, sd, sdxl
from stages.models.checkpoint import Checkpoint
from stages.models.tokenizers import read_tokenizer
from stages.stitch import settings
from stages.techniques.inversion_file import read

TEXTS = ("a cat in mystyle, mystyle", "bad-hands and dog")


def encoders(folder: Path, pipeline: Any) -> Any:
    """A checkpoint's own tokenizers, the pipeline's networks before any word was learned."""
    tokenizers = Checkpoint.open(str(folder))
    return SimpleNamespace(
        checkpoint=tokenizers,
        open=lambda name: nullcontext(SimpleNamespace(model=getattr(pipeline, name))),
        device="cpu",
        **dict.fromkeys(("start", "advance", "note"), lambda value: None),
    )


def config_of(*files: Path) -> Any:
    made = {"prompt_weighting": "auto", "text_encode": {"clip_skip": None}}
    return OmegaConf.create({**made, "model": {"name": "x", "embeddings": [str(file) for file in files]}})


def with_room(encoder: Any) -> None:
    """The tiny tokenizers have fewer words than their highest number says, by which diffusers makes room for more."""
    resize = encoder.resize_token_embeddings
    encoder.resize_token_embeddings = lambda count: resize(max(count, 1200))


def close(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    return torch.allclose(got, wanted, atol=1e-4)


@torch.no_grad()
def test_as_diffusers_has_it_for_one_encoder(small: Callable[[str], Path], tmp_path: Path) -> None:
    folder = small("sd15")
    pipelines = [StableDiffusionPipeline.from_pretrained(folder) for _ in range(2)]
    wide = pipelines[0].text_encoder.config.hidden_size
    torch.manual_seed(1)
    save_file({"emb_params": torch.randn(3, wide)}, tmp_path / "mystyle.safetensors")
    save_file({"bad-hands": torch.randn(wide)}, tmp_path / "learned_embeds.safetensors")
    files = (tmp_path / "mystyle.safetensors", tmp_path / "learned_embeds.safetensors")
    with_room(pipelines[1].text_encoder)
    pipelines[1].load_textual_inversion(str(files[0]), token="mystyle")
    pipelines[1].load_textual_inversion(str(files[1]))
    got = sd.FAMILY.encode(encoders(folder, pipelines[0]), [TEXTS], config_of(*files))
    wanted = pipelines[1].encode_prompt(TEXTS[0], "cpu", 1, True, TEXTS[1])
    for name, theirs in zip(("prompt_embeds", "negative_prompt_embeds"), wanted, strict=True):
        assert close(got[name][0], theirs[0]), name
    without = sd.FAMILY.encode(encoders(folder, StableDiffusionPipeline.from_pretrained(folder)), [TEXTS], config_of())
    assert not close(without["prompt_embeds"], got["prompt_embeds"])


@torch.no_grad()
def test_as_diffusers_has_it_for_two_encoders(small: Callable[[str], Path], tmp_path: Path) -> None:
    folder = small("sdxl")
    ours, theirs = (StableDiffusionXLPipeline.from_pretrained(folder) for _ in range(2))
    torch.manual_seed(2)
    widths = {"clip_l": ours.text_encoder.config.hidden_size, "clip_g": ours.text_encoder_2.config.hidden_size}
    rows = {name: torch.randn(2, width) for name, width in widths.items()}
    save_file(rows, tmp_path / "mystyle.safetensors")
    for name, suffix in (("clip_l", ""), ("clip_g", "_2")):
        own = {kind: getattr(theirs, f"{kind}{suffix}") for kind in ("text_encoder", "tokenizer")}
        with_room(own["text_encoder"])
        theirs.load_textual_inversion(rows[name], token="mystyle", **own)
    got = sdxl.FAMILY.encode(encoders(folder, ours), [TEXTS], config_of(tmp_path / "mystyle.safetensors"))
    wanted = theirs.encode_prompt(TEXTS[0], negative_prompt=TEXTS[1], device="cpu")
    for (name, own), expected in zip(got.items(), wanted, strict=True):
        assert close(own[0], expected[0]), name


def test_refused_where_it_does_not_fit_and_in_the_fingerprint(work: Work, tmp_path: Path) -> None:
    wide = Checkpoint.open(str(work.checkpoint)).config("text_encoder")["hidden_size"]
    save_file({"emb_params": torch.randn(2, wide)}, tmp_path / "good.safetensors")
    save_file({"emb_params": torch.randn(2, wide + 1)}, tmp_path / "wide.safetensors")
    save_file({"clip_l": torch.randn(2, 8), "clip_g": torch.randn(2, 8)}, tmp_path / "xl.safetensors")
    save_file({"a": torch.randn(2, 8), "b": torch.randn(2, 8)}, tmp_path / "other.safetensors")
    (tmp_path / "old.pt").write_bytes(b"x")

    def config(name: str) -> Any:
        return work.config({"model.embeddings": [str(tmp_path / name)]})

    good, without = (work.states(one)["text_encode"].fingerprint for one in (config("good.safetensors"), work.config()))
    assert good != without
    assert settings(config("good.safetensors"))["model"]["embeddings"] == ["good"]  # no path
    assert read(tmp_path / "good.safetensors").tokens == ["good", "good_1"]
    for name, said in (("xl.safetensors", "SDXL"), ("other.safetensors", "emb_params"), ("old.pt", "Unpickling")):
        with pytest.raises(ConfigError, match=said):
            config(name)
    with pytest.raises(ConfigError, match=f"with {wide + 1} numbers a row"):
        look(config("wide.safetensors"), "text_encode")
    found = work.run(
        {"model.embeddings": [str(tmp_path / "good.safetensors")], "prompt": "a good cat"}, until="text_encode"
    )
    assert (found["text_encode"] / "embeddings.safetensors").is_file()


def test_a_word_that_the_tokenizer_has_is_refused(tmp_path: Path) -> None:
    """It would keep its number, and every word with a higher one would be taken for a learned one."""
    tokenizer = read_tokenizer("CLIPTokenizer", ROOT / "models" / "embedded" / "tokenizer")
    word = next(one for one in tokenizer.get_vocab() if one.isalpha() and len(one) > 1)
    save_file({"emb_params": torch.randn(1, 8)}, tmp_path / f"{word}.safetensors")
    with pytest.raises(ConfigError, match=f"model.embeddings: .*{word} is one"):
        inversion.joined(tokenizer, [("a", "")], config_of(tmp_path / f"{word}.safetensors"))
