"""Distil linear attention for the embedded model: ``python -m training.linfusion``, a minute on a GPU.

Every self-attention of the UNet gets a linear one beside it (LinFusion, arXiv 2409.02097), which begins with its
projections. In the first phase each learns to say what its attention says of the same tokens, and what it says goes on
through the network, so that the next ones are trained on what they will see. In the second one the whole network
learns to predict what the stock one predicts. The rest of the network stays as it is.
"""

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stages.linear_attention import LinearAttention
from stages.memory.layout import owner
from stages.techniques.linfusion import WEIGHTS, Part

from .clock import Clock, Phase
from .denoiser import LatentSource, choose_timesteps, choose_tokens
from .library import Library
from .models import MODEL, make_scheduler
from .optim import Trainee
from .source import Source
from .train import HELD_OUT


class Pupil(nn.Module):
    """A linear attention in the place of ``attention``; ``alone``: it does not look at that any more."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.attention, self.alone, self.loss = attention, False, torch.zeros(())
        width = attention.to_q.in_features
        self.linear = LinearAttention(width, attention.heads, width).to(attention.to_q.weight.device)
        keys, queries = self.linear.keys, self.linear.queries
        known = {keys.to_k: "to_k", keys.to_v: "to_v", queries.to_q: "to_q", queries.to_out: "to_out.0"}
        with torch.no_grad():
            for module, name in known.items():
                module.load_state_dict(attention.get_submodule(name).state_dict())
            for inner in (keys.to_k_, queries.to_q_):  # it adds nothing at first
                inner[-1].weight.zero_()  # type: ignore[index]
                inner[-1].bias.zero_()  # type: ignore[index]

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        """``[B, N, width]`` of the same."""
        if self.alone:
            return self.linear(hidden_states)
        wanted = self.attention(hidden_states)
        with torch.enable_grad():
            found = self.linear(hidden_states)
            self.loss = F.mse_loss(found.float(), wanted.float()) / wanted.float().var()
        return found.detach()


def pupils(unet: nn.Module) -> dict[str, Pupil]:
    """Put one in the place of every self-attention; by the names of these."""
    found = {name: Pupil(module) for name, module in unet.named_modules() if name.endswith("attn1")}
    for name, pupil in found.items():
        parent, last = owner(unet, name)
        setattr(parent, last, pupil)
    return found


class Work:
    """Noised latents of scenes with their captions, as the network was trained on."""

    def __init__(self, unet: Any, text: Any, vae: Any, given: argparse.Namespace, seed: int, base: int = 0) -> None:
        device = torch.device(given.device)
        self.text, self.generator = text, torch.Generator(device=device).manual_seed(seed)
        self.library = Library.make(given.groups, given.per_group, seed, device)
        source = Source(self.library, device, seed + 1, size=given.size, seed_base=base)
        self.latents = LatentSource(source, vae, vae.config.scaling_factor, given.pool)
        for _ in range(given.fill - 1):
            self.latents.grow()
        self.alphas, self.dtype = make_scheduler().alphas_cumprod.to(device), unet.dtype

    @torch.no_grad()
    def draw(self, batch: int) -> dict[str, Any]:
        """Arguments of the UNet."""
        rows = self.latents.ring.sample(batch, self.generator)
        x = rows["latents"].float()
        t = choose_timesteps(rows["crop"], self.generator)
        tokens = choose_tokens(self.library, rows, self.generator)
        a = self.alphas[t].view(-1, 1, 1, 1)
        noise = torch.randn(x.shape, generator=self.generator, device=x.device)
        noisy = (a.sqrt() * x + (1 - a).sqrt() * noise).to(self.dtype, memory_format=torch.channels_last)
        states = self.text(tokens).last_hidden_state
        return {"sample": noisy, "timestep": t, "encoder_hidden_states": states, "return_dict": False}


@torch.no_grad()
def error(unet: Any, stock: Any, work: Work, batches: int) -> float:
    """Mean square of the difference of predictions, relative to the stock one's."""
    found = []
    for _ in range(batches):
        inputs = work.draw(16)
        wanted = stock(**inputs)[0].float()
        found.append(float(F.mse_loss(unet(**inputs)[0].float(), wanted) / wanted.square().mean()))
    return sum(found) / len(found)


def distil(unet: Any, stock: Any, work: Work, given: argparse.Namespace) -> dict[str, Pupil]:
    """Train for so long; the UNet's pupils, with averaged weights."""
    found = pupils(unet)
    trainee = Trainee(
        {name: one.linear for name, one in found.items()}, device=work.alphas.device, decay=0.998, dtype=torch.float32
    )
    seconds, share = 60 * given.minutes, 0.0 if given.resume else 0.5
    if given.resume:
        trainee.load_weights(read(given.resume, found))
    clock = Clock({"layers": share * seconds, "network": (1 - share) * seconds}, {}, seconds)
    phase = Phase(clock, "layers")
    while phase.go():
        with torch.no_grad():
            unet(**work.draw(given.batch))
        losses = torch.stack([one.loss for one in found.values()])
        trainee.step(losses.sum(), phase.lr(given.lr, warmup=20))
        phase.tick(given.batch, loss=losses.detach().mean())
    for one in found.values():
        one.alone = True
    phase = Phase(clock, "network")
    while phase.go():
        inputs = work.draw(given.batch)
        with torch.no_grad():
            wanted = stock(**inputs)[0].float()
        loss = F.mse_loss(unet(**inputs)[0].float(), wanted)
        trainee.step(loss, phase.lr(given.lr / 2, warmup=20))
        phase.tick(given.batch, loss=loss.detach())
    for name, one in found.items():
        one.linear.load_state_dict(trainee.ema[name].state_dict())
    return found


def read(folder: Path, found: dict[str, Pupil]) -> dict[str, dict[str, Tensor]]:
    """Weights that ``write`` wrote, of every pupil, in float32."""
    tensors = load_file(folder / WEIGHTS)
    return {
        name: {here: tensors[f"{index}.{there}"].float() for here, there, _ in _part(name, one).shapes()}
        for index, (name, one) in enumerate(found.items())
    }


def _part(name: str, one: Pupil) -> Part:
    width = one.attention.to_q.in_features
    return Part(name, width, one.attention.heads, width)


def write(folder: Path, found: dict[str, Pupil]) -> float:
    """The published layout, in fp16; its MB."""
    listed: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    for index, (name, one) in enumerate(found.items()):
        part, state = _part(name, one), one.linear.state_dict()
        listed.append({"module_name": name, "dim_n": part.width, "heads": part.heads, "projection_mid_dim": None})
        for here, there, _ in part.shapes():
            tensors[f"{index}.{there}"] = state[here].detach().to("cpu", torch.float16).contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS)
    (folder / "config.json").write_text(
        json.dumps({"_class_name": "LinFusion", "modules_list": listed}, indent=1) + "\n"
    )
    return (folder / WEIGHTS).stat().st_size / 1e6


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL, help="diffusers folder of the model")
    parser.add_argument("--out", type=Path, default=MODEL / "linfusion", help="folder for config.json and weights")
    parser.add_argument("--resume", type=Path, metavar="DIR", help="begin with the linear attention that lies there")
    parser.add_argument("--minutes", type=float, default=0.85, help="of training; scenes are rendered before")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--groups", type=int, default=200)
    parser.add_argument("--per-group", type=int, default=64)
    parser.add_argument("--fill", type=int, default=100, help="groups that are rendered, whole scenes and crops")
    parser.add_argument("--pool", type=int, default=6400)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    began, device = time.monotonic(), torch.device(given.device)
    torch.manual_seed(given.seed)
    kinds: dict[str, Any] = {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel, "vae": AutoencoderKL}
    stock, text, vae = (
        kind.from_pretrained(given.model / name, torch_dtype=torch.float32).to(device).eval().requires_grad_(False)
        for name, kind in kinds.items()
    )
    unet: Any = copy.deepcopy(stock)
    with torch.no_grad():
        work = Work(stock, text, vae, given, given.seed + 301)
        held = Work(stock, text, vae, argparse.Namespace(**{**vars(given), "fill": 8}), given.seed + 7919, HELD_OUT)
    print(f"{given.fill} groups of scenes in {time.monotonic() - began:.0f} s", flush=True)
    found = distil(unet, stock, work, given)
    print(f"error of predictions on held-out scenes {error(unet, stock, held, 8):.5f}", flush=True)
    print(f"{given.out}: {write(given.out, found):.1f} MB, {time.monotonic() - began:.0f} s in all", flush=True)


if __name__ == "__main__":
    main()
