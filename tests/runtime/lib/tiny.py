"""A model written by hand as the compiler writes one, and the same model in the paper's letters.

`Tiny` uses only what generated code may use. `reference` computes one document at a time from named weights, with
plain loops: it shares no code with the library.
"""

from __future__ import annotations

import itertools

import torch
from torch import nn

from heddle.runtime import lib

CAUSAL = lib.Mask(lambda query, key: key.position <= query.position, behind=None, ahead=0)
WINDOW = lib.Mask(
    lambda query, key: (key.position <= query.position) & (query.position - key.position < 3), behind=2, ahead=0
)
PIECE = lib.Mask(
    lambda query, key: (key.position // 3 == query.position // 3) & (key.position <= query.position), behind=2, ahead=0
)
VOCAB, HIDDEN, HEADS, KV, WIDTH, STATE, GROUPS, TAPS = 11, 12, 4, 2, 3, 5, 2, 4
SPEED = torch.tensor([1.0], dtype=torch.float64)
KINDS = ("mamba", "causal", "window", "mlp", "piece", "mamba")


class Attention(nn.Module):
    def __init__(self, mask, keep):
        super().__init__()
        self.mask, self.keep = mask, keep
        self.q_k_v = lib.Parallel(
            {"q": ((HEADS, WIDTH), False), "k": ((KV, WIDTH), True), "v": ((KV, WIDTH), False)}, (HIDDEN,)
        )
        self.out = lib.Linear((HEADS, WIDTH), (HIDDEN,), bias=False)

    def slots(self, stream):
        return lib.Slots(o=stream.cache(k=(KV, WIDTH), v=(KV, WIDTH), keep=self.keep))

    def forward(self, x, at, state):
        q, k, v = self.q_k_v(x)
        cos, sin = angles(at.position, SPEED)
        q, k = lib.rotate(q, cos, sin), lib.rotate(k, cos, sin)
        return self.out(lib.attend(q, (k, v, self.mask), at=at, scale=WIDTH**-0.5, past=state.o))


def angles(position, speed):
    """cos, sin of position[b, t] * speed[pairs], each [b, t, pairs]."""
    angle = position.unsqueeze(-1).to(speed.dtype) * speed
    return angle.cos(), angle.sin()


class Mamba(nn.Module):
    def __init__(self):
        super().__init__()
        inner, shared = (HEADS, WIDTH), (GROUPS, STATE)
        self.z_u_b_c_dt = lib.Parallel(
            {
                "z": (inner, False),
                "u": (inner, False),
                "b": (shared, False),
                "c": (shared, False),
                "dt": ((HEADS,), False),
            },
            (HIDDEN,),
            give=(("z",), ("u", "b", "c"), ("dt",)),
        )
        self.conv = lib.ParallelConv({"conv_u": inner, "conv_b": shared, "conv_c": shared}, TAPS)
        self.y = lib.Weights(A_log=(HEADS,), D=(HEADS,), dt_bias=(HEADS,))
        self.norm = lib.RmsNorm(inner, 1e-5, groups=GROUPS)
        self.out = lib.Linear(inner, (HIDDEN,))

    def slots(self, stream):
        channels = HEADS * WIDTH + 2 * GROUPS * STATE
        return lib.Slots(
            u_b_c=stream.window(channels=channels, taps=TAPS),
            y=stream.scan(heads=HEADS, head_dim=WIDTH, groups=GROUPS, state=STATE),
        )

    def forward(self, x, at, state):
        z, u_b_c, dt = self.z_u_b_c_dt(x)
        u, b, c = self.conv(u_b_c, at, past=state.u_b_c, act="silu")
        y = lib.ssd(u, dt, b, c, self.y.A_log, self.y.D, self.y.dt_bias, at=at, chunk=4, past=state.y)
        return self.out(self.norm(lib.silu_mul(y, z)))


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = lib.Linear((HIDDEN,), (16,), bias=True), lib.Linear((16,), (HIDDEN,), bias=True)

    def slots(self, stream):
        return lib.Slots()

    def forward(self, x, at, state):
        return self.down(lib.relu2(self.up(x)))


class Block(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.norm = lib.LayerNorm((HIDDEN,), 1e-5, zero_centred=True) if kind == "mlp" else lib.RmsNorm((HIDDEN,), 1e-5)
        makers = {
            "mamba": Mamba,
            "mlp": Mlp,
            "causal": lambda: Attention(CAUSAL, None),
            "window": lambda: Attention(WINDOW, 2),
            "piece": lambda: Attention(PIECE, 2),
        }
        self.mixer = makers[kind]()

    def slots(self, stream):
        return self.mixer.slots(stream)

    def forward(self, x, at, state):
        return x + self.mixer(self.norm(x), at, state)


class Tiny(lib.Model):
    vocab = VOCAB
    keep_fp32 = ("*.A_log", "*.D", "*.dt_bias", "*norm.weight")

    def __init__(self, kinds=KINDS):
        super().__init__()
        self.kinds = kinds
        self.embedding = lib.Embed(VOCAB, (HIDDEN,))
        self.layer = nn.ModuleList(Block(kind) for kind in kinds)
        self.norm = lib.RmsNorm((HIDDEN,), 1e-5)
        self.head = lib.Linear((HIDDEN,), (VOCAB,))
        self.INIT = {path: self.rule(path) for path, _, _ in self.named_logical_parameters()}

    @staticmethod
    def rule(path):
        name = path.rpartition(".")[2]
        if name == "A_log":
            return "log_uniform", 1, 16
        if name == "dt_bias":
            return "softplus_inverse_log_uniform", 0.01, 0.5, 1e-4
        if name == "D" or (name == "weight" and ".norm." in path):
            return "uniform", 0.5, 1.5
        return "normal", 0.5

    def slots(self, stream):
        return lib.Slots(layer=[layer.slots(stream) for layer in self.layer])

    def run(self, tokens, at, state):
        x = self.embedding(tokens)
        for layer, slots in zip(self.layer, state.layer, strict=False):
            x = layer(x, at, slots)
        return self.head(self.norm(x))

    def losses_of(self, tokens, at):
        return {"next": lib.cross_entropy(self.run(tokens, at, lib.STATELESS), lib.next_token(tokens, at))}

    def counts_of(self, tokens, at):
        return {"next": lib.known(lib.next_token(tokens, at))}


def scan(u, dt, b, c, A_log, D, dt_bias):
    """One document, [t, H, P], [t, H], [t, G, N] x 2: facts 3.2, step by step."""
    heads, groups = u.shape[1], b.shape[1]
    rows = []
    state = [u.new_zeros(u.shape[2], b.shape[2]) for _ in range(heads)]
    for t in range(len(u)):
        row = []
        for h in range(heads):
            step = (1 + (dt[t, h] + dt_bias[h]).exp()).log()
            g = h // (heads // groups)
            state[h] = (-step * A_log[h].exp()).exp() * state[h] + step * torch.outer(u[t, h], b[t, g])
            row.append(state[h] @ c[t, g] + D[h] * u[t, h])
        rows.append(torch.stack(row))
    return torch.stack(rows)


def convolve(x, weight, bias=None):
    """One document [t, C], weight [C, k]."""
    rows = []
    for t in range(len(x)):
        row = torch.zeros_like(x[0]) if bias is None else bias
        for j in range(weight.shape[1]):
            if t - weight.shape[1] + 1 + j >= 0:
                row = row + weight[:, j] * x[t - weight.shape[1] + 1 + j]
        rows.append(row)
    return torch.stack(rows)


def attention(q, k, v, seen, scale):
    """One document [t, H, D], [s, V, D], [s, V, E], seen bool [t, s]; a query that sees nothing gives 0."""
    heads = []
    for h in range(q.shape[1]):
        g = h // (q.shape[1] // k.shape[1])
        rows = []
        for t in range(len(q)):
            keys = seen[t].nonzero()[:, 0]
            if not len(keys):
                rows.append(torch.zeros_like(v[0, g]))
                continue
            e = (scale * (k[keys, g] @ q[t, h])).exp()
            rows.append((e / e.sum()) @ v[keys, g])
        heads.append(torch.stack(rows))
    return torch.stack(heads, 1)


def rotated(x, speed):
    """One document [t, h, d]: pairs (j, j + len(speed)) turned by position * speed[j]."""
    n = len(speed)
    angle = torch.arange(len(x), dtype=x.dtype)[:, None, None] * speed
    a, b = x[..., :n], x[..., n : 2 * n]
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos(), x[..., 2 * n :]], -1)


def rms(x, weight, groups=1, dims=1):
    flat = x.flatten(-dims)
    parts = flat.reshape(*flat.shape[:-1], groups, -1)
    parts = parts / (parts.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    return (parts.reshape(flat.shape) * weight.flatten()).reshape(x.shape)


def reference(weights, tokens, kinds=KINDS):
    """Logits [t, vocab] of one document from {path: weight}."""
    w = weights
    x = w["embedding.weight"][tokens]
    t = torch.arange(len(tokens))
    back = t[:, None] - t[None]
    seen = {
        "causal": back >= 0,
        "window": (back >= 0) & (back < 3),
        "piece": (back >= 0) & (t[:, None] // 3 == t[None] // 3),
    }
    for i, kind in enumerate(kinds):
        p = {key.removeprefix(f"layer.{i}."): value for key, value in w.items() if key.startswith(f"layer.{i}.")}
        m = {key.removeprefix("mixer."): value for key, value in p.items()}
        if kind == "mlp":
            mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
            h = (x - mean) / (var + 1e-5).sqrt() * (1 + p["norm.weight"]) + p["norm.bias"]
            up = (h @ m["up.weight"].T + m["up.bias"]).clamp_min(0) ** 2
            x = x + up @ m["down.weight"].T + m["down.bias"]
            continue
        h = rms(x, p["norm.weight"])
        if kind == "mamba":
            z, u, b, c, dt = (torch.einsum("td,...d->t...", h, m[f"{n}.weight"]) for n in ("z", "u", "b", "c", "dt"))
            u, b, c = (
                convolve(y.flatten(1), m[f"conv_{n}.weight"].flatten(0, 1), m[f"conv_{n}.bias"].flatten()).view(y.shape)
                for n, y in (("u", u), ("b", b), ("c", c))
            )
            u, b, c = (y * y.sigmoid() for y in (u, b, c))
            y = scan(u, dt, b, c, m["y.A_log"], m["y.D"], m["y.dt_bias"])
            y = rms(y * z * z.sigmoid(), m["norm.weight"], GROUPS, 2)
        else:
            q, k, v = (torch.einsum("td,...d->t...", h, m[f"{n}.weight"]) for n in "qkv")
            q, k = rotated(q, SPEED), rotated(k + m["k.bias"], SPEED)
            y = attention(q, k, v, seen[kind], WIDTH**-0.5)
        x = x + torch.einsum("thp,dhp->td", y, m["out.weight"])
    return rms(x, w["norm.weight"]) @ w["head.weight"].T


def pieces(document):
    """bounds (start, end) of the runs of equal numbers in one row."""
    cuts = [0, *(i for i in range(1, len(document)) if document[i] != document[i - 1]), len(document)]
    return list(itertools.pairwise(cuts))
