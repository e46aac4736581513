"""Prompts to embeddings: ``embeddings.safetensors`` with one row a region, the whole picture's prompt first."""

from __future__ import annotations

from functools import partial

from stages.context import StageContext
from stages.families import family_of
from stages.families.encoders import Encoders
from stages.families.looking import Looking, StageLook
from stages.families.opening import open_checkpoint, open_component
from stages.files import atomic_path
from stages.memory.finite import refuse_not_finite
from stages.memory.planner import ModelProfile
from stages.memory.tensors import write_tensors
from stages.models.tokenizers import room
from stages.tiles import Size

GIVEN_UP = ("t5", "qwen3")  # encoders whose tokenizers are gone when they open
TRANSFORMERS = 22_000_000  # bytes: what transformers' classes take more than diffusers' models, with all they touch


def run(context: StageContext) -> None:
    """Write the family's embeddings, for SD ``prompt_embeds [R, S, D]`` and ``negative_prompt_embeds [R, S, D]``,
    float32; row 0 is the main prompt."""
    config, progress, family = context.config, context.progress, family_of(context.config)
    checkpoint = open_checkpoint(config, family.facts.components["text_encode"], progress.note)
    encoders = Encoders(
        checkpoint=checkpoint,
        open=partial(open_component, context, checkpoint),
        device=config.device,
        start=partial(progress.start, unit="prompts"),
        advance=progress.advance,
        note=progress.note,
    )
    embeds = family.encode(encoders, context.regions.texts, config)
    for name, rows in embeds.items():
        refuse_not_finite(rows, f"text_encode: {name}")
    with atomic_path(context.output / "embeddings.safetensors") as temporary:
        write_tensors(temporary, embeds)


def look(looking: Looking) -> StageLook:
    """Each text encoder, a prompt and its negative at a time; the embeddings of all regions are held."""
    family, count, longest = looking.family, len(looking.regions.texts), looking.config.model.text_tokens
    models, kept, before = [], [0], 0
    for component in family.encoders(looking.checkpoint):
        call, samples = family.text_call(component, looking.network_config(component), longest)
        measured = looking.measured("text", component, "text_encode", lambda network, _, call=call: call(network))
        profile = ModelProfile(
            component=component,
            micro_batch=samples,
            micro_batches=count,
            steps=1,
            group=1,
            **measured._asdict(),
        )
        models.append(profile)
        kind = looking.network_config(component).get("model_type", "")
        rooms = room(looking.checkpoint.folder / component.replace("text_encoder", "tokenizer"), kind == "t5")
        kept.append(rooms.left if kind in GIVEN_UP else rooms.held)
        before = max(before, rooms.opening)
    _, embeds = family.example(looking.network_config(family.facts.denoiser), Size(64, 64), 1, longest)
    held = count * sum(rows.nbytes for rows in embeds.values()) + max(kept)
    return StageLook(tuple(models), extra=held, before=before, code=TRANSFORMERS)
