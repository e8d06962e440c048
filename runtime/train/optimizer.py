"""AdamW over fp32 masters, with the weights of the model in their own dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..lib import Beside, Model
from .config import TrainConfig

SLOTS = ("step", "exp_avg", "exp_avg_sq")


class Held(NamedTuple):
    """A weight by its path in the spec: the name of the parameter that holds it, and what cuts it out of a tensor that
    is laid out like that parameter."""

    path: str
    name: str
    cut: Callable[[Tensor], Tensor]


def held(model: Model | Beside) -> list[Held]:
    """Every weight of a model once, by the first of its paths."""
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[Any, Held] = {}
    for path, holder, view in model.named_logical_parameters():
        offset = int(view.storage_offset() - holder.storage_offset())
        cut = _cut(view.size(), view.stride(), offset)
        found.setdefault((id(holder), offset, view.size()), Held(path, names[id(holder)], cut))
    return list(found.values())


def _cut(size: torch.Size, stride: tuple[int, ...], offset: int) -> Callable[[Tensor], Tensor]:
    def cut(x: Tensor) -> Tensor:
        assert x.is_contiguous()
        return x.as_strided(size, stride, x.storage_offset() + offset)

    return cut


class Optimizer:
    """AdamW (Loshchilov and Hutter 2019). Weights below fp32 have a master copy that is stepped and copied back, and
    their gradients are summed in fp32.

    Names are those of parameters of the module; a fused parameter is stepped as one, which AdamW cannot tell apart.
    Only what is saved goes by paths in the spec, which are the same however a module is fused or laid out.
    """

    def __init__(self, model: Model, config: TrainConfig):
        self.weights: dict[str, nn.Parameter] = dict(model.named_parameters())
        self.held = held(model)
        decayed = _decayed(model)
        self.beside: list[str] = []
        if model.beside is not None:  # what the objective owns is saved here: the checkpoint's weights are the model's
            owned = {f"beside.{name}": p for name, p in model.beside.named_parameters()}
            self.weights |= owned
            self.beside = list(owned)
            self.held += [Held(f"beside.{h.path}", f"beside.{h.name}", h.cut) for h in held(model.beside)]
            decayed |= {f"beside.{name}" for name in _decayed(model.beside)}
        self.masters: dict[str, Tensor] = {name: self._master(name, p) for name, p in self.weights.items()}
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

    def _master(self, name: str, weight: nn.Parameter) -> Tensor:
        """What is stepped for a parameter: itself, or a wider copy."""
        return weight.detach().float().clone().requires_grad_() if weight.dtype.itemsize < 4 else weight

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
        self._follow()

    @torch.no_grad()
    def _follow(self) -> None:
        for name, weight in self.weights.items():
            if self.masters[name] is not weight:
                weight.copy_(self.masters[name])

    def reduce(self) -> None:
        """Make gradients whole behind the last micro-batch; those of one process are."""

    # --- state ------------------------------------------------------------------------------------

    def states(self) -> Iterator[tuple[str, str, Tensor]]:
        """(key, path of the weight, tensor) of moments, masters and counts of steps: `exp_avg.<path>`,
        `exp_avg_sq.<path>`, `master.<path>`, `step.<path>`, which has no dims, and `weight.<path>` of what the
        objective owns."""
        for path, name, cut in self.held:
            master = self.masters[name]
            for key, value in self.adam.state[master].items():
                whole = value.detach().clone() if key == "step" else cut(self._whole(name, value))
                yield f"{key}.{path}", path, whole
            if master.dtype != self.weights[name].dtype:
                yield f"master.{path}", path, cut(self._whole(name, master.detach()))
            if name in self.beside:
                yield f"weight.{path}", path, cut(self._whole(name, self.weights[name].detach()))

    def _whole(self, name: str, value: Tensor) -> Tensor:
        """Something laid out like what is stepped, laid out like the parameter."""
        return value

    def _part(self, name: str, value: Tensor) -> Tensor:
        """The way back."""
        return value

    def state(self) -> dict[str, Tensor]:
        """All `states`, by key."""
        return {key: value for key, _, value in self.states()}

    def load(self, take: Callable[[str, str], Tensor | None]) -> None:
        """Take up a saved state, behind the weights; `take(key, path)` gives a tensor, None for one that was not
        saved. Raises KeyError where some of a weight is missing."""
        for name, master in self.masters.items():
            mine = [h for h in self.held if h.name == name]
            with torch.no_grad():
                weight = self.weights[name]
                if name in self.beside:
                    weight.copy_(self._taken("weight", name, mine, take))
                if master.dtype != weight.dtype:
                    wide = self._taken("master", name, mine, take)
                    weight.copy_(wide)
                    master.copy_(self._part(name, wide))
                elif master is not weight:
                    master.copy_(self._part(name, weight))
            if all(take(f"step.{h.path}", h.path) is None for h in mine) and take(f"step.{name}", name) is None:
                continue  # a weight that never had a gradient
            slots: dict[str, Any] = self.adam.state[master]
            for key in SLOTS:
                value = self._taken(key, name, mine, take)
                slots[key] = value.to(master.device) if key == "step" else self._part(name, value).clone()

    def _taken(self, key: str, name: str, mine: list[Held], take: Callable[[str, str], Tensor | None]) -> Tensor:
        """A tensor laid out like a parameter, from those of the weights that it holds."""
        pieces = [(h, take(f"{key}.{h.path}", h.path)) for h in mine]
        if any(piece is None for _, piece in pieces):
            older = take(f"{key}.{name}", name)  # version 0.1 saved fused parameters as one
            if older is None:
                raise KeyError(f"{key}.{name}")
            return older
        if key == "step":
            assert pieces[0][1] is not None
            return pieces[0][1].clone()
        kind = (
            self.weights[name].dtype
            if key == "weight"
            else torch.promote_types(self.weights[name].dtype, torch.float32)
        )
        made = torch.empty_like(self.weights[name], dtype=kind, memory_format=torch.contiguous_format)
        for h, piece in pieces:
            assert piece is not None
            h.cut(made).copy_(piece)
        return made


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
