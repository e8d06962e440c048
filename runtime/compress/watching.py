"""Activations of a generated module: hooks on the modules that make or read a variable of the spec.

A fused module is read through what goes into it; what comes out of one of its parts is that part's product again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ...codegen.names import attribute
from ...dsl.diagnostics import fail
from ...dsl.program import Body, Node
from ...lowering.graph import STRUCTURE, op_of
from ..lib import Linear, Model, Parallel
from .dims import Dims, Path
from .sites import Where, contractions

Seen = Callable[[Tensor], None]


def module_at(model: nn.Module, path: Path) -> nn.Module:
    """The module of the body at a path."""
    at: Any = model
    for segment in path:
        at = at[segment] if isinstance(segment, int) else getattr(at, attribute(segment))
    assert isinstance(at, nn.Module)
    return at


def watch(model: Model, dims: Dims, where: Where, see: Seen) -> list[Any]:
    """Call `see` with the activation each time the model computes it; gives handles of the hooks.

    Raises `SpecError` `not-built-yet` where no module makes or reads it.
    """
    for path, node in where.readers:
        body = dims.places[path].body
        if dims.places[path].routed and not dims.places[where.path].routed:
            continue  # it reads some of the rows only
        found = _product_module(module_at(model, path), _owner(body, node))
        if found is not None:
            return [found.register_forward_pre_hook(lambda module, args: see(args[0]))]
    place = dims.places[where.path]
    module = module_at(model, where.path)
    made = next((n for n in place.body.nodes if any(r.name == where.value for r in n.results)), None)
    if made is None:
        inputs = [v.name for v in place.body.inputs]
        if where.value in inputs:
            i = inputs.index(where.value)
            return [module.register_forward_pre_hook(lambda module, args: see(args[i]))]
    elif made.op == "call":
        instance = next(i for i in place.body.instances if i.name == made.attr("instance"))
        inner = module_at(model, place.instance_path(instance))
        i = [r.name for r in made.results].index(where.value)
        return [inner.register_forward_hook(lambda module, args, out: see(out[i] if isinstance(out, tuple) else out))]
    elif made.op == "loop":
        instance = next(i for i in place.body.instances if i.name == made.attr("instance"))
        last = module_at(model, (*place.instance_path(instance), len(instance.schedule or ()) - 1))
        i = [r.name for r in made.results].index(where.value)
        return [last.register_forward_hook(lambda module, args, out: see(out[i] if isinstance(out, tuple) else out))]
    elif made.op not in STRUCTURE:
        owner = _owner(place.body, made)
        product = _product_module(module, owner)
        if product is not None and contractions(op_of(made)):
            return [product.register_forward_pre_hook(lambda module, args: see(_part(module, owner, args[0])))]
        alone = getattr(module, attribute(owner), None) if owner else None
        if isinstance(alone, nn.Module) and len(made.results) == 1:
            return [alone.register_forward_hook(lambda module, args, out: see(out))]
    if where.value in place.body.outputs:
        i = place.body.outputs.index(where.value)
        return [module.register_forward_hook(lambda module, args, out: see(out[i] if isinstance(out, tuple) else out))]
    raise fail(
        "not-built-yet",
        f"scoring by `{where.value}` of `{place.body.block}`, which no module makes or reads, is not built yet",
        made.spans[0] if made is not None else place.body.span,
    )


def _owner(body: Body, node: Node) -> str | None:
    """The name under which a node's own weights stand in its body."""
    own = {w.name for w in body.weights}
    return next((o.rpartition(".")[0] for o in node.operands if o in own and "." in o), None)


def _product_module(module: nn.Module, owner: str | None) -> Linear | Parallel | None:
    """The matrix product that has a weight: alone, or with others of the same input."""
    if owner is None:
        return None
    alone = getattr(module, attribute(owner), None)
    if isinstance(alone, Linear):
        return alone
    return next((m for m in module.children() if isinstance(m, Parallel) and owner in m.parts), None)


def _part(module: nn.Module, owner: str | None, x: Tensor) -> Tensor:
    """What one part of a product gives, with its dims."""
    weight: Tensor
    bias: Tensor | None
    if isinstance(module, Linear):
        weight, bias, outs, ins = module.weight, module.bias, module.outs, module.ins
    else:
        assert isinstance(module, Parallel) and owner is not None
        logical = {name: view for name, _, view in module.logical()}
        weight, bias = logical[f"{owner}.weight"], logical.get(f"{owner}.bias")
        outs, ins = module.parts[owner][0], module.columns
    flat = x.flatten(-len(ins)) if len(ins) > 1 else x
    y = F.linear(flat, weight.reshape(-1, flat.shape[-1]), None if bias is None else bias.reshape(-1))
    return y.unflatten(-1, outs)
