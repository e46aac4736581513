"""What people type who know other programs: their keys are told ours, their names of samplers are understood."""

from __future__ import annotations

import re
from collections.abc import Collection

_MEANT = {
    (
        "steps",
        "num_inference_steps",
        "sampling_steps",
    ): "denoise.num_inference_steps=N, lowres.num_inference_steps=N",
    ("cfg", "cfg_scale", "guidance", "guidance_scale"): "denoise.guidance_scale=X, lowres.guidance_scale=X",
    ("sampler", "sampler_name", "sampler_index", "schedule_type"): "scheduler=NAME",
    ("batch_size", "batch_count", "n_iter", "num_images", "num_images_per_prompt"): "-m seed=1,2,3",
    ("image", "init_image", "init_images", "init_img"): "guide.image=FILE",
    ("strength", "denoising_strength"): "denoise.strength=X",
    ("clip_skip",): "text_encode.clip_skip=N",
    ("negative", "neg_prompt", "uc"): "negative_prompt=TEXT",
    ("checkpoint", "ckpt", "ckpt_path", "model_path", "sd_model_checkpoint", "model.name_or_path"): "model.path=PATH",
    ("dtype", "torch_dtype", "precision"): "technique.dtype=auto|fp32|bf16|fp16",
    ("size", "resolution"): "width=N height=N",
    ("tile_size",): "denoise.tile_size=N or decode.tile_size=N",
    ("budget", "max_memory"): "memory.budget=SIZE",
    ("out", "output", "outdir", "output_path"): "output_dir=FOLDER",
    (
        "controlnet",
        "controlnets",
        "model.controlnet",
        "control_image",
    ): "model.controlnets=[{path: PATH, image: FILE, scale: 1.0}]",
    ("vae", "vae_path", "sd_vae"): "model.vae=PATH",
    ("upscaler", "hr_upscaler", "upscale_model"): "guide.upscale=FILE",
    ("model.lora", "lora", "loras", "lora_weights"): "model.loras=[FILE:0.8]",
}
_SAMPLERS = {
    "euler_a": "euler_ancestral",
    "plms": "pndm",
    "uni_pc": "unipc",
    "uni_pc_bh2": "unipc",
    "dpm_2m": "dpmpp_2m",
}
_NEAREST = {  # of those that diffusers does not have
    **dict.fromkeys(("dpmpp_2s_a", "dpmpp_2s_ancestral"), "dpmpp_sde"),
    **dict.fromkeys(("dpmpp_3m_sde", "er_sde", "seeds_2"), "dpmpp_2m_sde"),
    **dict.fromkeys(("dpm_fast", "dpm_adaptive", "res_multistep", "ipndm", "deis", "gradient_estimation"), "dpmpp_2m"),
    "ddpm": "euler_ancestral",
    "restart": "heun",
    "heunpp2": "heun",
    "dpm2": "heun",
    "dpm_2": "heun",
    **dict.fromkeys(("dpm2_a", "dpm_2_a", "dpm_2_ancestral"), "euler_ancestral"),
}


def meant(key: str) -> str:
    """A sentence that says which key is meant by another program's; "" for one that is not known."""
    name = key.lower().replace("-", "_")
    return next((f"Here it is {ours}." for theirs, ours in _MEANT.items() if name in theirs), "")


def sampler(name: str, options: Collection[str]) -> str:
    """The option that a sampler's name in A1111 or ComfyUI stands for (``DPM++ 2M Karras``); else ``name``."""
    if name in options:
        return name
    plain = _plain(name)
    return plain if plain in options else name


def nearest(name: str) -> str:
    """A sentence with the option that comes nearest to a sampler which is not here; "" for one that is not known."""
    plain = _plain(name)
    found = _NEAREST.get(plain.removesuffix("_karras"))
    return f"The nearest is scheduler={found}." if found else ""


def _plain(name: str) -> str:
    plain = re.sub(r"\W+", "_", name.strip().strip("'\"").lower().replace("++", "pp")).strip("_")
    plain = plain.removeprefix("k_").removesuffix("_gpu").removesuffix("_exponential")
    return _SAMPLERS.get(plain, plain)
