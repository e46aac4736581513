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
    ("model.lora", "lora", "loras"): "nothing that is here: LoRA files are not supported; merge one into a checkpoint",
}
_SAMPLERS = {"euler_a": "euler_ancestral", "plms": "pndm", "uni_pc": "unipc", "dpm_2m": "dpmpp_2m"}


def meant(key: str) -> str:
    """A sentence that says which key is meant by another program's; "" for one that is not known."""
    name = key.lower().replace("-", "_")
    return next((f"Here it is {ours}." for theirs, ours in _MEANT.items() if name in theirs), "")


def sampler(name: str, options: Collection[str]) -> str:
    """The option that a sampler's name in A1111 or ComfyUI stands for (``DPM++ 2M Karras``); else ``name``."""
    if name in options:
        return name
    plain = re.sub(r"\W+", "_", name.strip().strip("'\"").lower().replace("++", "pp")).strip("_").removeprefix("k_")
    plain = _SAMPLERS.get(plain, plain)
    return plain if plain in options else name
