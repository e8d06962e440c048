"""Linear maps over compound dims, alone or several in one matrix product, and the embedding.

A fresh module holds NaN: it must be initialised or loaded, and forgetting is seen at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .gemms import takes
from .kernels import suits
from .later import Later, Weight, waiting
from .product import product


def empty(*shape: int) -> nn.Parameter:
    """A parameter that must still be given its values."""
    return nn.Parameter(torch.full(shape, float("nan")))


class Weights(nn.Module):
    """Bare parameters: `Weights(A_log=(heads,), D=(heads,))`."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, empty(*shape))


class Linear(nn.Module):
    """x[..., *ins] -> y[..., *outs] = weight[*outs, *ins] x + bias[*outs]."""

    def __init__(self, ins: tuple[int, ...], outs: tuple[int, ...], bias: bool = False) -> None:
        super().__init__()
        self.ins, self.outs = tuple(ins), tuple(outs)
        self.weight = empty(*self.outs, *self.ins)
        self.bias = empty(*self.outs) if bias else None

    def forward(self, x: Tensor, **ends: Any) -> Tensor:
        return linear(x, self.weight, self.bias, len(self.ins), **ends)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, ins: int = 1, kernel: Any = None,
    epilogue: Callable[[Tensor], Tensor] | None = None, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x[..., *ins], weight[*outs, *ins], bias[*outs] -> y[..., *outs]; `ins` is how many dims go.

    With a `kernel`, a generated one: `epilogue(y)`, which adds a `residual`[..., *outs] if there is one; of all that
    the kernel makes one pass, where it takes these tensors.
    """
    outs = weight.shape[: weight.dim() - ins]
    if ins > 1:
        x = x.flatten(-ins)
    if takes(kernel, x, weight, bias, residual):
        given = [None if t is None else t.reshape(shape) for t, shape in (
            (bias, (-1,)), (residual, (*x.shape[:-1], -1)))]  # fmt: skip
        y = kernel(x.to(weight.dtype), weight.reshape(-1, x.shape[-1]), *(t for t in given if t is not None))
        return y.view(*x.shape[:-1], *outs) if len(outs) > 1 else y
    (y,) = product(x, weight, bias, [prod(outs)])
    y = y.view(*x.shape[:-1], *outs) if len(outs) > 1 else y
    return y if epilogue is None else epilogue(y)


class Fused(nn.Module):
    """Several weights in the rows of one parameter, known to the outside by their own names.

    parts:   {name: (dims of its rows, has bias)}, in the order of the rows
    columns: dims of the rest of each weight
    flip:    the parameter is stored [columns, rows]; its parts are the same to the outside
    Each part is a view of the one parameter; an elementwise optimiser (AdamW) trains it exactly as it would alone.
    A part named "" is the module itself: its weight is `<module>.weight`, not a neighbour of the module.
    """

    def __init__(
        self, parts: Mapping[str, tuple[tuple[int, ...], bool]], columns: tuple[int, ...], flip: bool = False
    ) -> None:
        super().__init__()
        self.flip = flip
        self.parts = {name: (tuple(dims), bias) for name, (dims, bias) in parts.items()}
        self.columns = tuple(columns)
        self.sizes = [prod(dims) for dims, _ in self.parts.values()]
        with_bias = [size for size, (_, bias) in zip(self.sizes, self.parts.values(), strict=True) if bias]
        shape = (sum(self.sizes), prod(self.columns))
        self.weight = empty(*reversed(shape)) if flip else empty(*shape)
        self.bias = empty(sum(with_bias)) if with_bias else None
        self.every_bias = len(with_bias) == len(self.sizes)

    def owner(self, prefix: str) -> str:
        """The path in the spec under which the parts of the module at `prefix` are named."""
        return prefix if "" in self.parts else prefix.rpartition(".")[0]

    def logical(self) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        """(name, parameter that holds it, view with the part's own dims) for each weight and bias."""
        row = 0
        bias_row = 0
        weight = self.weight.detach().T if self.flip else self.weight.detach()
        for (name, (dims, bias)), size in zip(self.parts.items(), self.sizes, strict=True):
            name = f"{name}." if name else ""
            yield f"{name}weight", self.weight, weight[row : row + size].view(*dims, *self.columns)
            row += size
            if bias:
                assert self.bias is not None
                yield f"{name}bias", self.bias, self.bias.detach()[bias_row : bias_row + size].view(dims)
                bias_row += size

    def full_bias(self) -> Tensor | None:
        """One bias a row of the weight, 0 for parts that have none."""
        if self.bias is None or self.every_bias:
            return self.bias
        pieces = []
        row = 0
        for (_, bias), size in zip(self.parts.values(), self.sizes, strict=True):
            pieces.append(self.bias[row : row + size] if bias else self.bias.new_zeros(size))
            row += size if bias else 0
        return torch.cat(pieces)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, _, view in self.logical():
            destination[prefix + name] = view

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = {prefix + name: view for name, _, view in self.logical()}
        for key, view in own.items():
            if key not in state_dict:
                missing_keys.append(key)
            elif state_dict[key].shape != view.shape:
                error_msgs.append(f"{key} has shape {list(state_dict[key].shape)}, expected {list(view.shape)}")
            else:
                with torch.no_grad():
                    view.copy_(state_dict[key])
        unexpected_keys.extend(key for key in state_dict if key.startswith(prefix) and key not in own)


class Parallel(Fused):
    """Linear maps of one input in one matrix product: x[..., *ins] -> one tensor a group of `give`.

    parts: {name: (outs, has bias)}; give: the groups, in the order of the parts, None for each part alone.
    A group of one part has that part's dims; a group of several stays flat [..., rows], parts side by side.
    """

    def __init__(
        self,
        parts: Mapping[str, tuple[tuple[int, ...], bool]],
        ins: tuple[int, ...],
        give: tuple[tuple[str, ...], ...] | None = None,
    ) -> None:
        super().__init__(parts, ins)
        groups = tuple((name,) for name in self.parts) if give is None else give
        if [name for group in groups for name in group] != list(self.parts):
            raise ValueError(f"give {groups} does not list the parts {tuple(self.parts)} in their order")
        size = dict(zip(self.parts, self.sizes, strict=True))
        self.widths = [sum(size[name] for name in group) for group in groups]
        compound = [len(group) == 1 and len(self.parts[group[0]][0]) > 1 for group in groups]
        self.dims = [self.parts[group[0]][0] if c else None for group, c in zip(groups, compound, strict=True)]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if len(self.columns) > 1:
            x = x.flatten(-len(self.columns))
        pieces = product(x, self.weight, self.full_bias(), self.widths)
        lead = tuple(x.shape[:-1])
        return tuple([y if dims is None else y.view(lead + dims) for y, dims in zip(pieces, self.dims, strict=True)])


class Embed(nn.Module):
    """tokens int64[...] -> weight[vocab, *outs] rows."""

    def __init__(self, vocab: int, outs: tuple[int, ...]) -> None:
        super().__init__()
        self.vocab = vocab
        self.weight = empty(vocab, *outs)

    def forward(self, tokens: Tensor, kernel: Any = None) -> Tensor:
        return embed(tokens, self.weight, kernel)


def embed(tokens: Tensor, weight: Tensor, kernel: Any = None) -> Tensor:
    """tokens int64[...], weight [vocab, *outs] -> [..., *outs]. kernel: a generated one, for the gradient of weight."""
    store = waiting()
    kernel = kernel if suits(weight) and tokens.numel() else None
    if store is not None and weight.requires_grad:
        of = Weight.of(weight, (len(weight), -1))
        found: Tensor = _LaterRows.apply(tokens, store.anchor, of, store, kernel)
    elif kernel is not None and torch.is_grad_enabled():
        found = _Rows.apply(tokens, weight.flatten(1), kernel)
    else:
        found = F.embedding(tokens, weight if weight.dim() == 2 else weight.flatten(1))
    return found if weight.dim() == 2 else found.unflatten(-1, weight.shape[1:])


def _gradient_of_rows(grad: Tensor, tokens: Tensor, rows: int, kernel: Any) -> Tensor:
    """grad [..., N], tokens [...] -> [rows, N]."""
    if kernel is not None:
        return kernel(grad.reshape(-1, grad.shape[-1]), tokens.reshape(-1), rows)
    return torch.ops.aten.embedding_dense_backward(grad, tokens, rows, -1, False)


class _Rows(torch.autograd.Function):
    """Rows of a table; its gradient is a kernel's."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, kernel: Any) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.rows, ctx.kernel = len(weight), kernel
        return F.embedding(tokens, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (tokens,) = ctx.saved_tensors
        return None, _gradient_of_rows(grad, tokens, ctx.rows, ctx.kernel), None


class _LaterRows(torch.autograd.Function):
    """Rows of a table; its gradient waits."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, anchor: Tensor, weight: Weight, store: Later, kernel: Any) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.weight, ctx.rows, ctx.store, ctx.kernel = weight.without_value(), len(weight.value), store, kernel
        return F.embedding(tokens, weight.value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        (tokens,), rows, kernel = ctx.saved_tensors, ctx.rows, ctx.kernel
        ctx.store.put(ctx.weight, lambda: _gradient_of_rows(grad, tokens, rows, kernel), grad, tokens)
        return None, None, None, None, None


def embed_part(tokens: Tensor, weight: Tensor, start: int, kernel: Any = None) -> Tensor:
    """Rows of a table of which rows start, start + 1, .. are here; tokens of other rows give 0."""
    row = tokens - start
    here = (row >= 0) & (row < len(weight))
    found = embed(torch.where(here, row, 0), weight, kernel)
    return torch.where(here.reshape(*here.shape, *[1] * (weight.dim() - 1)), found, 0)


def named_logical_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
    """(path in the spec, parameter that holds it, view with the spec's dims that shares its memory).

    A fused module's own name is no word of the spec, so its parts appear beside it: `attention.q_k_v` gives
    `attention.q.weight`. A parameter used at two paths is given at each.
    """
    for prefix, child in module.named_modules(remove_duplicate=False):
        if isinstance(child, Fused):
            owner = child.owner(prefix)
            for name, holder, view in child.logical():
                yield spec_path(module, f"{owner}.{name}" if owner else name), holder, view
        else:
            for name, parameter in child._parameters.items():
                if parameter is not None:
                    yield spec_path(module, f"{prefix}.{name}" if prefix else name), parameter, parameter.detach()


def spec_path(module: nn.Module, path: str) -> str:
    """The path in the spec of something at a path of modules.

    A module that was built `around` another, its `it`, stands in its place: `q.it.weight` is `q.weight`, and what is
    its own has its name in the path, `q.lora.a.weight`.
    """
    found: list[str] = []
    at: Any = module
    for segment in path.split("."):
        around = getattr(at, "around", None)
        if around is None or segment != "it":
            found += [segment] if around is None else [around, segment]
        at = getattr(at, segment, None)
    return ".".join(found)


def spec_paths(module: nn.Module) -> dict[str, str]:
    """{key of `nn.Module.state_dict`: path in the spec}, for the keys that differ."""
    paths: dict[str, str] = {}
    for prefix, child in module.named_modules(remove_duplicate=False):
        if isinstance(child, Fused):
            owner = child.owner(prefix)
            names = [(f"{prefix}.{name}", f"{owner}.{name}" if owner else name) for name, _, _ in child.logical()]
        else:
            own = [*child._parameters, *(n for n in child._buffers if n not in child._non_persistent_buffers_set)]
            names = [(f"{prefix}.{name}" if prefix else name,) * 2 for name in own]
        paths.update((key, spec) for key, name in names if (spec := spec_path(module, name)) != key)
    return paths
