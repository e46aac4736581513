"""The rows of ``benchmarks.techniques``: what is done, by which way, and what was published of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

RTX, TITAN = "RTX 3090", "TITAN RTX, 50 steps"
HALF = {"dtype": "float16"}


@dataclass(frozen=True, kw_only=True)
class Work:
    """Pictures of Stable Diffusion 1.5; ``steps`` of as many as a picture takes are run."""

    width: int
    height: int
    scheduler: str = "ddim"
    batch: int = 1
    steps: dict[str, int]  # by device
    full: int = 50


WORKS = {
    "512": Work(width=512, height=512, steps={"cuda": 20, "cpu": 4}),
    "1024": Work(width=1024, height=1024, steps={"cuda": 6, "cpu": 3}),
    "4k": Work(width=3840, height=2224, scheduler="unipc", steps={"cuda": 4, "cpu": 0}, full=20),
    "batch": Work(width=512, height=512, batch=32, steps={"cuda": 4, "cpu": 0}),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """``kind``: stock (diffusers' pipeline, ``options`` of ``_techniques_ways.stock``) or ours (``options`` are
    overrides). ``share``: of the work's steps, for slow ways."""

    name: str
    work: str = "512"
    kind: str = "stock"
    options: dict[str, Any] = field(default_factory=dict)
    published: str = ""
    devices: tuple[str, ...] = ("cuda",)
    share: float = 1.0


BOTH = ("cuda", "cpu")


def _ours(name: str, *, work: str = "512", published: str = "", devices: tuple[str, ...] = BOTH, **options: Any) -> Row:
    given = {key.replace("__", "."): value for key, value in options.items()}
    return Row(name=name, work=work, kind="ours", options=given, published=published, devices=devices)


STAY: dict[str, Any] = {"technique__offload": "none"}
MERGED: dict[str, Any] = {"technique__tome__ratio": 0.5}
CACHED: dict[str, Any] = {"technique__step_cache__interval": 5}
WHOLE: dict[str, Any] = {"work": "1024", "denoise__tile_size": 1024}  # one tile, as the libraries do it
LARGE: dict[str, Any] = {"work": "4k", "devices": ("cuda",), "budget": "1500MB"}
DEEP = "DeepCache, SD 2.1, 50 steps, RTX A5000"
ROWS = (
    Row(name="fp32", published=f"{RTX}: 8.4 GB, 7.51 it/s; {TITAN}: 9.50 s", devices=BOTH),
    Row(name="fp16, SDPA", options=HALF, published=f"{TITAN}: 3.61 s (2.63x)"),
    Row(
        name="sequential", options={**HALF, "offload": "sequential"}, published="< 3 GB (slicing alone 3.2)", share=0.4
    ),
    _ours("offload=stream, least memory", budget="least", decode__tile_size=128),
    _ours("offload=stream, 800 MB", budget="800MB"),
    Row(name="4K, tiled VAE", work="4k", options={**HALF, "vae_tiling": True}, published="8 GB"),
    _ours("4K, offload=stream, 1.5 GB", **LARGE),
    _ours("UNet stays, the rest leaves (stages)", published=f"{RTX}: 3.2 of 8.4 GB (0.38)", **STAY),
    Row(name="TF32", options={"tf32": True}),
    Row(name="bf16", options={"dtype": "bfloat16"}, published=f"{RTX}: 4.7 GB (0.56), 19.1 it/s (2.54x)", devices=BOTH),
    Row(
        name="channels-last",
        options={**HALF, "channels_last": True},
        published=f"{TITAN}: 3.30 s (2.88x)",
    ),
    Row(name="fp32, channels-last", options={"channels_last": True}, devices=("cpu",)),
    Row(name="bf16, channels-last", options={"dtype": "bfloat16", "channels_last": True}, devices=("cpu",)),
    _ours("bf16, UNet stays (stages)", devices=("cpu",), technique__dtype="bf16", **STAY),
    _ours("bf16, offload=stream, 800 MB", devices=("cpu",), technique__dtype="bf16", budget="800MB"),
    Row(name="math attention", options={**HALF, "attention": "math"}),
    Row(name="fp32, math attention", options={"attention": "math"}, devices=("cpu",)),
    Row(name="sliced attention", options={**HALF, "attention": "sliced"}, published="3.2 GB"),
    Row(name="fp32, sliced attention", options={"attention": "sliced"}, devices=("cpu",)),
    Row(
        name="xFormers",
        options={**HALF, "attention": "xformers"},
        published=f"memory-efficient attention, {TITAN}: 2.63 s (3.61x)",
    ),
    Row(
        name="sequential, sliced",
        options={**HALF, "offload": "sequential", "attention": "sliced"},
        published="< 2 GB",
        share=0.4,
    ),
    Row(name="model offload", options={**HALF, "offload": "model"}, published=f"{RTX}: 3.6 of 8.4 GB (0.43)"),
    Row(name="group offload (leaf, stream)", options={**HALF, "offload": "group"}),
    Row(
        name="traced",
        options={**HALF, "channels_last": True, "compile": "trace"},
        published=f"{TITAN}: 3.21 s (2.96x)",
    ),
    Row(name="fp32, traced", options={"compile": "trace"}, devices=("cpu",)),
    _ours("ToMe 0.5 (stages)", published=f"{RTX}: 19 to 20 it/s (1.05x)", **MERGED, **STAY),
    _ours("step cache 5 (stages)", published=f"{DEEP}: 2.61 to 0.81 s (3.24x)", **CACHED, **STAY),
    _ours("step cache 5, offload=stream, 800 MB", budget="800MB", **CACHED),
    _ours("ToMe 0.5, offload=stream, 800 MB", budget="800MB", **MERGED),
    Row(name="1024x1024", work="1024", options=HALF, published=f"{RTX}: 7.6 GB"),
    Row(
        name="1024x1024, VAE tiling",
        work="1024",
        options={**HALF, "vae_tiling": True},
        published=f"{RTX}: 5.1 GB (0.67)",
    ),
    _ours("1024x1024 whole (stages)", **WHOLE, **STAY),
    _ours("1024x1024 whole, ToMe 0.5 (stages)", **WHOLE, **MERGED, **STAY),
    _ours(
        "1024x1024 whole, step cache 5 (stages)",
        published=f"{DEEP}: 13.83 to 4.43 s (3.12x)",
        **WHOLE,
        **CACHED,
        **STAY,
    ),
    _ours("1024x1024 whole, offload=stream, least memory", **WHOLE, budget="least"),
    _ours("1024x1024 in tiles, offload=stream, 800 MB", work="1024", budget="800MB"),
    _ours("4K, ToMe 0.5, offload=stream, 1.5 GB", **LARGE, **MERGED),
    _ours("4K, step cache 5, offload=stream, 1.5 GB", **LARGE, **CACHED),
    Row(name="batch of 32", work="batch", options=HALF),
    Row(name="batch of 32, VAE slicing", work="batch", options={**HALF, "vae_slicing": True}),
    _ours("attention=math (stages)", technique__attention="math", **STAY),
    _ours("attention=sliced (stages)", technique__attention="sliced", **STAY),
    _ours("attention=xformers (stages)", technique__attention="xformers", **STAY),
    _ours("attention=openvino (stages)", devices=("cpu",), technique__attention="openvino", **STAY),
    _ours("offload=sequential (stages)", technique__offload="sequential"),
    _ours("offload=group (stages)", technique__offload="group"),
    _ours("offload=model (stages)", technique__offload="model"),
    _ours("compile=trace (stages)", technique__compile="trace", **STAY),
    Row(name="compiled", options={**HALF, "channels_last": True, "compile": "compile"}),
    _ours("compile=compile (stages)", technique__compile="compile", **STAY),
    Row(name="fp32, compiled", options={"compile": "compile"}, devices=("cpu",)),
)
