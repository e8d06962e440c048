"""AdamW over fp32 masters, with the weights of the model in their own dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..lib import Beside, Model
from .config import TrainConfig


class Optimizer:
    """AdamW (Loshchilov and Hutter 2019). Weights below fp32 have a master copy that is stepped and copied back, and
    their gradients are summed in fp32.

    Names are those of parameters of the module; a fused parameter is stepped as one, which AdamW cannot tell apart.
    """

    def __init__(self, model: Model, config: TrainConfig):
        self.weights: dict[str, nn.Parameter] = dict(model.named_parameters())
        decayed = _decayed(model)
        self.beside: list[str] = []
        if model.beside is not None:  # what the objective owns is saved here: the checkpoint's weights are the model's
            owned = {f"beside.{name}": p for name, p in model.beside.named_parameters()}
            self.weights |= owned
            self.beside = list(owned)
            decayed |= {f"beside.{name}" for name in _decayed(model.beside)}
        self.masters: dict[str, Tensor] = {
            name: p.detach().float().clone().requires_grad_() if p.dtype.itemsize < 4 else p
            for name, p in self.weights.items()
        }
        groups = [
            {"params": [m for n, m in self.masters.items() if (n in decayed) == side], "weight_decay": decay}
            for side, decay in ((True, config.weight_decay), (False, 0.0))
        ]
        self.adam = torch.optim.AdamW(
            [g for g in groups if g["params"]],
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=True,
        )

    def gather(self, scale: float | Tensor = 1.0) -> None:
        """Add the gradients of a micro-batch to those of the masters."""
        for name, weight in self.weights.items():
            master = self.masters[name]
            if weight.grad is None or master is weight:
                continue
            if master.grad is None:
                master.grad = weight.grad.float()
            else:
                master.grad.add_(weight.grad)
            weight.grad = None

    def clip(self, most: float) -> Tensor:
        """Scale the gradient to a norm of at most `most`; gives the norm before."""
        return nn.utils.clip_grad_norm_(list(self.masters.values()), most, error_if_nonfinite=False)

    def step(self, rate: float) -> None:
        """One update, then the weights follow their masters."""
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, weight in self.weights.items():
                if self.masters[name] is not weight:
                    weight.copy_(self.masters[name])

    # --- state ------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Moments and masters by name: `exp_avg.<name>`, `exp_avg_sq.<name>`, `master.<name>`, the count of steps, and
        `weight.<name>` of what the objective owns."""
        found: dict[str, Tensor] = {}
        for name, master in self.masters.items():
            for key, value in self.adam.state[master].items():
                found[f"{key}.{name}"] = value.detach().clone() if value.dim() == 0 else value
            if master is not self.weights[name]:
                found[f"master.{name}"] = master.detach()
        return found | {f"weight.{name}": self.weights[name].detach() for name in self.beside}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take up a saved state. Raises KeyError where it lacks a name."""
        with torch.no_grad():
            for name in self.beside:
                self.weights[name].copy_(state[f"weight.{name}"])
            for name, master in self.masters.items():
                if master is not self.weights[name]:
                    master.copy_(state[f"master.{name}"])
                    self.weights[name].copy_(master)
                slots: dict[str, Any] = self.adam.state[master]
                for key in ("step", "exp_avg", "exp_avg_sq"):
                    slots[key] = state[f"{key}.{name}"].clone()


def _decayed(model: Model | Beside) -> set[str]:
    """Parameters with weight decay: those of whose parts in the spec any has two dims or more. Norms, biases and what a
    head has one number of are left alone. A convolution's taps count as a matrix, as they do in Megatron-LM."""
    holders = {id(p): name for name, p in model.named_parameters()}
    found = set()
    kept = getattr(model, "keep_fp32", ())
    from fnmatch import fnmatchcase

    for path, holder, view in model.named_logical_parameters():
        if view.dim() >= 2 and not path.endswith(".bias") and not any(fnmatchcase(path, k) for k in kept):
            found.add(holders[id(holder)])
    return found
