"""LinFusion: what a tile costs by its size, what prompts lose by it, pictures with attention over all of the canvas.

    python -m benchmarks linfusion --only cost                    # CPU-seconds a tile, and a plot: linear, quadratic
    python -m benchmarks linfusion --only prompts --count 16      # attributes of pictures, PSNR to the stock ones
    python -m benchmarks linfusion --only pictures --sizes 2048   # stock, tile and canvas: peaks, crops to look at

All with the embedded model and the weights that training/linfusion.py distilled for it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks._measure import RESULTS, finish, mb, parser, psnr, runner, summary, table
from benchmarks._quality_attributes import asked, judge_pictures
from benchmarks._quality_samples import samples
from benchmarks.look import look
from stages.config import ROOT

MODEL = ROOT / "models" / "embedded"
FOLDER = RESULTS / "linfusion"
LAYER, NETWORK = (16, 32, 64, 96), (16, 32, 64, 128)  # sides of tiles in latents
WAYS: dict[str, list[str]] = {"stock": [], "tile": [], "canvas": ["technique.linfusion.scope=canvas"]}


def mounted(folder: Path) -> Callable[[Any], None]:
    """Puts the weights of ``folder`` in the place of a UNet's self-attention."""
    from safetensors.torch import load_file

    from stages.linear_attention import LinearAttention
    from stages.memory.layout import owner
    from stages.techniques.linfusion import modules_list, weights_file

    tensors = load_file(weights_file(folder))

    def change(unet: Any) -> None:
        for index, part in enumerate(modules_list(folder)):
            linear = LinearAttention(part.width, part.heads, part.hidden).requires_grad_(False)
            linear.load_state_dict({here: tensors[f"{index}.{there}"].float() for here, there, _ in part.shapes()})
            parent, name = owner(unet, part.name)
            setattr(parent, name, linear)

    return change


def seconds(call: Callable[[], Any], repeats: int) -> float:
    """The best of some, of processor time: others may be at work on the machine."""
    call()
    found = []
    for _ in range(repeats):
        begin = time.process_time()
        call()
        found.append(time.process_time() - begin)
    return min(found)


def cost(folder: Path, repeats: int) -> list[dict[str, Any]]:
    """Processor seconds of a guided pair, float32: Stable Diffusion's first attention, and the whole embedded UNet."""
    import torch
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import Attention

    from stages.linear_attention import LinearAttention

    found, width, heads = [], 320, 8
    stock, linear = Attention(width, heads=heads, dim_head=width // heads), LinearAttention(width, heads, width)
    networks: list[Any] = []
    for change in (lambda unet: None, mounted(folder)):
        networks.append(UNet2DConditionModel.from_pretrained(MODEL, subfolder="unet").float().eval())  # type: ignore[union-attr]
        change(networks[-1])
    with torch.inference_mode():
        for side in LAYER:
            tokens = torch.randn(2, side * side, width)
            times = [seconds(lambda one=one, x=tokens: one(x), repeats) for one in (stock, linear)]
            found.append({"what": "layer", "side": side, "quadratic": times[0], "linear": times[1]})
        for side in NETWORK:
            inputs = torch.randn(2, 4, side, side), torch.tensor(500), torch.randn(2, 77, 160)
            times = [seconds(lambda one=one, x=inputs: one(*x), repeats) for one in networks]
            found.append({"what": "network", "side": side, "quadratic": times[0], "linear": times[1]})
    return found


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Seconds by the tile's side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    titles = {"layer": "one attention of Stable Diffusion 1.5 (320 channels)", "network": "UNet of the embedded model"}
    for axes, (what, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        mine = [row for row in rows if row["what"] == what]
        for kind, marker in (("quadratic", "o"), ("linear", "s")):
            axes.plot([row["side"] for row in mine], [row[kind] for row in mine], marker=marker, label=kind)
        axes.set(
            xscale="log", yscale="log", xlabel="side of a tile, latents", ylabel="processor seconds a pair", title=title
        )
        axes.minorticks_off()
        axes.set_xticks([row["side"] for row in mine], [str(row["side"]) for row in mine])
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def prompts(folder: Path, count: int) -> dict[str, Any]:
    """Attributes that the classifier sees in native-size pictures, stock and linear, and PSNR between the two."""
    every = asked()
    some = every[:: max(1, len(every) // count)][:count]
    paths = {
        name: samples(MODEL, FOLDER / name, [one.prompt for one in some], *options)
        for name, options in (("stock", ()), ("linear", (f"technique.linfusion.path={folder}",)))
    }
    judged = {name: judge_pictures(found, some) for name, found in paths.items()}
    alike = [psnr(a, b) for a, b in zip(paths["stock"], paths["linear"], strict=True)]
    shares = {name: {"right": one["right"], "asked": one["asked"]} for name, one in judged.items()}
    return {**shares, "psnr": sum(alike) / len(alike), "pictures": str(FOLDER)}


def pictures(folder: Path, size: int, ways: list[str], prompt: str, more: list[str]) -> list[dict[str, Any]]:
    """A picture each way: peak of the whole tree, of ``denoise`` and as predicted, and PSNR to the stock picture."""
    found, output = [], FOLDER / "runs"
    for way in ways:
        on = [] if way == "stock" else [f"technique.linfusion.path={folder}"]
        run = f"{way}_{size}"
        given = [f"run={run}", f"prompt={prompt}", f"width={size}", f"height={size}", *on, *WAYS[way], *more]
        done = runner(output, *given, "progress=false", "stage=all").check()
        look(output / run, FOLDER / run)
        (stage,) = [one for one in summary(output, run)["stages"] if one["name"] == "denoise"]
        found.append(
            {
                "way": way,
                "size": size,
                "peak": done.kernel_peak,
                "denoise": stage["peak_rss_bytes"],
                "predicted": stage["predicted_peak_rss_bytes"],
                "denoise_seconds": stage["seconds"],
                "seconds": done.seconds,
                "psnr": None
                if ways[0] != "stock" or way == "stock"
                else psnr(output / f"stock_{size}" / "image.png", output / run / "image.png"),
            }
        )
        print(found[-1], flush=True)
    return found


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--only", choices=("cost", "prompts", "pictures"), help="default: all")
    made.add_argument("--folder", type=Path, default=MODEL / "linfusion", help="LinFusion weights of the model")
    made.add_argument("--repeats", type=int, default=3)
    made.add_argument("--count", type=int, default=64, help="prompts")
    made.add_argument("--sizes", default="2048", help="pixels a side, of pictures")
    made.add_argument("--ways", default="stock,tile,canvas")
    made.add_argument("--prompt", default="a lighthouse on a cliff at sunset")
    made.add_argument("--override", action="append", default=[], metavar="KEY=VALUE", help="of the pictures' runs")
    given = made.parse_args()
    folder, result, checks = given.folder.resolve(), dict[str, Any](), dict[str, bool]()
    if given.only in (None, "cost"):
        result["cost"] = rows = cost(folder, given.repeats)
        names = ("what", "side", "quadratic", "linear")
        table(names, [(r["what"], r["side"], f"{r['quadratic']:.4f} s", f"{r['linear']:.4f} s") for r in rows])
        plot(rows, RESULTS / "linfusion.png")
        largest = max((row for row in rows if row["what"] == "layer"), key=lambda row: row["side"])
        text = f"at {largest['side']} latents a side {largest['quadratic'] / largest['linear']:.1f} times as fast"
        checks[text] = largest["linear"] < largest["quadratic"]
    if given.only in (None, "prompts"):
        result["prompts"] = found = prompts(folder, given.count)
        print(found)
        lost = found["stock"]["right"] - found["linear"]["right"]
        text = f"{lost} of {found['stock']['asked']} attributes are lost, at most a tenth"
        checks[text] = lost <= 0.1 * found["stock"]["asked"]
    if given.only in (None, "pictures"):
        result["pictures"] = rows = []
        for size in map(int, given.sizes.split(",")):
            rows += pictures(folder, size, given.ways.split(","), given.prompt, given.override)
        cells = [
            (r["way"], r["size"], mb(r["peak"]), mb(r["denoise"]), mb(r["predicted"]), f"{r['seconds']:.0f} s")
            for r in rows
        ]
        table(("way", "side", "peak", "denoise", "predicted", "time"), cells)
        for row in rows:
            text = f"{row['way']} at {row['size']}: denoise takes at most 3% more than predicted"
            checks[text] = row["denoise"] <= 1.03 * row["predicted"]
        print(f"look at them: {FOLDER}")
    return finish("linfusion", result, checks)


if __name__ == "__main__":
    sys.exit(main())
