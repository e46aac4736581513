"""Captions, vocabulary and tokenizer."""

import random
from pathlib import Path

import pytest

from training.captions import caption, detail_captions
from training.scenes import MATERIALS
from training.specs import TIMES, sample_spec
from training.vocabulary import MAX_LENGTH, encode, known_words, save_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    from transformers import CLIPTokenizer

    folder: Path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return CLIPTokenizer.from_pretrained(folder)


def test_at_least_150_known_words_each_one_token(tokenizer) -> None:
    assert len(known_words()) >= 150
    assert all(tokenizer.tokenize(word) == [word + "</w>"] for word in known_words())


def test_fast_encoding_equals_the_tokenizer(tokenizer) -> None:
    rng = random.Random(0)
    for _ in range(300):
        text = caption(rng, sample_spec(rng), rng.randrange(8))
        assert tokenizer(text, padding="max_length", max_length=MAX_LENGTH, truncation=True).input_ids == encode(text)


@pytest.mark.parametrize("text", ["介绍", "🎉 naïve", "(cat:1.2)", "Ελληνικά עברית", "<lora:x:0.8>"])
def test_any_script_has_tokens_and_comes_back(tokenizer, text: str) -> None:
    ids = tokenizer(text).input_ids[1:-1]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids).replace(" ", "") == text.lower().replace(" ", "")


def test_detail_captions_cover_every_pair_and_time() -> None:
    assert len(detail_captions(random.Random(0), 2)) == len(MATERIALS) * (len(MATERIALS) + 1) * len(TIMES) * 2


def test_captions_name_what_is_there() -> None:
    rng = random.Random(3)
    for _ in range(200):
        spec = sample_spec(rng)
        text = caption(rng, spec, 0)
        if spec.subject == "lighthouse":
            assert "lighthouse" in text
        elif spec.subject == "cactus":
            assert "cactus" in text or "saguaro" in text
        else:
            assert "lighthouse" not in text
