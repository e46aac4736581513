"""``technique.linfusion``: self-attention of a UNet that is linear in the number of tokens, with weights of its own.

LinFusion (arXiv 2409.02097) as it is published: a folder with ``config.json``, whose ``modules_list`` says which
attention modules are replaced, and a safetensors file with ``{index}.to_q.weight`` and so on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from stages.config import ConfigError, close_match, on_gpu
from stages.families.facts import facts_of
from stages.files import read_json
from stages.hashes import file_hash, fingerprint
from stages.memory.raw import read_entries
from stages.techniques.base import SAMPLING, Technique

if TYPE_CHECKING:
    from torch import Tensor, nn

    from stages.canvas.key_means import CanvasMeans
    from stages.canvas.mixture import Turns
    from stages.memory.layout import Layout, Slot
    from stages.memory.refs import TensorRef
    from stages.memory.source import WeightSource

PATH, SCOPE = "technique.linfusion.path", "technique.linfusion.scope"
_APART = {
    "launch.nproc": 1,
    "launch.nnodes": 1,
    "denoise.dilated.enabled": False,
    "technique.offload": "stream",
    "technique.compile": "none",
    "technique.tome.ratio": 0,
    "technique.step_cache.interval": 1,
}
SCOPES = ("tile", "canvas")
WEIGHTS = "diffusion_pytorch_model.safetensors"
_AROUND = frozenset({"Transformer2DModel", "BasicTransformerBlock"})  # self-attention
_FOLDER = "a folder with config.json and a .safetensors file"
_FETCH = "The published ones: hf download Yuanshi/LinFusion-1-5 --local-dir FOLDER (LinFusion-2-1, LinFusion-XL)."


class Part(NamedTuple):
    """One module of ``modules_list``: ``width`` channels in ``heads`` heads, ``hidden`` inside of f (-1: no f)."""

    name: str
    width: int
    heads: int
    hidden: int

    def shapes(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """(parameter here, name in the file, shape) of each."""
        square = (self.width, self.width)
        for here, there in (("keys.to_k", "to_k"), ("keys.to_v", "to_v"), ("queries.to_q", "to_q")):
            yield f"{here}.weight", f"{there}.weight", square
        yield "queries.to_out.weight", "to_out.0.weight", square
        yield "queries.to_out.bias", "to_out.0.bias", (self.width,)
        if self.hidden == -1:
            return
        inside = {0: (self.hidden, self.width), 1: (self.hidden,), 3: (self.width, self.hidden)}
        for here, there in (("keys.to_k_", "to_k_"), ("queries.to_q_", "to_q_")):
            for index, shape in inside.items():
                yield f"{here}.{index}.weight", f"{there}.{index}.weight", shape
                yield f"{here}.{index}.bias", f"{there}.{index}.bias", shape[:1]


class LinFusion(Technique):
    """Every attention module that the folder lists becomes a linear one."""

    name = "linfusion"
    keys = (PATH, SCOPE)
    whole = frozenset({"LinearKeys", "LinearQueries"})  # products over a batch round by its size: a micro-batch

    @classmethod
    def of(cls, config: DictConfig) -> LinFusion | None:
        return cls(config) if config.technique.linfusion.path else None

    def __init__(self, config: DictConfig) -> None:
        self.folder, self.scope = Path(config.technique.linfusion.path), config.technique.linfusion.scope
        self._own: dict[str, TensorRef] = {}
        self._means: CanvasMeans | None = None
        if self.scope == "canvas":
            self.through, self.joins = _AROUND, False
            self.lanes = False  # what brings parked activations back follows one thread

    @classmethod
    def check(cls, config: DictConfig) -> None:
        scope, folder = config.technique.linfusion.scope, config.technique.linfusion.path
        if scope not in SCOPES:
            raise ConfigError(SCOPE, scope, f"one of {', '.join(SCOPES)}", close_match(scope, SCOPES))
        if not folder:
            return
        if not facts_of(config).unet:
            raise ConfigError(PATH, folder, "none for a transformer", "It replaces the self-attention of a UNet.")
        if scope == "canvas":
            _check_canvas(config)
        if Path(folder).is_dir():  # one that is gone is what it was: its results may all be there
            _check(Path(folder))
        elif cls(config)._unknown(Path(config.output_dir) / ".store" / ".identity"):
            raise ConfigError(PATH, folder, _FOLDER, _FETCH)

    def _unknown(self, cache: Path) -> bool:
        try:
            return not self.fingerprint(cache)
        except (FileNotFoundError, ConfigError):
            return True

    def fingerprint(self, cache: Path) -> Mapping[str, Any]:
        files = (self.folder / "config.json", weights_file(self.folder))
        hashes = {str(index): file_hash(file, cache) for index, file in enumerate(files)}
        return {PATH: fingerprint(hashes), SCOPE: self.scope}

    def touches(self, stage: str) -> bool:
        return stage in SAMPLING

    def on_model(self, network: nn.Module, component: str) -> None:
        import torch

        from stages.linear_attention import LinearAttention
        from stages.memory.layout import owner
        from stages.memory.tensors import read_header

        if self.scope == "canvas":
            from stages.canvas.key_means import CanvasMeans
            from stages.canvas.turns import meet

            self._means = CanvasMeans(meet)
        refs, modules = read_header(weights_file(self.folder)), dict(network.named_modules())
        for index, part in enumerate(modules_list(self.folder)):
            found = _width(modules.get(part.name))
            if found != part.width:
                got = f"no self-attention {part.name}" if found is None else f"{part.name} of {found} channels"
                hint = f"{PATH}={self.folder} was made for another model."
                raise ConfigError(PATH, f"a {component} with {got}", f"{part.name} of {part.width} channels", hint)
            with torch.device("meta"):
                linear = LinearAttention(part.width, part.heads, part.hidden).requires_grad_(False).eval()
            linear.exchange = self._means
            parent, last = owner(network, part.name)
            setattr(parent, last, linear)
            self._own |= {f"{part.name}.{here}": refs[f"{index}.{there}"] for here, there, _ in part.shapes()}

    def before_call(self, batch: Any, step: Tensor, inputs: dict[str, Tensor]) -> None:
        if self._means is not None and not batch.samples.is_meta:
            self._means.begin(batch)

    def turns(self, folder: Path) -> Turns | None:
        if self.scope != "canvas":
            return None
        from stages.canvas.turns import in_turns

        def run(calls: Sequence[Callable[[], Tensor]]) -> Iterator[Tensor]:
            assert self._means is not None
            self._means.start()
            return in_turns(calls, folder / "waiting.bin")

        return run

    def on_source(self, source: WeightSource, layout: Layout) -> WeightSource:
        from stages.memory.source import CheckpointSource

        return Beside(source, CheckpointSource(self._own), frozenset(self._own))


class Beside:
    """A source of weights, some of which (``names``) come from another one."""

    def __init__(self, source: WeightSource, other: WeightSource, names: frozenset[str]) -> None:
        self._source, self._other, self._names = source, other, names

    def read(self, slots: Sequence[Slot], start: int, packed: Tensor) -> None:
        for source, inside in ((self._other, True), (self._source, False)):
            if mine := [slot for slot in slots if (slot.name in self._names) == inside]:
                source.read(mine, start, packed)

    def close(self) -> None:
        self._other.close()
        self._source.close()


def weights_file(folder: Path) -> Path:
    """The published name, or the only safetensors file; ConfigError for none and for several."""
    found = [folder / WEIGHTS] if (folder / WEIGHTS).is_file() else sorted(folder.glob("*.safetensors"))
    if folder.is_dir() and len(found) != 1:
        raise ConfigError(PATH, f"{folder} with {len(found)} .safetensors files", _FOLDER, _FETCH)
    return found[0] if found else folder / WEIGHTS


def modules_list(folder: Path) -> list[Part]:
    """What the folder's ``config.json`` says. ConfigError for anything else."""
    config = read_json(folder / "config.json")
    listed = config.get("modules_list") if isinstance(config, dict) else None
    if not isinstance(listed, list) or not listed:
        raise ConfigError(PATH, str(folder), f"{_FOLDER}; config.json has a modules_list", _FETCH)
    return [_part(folder, number, one) for number, one in enumerate(listed)]


def _part(folder: Path, number: int, entry: Any) -> Part:
    said: Mapping[str, Any] = entry if isinstance(entry, dict) else {}
    name, width, heads = (said.get(key) for key in ("module_name", "dim_n", "heads"))
    hidden = said.get("projection_mid_dim")
    hidden = width if hidden is None else hidden
    whole = all(type(value) is int for value in (width, heads, hidden)) and isinstance(name, str)
    if not whole or min(width, heads) < 1 or width % heads or not (hidden == -1 or hidden > 0):  # type: ignore[operator,type-var]
        expected = "module_name, dim_n (a multiple of heads), heads, projection_mid_dim (null, -1 or a width)"
        raise ConfigError(f"{PATH}={folder}: modules_list[{number}]", entry, expected)
    return Part(name, width, heads, hidden)  # type: ignore[arg-type]


def _check(folder: Path) -> None:
    """That the weights are those of the config."""
    wanted = {
        f"{index}.{there}": shape
        for index, part in enumerate(modules_list(folder))
        for _, there, shape in part.shapes()
    }
    file = weights_file(folder)
    try:
        found = {name: entry.shape for name, entry in read_entries(file).items()}
    except (OSError, ValueError) as error:
        raise ConfigError(PATH, str(file), "a safetensors file", str(error)) from None
    for name, shape in wanted.items():
        if found.get(name) != shape:
            got = f"{file.name} with {name} {list(found[name])}" if name in found else f"{file.name} without {name}"
            raise ConfigError(PATH, got, f"{name} {list(shape)}, as its config.json says", _FETCH)


def _check_canvas(config: DictConfig) -> None:
    """That all tiles are in one process and stand still where they have to."""
    hint = f"With {SCOPE}=canvas every tile waits for all the others at each attention."
    if find_spec("greenlet") is None:
        raise ConfigError(SCOPE, "canvas", "tile without the package greenlet", "pip install greenlet")
    if on_gpu(config):
        raise ConfigError(SCOPE, "canvas", "tile on a GPU", "There a pass is one recording, which cannot stand still.")
    for key, off in _APART.items():
        value = OmegaConf.select(config, key)
        if value is not None and value != off:
            raise ConfigError(key, value, f"{off} with {SCOPE}=canvas", hint)


def _width(module: Any) -> int | None:
    """Channels of a self-attention; None for anything else."""
    linears = [getattr(module, name, None) for name in ("to_q", "to_k", "to_v")]
    widths = {getattr(linear, "in_features", None) for linear in linears}
    widths |= {getattr(linear, "out_features", None) for linear in linears}
    return widths.pop() if len(widths) == 1 else None
