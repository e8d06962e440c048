"""Peers for norms, gates, convolutions and scans."""

from __future__ import annotations

from importlib import import_module
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...dsl.program import Node
from ...lowering.alone import Alone
from ..lib import ParallelConv
from .seam import NotServed, Peer, Plain, calling, computing, setting, without_parent

# Of Liger's norms, behind eps: nothing is added to the weight, only 1 / rms is fp32, gradients get memory of their own.
_ROUNDED = (0.0, "llama", False)


class _Norm(NamedTuple):
    """An RMS norm of a use: its weight's path, what it is over, its groups, and its operand's name."""

    weight: str
    width: int
    groups: int
    eps: float
    given: str

    @classmethod
    def of(cls, alone: Alone, node: Node) -> _Norm:
        given, weight = node.operands[0] or "", node.operands[1]
        if weight is None:
            raise NotServed("a norm without a weight")
        width = prod(alone.graph.size(d) or 0 for d in alone.graph.values[weight].type.dims)
        return cls(weight, width, setting(node, "groups"), setting(node, "eps"), given)

    def flat(self, x: Tensor) -> Tensor:
        """x with what the norm is over as its last dim."""
        return x.reshape(*x.shape[:2], self.width)


def _added_norm(alone: Alone) -> tuple[_Norm, Node, Node]:
    add, node = alone.nodes
    norm = _Norm.of(alone, node)
    if norm.groups != 1 or norm.given != add.results[0].name or None in add.operands:
        raise NotServed("its norm is in groups, or of something else than the sum")
    return norm, add, node


def _liger_added(alone: Alone, plain: Plain) -> Any:
    norm, add, node = _added_norm(alone)
    apply = import_module("liger_kernel.ops.fused_add_rms_norm").LigerFusedAddRMSNormFunction.apply

    def forward(block: Any, given: dict[str, Tensor], at: Any) -> dict[str, Tensor]:
        x, residual = (norm.flat(given[o or ""]) for o in add.operands)
        y, total = apply(x, residual, block.get_parameter(norm.weight).flatten(), norm.eps, *_ROUNDED)
        like = given[add.operands[0] or ""]
        return {add.results[0].name: total.view_as(like), node.results[0].name: y.view_as(like)}

    return computing(plain(), alone, forward)


def _liger_norm(alone: Alone, plain: Plain) -> Any:
    (node,) = alone.nodes
    norm = _Norm.of(alone, node)
    if norm.groups != 1:
        raise NotServed("its norm is in groups")
    apply = import_module("liger_kernel.ops.rms_norm").LigerRMSNormFunction.apply

    def forward(block: Any, given: dict[str, Tensor], at: Any) -> dict[str, Tensor]:
        x = given[norm.given]
        y = apply(norm.flat(x), block.get_parameter(norm.weight).flatten(), norm.eps, *_ROUNDED)
        return {node.results[0].name: y.view_as(x)}

    return computing(plain(), alone, forward)


def _liger_gate(alone: Alone, plain: Plain) -> Any:
    silu, mul = alone.nodes
    gate, other = _gate_and_other(silu, mul)
    apply = import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction.apply

    def forward(block: Any, given: dict[str, Tensor], at: Any) -> dict[str, Tensor]:
        return {mul.results[0].name: apply(given[gate], given[other])}

    return computing(plain(), alone, forward)


def _gate_and_other(silu: Node, mul: Node) -> tuple[str, str]:
    """The names of z and y in y * silu(z)."""
    rest = [o for o in mul.operands if o is not None and o != silu.results[0].name]
    if len(rest) != 1:
        raise NotServed("it is no product with silu of something")
    return silu.operands[0] or "", rest[0]


def _fla_added(alone: Alone, plain: Plain) -> Any:
    norm, add, node = _added_norm(alone)
    rms_norm = import_module("fla.modules.norm.layernorm").rms_norm

    def forward(block: Any, given: dict[str, Tensor], at: Any) -> dict[str, Tensor]:
        x, residual = (norm.flat(given[o or ""]) for o in add.operands)
        weight = block.get_parameter(norm.weight).flatten()
        y, total = rms_norm(x, weight, None, residual=residual, eps=norm.eps, prenorm=True)
        like = given[add.operands[0] or ""]
        return {add.results[0].name: total.view_as(like), node.results[0].name: y.view_as(like)}

    return computing(plain(), alone, forward)


def _gated_norm(alone: Alone, plain: Plain, rmsnorm: Any) -> Any:
    silu, mul, node = alone.nodes
    gate, other = _gate_and_other(silu, mul)
    norm = _Norm.of(alone, node)
    if norm.given != mul.results[0].name:
        raise NotServed("its norm is of something else than the product")

    def forward(block: Any, given: dict[str, Tensor], at: Any) -> dict[str, Tensor]:
        y = rmsnorm(
            norm.flat(given[other]), block.get_parameter(norm.weight).flatten(), None, z=norm.flat(given[gate]),
            eps=norm.eps, group_size=norm.width // norm.groups, norm_before_gate=False,
        )  # fmt: skip
        return {node.results[0].name: y.view_as(given[other])}

    return computing(plain(), alone, forward)


def _fla_gated(alone: Alone, plain: Plain) -> Any:
    return _gated_norm(alone, plain, import_module("fla.modules.norm.layernorm_gated").rmsnorm_fn)


def _mamba_gated(alone: Alone, plain: Plain) -> Any:
    return _gated_norm(alone, plain, without_parent("mamba_ssm", "ops.triton.layernorm_gated").rmsnorm_fn)


def _conv(alone: Alone, plain: Plain, convolve: Any) -> Any:
    """convolve(x [B, T, C], weight [C, k], bias [C] | None, act) -> y [B, T, C]."""
    (node,) = alone.nodes
    act, names = setting(node, "act"), [r.name for r in node.results]

    def forward(block: Any, given: dict[str, Tensor], at: Any) -> dict[str, Tensor]:
        if at.starts is not None:
            raise NotServed("documents are packed")
        (own,) = (m for m in block.modules() if isinstance(m, ParallelConv))
        (x,) = given.values()
        y = convolve(x.flatten(2), own.weight.T, own.bias, act)
        parts = zip(names, y.split(own.sizes, -1), own.parts.values(), strict=True)
        return {name: part.view(*x.shape[:2], *dims) for name, part, (dims, _) in parts}

    return computing(plain(), alone, forward)


def _fla_conv(alone: Alone, plain: Plain) -> Any:
    causal_conv1d = import_module("fla.modules.causal_conv1d").causal_conv1d

    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, act: str | None) -> Tensor:
        y: Tensor = causal_conv1d(x, weight.contiguous(), bias, activation=act)[0]
        return y

    return _conv(alone, plain, convolve)


def _cuda_conv(alone: Alone, plain: Plain) -> Any:
    causal_conv1d_fn = import_module("causal_conv1d").causal_conv1d_fn

    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, act: str | None) -> Tensor:
        # Channels last, as rows lie here: the package has a kernel for that.
        y: Tensor = causal_conv1d_fn(x.transpose(1, 2), weight.contiguous(), bias, activation=act)
        return y.transpose(1, 2)

    return _conv(alone, plain, convolve)


def _mamba_scan(alone: Alone, plain: Plain) -> Any:
    combined = without_parent("mamba_ssm", "ops.triton.ssd_combined").mamba_chunk_scan_combined

    def ssd(
        u: Tensor, dt: Tensor, b: Tensor, c: Tensor, A_log: Tensor, D: Tensor, dt_bias: Tensor, at: Any,
        chunk: int = 128, past: Any = None,
    ) -> Tensor:  # fmt: skip
        documents = None if at.starts is None else at.segment.int()
        y: Tensor = combined(
            u, dt, -torch.exp(A_log.float()), b, c, chunk, D=D, dt_bias=dt_bias, seq_idx=documents, dt_softplus=True
        )
        return y

    return calling(plain(), ssd=ssd)


def _liger_loss(sums: torch.dtype | None) -> Any:
    def make(alone: Alone, plain: Plain) -> Any:
        apply = import_module("liger_kernel.ops.fused_linear_cross_entropy").LigerFusedLinearCrossEntropyFunction.apply

        def loss(
            x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, scale: float | None = None,
            softcap: float | None = None,
        ) -> Tensor:  # fmt: skip
            if scale is not None:
                raise NotServed("its logits are scaled")
            # Behind `target`: bias, weights of classes, what is not scored, two regularisers, how it is summed, cap,
            # the second loss, the type of sums.
            more = (bias, None, -1, 0.0, 0.0, "sum", softcap, False, sums)
            found: Tensor = apply(x.flatten(0, -2), weight, target.flatten(), *more)[0]
            return found

        return calling(plain(), linear_cross_entropy=loss)

    return make


_ADDED, _GATED = (("add", "rms_norm"),), (("silu", "mul", "rms_norm"),)
_CONV, _HEAD = (("parallel_conv",), ("causal_conv",)), (("linear", "cross_entropy"),)

PEERS = (
    Peer("liger", "liger-kernel", _ADDED, _liger_added),
    Peer("liger", "liger-kernel", (("rms_norm",),), _liger_norm),
    Peer("liger", "liger-kernel", (("silu", "mul"),), _liger_gate),
    Peer("liger", "liger-kernel", _HEAD, _liger_loss(None)),
    Peer("liger, fp32 sums", "liger-kernel", _HEAD, _liger_loss(torch.float32)),
    Peer("fla", "fla-core", _ADDED, _fla_added),
    Peer("fla", "fla-core", _GATED, _fla_gated),
    Peer("fla", "fla-core", _CONV, _fla_conv),
    Peer("mamba_ssm", "mamba-ssm", _GATED, _mamba_gated),
    Peer("mamba_ssm", "mamba-ssm", (("ssd",),), _mamba_scan),
    Peer("causal_conv1d", "causal-conv1d", _CONV, _cuda_conv),
)
