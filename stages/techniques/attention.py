"""``technique.attention``: how the denoiser's attention is computed. Text encoders and the VAE keep torch's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from stages.config import ConfigError, close_match, cpu_field, dtype_of_component, on_gpu
from stages.families.facts import facts_of
from stages.techniques.base import SAMPLING, Technique

if TYPE_CHECKING:
    from torch import Tensor, nn

    from stages.memory.planner import ModelProfile

KEY = "technique.attention"
STOCK = ("auto", "sdpa")  # what diffusers takes where nothing is said: torch's scaled_dot_product_attention
NAMES = (*STOCK, "math", "sliced", "xformers", "openvino")
# ``auto`` takes OpenVINO's kernels from so many tokens on: with fewer, loading the library takes what they save
TOKENS = 2048
# bytes of RES: the library and its kernels' code, in two lanes (``python -m benchmarks attention``)
OPENVINO = 86_000_000
KERNELS = 2  # of OpenVINO's; raised where others are asked for, so that stored results are not mixed


def chosen(config: DictConfig) -> str:
    """What ``technique.attention`` is, ``auto`` resolved where OpenVINO's kernels pay: by machine and model, never by
    the budget, as they round otherwise.

    They do for UNets in bf16, on processors with products of bf16 vectors and not of matrices (AMX): torch's attention
    makes no use of the former (0.5x of its time; ``python -m benchmarks attention``). Of transformers not all that
    800 MB hold have room for them.
    """
    kind, facts, flags = config.technique.attention, facts_of(config), cpu_field("flags").split()
    if kind != "auto" or on_gpu(config) or not facts.attends or config.technique.compile != "none":
        return kind
    if config.technique.linfusion.path is not None or dtype_of_component(config, facts.denoiser) != "bf16":
        return kind
    vectors = "avx512_bf16" in flags and "amx_bf16" not in flags
    tokens = (config.denoise.tile_size // config.model.vae_scale_factor // facts.attends) ** 2
    return "openvino" if vectors and tokens >= TOKENS and find_spec("openvino") is not None else kind


class Attention(Technique):
    """``math``: scores and softmax written out, memory quadratic in tokens. ``sliced``: the same, half of the heads at
    a time. ``xformers``: its memory-efficient kernels. ``openvino``: those of a CPU (``stages/openvino_attention.py``).

    Other names are those of diffusers' attention dispatcher, which the transformers of FLUX and Z-Image ask
    (https://huggingface.co/docs/diffusers/optimization/attention_backends).
    """

    name = "attention"
    keys = (KEY,)
    # products over a batch round by its size, which has to be a micro-batch
    whole = frozenset({"Attention", "FluxAttention", "Flux2Attention", "Flux2ParallelSelfAttention"})

    @classmethod
    def of(cls, config: DictConfig) -> Attention | None:
        return None if config.technique.attention in STOCK else cls(config.technique.attention)

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._later: Callable[[], object] | None = None  # kernels that know no meta tensors

    @classmethod
    def check(cls, config: DictConfig) -> None:
        kind, unet = config.technique.attention, facts_of(config).unet
        if unet and kind not in NAMES:
            hint = close_match(kind, NAMES) or "Names of diffusers' attention dispatcher are for transformers."
            raise ConfigError(KEY, kind, f"one of {', '.join(NAMES)} for a UNet", hint)
        if kind == "sliced" and not unet:
            hint = "diffusers slices the attention of UNets; this denoiser is a transformer."
            raise ConfigError(KEY, kind, "auto, sdpa, math or a name of diffusers' attention dispatcher", hint)
        if kind == "xformers" and not on_gpu(config):
            raise ConfigError(KEY, kind, "auto, sdpa, math or sliced on a CPU", "Its kernels are for GPUs: device=cuda")
        if kind == "openvino" and on_gpu(config):
            raise ConfigError(KEY, kind, "another one on a GPU", "Its kernels are for processors: device=cpu")
        if kind == "openvino" and (way := config.technique.compile) != "none":
            hint = "A program of torch's knows no kernels of others."
            raise ConfigError("technique.compile", way, f"none with {KEY}=openvino", hint)
        package = {"xformers": "xformers", "openvino": '"highres-lowram[openvino]"'}.get(kind)
        if package and find_spec(kind) is None:
            raise ConfigError(KEY, kind, "a package that is installed", f"pip install {package}")

    def fingerprint(self, cache: Path) -> Mapping[str, Any]:
        return {KEY: self.kind} | ({f"{KEY}.kernels": KERNELS} if self.kind == "openvino" else {})

    def touches(self, stage: str) -> bool:
        return stage in SAMPLING

    def planned(self, model: ModelProfile) -> ModelProfile:
        """With the library and the code of its kernels; what they keep of tokens is in the look."""
        return model.holding(OPENVINO) if self.kind == "openvino" else model

    def on_model(self, network: nn.Module, component: str) -> None:
        stock: Any = network
        if self.kind == "openvino":
            from stages.openvino_attention import Kernels, attend_by

            attend_by(Kernels(), [one for one in network.modules() if type(one).__name__ in self.whole])
        elif any(hasattr(getattr(module, "processor", None), "_attention_backend") for module in network.modules()):
            backend = "_native_math" if self.kind == "math" else self.kind
            try:
                stock.set_attention_backend(backend)
            except (ValueError, RuntimeError, ImportError) as error:
                expected = "a backend of diffusers' attention dispatcher that works here"
                raise ConfigError(KEY, self.kind, expected, str(error)) from None
            if not backend.startswith("_native"):  # those are torch's, on meta too
                self._later = partial(stock.set_attention_backend, backend)
                stock.set_attention_backend("native")
        elif self.kind == "math" and hasattr(stock, "set_attn_processor"):
            from diffusers.models.attention_processor import AttnProcessor

            stock.set_attn_processor(AttnProcessor())
        elif self.kind == "sliced":
            stock.set_attention_slice("auto")
        elif self.kind == "xformers":
            self._later = stock.enable_xformers_memory_efficient_attention
        else:
            raise ConfigError(KEY, self.kind, "auto", f"The {component} of this checkpoint knows no other attention.")

    def before_call(self, batch: Any, step: Tensor, inputs: dict[str, Tensor]) -> None:
        if self._later is not None and batch.samples.device.type != "meta":
            self._later()
            self._later = None
