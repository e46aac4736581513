"""What is known of each family without torch: the runner, validation and fingerprints read it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from omegaconf import DictConfig

from stages.config import ConfigError, close_match


@dataclass(frozen=True, kw_only=True)
class Facts:
    """One family.

    ``components``: stage -> what it opens of a checkpoint. ``denoiser`` names the network that denoises, ``classes``
    the stock classes by which the family is recognised (``optional`` ones may be missing), ``vae`` that of its VAE.
    Sides are multiples of ``vae_scale_factor * patch`` pixels. ``embeds``: tensors of ``embeddings.safetensors``, one
    row a prompt. ``overflows``: components that do in fp16, and compute in bf16 instead. ``flow``: it matches flows
    (:mod:`stages.families.flow`). ``models``: options of ``conf/model``, the one whose defaults a checkpoint of this
    family gets first. ``module``: its file in ``stages/families``. ``own_length``: its texts are not padded.
    ``attends``: a side of latents over one of its UNet's largest self-attention; 0 where that is no UNet.
    """

    module: str
    models: tuple[str, ...]
    classes: Mapping[str, str]
    optional: tuple[str, ...] = ()
    vae: str = "AutoencoderKL"
    components: Mapping[str, tuple[str, ...]]
    denoiser: str
    latent_channels: int
    vae_scale_factor: int
    patch: int = 1
    guidance: Literal["cfg", "embedded", "none"]
    flow: bool = False
    embeds: tuple[str, ...]
    overflows: tuple[str, ...] = ()
    own_length: bool = False
    attends: int = 0

    @property
    def unet(self) -> bool:
        """Whether a UNet denoises; else a transformer."""
        return self.denoiser == "unet"

    @property
    def opened(self) -> tuple[str, ...]:
        """All components that any stage opens, each once."""
        return tuple(dict.fromkeys(name for names in self.components.values() for name in names))


def _components(text: tuple[str, ...], denoiser: str) -> dict[str, tuple[str, ...]]:
    """The usual ones: text encoders and tokenizers, a denoiser with its scheduler, a VAE."""
    return {
        "text_encode": text,
        **dict.fromkeys(("lowres", "denoise"), (denoiser, "scheduler")),
        **dict.fromkeys(("guide", "decode"), ("vae",)),
        "profile": (*(name for name in text if "encoder" in name), denoiser, "vae"),
    }


POOLED = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")

FACTS: Mapping[str, Facts] = {
    "sd": Facts(
        module="sd",
        models=("sd15", "sd21", "embedded"),
        classes={"unet": "UNet2DConditionModel", "text_encoder": "CLIPTextModel"},
        components=_components(("tokenizer", "text_encoder"), "unet"),
        denoiser="unet",
        latent_channels=4,
        vae_scale_factor=8,
        guidance="cfg",
        embeds=("prompt_embeds", "negative_prompt_embeds"),
        attends=1,
    ),
    "sdxl": Facts(
        module="sdxl",
        models=("sdxl", "sdxl_turbo"),
        classes={
            "unet": "UNet2DConditionModel",
            "text_encoder": "CLIPTextModel",
            "text_encoder_2": "CLIPTextModelWithProjection",
        },
        components=_components(("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2"), "unet"),
        denoiser="unet",
        latent_channels=4,
        vae_scale_factor=8,
        guidance="cfg",
        embeds=POOLED,
        overflows=("vae",),
        attends=2,
    ),
    "sd3": Facts(
        module="sd3",
        models=("sd3",),
        classes={
            "transformer": "SD3Transformer2DModel",
            "text_encoder": "CLIPTextModelWithProjection",
            "text_encoder_2": "CLIPTextModelWithProjection",
            "text_encoder_3": "T5EncoderModel",
        },
        optional=("text_encoder_3",),
        components=_components(
            (
                *("tokenizer", "tokenizer_2", "tokenizer_3"),
                *("text_encoder", "text_encoder_2", "text_encoder_3"),
            ),
            "transformer",
        ),
        denoiser="transformer",
        latent_channels=16,
        vae_scale_factor=8,
        patch=2,
        guidance="cfg",
        flow=True,
        embeds=POOLED,
        overflows=("text_encoder_3",),
    ),
    "flux": Facts(
        module="flux",
        models=("flux", "flux_schnell"),
        classes={
            "transformer": "FluxTransformer2DModel",
            "text_encoder": "CLIPTextModel",
            "text_encoder_2": "T5EncoderModel",
        },
        components=_components(("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2"), "transformer"),
        denoiser="transformer",
        latent_channels=16,
        vae_scale_factor=8,
        patch=2,
        guidance="embedded",
        flow=True,
        embeds=("prompt_embeds", "pooled_prompt_embeds"),
        overflows=("text_encoder_2",),
    ),
    "flux2_klein": Facts(
        module="flux2_klein",
        models=("flux2_klein",),
        classes={"transformer": "Flux2Transformer2DModel", "text_encoder": "Qwen3ForCausalLM"},
        vae="AutoencoderKLFlux2",
        components={
            **_components(("tokenizer", "text_encoder"), "transformer"),
            # the VAE's statistics are the denoiser's
            **dict.fromkeys(("lowres", "denoise"), ("transformer", "scheduler", "vae")),
        },
        denoiser="transformer",
        latent_channels=32,
        vae_scale_factor=8,
        patch=2,
        guidance="cfg",
        flow=True,
        embeds=("prompt_embeds", "negative_prompt_embeds"),
        overflows=("text_encoder",),
    ),
    "z_image": Facts(
        module="z_image",
        models=("z_image", "z_image_turbo"),
        classes={"transformer": "ZImageTransformer2DModel", "text_encoder": "Qwen3Model"},
        components=_components(("tokenizer", "text_encoder"), "transformer"),
        denoiser="transformer",
        latent_channels=16,
        vae_scale_factor=8,
        patch=2,
        guidance="cfg",
        flow=True,
        embeds=("prompt_embeds", "negative_prompt_embeds", "prompt_lengths", "negative_prompt_lengths"),
        own_length=True,
        overflows=("transformer", "text_encoder"),
    ),
}


WITHOUT_HEAD = {"Qwen3ForCausalLM": "Qwen3Model"}  # what encodes text makes no words: checkpoints say either
DENOISERS = tuple(dict.fromkeys(facts.denoiser for facts in FACTS.values()))  # what checkpoints call them


def facts_of(config: DictConfig) -> Facts:
    """Of the config's model.

    Raises:
        ConfigError: a family that is not there.
    """
    family = str(config.model.family)
    if family not in FACTS:
        raise ConfigError("model.family", family, f"one of {', '.join(FACTS)}", close_match(family, FACTS))
    return FACTS[family]


def known_classes(component: str, beside: Collection[str] | None = None) -> tuple[str, ...]:
    """Stock classes that some family opens as ``component``: no other is made, whatever a checkpoint's files name.

    ``beside``: only of families whose components are all among these.
    """
    fitting = [facts for facts in FACTS.values() if beside is None or set(facts.classes) <= set(beside)]
    found = [facts.vae if component == "vae" else facts.classes.get(component) for facts in fitting]
    return tuple(dict.fromkeys(name for name in found if name))


def steps_by_strength(flow: bool, num_inference_steps: int, strength: float) -> int:
    """Steps that run of a guided canvas, as diffusers' img2img pipelines count: those of flows round up."""
    strength = min(strength, 1.0)
    if flow:
        return num_inference_steps - int(max(num_inference_steps - num_inference_steps * strength, 0))
    return int(num_inference_steps * strength)


def running_steps(config: DictConfig) -> int:
    """Steps of ``denoise`` that run: with a guide its ``strength`` of them."""
    steps = config.denoise.num_inference_steps
    if config.guide.mode == "none":
        return steps
    return steps_by_strength(facts_of(config).flow, steps, config.denoise.strength)


def family_of_classes(classes: Mapping[str, str]) -> str | None:
    """The family of a checkpoint whose components are of these stock classes ({component: class name}): the one that
    asks for most of them. None if no family knows them."""
    fitting = [
        (len(facts.classes), name)
        for name, facts in FACTS.items()
        if all(
            _headless(classes.get(component, wanted if component in facts.optional else "")) == _headless(wanted)
            for component, wanted in facts.classes.items()
        )
        and not any("encoder" in component and component not in facts.opened for component in classes)
    ]
    return max(fitting)[1] if fitting else None


def _headless(class_name: str) -> str:
    return WITHOUT_HEAD.get(class_name, class_name)
