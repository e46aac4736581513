"""The four networks: their shapes, and a folder that ``StableDiffusionPipeline.from_pretrained`` opens."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from .vocabulary import END, MAX_LENGTH, START, build

MODEL = Path(__file__).resolve().parents[1] / "models" / "embedded"  # what ships
NATIVE_SIZE = 256
TEXT_WIDTH = 160
LATENT_CHANNELS = 16
LAYERS = (2, 3, 1)  # of the denoiser's levels, from 32x32 down to 8x8
SHARD = "28MB"  # no file of the package is larger than 30 MB


def make_vae(scaling_factor: float = 1.0, *, tiny: bool = False, channels: int = LATENT_CHANNELS) -> AutoencoderKL:
    """The autoencoder: 4.6 M parameters, factor 8, 16 channels. tiny: a toy of the same topology for smoke runs."""
    make: Any = AutoencoderKL  # its tuples are annotated with one element
    vae = make(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 16, 32, 32) if tiny else (32, 48, 96, 160),
        layers_per_block=1,
        norm_num_groups=16,
        latent_channels=channels,
        sample_size=NATIVE_SIZE,
        scaling_factor=scaling_factor,
    )
    with torch.no_grad():  # begin almost without posterior noise: training settles much sooner
        vae.quant_conv.bias[channels:] = -5.0
    return vae


def make_text_encoder() -> CLIPTextModel:
    """The text encoder: 1.5 M parameters, 4 layers of width 160."""
    vocab, _ = build()
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocab),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=4,
            num_attention_heads=5,
            max_position_embeddings=MAX_LENGTH,
            hidden_act="quick_gelu",
            bos_token_id=vocab[START],
            eos_token_id=vocab[END],
            pad_token_id=vocab[END],
        )
    )


def make_unet(
    *, tiny: bool = False, channels: int = LATENT_CHANNELS, layers: tuple[int, ...] = LAYERS
) -> UNet2DConditionModel:
    """The denoiser: 20.0 M parameters, 3.0 GMAC a pass at 32x32. tiny: a toy for smoke runs."""
    make: Any = UNet2DConditionModel  # its tuples are annotated with one element
    return make(
        sample_size=NATIVE_SIZE // 8,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(32, 32, 48) if tiny else (64, 128, 256),
        layers_per_block=layers,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 2, 3) if tiny else (4, 4, 8),  # diffusers reads this as the number of heads
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=16,
    )


def make_scheduler() -> DDIMScheduler:
    """The noise schedule that the model is trained on: v-prediction, scaled-linear betas, 1000 steps."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def halves(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Its weights in fp16, on the CPU."""
    return {name: value.detach().to("cpu", torch.float16).contiguous() for name, value in module.state_dict().items()}


def save_halves(weights: dict[str, torch.Tensor], file: Path) -> None:
    """One file of weights, as diffusers opens it; under a temporary name first."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, temporary := file.with_name(f".{file.name}"), metadata={"format": "pt"})
    temporary.replace(file)


def save_folder(folder: Path, vae: AutoencoderKL, text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> None:
    """Write the diffusers folder, weights in fp16."""
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTokenizer

    from .vocabulary import save_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(folder / "tokenizer")
    make: Any = StableDiffusionPipeline  # what may be None is annotated as if it could not be
    pipeline = make(
        vae=vae.half(),
        text_encoder=text_encoder.half(),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=unet.half(),
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True, max_shard_size=SHARD)
    save_tokenizer(folder / "tokenizer")  # once more: vocab.json, merges.txt and the word list beside tokenizer.json


def parameter_count(model: torch.nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())
