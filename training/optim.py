"""Optimiser, exponential moving average and mixed precision, the same for every part."""

import copy

import torch
from torch import nn

from .ranks import mean_gradients


class Trainee:
    """Modules trained together: AdamW on fp32 master weights, gradient clipping, an EMA copy of each module.

    dtype: what the modules compute in, bf16 on CUDA and fp32 elsewhere unless given. The modules hold weights of
    that dtype; after each update they are copied from the masters.
    """

    def __init__(
        self,
        modules: dict[str, nn.Module],
        *,
        device: torch.device,
        decay: float,
        weight_decay: float = 0.01,
        dtype: torch.dtype | None = None,
    ):
        self.modules = modules
        self.device, self.decay, self.updates = device, decay, 0
        self.dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        self.ema = {name: copy.deepcopy(m).eval().requires_grad_(False) for name, m in modules.items()}
        self.ema_parameters: list[torch.Tensor] = [p for m in self.ema.values() for p in m.parameters()]
        self.masters = [p.detach().clone() for p in self.ema_parameters]
        for module in modules.values():
            module.to(self.dtype)
        self.parameters: list[torch.Tensor] = [p for m in modules.values() for p in m.parameters()]
        self.optimizer = torch.optim.AdamW(
            self.masters, lr=1e-3, betas=(0.9, 0.99), weight_decay=weight_decay, fused=device.type == "cuda"
        )

    def step(self, loss: torch.Tensor, lr: float) -> None:
        """One update at learning rate ``lr``."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss.backward()
        with torch.no_grad():
            mean_gradients(self.parameters)
            for master, p in zip(self.masters, self.parameters, strict=True):
                master.grad = None if p.grad is None else p.grad.float()
                p.grad = None
            nn.utils.clip_grad_norm_(self.masters, 1.0)
            self.optimizer.step()
            torch._foreach_copy_(self.parameters, self.masters)
            self.updates += 1
            decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
            torch._foreach_lerp_(self.ema_parameters, self.masters, 1 - decay)

    def forget(self) -> None:
        """Drop the gradients of a step that was only tried."""
        for p in self.parameters:
            p.grad = None

    def state_dict(self) -> dict:
        """Everything needed to go on."""
        return {
            "masters": self.masters,
            "ema": {k: m.state_dict() for k, m in self.ema.items()},
            "optimizer": self.optimizer.state_dict(),
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from ``state``."""
        for name, module in self.ema.items():
            module.load_state_dict(state["ema"][name])
        self._set(state["masters"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.updates = state["updates"]

    def load_weights(self, weights: dict[str, dict[str, torch.Tensor]]) -> None:
        """Start from exported (EMA) weights alone."""
        for name, module in self.ema.items():
            module.load_state_dict(weights[name])
        self._set(self.ema_parameters)
        self.updates = 1000

    def _set(self, masters: list[torch.Tensor]) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self.masters, masters)
            torch._foreach_copy_(self.parameters, self.masters)
