"""Hostile and broken checkpoints: each is refused clearly before any work, or gives the picture of the whole one."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

from benchmarks._faults.common import Bench, Tally, image, last, unclear, within_budget, worked

COMPONENTS = ("unet", "vae", "text_encoder")
Change = Callable[[Path], None]
REFUSED, SAME, EITHER = "refused", "same", "either"  # EITHER: another model, or refused: never a crash


def weights(folder: Path, component: str) -> Path:
    return (
        folder / component / ("model.safetensors" if "encoder" in component else "diffusion_pytorch_model.safetensors")
    )


def _json(file: str, key: str, value: Any, folder: Path) -> None:
    """``key`` of a JSON file; None removes it."""
    content = json.loads((folder / file).read_text())
    content.pop(key, None)
    if value is not None:
        content[key] = value
    (folder / file).write_text(json.dumps(content))


def _text(file: str, text: str | bytes, folder: Path) -> None:
    (folder / file).write_bytes(text.encode() if isinstance(text, str) else text)


def _gone(file: str, folder: Path) -> None:
    path = folder / file
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _folder(file: str, folder: Path) -> None:
    _gone(file, folder)
    (folder / file).mkdir()


def _linked(file: str, to: str, folder: Path) -> None:
    _gone(file, folder)
    (folder / file).symlink_to(to)


def _fifo(file: str, folder: Path) -> None:
    _gone(file, folder)
    os.mkfifo(folder / file)


def _header(component: str, change: Callable[[dict[str, Any]], Any], folder: Path) -> None:
    """Another header over the same data."""
    file = weights(folder, component)
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    text = json.dumps(change(header) or header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def _entry(key: str, value: Any, header: dict[str, Any]) -> None:
    """Of the second tensor."""
    names = [name for name in header if name != "__metadata__"]
    header[names[1]][key] = value(header[names[1]][key]) if callable(value) else value


def _overlapping(header: dict[str, Any]) -> None:
    names = [name for name in header if name != "__metadata__"]
    one, same = next(pair for pair in combinations(names, 2) if header[pair[0]]["shape"] == header[pair[1]]["shape"])
    header[same]["data_offsets"] = header[one]["data_offsets"]


def _raw(component: str, change: Callable[[bytes], bytes], folder: Path) -> None:
    file = weights(folder, component)
    file.write_bytes(change(file.read_bytes()))


def _not_finite(component: str, value: float, folder: Path) -> None:
    _raw(component, lambda content: content[:-4] + struct.pack("<f", value), folder)


def _all_not_finite(component: str, folder: Path) -> None:
    def change(content: bytes) -> bytes:
        (length,) = struct.unpack("<Q", content[:8])
        return content[: 8 + length] + struct.pack("<f", float("nan")) * ((len(content) - 8 - length) // 4)

    _raw(component, change, folder)


def _sharded(place: str, folder: Path) -> None:
    """An index that names ``place`` for every tensor."""
    file = weights(folder, "unet")
    content = file.read_bytes()
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    shard = file.parent / "diffusion_pytorch_model-00001-of-00001.safetensors"
    shutil.copy(file, folder.parent / "outside.safetensors")
    file.rename(shard)
    map_ = {name: place or shard.name for name in header if name != "__metadata__"}
    (file.parent / f"{file.name}.index.json").write_text(json.dumps({"weight_map": map_}))


def _index(content: Any, folder: Path) -> None:
    _sharded("", folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(content))


def _pickle(file: str, folder: Path) -> None:
    """One that writes a file when it is opened."""
    canary = folder.parent / "code-has-run"
    said = f"cos\nsystem\n(S'touch {canary}'\ntR.".encode()
    for path in (folder / file).parent.glob("*.safetensors"):
        path.unlink()
    (folder / file).write_bytes(said)


def _code(folder: Path) -> None:
    """Python beside the configs, and the keys by which libraries would run it."""
    canary = folder.parent / "code-has-run"
    for component in COMPONENTS:
        (folder / component / "modeling.py").write_text(f"open({str(canary)!r}, 'w')\nclass Model: pass\n")
        _json(f"{component}/config.json", "auto_map", {"AutoModel": "modeling.Model"}, folder)
    _json("model_index.json", "_class_name", ["pipeline", "Model"], folder)


TRAITS: tuple[tuple[str, str, Any, str], ...] = (
    *(("unet", "in_channels", value, REFUSED) for value in (8, 9, 0, -4, "4", None if False else 3)),
    *(("unet", "out_channels", value, REFUSED) for value in (8, 3)),
    *(("unet", "class_embed_type", value, REFUSED) for value in ("timestep", "identity", "projection", "nonsense")),
    *(("unet", "addition_embed_type", value, REFUSED) for value in ("text", "text_time", "image")),
    *(("unet", "encoder_hid_dim_type", value, REFUSED) for value in ("text_proj", "image_proj")),
    ("unet", "encoder_hid_dim", 32, REFUSED),
    ("unet", "num_class_embeds", 3, REFUSED),
    ("unet", "attention_type", "gated", REFUSED),
    ("unet", "cross_attention_dim", 64, REFUSED),
    ("unet", "cross_attention_dim", [16, 32], REFUSED),
    ("unet", "block_out_channels", [8, 32], REFUSED),
    ("unet", "block_out_channels", [10**9, 10**9], REFUSED),
    ("unet", "block_out_channels", [], REFUSED),
    ("unet", "block_out_channels", "many", REFUSED),
    ("unet", "layers_per_block", 10**6, REFUSED),
    ("unet", "down_block_types", ["NoSuchBlock2D", "DownBlock2D"], REFUSED),
    ("unet", "norm_num_groups", 3, REFUSED),
    ("unet", "norm_num_groups", 0, REFUSED),
    ("unet", "time_cond_proj_dim", 16, REFUSED),
    ("unet", "act_fn", "nonsense", REFUSED),
    ("unet", "_class_name", "UNet1DModel", REFUSED),
    ("unet", "_class_name", "os.system", REFUSED),
    ("unet", "sample_size", "large", EITHER),
    ("unet", "mid_block_type", "nonsense", REFUSED),
    ("unet", "attention_head_dim", 0, REFUSED),
    ("unet", "unknown_trait", 7, SAME),
    ("vae", "_class_name", "AutoencoderTiny", REFUSED),
    ("vae", "_class_name", "VQModel", REFUSED),
    ("vae", "latent_channels", 16, REFUSED),
    ("vae", "latent_channels", 0, REFUSED),
    ("vae", "in_channels", 4, REFUSED),
    ("vae", "out_channels", 4, REFUSED),
    ("vae", "block_out_channels", [8, 8, 8], REFUSED),
    ("vae", "scaling_factor", float("nan"), REFUSED),
    ("vae", "scaling_factor", 0, REFUSED),
    ("vae", "scaling_factor", "big", REFUSED),
    ("vae", "scaling_factor", 1e30, REFUSED),
    ("vae", "shift_factor", "x", REFUSED),
    ("vae", "latents_mean", [0, 0], EITHER),
    ("vae", "norm_num_groups", 5, REFUSED),
    ("text_encoder", "hidden_size", 64, REFUSED),
    ("text_encoder", "num_hidden_layers", 10**6, REFUSED),
    ("text_encoder", "num_attention_heads", 5, REFUSED),
    ("text_encoder", "vocab_size", 10, REFUSED),
    ("text_encoder", "max_position_embeddings", 3, REFUSED),
    ("text_encoder", "architectures", ["GPT2Model"], EITHER),
    ("text_encoder", "architectures", 3, EITHER),
    ("text_encoder", "model_type", "gpt2", EITHER),
    ("text_encoder", "hidden_act", "nonsense", REFUSED),
    ("text_encoder", "_attn_implementation", "kernels-community/flash", SAME),
    ("text_encoder", "torch_dtype", "nonsense", EITHER),
    ("text_encoder", "layer_norm_eps", float("nan"), REFUSED),
)
SCHEDULER: tuple[tuple[str, Any, str], ...] = (
    ("_class_name", "UNet2DConditionModel", EITHER),
    ("_class_name", "os.system", EITHER),  # the command names another
    ("_class_name", "FlowMatchEulerDiscreteScheduler", EITHER),
    ("_class_name", 3, EITHER),
    ("num_train_timesteps", 10**8, REFUSED),
    ("num_train_timesteps", 0, REFUSED),
    ("num_train_timesteps", "many", REFUSED),
    ("beta_start", float("nan"), REFUSED),
    ("beta_end", 5.0, REFUSED),
    ("beta_schedule", "nonsense", REFUSED),
    ("prediction_type", "nonsense", REFUSED),
    ("timestep_spacing", "nonsense", REFUSED),
    ("trained_betas", [0.1], REFUSED),
    ("unknown", [1], EITHER),
)
_SHAPES = ("", "[]", "null", "{", "3", '"x"', "[" * 100_000, "<html>", "version https://git-lfs.github.com/spec/v1\n")
_NOTHING = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
_JUNK = {f"junk.{number}": _NOTHING for number in range(200_000)}
_INDEXES = ({}, [], None, {"weight_map": None}, {"weight_map": {}}, {"weight_map": [1]}, {"weight_map": {"x": 3}})
_PICKLES = ("unet/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin")


def cases() -> Iterator[tuple[str, Change, str]]:
    """(name, what is done to a copy of the checkpoint, what is to come of it)."""
    for component, key, value, outcome in TRAITS:
        yield f"{component} {key}={value!r:.30}", partial(_json, f"{component}/config.json", key, value), outcome
    for key, value, outcome in SCHEDULER:
        yield f"scheduler {key}={value!r:.30}", partial(_json, "scheduler/scheduler_config.json", key, value), outcome
    for component in COMPONENTS:
        for shape in _SHAPES:
            yield f"{component}/config.json {shape!r:.20}", partial(_text, f"{component}/config.json", shape), REFUSED
        file = f"{component}/{weights(Path(), component).name}"
        for shape in ("", *_SHAPES[-3:], b"\x80\x02", b"PK\x03\x04", b"\xff" * 100, struct.pack("<Q", 0), b"GGUF"):
            yield f"{file} {shape!r:.20}", partial(_text, file, shape), REFUSED
        yield f"{file} gone", partial(_gone, file), REFUSED
        yield f"{file} is a folder", partial(_folder, file), REFUSED
        yield f"{file} is a pipe", partial(_fifo, file), REFUSED
        yield f"{file} is /dev/zero", partial(_linked, file, "/dev/zero"), REFUSED
        yield f"{file} links nowhere", partial(_linked, file, "/nowhere"), REFUSED
        yield f"{file} torn", partial(_raw, component, lambda content: content[: len(content) // 2]), REFUSED
        yield f"{file} NaN", partial(_all_not_finite, component), REFUSED
        yield f"{component} offsets overlap", partial(_header, component, _overlapping), REFUSED
    entries: tuple[tuple[str, Any], ...] = (
        *(
            ("data_offsets", value)
            for value in ([-8, 0], [8, 0], [0, 10**15], [0.0, 4.0], "x", [0], None, [2**63, 2**64])
        ),
        *(("dtype", value) for value in ("F12", "F64", "I8", "F16", 3, None, "os.system")),
        *(("shape", value) for value in ([-1], [10**9, 10**9], "x", [0.5], None, [[1]], [2**62, 4], [])),
    )
    for key, value in entries:
        yield f"header {key}={value!r}", partial(_header, "unet", partial(_entry, key, value)), REFUSED
    yield "a header of 200000 more tensors", partial(_header, "unet", lambda header: _JUNK | header), REFUSED
    yield "a header that is a list", partial(_header, "unet", lambda header: [1, 2]), REFUSED
    yield "metadata of another shape", partial(_header, "unet", lambda h: {**h, "__metadata__": [1]}), EITHER
    yield (
        "a tensor more",
        partial(_header, "unet", lambda header: header | {"extra": _NOTHING}),
        REFUSED,
    )
    yield (
        "the length of the header",
        partial(_raw, "unet", lambda content: struct.pack("<Q", 2**63) + content[8:]),
        REFUSED,
    )
    yield "one weight is infinite", partial(_not_finite, "vae", float("inf")), REFUSED
    for place in ("../outside.safetensors", "/etc/passwd", "..\\x.safetensors", "x.bin", "missing.safetensors", ".."):
        yield f"weight_map names {place}", partial(_sharded, place), REFUSED
    yield "one shard", partial(_sharded, ""), SAME
    for content in (
        {},
        [],
        None,
        {"weight_map": None},
        {"weight_map": {}},
        {"weight_map": [1]},
        {"weight_map": {"x": 3}},
    ):
        yield f"index {content}", partial(_index, content), REFUSED
    for file in (
        "unet/diffusion_pytorch_model.bin",
        "vae/diffusion_pytorch_model.bin",
        "text_encoder/pytorch_model.bin",
    ):
        yield f"a pickle as {file}", partial(_pickle, file), REFUSED
    yield "code beside the configs", _code, SAME
    for file in ("vocab.json", "merges.txt"):
        yield f"tokenizer/{file} gone", partial(_gone, f"tokenizer/{file}"), REFUSED
    for shape in _SHAPES[:6]:
        yield f"tokenizer/vocab.json {shape!r:.20}", partial(_text, "tokenizer/vocab.json", shape), REFUSED
        yield f"tokenizer_config.json {shape!r:.20}", partial(_text, "tokenizer/tokenizer_config.json", shape), EITHER
        yield f"scheduler_config.json {shape!r:.20}", partial(_text, "scheduler/scheduler_config.json", shape), EITHER
        yield f"model_index.json {shape!r:.20}", partial(_text, "model_index.json", shape), EITHER
    yield (
        "a tokenizer of 10**9 tokens",
        partial(_json, "tokenizer/tokenizer_config.json", "model_max_length", 10**9),
        REFUSED,
    )
    yield "tokenizer_class", partial(_json, "tokenizer/tokenizer_config.json", "tokenizer_class", "os.system"), EITHER
    yield "model_index: another class", partial(_json, "model_index.json", "unet", ["diffusers", "VQModel"]), REFUSED
    yield "model_index: another library", partial(_json, "model_index.json", "vae", ["os", "system"]), REFUSED
    for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        yield f"no {name}", partial(_gone, name), EITHER if name == "scheduler" else REFUSED


def run(bench: Bench) -> Tally:
    tally = Tally("hostile checkpoints")
    output, every = bench.scratch / "out", list(cases())
    made = bench.run(output)
    whole = image(output)
    if made.code or whole is None:
        raise SystemExit(f"the run that is to be disturbed failed:\n{made.err}")
    for name, change, outcome in bench.random.sample(every, bench.tries or len(every)):
        tally.tries += 1
        folder = bench.scratch / "hostile" / "model"
        shutil.rmtree(folder.parent, ignore_errors=True)
        shutil.copytree(bench.checkpoint, folder)
        change(folder)
        shutil.rmtree(output, ignore_errors=True)  # a result for the same bytes would be reused
        done = bench.run(output, f"model.path={folder}")
        if (folder.parent / "code-has-run").exists():
            tally.fault("wrong picture", f"{name}: code from the checkpoint has run")
        within_budget(tally, output, name)
        if done.timed_out:
            tally.fault("stuck", f"{name}: {last(done)}")
        elif done.code == 0:
            if outcome == REFUSED or (outcome == SAME and image(output) != whole):
                tally.fault("wrong picture", f"{name}: exit 0")
        elif why := unclear(done):
            tally.fault("unclear", f"{name}: {why}: {last(done)}")
        elif outcome == SAME:
            tally.fault("stuck", f"{name}: {last(done)}")
        elif worked(output) and "NaN or infinite" not in done.err:
            tally.fault("unclear", f"{name}: refused after work: {last(done)}")
    return tally
