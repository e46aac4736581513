"""Files of regions as other tools and people write them: what is text, what is JSON, and what is too much."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stages.config import ConfigError
from stages.regions.config import parse
from stages.regions.document import read_document
from stages.regions.files import overrides, plain
from stages.tiles import Size
from stages.workflow.complete import complete

CANVAS = {
    "canvas_width": 512,
    "canvas_height": 256,
    "regions": [{"prompt": "a cat 🐈", "row_init": 0, "row_end": 256, "col_init": 0, "col_end": 512}],
}
TILING = {"tile_width": 256, "tile_height": 256, "tile_row_overlap": 0, "tile_col_overlap": 0}
PROMPTS = [["a", "b", "c"], ["d", "e", "f"]]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def written(text: str, name: str = "regions.yaml") -> Path:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return written


@pytest.mark.parametrize("name", ["regions.json", "regions.yaml", "regions"])
@pytest.mark.parametrize("indent", ["\t", None, 2])
def test_json_is_read_as_json(write: Callable[..., Path], name: str, indent: Any) -> None:
    """Tabs are not YAML, and YAML takes an escaped emoji for two halves."""
    text = json.dumps(CANVAS, indent=indent)
    assert "\\ud83d" in text
    assert read_document(write(text, name)) == CANVAS
    assert read_document(write("\ufeff" + text, name)) == CANVAS


def test_a_file_of_another_tool_goes_all_the_way(make_config: Callable[..., Any], write: Callable[..., Path]) -> None:
    file = write(json.dumps(CANVAS, indent="\t"), "canvas.json")
    job = complete(make_config({"regions": str(file), "prompt": None, "width": 8}, derive=False))
    assert [region.prompt for region in job.regions.regions] == ["a cat 🐈"]
    assert (job.config.width, job.config.height) == (512, 256)


@pytest.mark.parametrize("text", ["2024-01-01", "1984", "no", "1e5", "0x10", "12:30:45", "3.10"])
def test_a_prompt_is_text_as_it_is_written(write: Callable[..., Path], text: str) -> None:
    found = read_document(write(f"- prompt: {text}\n  negative_prompt: {text}\n  box: [0, 0, 1, 1]\n"))
    assert found == [{"prompt": text, "negative_prompt": text, "box": [0, 0, 1, 1]}]
    assert read_document(write(f"grid: [[{text}, b], [c, {{prompt: {text}}}]]"))["grid"] == [
        [text, "b"],
        ["c", {"prompt": text}],
    ]


def test_what_is_no_prompt_keeps_its_kind(write: Callable[..., Path]) -> None:
    found = read_document(write("{background: false, overlap: 64, regions: [{prompt: ~, seed: 3, weight: 0.5}]}"))
    assert found == {"background": False, "overlap": 64, "regions": [{"prompt": None, "seed": 3, "weight": 0.5}]}


@pytest.mark.parametrize(
    ("text", "name", "said"),
    [
        ("{'prompt': 1}", "x.json", "a YAML or JSON file of regions"),
        ("[" * 100_000, "x.json", "a YAML or JSON file of regions"),
        ("[" * 100_000, "x.yaml", "a YAML or JSON file of regions"),
        ("[" * 30 + "]" * 30, "x.yaml", "20 levels deep"),
        ('"\\ud83d"', "x.json", "text that UTF-8 can write"),
        ("x" * 4_000_001, "x.yaml", "at most 4000000 bytes"),
        ("- !!python/object/apply:os.system [true]", "x.yaml", "a YAML or JSON file"),
    ],
)
def test_what_is_refused(write: Callable[..., Path], text: str, name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_document(write(text, name))


def test_aliases_count_where_they_are_used(write: Callable[..., Path]) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    with pytest.raises(ConfigError, match=r"at most 100000 values \(aliases count where they are used\)"):
        read_document(write("\n".join(lines)))
    with pytest.raises(ConfigError, match="20 levels deep"):
        read_document(write("&a [*a]"))


def test_a_folder_or_nothing_is_no_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match="no such file"):
            read_document(path)


@pytest.mark.parametrize(
    ("change", "key", "expected"),
    [
        ({"gc_tiles": [[1, 2], [3, 4]]}, "regions.gc_tiles[0]", "a row of 3 values"),
        ({"gc_tiles": [[1, 2, 3]]}, "regions.gc_tiles", "2 rows of 3 values"),
        ({"gc_tiles": [1, 2, 3]}, "regions.gc_tiles[0]", "a row of 3 values"),
        ({"gc_tiles": [[1, 2, 3], [4, "five", 6]]}, "regions.gc_tiles[1][1]", "a number"),
        ({"seed_tiles": [[1, 2, 3], [4]]}, "regions.seed_tiles[1]", "a row of 3 values"),
        ({"seed_tiles_mode": [["full"] * 3, ["full", "exclusive", "full"]]}, "regions.seed_tiles_mode[1][1]", "full;"),
        ({"prompt": [["a", "b", "c"], ["d", 5, "f"]]}, "regions.prompt[1][1]", "a text"),
        ({"prompt": {"a": 1}}, "regions", "one of"),
        ({"prompt": [["a"], ["b", "c"]]}, "regions.prompt", "rows of equal length"),
        (
            {"seed_reroll_regions": [[0, 256, 0, 256]]},
            "regions.seed_reroll_regions[0]",
            "[row0, row1, col0, col1, seed]",
        ),
        ({"seed_reroll_regions": 3}, "regions.seed_reroll_regions", "a list"),
    ],
)
def test_tables_of_a_tiling_file_have_a_value_a_tile(change: dict[str, Any], key: str, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse({**TILING, "prompt": PROMPTS, **change}, size=Size(512, 768))
    assert error.value.key.startswith(key) and expected in str(error.value)


@pytest.mark.parametrize("table", [None, 3, [[1, 2, 3], [4, 5, 6]]])
def test_a_table_may_be_one_value(table: Any) -> None:
    written, _ = plain({**TILING, "prompt": PROMPTS, "gc_tiles": table})
    found = [region["guidance_scale"] for region in written["regions"]]
    assert found == ([1, 2, 3, 4, 5, 6] if isinstance(table, list) else [table] * 6)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"regions": 5}, "regions.regions"),
        ({"regions": "x"}, "regions.regions"),
        ({"reroll_regions": {"a": 1}}, "regions.reroll_regions"),
        ({"reroll_regions": [{"area": [0, 256, 0], "seed": 1}]}, "regions.reroll_regions[0].area"),
        ({"reroll_regions": [{"area": 5, "seed": 1}]}, "regions.reroll_regions[0].area"),
        ({"regions": [{"ref_img": "x.png", "area": 5}]}, "regions[0].area"),
    ],
)
def test_shapes_of_a_canvas_file(change: dict[str, Any], key: str) -> None:
    def read() -> None:
        overrides({**CANVAS, **change})
        parse({**CANVAS, **change}, size=Size(256, 512))

    with pytest.raises(ConfigError) as error:
        read()
    assert error.value.key == key
