"""Train the embedded model with one command: ``python -m training.train --out DIR [--resume] [--smoke]``.

Phases by wall-clock budget: autoencoder, text encoder + UNet, classifier. A command ends by itself before
``--minutes`` with everything exported, and ``--resume`` goes on. Flat files in DIR: ``vae``,
``text_encoder``, ``unet``, ``classifier`` (.safetensors, fp16), ``figures.json``, ``sheet.png``; ``state.pt`` resumes.
"""

import argparse
import copy
import json
import random
import time

import torch

from .autoencoder import measure_autoencoder, train_autoencoder
from .captions import caption
from .classifier import Classifier, classify
from .clock import Clock
from .denoiser import LatentSource, sample, train_denoiser
from .export import PARTS, read_flat, write_flat
from .judge import measure_classifier, train_classifier
from .library import Library, labels
from .models import make_text_encoder, make_unet, make_vae, parameter_count
from .optim import Trainee
from .preview import sheet
from .settings import Settings, parse
from .source import Source
from .specs import SETTINGS, SUBJECTS, TIMES, sample_spec
from .vocabulary import encode

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
)


class Training:
    """All parts, their budgets, and where they are kept."""

    def __init__(self, options: Settings):
        self.options, self.out = options, options.out
        self.out.mkdir(parents=True, exist_ok=True)
        self.device = torch.device(options.device)
        torch.manual_seed(options.seed)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
        o = options
        parts = {
            "vae": {"vae": make_vae(tiny=o.tiny)},
            "denoiser": {"unet": make_unet(tiny=o.tiny), "text_encoder": make_text_encoder()},
            "classifier": {"classifier": Classifier()},
        }
        self.trainees = {}
        for name, modules in parts.items():
            placed = {k: m.to(self.device, memory_format=torch.channels_last) for k, m in modules.items()}
            decay = {"vae": 0.998, "denoiser": 0.9995, "classifier": 0.998}[name]
            self.trainees[name] = Trainee(placed, device=self.device, decay=decay)
        self.figures: dict = {"tiny": o.tiny, "scaling_factor": 1.0}
        elapsed = self._resume() if o.resume else {}
        budgets = {"vae": o.vae_seconds, "denoiser": o.denoiser_seconds, "classifier": o.classifier_seconds}
        self.clock = Clock(budgets, elapsed, o.stop_after - o.reserve)

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
            for trainee in self.trainees.values():
                trainee.load_weights({part: read_flat(self.out, part) for part in trainee.modules})
            print(f"resumed from the exported weights in {self.out}", flush=True)
        return self.figures["elapsed"]

    @property
    def vae(self):
        """The averaged autoencoder."""
        return self.trainees["vae"].ema["vae"]

    def fast_vae(self):
        """A copy of it in the dtype that training computes in."""
        return copy.deepcopy(self.vae).to(self.trainees["vae"].dtype)

    def run(self) -> None:
        """Every phase that has budget left, then the figures and the files."""
        o, clock = self.options, self.clock
        began = time.monotonic()
        library = Library.make(o.groups, o.per_group, o.seed + int(sum(clock.elapsed.values())), self.device)
        print(f"{len(library.tokens)} captions in {time.monotonic() - began:.1f} s", flush=True)
        source = Source(library, self.device, o.seed + 1 + int(sum(clock.elapsed.values())), size=o.size)
        held = Library.make(o.held_groups, 8, o.seed + 7919, self.device)
        held_out = Source(held, self.device, 99, size=o.size, seed_base=HELD_OUT)
        fresh = not clock.done("vae")
        train_autoencoder(clock, self.trainees["vae"], source, batch=o.vae_batch, peak_lr=1.0e-3)
        if fresh:
            measured = measure_autoencoder(self.vae, held_out, o.held_groups)
            print(measured, flush=True)
            self.figures |= measured | {"scaling_factor": 1.0 / measured["latent_std"]}
            self.save()
        if clock.done("vae") and not clock.done("denoiser"):
            latents = LatentSource(source, self.fast_vae(), self.figures["scaling_factor"], o.pool)
            train_denoiser(
                clock,
                self.trainees["denoiser"],
                latents,
                library,
                batch=o.batch,
                peak_lr=o.lr,
                fill=o.fill,
                render_every=o.render_every,
            )
        if clock.done("denoiser"):
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
        self.figures |= measure_classifier(self.trainees["classifier"], held_out, o.held_groups)
        self._sheet(library)
        self._accuracy(library)
        self.save(full=False)
        print(json.dumps(self.figures, indent=1), flush=True)

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

    def _sheet(self, library: Library) -> None:
        prompts = SHEET_PROMPTS[: self.options.sheet]
        tokens = torch.tensor(
            [encode(p) for p in prompts for _ in range(self.options.sheet_columns)], device=self.device
        )
        sheet(self._sample(library, tokens, 1), 2 * self.options.sheet_columns, self.out / "sheet.png")

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
        for trainee in self.trainees.values():
            for part in PARTS:
                if part in trainee.ema:
                    write_flat(self.out, part, trainee.ema[part])
        if full:
            torch.save({name: t.state_dict() for name, t in self.trainees.items()}, self.out / ".state.pt")
            (self.out / ".state.pt").replace(self.out / "state.pt")
        updates = {name: t.updates for name, t in self.trainees.items()}
        counts = {k: parameter_count(m) for t in self.trainees.values() for k, m in t.modules.items()}
        self.figures |= {"elapsed": self.clock.elapsed, "updates": updates, "parameters": counts}
        (self.out / "figures.json").write_text(json.dumps(self.figures, indent=1) + "\n")


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    Training(parse(parser, argv)).run()


if __name__ == "__main__":
    main()
