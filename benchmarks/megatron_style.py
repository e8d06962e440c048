"""A dense decoder of one rank of data x tensor, written by hand with torch.distributed: what generated modules are held
against.

As in Megatron-LM (Shoeybi et al. 2019, section 3; Korthikanti et al. 2022, section 4.2.2): q, k and v are one product,
gate and up are one, their outputs split over the tensor ranks, the inputs of what follows them too; f and g are two
autograd functions; embedding and cross entropy are vocabulary-parallel; gradients lie in one buffer that is summed over
the data ranks once a step. Dims: b batch, t seq, d hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

Group = Any


def summed(x: Tensor, group: Group) -> Tensor:
    dist.all_reduce(x, group=group)
    return x


def joined(x: Tensor, group: Group) -> Tensor:
    """[b, t, d] of each -> [b, ranks t, d]. Rows come from ranks one after the other: for one batch row they lie as
    they are needed, else they are brought into order."""
    ranks = dist.get_world_size(group)
    whole = x.new_empty(ranks * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(whole, x.contiguous(), group=group)
    return whole.view(ranks, *x.shape).movedim(0, 1).flatten(1, 2)


def scattered(x: Tensor, group: Group) -> Tensor:
    """[b, ranks t, d] -> [b, t, d], this rank's rows of the sum."""
    ranks = dist.get_world_size(group)
    parts = x.unflatten(1, (ranks, -1)).movedim(1, 0).contiguous()
    own = torch.empty_like(parts[0])
    dist.reduce_scatter_tensor(own, parts.flatten(0, 1), group=group)
    return own


class Copied(torch.autograd.Function):
    """f: the input of column-parallel products. Its gradient is a sum over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return summed(grad.contiguous(), ctx.group), None


class Summed(torch.autograd.Function):
    """g: the sum of what row-parallel products give. Its gradient is the same on all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.mark_dirty(x)
        return summed(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class Joined(torch.autograd.Function):
    """f with split sequences."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return joined(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return scattered(grad, ctx.group), None


class Scattered(torch.autograd.Function):
    """g with split sequences."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return scattered(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return joined(grad, ctx.group), None


class CrossEntropy(torch.autograd.Function):
    """The sum of -log softmax over columns of which each rank has a part: three sums of a number a row."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, known: Tensor, start: int, group: Group) -> Tensor:
        most = logits.amax(-1)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
        shifted = logits - most[:, None]
        column = target - start
        here = (column >= 0) & (column < logits.shape[1])
        column = torch.where(here, column, 0)
        found = shifted.gather(1, column[:, None])[:, 0].masked_fill_(~here, 0)
        dist.all_reduce(found, group=group)
        soft = shifted.exp_()
        total = soft.sum(1)
        dist.all_reduce(total, group=group)
        ctx.save_for_backward(soft.div_(total[:, None]), column, here, known)
        return ((total.log() - found) * known).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        soft, column, here, known = ctx.saved_tensors
        soft.scatter_add_(1, column[:, None], -here[:, None].to(soft.dtype))
        return soft.mul_((grad * known)[:, None]), None, None, None, None


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [b, t, heads, width], half a turn apart."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Layer(nn.Module):
    """Grouped-query attention and a gated MLP, each behind a norm."""

    def __init__(self, sizes: Mapping[str, int], group: Group, split: bool) -> None:
        super().__init__()
        ranks = dist.get_world_size(group)
        hidden, self.width, ffn = sizes["hidden"], sizes["head_dim"], sizes["ffn"] // ranks
        self.heads, self.kv_heads = sizes["heads"] // ranks, sizes["kv_heads"] // ranks
        self.group, self.f, self.g = group, Joined if split else Copied, Scattered if split else Summed
        self.norm1, self.norm2 = nn.Parameter(torch.empty(hidden)), nn.Parameter(torch.empty(hidden))
        self.q_k_v = nn.Parameter(torch.empty((self.heads + 2 * self.kv_heads) * self.width, hidden))
        self.out = nn.Parameter(torch.empty(hidden, self.heads * self.width))
        self.gate_up, self.down = nn.Parameter(torch.empty(2 * ffn, hidden)), nn.Parameter(torch.empty(hidden, ffn))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = self.f.apply(F.rms_norm(x, x.shape[-1:], self.norm1, 1e-5), self.group)
        b, t = h.shape[:2]
        whole = F.linear(h, self.q_k_v).view(b, t, -1, self.width)
        q, k, v = whole.split([self.heads, self.kv_heads, self.kv_heads], 2)
        q, k, v = (y.transpose(1, 2) for y in (rotated(q, cos, sin), rotated(k, cos, sin), v))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads > self.kv_heads)
        x = x + self.g.apply(F.linear(o.transpose(1, 2).flatten(2), self.out), self.group)
        h = self.f.apply(F.rms_norm(x, x.shape[-1:], self.norm2, 1e-5), self.group)
        gate, up = F.linear(h, self.gate_up).chunk(2, -1)
        return x + self.g.apply(F.linear(F.silu(gate) * up, self.down), self.group)


class Decoder(nn.Module):
    """The model of one rank. `split`: between blocks the sequence is split over the tensor ranks."""

    def __init__(self, sizes: Mapping[str, int], data: Group, tensor: Group, split: bool) -> None:
        super().__init__()
        self.data, self.tensor, self.split = data, tensor, split
        self.rows = sizes["vocab"] // dist.get_world_size(tensor)
        self.start = self.rows * dist.get_rank(tensor)
        self.embedding = nn.Parameter(torch.empty(self.rows, sizes["hidden"]))
        self.layers = nn.ModuleList(Layer(sizes, tensor, split) for _ in range(sizes["layers"]))
        self.final = nn.Parameter(torch.empty(sizes["hidden"]))
        self.logits = nn.Parameter(torch.empty(self.rows, sizes["hidden"]))
        self.speed = 10000 ** -(torch.arange(sizes["head_dim"] // 2) / (sizes["head_dim"] // 2))
        self.replicated = [p for n, p in self.named_parameters() if "norm" in n or n == "final"] if split else []

    def buffer(self) -> None:
        """Let all gradients lie side by side."""
        own = list(self.parameters())
        self.gradients = own[0].new_zeros(sum(p.numel() for p in own))
        for p, piece in zip(own, self.gradients.split([p.numel() for p in own]), strict=True):
            p.grad = piece.view_as(p)

    def loss(self, tokens: Tensor) -> Tensor:
        """The sum of the losses of a rank's rows, tokens int64 [b, t]; 0-d."""
        row = tokens - self.start
        here = (row >= 0) & (row < self.rows)
        x = F.embedding(torch.where(here, row, 0), self.embedding).masked_fill(~here[..., None], 0)
        x = (Scattered if self.split else Summed).apply(x, self.tensor)
        turn = torch.arange(tokens.shape[1])[:, None, None] * self.speed
        cos, sin = turn.cos(), turn.sin()
        for layer in self.layers:
            x = layer(x, cos, sin)
        x = (Joined if self.split else Copied).apply(F.rms_norm(x, x.shape[-1:], self.final, 1e-5), self.tensor)
        target = F.pad(tokens[:, 1:], (0, 1)).flatten()
        known = torch.ones(tokens.shape)
        known[:, -1] = 0
        scores = F.linear(x, self.logits).flatten(0, 1)
        return CrossEntropy.apply(scores, target, known.flatten(), self.start, self.tensor)

    def step(self, tokens: Tensor) -> Tensor:
        """Forward, backward and whole gradients of the mean over all tokens; gives this rank's part of it."""
        self.gradients.zero_()
        count = summed(torch.tensor(tokens.shape[0] * (tokens.shape[1] - 1)), self.data)
        part = self.loss(tokens) / count
        part.backward()
        if self.replicated:
            flat = torch.cat([p.grad for p in self.replicated if p.grad is not None])
            pieces = summed(flat, self.tensor).split([p.numel() for p in self.replicated])
            for p, piece in zip(self.replicated, pieces, strict=True):
                assert p.grad is not None
                p.grad.copy_(piece)
        summed(self.gradients, self.data)
        return part.detach()

    @torch.no_grad()
    def take(self, weights: Mapping[str, Tensor]) -> None:
        """Copy a rank's weights, by their paths in the spec."""
        for path, into in self.places():
            into.copy_(weights[path].reshape(into.shape))

    def places(self, gradients: bool = False) -> list[tuple[str, Tensor]]:
        """Where each weight of the spec, or its gradient, lies."""

        def of(p: nn.Parameter) -> Tensor:
            found = p.grad if gradients else p.detach()
            assert found is not None
            return found

        found = [(f"{n}.weight", of(p)) for n, p in self.named_parameters() if "." not in n]
        for i, layer in enumerate(self.layers):
            width = [layer.heads * layer.width, *[layer.kv_heads * layer.width] * 2]
            inner = zip(("attention.q", "attention.k", "attention.v"), of(layer.q_k_v).split(width), strict=True)
            half = zip(("gated_mlp.gate", "gated_mlp.up"), of(layer.gate_up).chunk(2), strict=True)
            named = [*inner, *half, ("attention.out", of(layer.out)), ("gated_mlp.out", of(layer.down)),
                     ("norm1", of(layer.norm1)), ("norm2", of(layer.norm2))]  # fmt: skip
            found += [(f"layer.{i}.{name}.weight", x) for name, x in named]
        return found
