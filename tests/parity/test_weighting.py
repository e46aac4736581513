"""Weighted prompts against compel used by hand; whatever a person types arrives, as typed or weighted."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from compel import Compel, ReturnedEmbeddingsType
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import Tensor

from stages.families import sd, sdxl
from stages.families.grammar import Part, plain, read

LONG = " ".join(f"w{index}" for index in range(60))


def test_the_grammar() -> None:
    for text, fragments in {
        "a cat": [("a cat", 1.0)],
        "(a cat)": [("a cat", 1.1)],
        "a ((big)) dog": [("a ", 1.0), ("big", 1.1 * 1.1), (" dog", 1.0)],
        "[red] sea": [("red", 1 / 1.1), (" sea", 1.0)],
        "(sea:1.2), wall": [("sea", 1.2), (", wall", 1.0)],
        "(a [b] c: 1.5 )": [("a ", 1.5), ("b", 1.5 / 1.1), (" c", 1.5)],
        r"\(real\) \[x\] \\": [(r"(real) [x] " + "\\", 1.0)],
        "((a": [("((a", 1.0)],
        "a) b] :)": [("a) b] :)", 1.0)],
        "(a:1e9)": [("a:1e9", 1.1)],
        "(a:9999)": [("(a:9999)", 1.0)],
        "": [],
    }.items():
        (part,) = read(text)
        assert part.weight == 1 and [text for text, _ in part.fragments] == [text for text, _ in fragments]
        assert [weight for _, weight in part.fragments] == pytest.approx([weight for _, weight in fragments])
    assert read("a BREAK b AND (c) :0.5") == (
        Part([("a", 1.0)]),
        Part([("b", 1.0)]),
        Part([("c", 1.1)], 0.5),
    )
    assert plain(read("(a:1.2) [b] BREAK c")) == "a b c"


BY_HAND = {  # as A1111 has it: in compel's grammar
    "a cat, (sea:1.4)": "a cat, (sea)1.4",
    "a (cat:0.4) sea": "a (cat)0.4 sea",
    "a [[cat]] and (dog:1.2)": f"a (cat){1 / 1.1**2} and (dog)1.2",
    "a cat BREAK (dog:1.3)": '("a cat", "(dog)1.3").and()',
    "a cat AND dog :0.5": '("a cat", "dog").and(1, 0.5)',
    LONG: LONG,
}


class Open(NamedTuple):
    """A family's encoders, in memory, and the stock pipeline that they are of."""

    pipeline: Any
    encode: Callable[..., dict[str, Tensor]]


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def opened(request: pytest.FixtureRequest, small: Callable[[str], Path]) -> Open:
    classes: dict[str, Any] = {"sd15": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
    folder, families = small(request.param), {"sd15": sd.FAMILY, "sdxl": sdxl.FAMILY}
    pipeline = classes[request.param].from_pretrained(folder)
    encoders: Any = SimpleNamespace(
        checkpoint=SimpleNamespace(folder=folder, tokenizer=lambda name="tokenizer": getattr(pipeline, name)),
        open=lambda name: nullcontext(SimpleNamespace(model=getattr(pipeline, name))),
        device="cpu",
        **dict.fromkeys(("start", "advance", "note"), lambda value: None),
    )

    @torch.no_grad()
    def encode(*texts: tuple[str, str], way: str = "auto") -> dict[str, Tensor]:
        config = {"prompt_weighting": way, "text_encode": {"clip_skip": None}, "model": {"name": "x"}}
        return families[request.param].encode(encoders, texts, OmegaConf.create(config))

    return Open(pipeline, encode)


def test_as_compel_has_it(opened: Open) -> None:
    of, pipeline = ReturnedEmbeddingsType, opened.pipeline
    wide = hasattr(pipeline, "text_encoder_2")
    taken = of.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED if wide else of.LAST_HIDDEN_STATES_NORMALIZED
    by_hand = []
    for name in ("", "_2") if wide else ("",):
        encoder, tokenizer = getattr(pipeline, f"text_encoder{name}"), getattr(pipeline, f"tokenizer{name}")
        by_hand.append(Compel(tokenizer, encoder, truncate_long_prompts=False, returned_embeddings_type=taken))

    def compel(text: str) -> Tensor:
        return torch.cat([one(text) for one in by_hand], dim=-1)

    got = opened.encode(*((text, "dog") for text in BY_HAND))
    longest = max(compel(text).shape[1] for text in BY_HAND.values())
    assert longest > 77 and got["prompt_embeds"].shape[1] == got["negative_prompt_embeds"].shape[1] == longest
    for row, (text, theirs) in enumerate(BY_HAND.items()):
        for name, wanted in (("prompt_embeds", theirs), ("negative_prompt_embeds", "dog")):
            want = compel(wanted)
            want = torch.cat([want, *[compel("")] * ((longest - want.shape[1]) // 77)], dim=1)
            assert torch.allclose(got[name][row], want[0], atol=1e-4), (text, name)
        if wide:
            pooled = pipeline.encode_prompt(plain(read(text)), device="cpu")[2]
            assert torch.allclose(got["pooled_prompt_embeds"][row], pooled[0], atol=1e-4)


def test_without_signs_and_off_nothing_changes(opened: Open) -> None:
    off, on = (opened.encode(("a cat: sea, dog", ""), way=way) for way in ("off", "auto"))
    assert all(torch.equal(off[name], on[name]) for name in off)
    typed = opened.encode(("a (cat:1.3)", "no"), way="off")["prompt_embeds"]
    assert not torch.equal(typed, opened.encode(("a (cat:1.3)", "no"))["prompt_embeds"])
    assert torch.allclose(opened.encode((r"a \(cat:1.3\)", "no"))["prompt_embeds"], typed, atol=1e-6)


PIECES = ["(", ")", "[", "]", ":1.2)", ":0)", ":-1)", ":.5)", "BREAK", " AND ", " :2 AND", "\\", "\\(", "{a|b}", "cat"]
PIECES += [
    " ",
    ", ",
    "w 1",
    "<|endoftext|>",
    "<|startoftext|>",
    "介绍",
    "😀",
    "\n",
    "\x00",
    "é",
    "x" * 90,
    ":",
    "${x}",
    '"',
]


@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_hostile_prompts_arrive(opened: Open, text: str) -> None:
    states = opened.encode((text, "no"))["prompt_embeds"][0]
    assert states.isfinite().all() and states.shape[0] % 77 == 0
