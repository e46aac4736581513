"""ControlNets of each family: their stock classes, and how they and the denoiser are called, as in stock pipelines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from stages.families.tokens import packed

if TYPE_CHECKING:
    from torch import Tensor, nn

Added = list[list["Tensor"]]  # what a ControlNet adds, in lists that are handed over together
# stock class of a denoiser -> that of its ControlNets
NETWORKS: Mapping[str, str] = {
    "UNet2DConditionModel": "ControlNetModel",
    "FluxTransformer2DModel": "FluxControlNetModel",
    "SD3Transformer2DModel": "SD3ControlNetModel",
}
CONDITION, SCALE = "controlnet_condition_{}", "controlnet_scale_{}"  # arguments of the network, by number


class Calls(NamedTuple):
    """``asked(network, net, inputs)`` with the arguments of the denoiser gives what is added, ``handed`` the arguments
    that hold it."""

    asked: Callable[..., Added]
    handed: Callable[[Added], dict[str, Any]]


def steer(network: nn.Module) -> None:
    """Have a pass of ``network`` begin with one of each of its ``controlnets`` that is shown something."""
    whole: Any = network.forward
    nets: Any = network.controlnets
    calls = CALLS[type(network).__name__]

    def forward(**inputs: Any) -> Any:
        given = []
        for number, net in enumerate(nets):
            shown, scale = (inputs.pop(name.format(number), None) for name in (CONDITION, SCALE))
            if shown is not None:
                given.append((net, shown, scale))
        if not given:
            return whole(**inputs)
        total: Added = []
        for net, shown, scale in given:
            found = calls.asked(network, net, inputs, controlnet_cond=shown, conditioning_scale=scale)
            for sums, more in zip(total, found, strict=True) if total else ():
                for sum_, one in zip(sums, more, strict=True):
                    sum_ += one
            total = total or found
            del found
        return whole(**inputs, **calls.handed(total))

    network.forward = forward


def _some(inputs: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: inputs[name] for name in names if name in inputs}


# -- UNets ------------------------------------------------------------------------------------------------------------

_UNET = ("sample", "timestep", "encoder_hidden_states", "added_cond_kwargs", "cross_attention_kwargs")


def _ask_unet(network: Any, net: Any, inputs: Mapping[str, Any], **shown: Any) -> Added:
    down, middle = net(**_some(inputs, *_UNET), **shown, return_dict=False)
    return [list(down), [middle]]


def _hand_unet(added: Added) -> dict[str, Any]:
    down, (middle,) = added
    added.clear()
    return {"down_block_additional_residuals": _one_by_one(down), "mid_block_additional_residual": middle}


def _one_by_one(tensors: list[Tensor]) -> Iterator[Tensor]:
    """Each is free again when it has been added."""
    tensors.reverse()
    while tensors:
        yield tensors.pop()


# -- transformers -----------------------------------------------------------------------------------------------------

_TRANSFORMER = ("hidden_states", "timestep", "encoder_hidden_states", "pooled_projections")


def _ask_flux(network: Any, net: Any, inputs: Mapping[str, Any], controlnet_cond: Tensor, **shown: Any) -> Added:
    own = _some(inputs, *_TRANSFORMER, "img_ids", "txt_ids")
    own |= _some(inputs, "guidance") if net.config.guidance_embeds else {}
    double, single = net(**own, controlnet_cond=packed(controlnet_cond), **shown, return_dict=False)
    return [double or [], single or []]


def _hand_flux(added: Added) -> dict[str, Any]:
    double, single = added
    return {"controlnet_block_samples": double or None, "controlnet_single_block_samples": single or None}


def _ask_sd3(network: Any, net: Any, inputs: Mapping[str, Any], controlnet_cond: Tensor, **shown: Any) -> Added:
    config, own = net.config, _some(inputs, *_TRANSFORMER)
    if config.force_zeros_for_pooled_projection:
        own["pooled_projections"] = own["pooled_projections"].new_zeros(()).expand_as(own["pooled_projections"])
    if config.joint_attention_dim is None:
        del own["encoder_hidden_states"]
    if not config.use_pos_embed:
        own["hidden_states"] = network.pos_embed(own["hidden_states"])
    return [list(net(**own, controlnet_cond=controlnet_cond + net.condition_shift, **shown, return_dict=False)[0])]


def _hand_sd3(added: Added) -> dict[str, Any]:
    return {"block_controlnet_hidden_states": added[0]}


CALLS: Mapping[str, Calls] = {
    "UNet2DConditionModel": Calls(_ask_unet, _hand_unet),
    "FluxTransformer2DModel": Calls(_ask_flux, _hand_flux),
    "SD3Transformer2DModel": Calls(_ask_sd3, _hand_sd3),
}
