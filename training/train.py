"""Train the embedded model: ``python -m training.train --out DIR [--phase vae|denoiser|classifier] [--resume]``.

Phases by wall-clock budget: autoencoder, text encoder + UNet, classifier; one process a GPU. A command ends by itself
before ``--minutes`` with everything exported, and ``--resume`` goes on. Flat files in DIR: ``vae``, ``text_encoder``,
``unet``, ``classifier`` (.safetensors, fp16, large ones in parts), ``figures.json``, ``vae.png``, ``sheet.png``;
``state.pt`` resumes. ``--smoke`` runs everything at toy size on a CPU.
"""

import argparse
import copy
import json
import os
import random
import shutil
import sys
import time
from typing import Any

import torch

from .autoencoder import measure_autoencoder, train_autoencoder
from .captions import caption
from .classifier import Classifier, classify
from .clock import Clock
from .denoiser import LatentSource, measure_denoiser, sample, train_denoiser
from .export import files_of, read_flat, write_flat
from .judge import measure_classifier, train_classifier
from .library import Library, labels
from .models import make_text_encoder, make_unet, make_vae, parameter_count
from .optim import Trainee
from .preview import sheet
from .ranks import MEETING, agree, launch, rank, start
from .settings import Settings, parse
from .source import Source
from .specs import SETTINGS, SUBJECTS, TIMES, sample_spec
from .vocabulary import encode
from .widen import settle

HELD_OUT = 1 << 40  # seeds of held-out scenes start here; training stays below
SHEET_PROMPTS = (
    "a lighthouse on a cliff at sunset",
    "snowy mountains",
    "desert",
    "night sky, full moon over snowy mountains",
    "stormy sea with a sailing boat",
    "a castle in the mountains at sunrise",
    "a cabin in a pine forest at night",
    "a windmill on a green hill, cloudy sky",
    "a hot air balloon over the sea at dusk",
    "a cactus in the desert at sunset",
    "a stone bridge over a lake, snowy mountains in the background",
    "a lone tree in a snowy field, falling snow",
    "a red lighthouse on a beach by day, clear sky",
    "a ship on the sea at night, crescent moon",
    "a sailboat with yellow sails on the sea, the sun",
    "a tent by a lake in the fog at dawn",
)


class Training:
    """All parts, their budgets, and where they are kept."""

    def __init__(self, options: Settings):
        self.options, self.out = options, options.out
        self.out.mkdir(parents=True, exist_ok=True)
        self.device = start(options.device)
        torch.manual_seed(options.seed)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
        o = options
        parts = {
            "vae": {"vae": make_vae(tiny=o.tiny)},
            "denoiser": {"unet": make_unet(tiny=o.tiny), "text_encoder": make_text_encoder()},
            "classifier": {"classifier": Classifier()},
        }
        if o.text:
            loaded: Any = type(parts["denoiser"]["text_encoder"]).from_pretrained(o.text, torch_dtype=torch.float32)
            parts["denoiser"]["text_encoder"].load_state_dict(loaded.state_dict())
        self.trainees = {}
        for name, modules in parts.items():
            placed = {k: m.to(self.device, memory_format=torch.channels_last) for k, m in modules.items()}
            decay = {"vae": 0.998, "denoiser": 0.999, "classifier": 0.998}[name]
            self.trainees[name] = Trainee(placed, device=self.device, decay=decay)
        self.figures: dict = {"tiny": o.tiny, "scaling_factor": 1.0}
        elapsed = self._resume() if o.resume else {}
        budgets = {"vae": o.vae_seconds, "denoiser": o.denoiser_seconds, "classifier": o.classifier_seconds}
        self.clock = Clock(budgets, elapsed, o.stop_after - o.reserve)
        self.ran: list[str] = []

    def _resume(self) -> dict[str, float]:
        state_file, figures_file = self.out / "state.pt", self.out / "figures.json"
        if not figures_file.exists():
            print(f"nothing to resume in {self.out}; starting anew", flush=True)
            return {}
        self.figures |= json.loads(figures_file.read_text())
        if state_file.exists():
            state = torch.load(state_file, map_location=self.device, weights_only=True)
            for name, trainee in self.trainees.items():
                trainee.load_state_dict(state[name])
            print(f"resumed from {state_file}", flush=True)
        else:
            for name, trainee in self.trainees.items():
                if all(files_of(self.out, part) for part in trainee.modules):
                    trainee.load_weights({part: read_flat(self.out, part) for part in trainee.modules})
                    print(f"resumed {name} from the exported weights in {self.out}", flush=True)
        return self.figures["elapsed"]

    @property
    def vae(self):
        """The averaged autoencoder."""
        return self.trainees["vae"].ema["vae"]

    def fast_vae(self):
        """A copy of it in the dtype that training computes in."""
        return copy.deepcopy(self.vae).to(self.trainees["vae"].dtype)

    def _anchor(self) -> Any | None:
        """The autoencoder that was named, in the dtype that training computes in."""
        if self.options.anchor is None:
            return None
        kind, dtype = type(self.vae), self.trainees["vae"].dtype
        anchor = kind.from_pretrained(self.options.anchor, torch_dtype=dtype).eval().requires_grad_(False)
        return anchor.to(self.device, memory_format=torch.channels_last)

    def _due(self, phase: str, *before: str) -> bool:
        """Whether this command trains ``phase``: it is asked for, has budget left, and those ``before`` are done."""
        asked, done = self.options.phase, self.clock.done
        due = asked == phase or (asked == "all" and all(done(name) for name in before))
        if due and not done(phase):
            self.ran.append(phase)
            return True
        return False

    def run(self) -> None:
        """Every phase that is due, then the figures and the files."""
        o, clock, began = self.options, self.clock, time.monotonic()
        seed = o.seed + int(sum(clock.elapsed.values())) + 1_000_003 * rank()
        library = Library.make(o.groups, o.per_group, seed, self.device)
        print(f"{len(library.tokens)} captions in {time.monotonic() - began:.1f} s", flush=True)
        source = Source(library, self.device, seed + 1, size=o.size)
        held = Library.make(o.held_groups, 8, o.seed + 7919, self.device)
        common = {"fill": o.fill, "finish": o.finish, "render_every": o.render_every, "compiled": o.compile}
        if self._due("vae"):
            own = {"batch": o.vae_batch, "peak_lr": o.vae_lr, "pool": o.pictures, "texture": o.texture}
            anchor = self._anchor()
            train_autoencoder(clock, self.trainees["vae"], source, anchor=anchor, **own, **common)
            scenes = self._held_out(held)
            scale = None
            if anchor is not None:
                scale = settle(self.vae, anchor, scenes)
                self.trainees["vae"].load_weights({"vae": self.vae.state_dict()})
            measured = measure_autoencoder(self.vae, scenes, o.held_groups)
            (scale,) = agree(scale or 1.0 / measured["latent_std"])
            self.figures |= measured | {"scaling_factor": scale}
            self.save()
            self._reconstructions(scenes)
        if self._due("denoiser", "vae"):
            scale = self.figures["scaling_factor"]
            denoiser, latents = self.trainees["denoiser"], LatentSource(source, self.fast_vae(), scale, o.pool)
            own = {"batch": o.batch, "peak_lr": o.lr, "keep": self.save, "keep_every": o.keep_every}
            train_denoiser(clock, denoiser, latents, library, **own, **common)
            self.save()
            if not rank():
                scenes = LatentSource(self._held_out(held), self.fast_vae(), scale, 1)
                self.figures |= measure_denoiser(denoiser, scenes, o.held_groups)
                self._sheet(library)
        if self._due("classifier", "vae", "denoiser"):
            train_classifier(
                clock,
                self.trainees["classifier"],
                self.fast_vae(),
                source,
                batch=o.classifier_batch,
                peak_lr=2e-3,
                fill=o.fill,
            )
            self.save()
        if not rank():
            if clock.elapsed["classifier"]:
                self.figures |= measure_classifier(self.trainees["classifier"], self._held_out(held), o.held_groups)
                self._accuracy(library)
            self.save(full=False)
            self._copy()
            print(json.dumps(self.figures, indent=1), flush=True)

    def _held_out(self, held: Library) -> Source:
        return Source(held, self.device, 99, size=self.options.size, seed_base=HELD_OUT)

    def _sample(self, library: Library, tokens: torch.Tensor, seed: int) -> torch.Tensor:
        denoiser = self.trainees["denoiser"]
        return sample(
            denoiser,
            self.vae,
            library,
            tokens,
            scale=self.figures["scaling_factor"],
            seed=seed,
            steps=self.options.sample_steps,
            latent_size=self.options.size // 8,
        )

    @torch.no_grad()
    def _reconstructions(self, scenes: Source) -> None:
        """Held-out scenes and crops, each row followed by what the autoencoder returns."""
        if rank():
            return
        rows = []
        for crops in (False, True):
            images = torch.cat([scenes.draw(crops).images[:2] for _ in range(4)])
            rows += [images, self.vae.decode(self.vae.encode(images).latent_dist.mode()).sample.clamp(-1, 1)]
        sheet(torch.cat(rows), len(rows[0]), self.out / "vae.png")

    def _sheet(self, library: Library) -> None:
        prompts = SHEET_PROMPTS[: self.options.sheet]
        tokens = torch.tensor(
            [encode(p) for p in prompts for _ in range(self.options.sheet_columns)], device=self.device
        )
        sheet(self._sample(library, tokens, 1), 4 * self.options.sheet_columns, self.out / "sheet.png")

    def _accuracy(self, library: Library) -> None:
        """Whether generated pictures show what held-out captions ask."""
        rng = random.Random(4242)
        specs = [sample_spec(rng) for _ in range(self.options.prompts)]
        tokens = torch.tensor([encode(caption(rng, spec, rng.randrange(8))) for spec in specs], device=self.device)
        judged = classify(self._sample(library, tokens, 2), self.trainees["classifier"].ema["classifier"])
        for i, (name, values) in enumerate((("time", TIMES), ("subject", SUBJECTS), ("setting", SETTINGS))):
            right = sum(got == values[labels(spec)[i]] for got, spec in zip(judged[name]["labels"], specs, strict=True))
            self.figures[f"generated_{name}"] = round(right / len(specs), 4)

    def save(self, full: bool = True) -> None:
        """Export the averaged weights and the figures; ``full``: the state to resume from, too."""
        if rank():
            return
        for trainee in self.trainees.values():
            for part, module in trainee.ema.items():
                write_flat(self.out, part, module)
        if full:
            torch.save({name: t.state_dict() for name, t in self.trainees.items()}, self.out / ".state.pt")
            (self.out / ".state.pt").replace(self.out / "state.pt")
        updates = {name: t.updates for name, t in self.trainees.items()}
        counts = {k: parameter_count(m) for t in self.trainees.values() for k, m in t.modules.items()}
        self.figures |= {"elapsed": self.clock.elapsed, "updates": updates, "parameters": counts}
        (self.out / "figures.json").write_text(json.dumps(self.figures, indent=1) + "\n")

    def _copy(self) -> None:
        """What the phases of this command made, into ``parts``."""
        if self.options.parts is None:
            return
        self.options.parts.mkdir(parents=True, exist_ok=True)
        weights = [f for name in self.ran for part in self.trainees[name].ema for f in files_of(self.out, part)]
        pictures = [
            self.out / f"{name}.png" for phase, name in (("vae", "vae"), ("denoiser", "sheet")) if phase in self.ran
        ]
        for file in (*weights, *pictures, self.out / "figures.json"):
            shutil.copyfile(file, self.options.parts / file.name)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options, processes = parse(parser, argv)
    if processes > 1 and MEETING not in os.environ:
        sys.exit(launch(processes, sys.argv[1:] if argv is None else argv))
    Training(options).run()


if __name__ == "__main__":
    main()
