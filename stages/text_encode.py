"""Prompts to embeddings: ``embeddings.safetensors`` with one row a region, the whole picture's prompt first."""

from __future__ import annotations

import torch

from stages.context import StageContext
from stages.files import atomic_path
from stages.memory.tensors import write_tensors
from stages.models.loading import compute_dtype, open_checkpoint, open_model
from stages.models.sd import encode, tokenize, unknown_words
from stages.regions.config import from_config


def run(context: StageContext) -> None:
    """Write ``prompt_embeds [R, S, D]`` and ``negative_prompt_embeds [R, S, D]``, float32; row 0 is the main prompt."""
    config, progress = context.config, context.progress
    checkpoint = open_checkpoint(config, ("text_encoder", "tokenizer"), progress.note)
    tokenizer = checkpoint.tokenizer()
    rows = from_config(config).texts
    known = {text: tokenize(tokenizer, text) for row in rows for text in row}
    for tokens in known.values():
        if tokens.truncated:
            most = tokenizer.model_max_length
            progress.note(f"warning: the prompt is longer than {most} tokens; not used: {tokens.truncated!r}")
    if unknown := unknown_words(" ".join(known), checkpoint.folder / "tokenizer"):
        progress.note(
            f"warning: the {config.model.name} model does not know: {', '.join(unknown)}. It was trained on a few "
            "hundred words; for any prompt use a real checkpoint: model=sd15 model.path=FOLDER_OR_FILE_OR_HUB_ID"
        )
    progress.start(2 * len(rows), "prompts")
    found = []
    with open_model(
        checkpoint.component("text_encoder"),
        dtype=compute_dtype(config),
        channels_last=False,
        plan=context.plan,
        mark=progress.mark,
        device=config.device,
    ) as streamer:
        for prompt, negative in rows:  # a pair at a time: regions by the dozen take no more memory than one
            tokens = [known[prompt]], [known[negative]]
            found.append(encode(streamer.model, *tokens, config.text_encode.clip_skip, config.device).float().cpu())
            progress.advance(2)
    embeds = torch.stack(found, dim=1)
    with atomic_path(context.output / "embeddings.safetensors") as temporary:
        tensors = {"prompt_embeds": embeds[0].contiguous(), "negative_prompt_embeds": embeds[1].contiguous()}
        write_tensors(temporary, tensors)
