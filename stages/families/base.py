"""The door of a family: how its prompts are encoded, its denoiser called and its networks cut.

A new family is one file here, one entry of ``facts.FACTS`` and one file in ``conf/model``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from stages.canvas.mixture import TileBatch, View
from stages.canvas.space import Space
from stages.families.encoders import Encoders
from stages.families.facts import FACTS, Facts
from stages.families.schedules import Schedule
from stages.memory.units import Blocks
from stages.models.checkpoint import Checkpoint, CheckpointError
from stages.techniques.base import Technique
from stages.tiles import Size, Tile

Embeds = Mapping[str, Tensor]  # by the names of ``Facts.embeds``, one row a prompt
Run = Callable[..., Tensor]  # ``run(call, *inputs)``: a whole pass, its result is valid until the next one

TILE = 64 * 64 * 320  # activations of a 64x64 tile of Stable Diffusion, at its first level


def plainly(call: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """``call(*inputs)``."""
    return call(*inputs)


class Denoiser(ABC):
    """Predicts for tile batches; the same object runs with weights and, on meta, is looked at.

    Args:
        network: the stock model (weights may be streamed).
        embeds: one row a prompt.
        config: of the run.
        canvas: its size in latents.
        dtype, device: of the computation.
        techniques: those that touch the stage.
        run: how a whole pass is run (``Streamer.graphed``).
    """

    def __init__(
        self,
        network: nn.Module,
        embeds: Embeds,
        config: DictConfig,
        *,
        canvas: Size,
        dtype: torch.dtype,
        device: str = "cpu",
        techniques: Sequence[Technique] = (),
        run: Run = plainly,
    ) -> None:
        self.network, self.config, self.canvas = network, config, canvas
        self.dtype, self.device, self._run = dtype, device, run
        self._count = len(next(rows for name, rows in embeds.items() if not name.startswith("negative_")))
        self._embeds = {
            name: torch.cat([rows, embeds[f"negative_{name}"]] if f"negative_{name}" in embeds else [rows]).to(
                device, self.dtype_of(name)
            )
            for name, rows in embeds.items()
            if not name.startswith("negative_")
        }
        self._techniques = tuple(techniques)

    def dtype_of(self, name: str) -> torch.dtype:
        """Of the embeddings ``name``."""
        return self.dtype

    def __call__(self, batch: TileBatch, timestep: Tensor) -> Tensor:
        """``[N, C, h, w]`` float32: what the scheduler expects of the model (noise, velocity or flow)."""
        inputs = self.inputs(batch, timestep)
        for technique in self._techniques:
            technique.before_call(batch, timestep, inputs)
        names = tuple(inputs)

        def call(*values: Tensor) -> Tensor:
            return self.predict(**dict(zip(names, values, strict=True)))

        predicted: Any = self._run(call, *inputs.values())
        for technique in self._techniques:
            predicted = technique.after_call(timestep, predicted)
        return self.outputs(predicted, batch).float().to(batch.samples.device)

    @abstractmethod
    def inputs(self, batch: TileBatch, timestep: Tensor) -> dict[str, Tensor]:
        """The arguments of ``predict``, on the device: a row a sample, or no dimension."""

    @abstractmethod
    def predict(self, **inputs: Tensor) -> Tensor:
        """One pass of the network."""

    def outputs(self, predicted: Tensor, batch: TileBatch) -> Tensor:
        """``[N, C, h, w]`` of what ``predict`` gave."""
        return predicted

    def rows(self, batch: TileBatch, name: str) -> Tensor:
        """The embeddings ``name`` of each sample, or ``negative_<name>`` of those without the prompt, ``[N, ...]``; one
        row of these is everybody's."""
        pairs, found = zip(batch.prompt_rows, batch.unconditional, strict=True), self._embeds[name]
        negatives = max(1, len(found) - self._count)
        places = [self._count + row % negatives if without else row for row, without in pairs]
        return found.index_select(0, torch.tensor(places, device=self.device))


class Family(ABC):
    """One family of models."""

    name: ClassVar[str]

    @property
    def facts(self) -> Facts:
        return FACTS[self.name]

    @abstractmethod
    def encode(self, encoders: Encoders, texts: Sequence[tuple[str, str]], config: DictConfig) -> dict[str, Tensor]:
        """Embeddings of (prompt, negative prompt) pairs, float32, a row each; encoders are open one after the other."""

    @abstractmethod
    def text_call(
        self, component: str, network_config: Mapping[str, Any], longest: int | None = None
    ) -> tuple[Callable[[Any], Any], int]:
        """(``call(network)`` on meta, samples of one): what ``encode`` does with a text encoder, for the look.

        Args:
            longest: tokens of a text at most, where the family does not pad them (``Facts.own_length``).
        """

    def encoders(self, checkpoint: Checkpoint) -> tuple[str, ...]:
        """The text encoders that are opened, one after the other."""
        return tuple(name for name in self.facts.components["text_encode"] if "encoder" in name)

    def tokenizer(self, component: str, checkpoint: Checkpoint) -> Any:
        """That of a text encoder, as ``encode`` opens it."""
        return checkpoint.tokenizer(component.replace("text_encoder", "tokenizer"))

    def unused(self, component: str, network_config: Mapping[str, Any]) -> tuple[str, ...]:
        """Modules of a component that no stage calls: their weights are not read."""
        return ()

    def largest_tile(self, network_config: Mapping[str, Any]) -> int | None:
        """Latents a side that the denoiser has positions for; None: any."""
        return None

    @abstractmethod
    def denoiser(self, network: nn.Module, embeds: Embeds, config: DictConfig, **options: Any) -> Denoiser:
        """Its denoiser; ``options`` are those of ``Denoiser``."""

    @abstractmethod
    def example(
        self, network_config: Mapping[str, Any], tile: Size, samples: int, longest: int | None = None
    ) -> tuple[TileBatch, Embeds]:
        """Meta tensors like those of a run: ``samples`` samples of tiles of ``tile`` latents, and embeddings; for
        ``longest`` see ``text_call``."""

    def guidance(self, checkpoint: Checkpoint) -> str:
        """cfg | embedded | none: how a guidance scale acts on this very model."""
        return self.facts.guidance

    def asks(self, views: Sequence[View], checkpoint: Checkpoint) -> list[View]:
        """The views as the network is asked about them."""
        embedded = self.guidance(checkpoint) != "cfg"
        return [view._replace(embedded=embedded) for view in views]

    @abstractmethod
    def blocks(self, component: str) -> Blocks:
        """Where a component may be cut."""

    @abstractmethod
    def micro_batch(self, network_config: Mapping[str, Any], tile: Size, device: str) -> int:
        """Samples that go through a block at a time: whole pairs. It depends on the model, the tile and the kind of
        device only, never on the budget: the same samples meet the same kernels, and so the picture is the same."""

    @abstractmethod
    def schedule(self, scheduler: Any, tile: Size, checkpoint: Checkpoint) -> Schedule:
        """The diffusers scheduler as the sampler drives it, for tiles of so many latents."""

    def space(self, checkpoint: Checkpoint) -> Space:
        """Where the denoiser's latents lie."""
        return Space()

    def refuse(self, checkpoint: Checkpoint, components: Sequence[str]) -> str | None:
        """Why those of a checkpoint cannot be used: a trait of a config that is not understood here."""
        return None

    def check(self, checkpoint: Checkpoint, components: Sequence[str]) -> None:
        """Raises:
        CheckpointError: what ``refuse`` says.
        """
        if why := self.refuse(checkpoint, components):
            raise CheckpointError(f"model.path={checkpoint.folder}: {why}")


def on_cpu(one: int) -> int:
    """Samples that go through a block at a time on a CPU: whole pairs, of about one 64x64 tile of Stable Diffusion; of
    larger tiles the halves of a pair one after the other.

    Args:
        one: activations of a sample, at the first level.
    """
    return 2 * min(8, TILE // one) if one <= TILE else 1


def example_tiles(tile: Size, samples: int, channels: int) -> TileBatch:
    """A batch on meta: samples with and without the prompt in turns, all of row 0."""
    box = Tile(0, 0, 0, 0, tile.height, tile.width)
    return TileBatch(
        samples=torch.empty((samples, channels, *tile), device="meta"),
        prompt_rows=(0,) * samples,
        unconditional=tuple(index % 2 == 0 for index in range(samples)),
        tiles=(box,) * samples,
    )
