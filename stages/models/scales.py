"""Scales that lie beside numbers of eight bits, under the names that ComfyUI and vLLM's tools give them."""

from __future__ import annotations

import json
from collections.abc import Mapping

from stages.memory.refs import TensorRef
from stages.memory.tensors import read_tensor
from stages.models.locate import CheckpointError

SCALES = ("weight_scale", "scale_weight")  # of ``weight`` beside it
INPUT_SCALES = ("input_scale", "scale_input")  # for products in eight bits, which are not computed here
MARK = "scaled_fp8"  # an empty tensor: the file has scales
FORMAT = "comfy_quant"  # JSON as bytes: how the layer is stored
FORMATS = ("float8_e4m3fn", "float8_e5m2")


def with_scales(refs: Mapping[str, TensorRef]) -> dict[str, TensorRef]:
    """The tensors without those that only describe others, scales with what they scale.

    Raises:
        CheckpointError: a scale that is not one number or one a row, or a layer in another format.
    """
    found = {name: ref for name, ref in refs.items() if not _describes(name)}
    for name, ref in refs.items():
        module, _, last = name.rpartition(".")
        weight = f"{module}.weight"
        if last == FORMAT:
            _check_format(name, ref)
        if last not in SCALES or weight not in found:
            continue
        if ref.numel not in (1, found[weight].shape[0] if found[weight].shape else 1) or ref.encoded:
            raise CheckpointError(
                f"{ref.file}: {name}: got a scale {ref.kind} {list(ref.shape)} of {found[weight].kind} "
                f"{list(found[weight].shape)}, expected one number or one a row. Take a file in another format."
            )
        found[weight] = found[weight]._replace(scale=ref)
    return found


def _describes(name: str) -> bool:
    return name.rpartition(".")[2] in (*SCALES, *INPUT_SCALES, MARK, FORMAT)


def _check_format(name: str, ref: TensorRef) -> None:
    try:
        said = json.loads(bytes(read_tensor(ref).view(-1).tolist()[:4096])).get("format")
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{ref.file}: {name}: expected JSON, got {error}.") from None
    if said not in FORMATS:
        raise CheckpointError(
            f"{ref.file}: {name} says {said!r:.60}, expected {' or '.join(FORMATS)}. Take a file in another format."
        )
