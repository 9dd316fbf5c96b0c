"""Random programs of every op, and what they do, written out block by block."""

import math
import random
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from steersman.kernels.program import Block, Program
from steersman.steering import lower

N_GATES = 3
D_HEAD = 8


def vector(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g)


def feature(i: int, d: int, r: int, g: torch.Generator, only_if_active: bool) -> Block:
    """Rows with an encoder of their own and a threshold, as those of a feature dictionary."""
    read, write = vector(g, r, d) / math.sqrt(d), vector(g, r, d) / math.sqrt(d)
    block = lower.affine(i, write, read + write, vector(g, r), 1.0)  # reads `read`
    return replace(
        block,
        gain=vector(g, r),
        offset=vector(g, r),
        threshold=vector(g, r).abs(),
        high=torch.full((r,), 3.0),
        only_if_active=only_if_active,
    )


def ops(d: int, rng: random.Random, g: torch.Generator) -> dict[str, Callable[[int], Block]]:
    """One block of each kind, by name; ``most`` bounds the rows so that no edit leaves only rounding errors of x."""
    most = max(1, d // 4)
    k = rng.choice([1, 2, min(7, most), min(64, most)])
    heads = rng.sample(range(max(1, d // D_HEAD)), max(1, d // D_HEAD // 2))

    def v() -> Tensor:
        return vector(g, d)

    def columns() -> Tensor:
        return torch.tensor([rng.randrange(d) for _ in range(k)])  # some twice

    def affine(i: int) -> Block:
        r = torch.linalg.qr(vector(g, d, k)).Q.T
        return lower.affine(i, r, vector(g, k, d) / math.sqrt(d), vector(g, k), rng.uniform(0, 1))

    return {
        "add": lambda i: lower.add(i, v(), rng.gauss(0, 2), False),
        "add_relative": lambda i: lower.add(i, v(), rng.uniform(-0.5, 0.5), True),
        "ablate": lambda i: lower.ablate(i, v()[None], rng.uniform(0, 1)),
        "ablate_subspace": lambda i: lower.ablate(i, vector(g, k, d), rng.uniform(0, 1)),
        "clamp": lambda i: lower.clamp(i, v(), -0.5, rng.choice([None, 0.5])),
        "clamp_value": lambda i: lower.clamp(i, v(), 2.0, 2.0),
        "multiply": lambda i: lower.multiply(i, v(), rng.uniform(-2, 2)),
        "rotate": lambda i: lower.rotate(i, v(), v(), rng.choice([30.0, 90.0, 200.0])),
        "feature": lambda i: feature(i, d, k, g, rng.random() < 0.5),
        "neurons": lambda i: lower.neurons(i, columns(), d, rng.choice(["set", "add", "scale"]), rng.uniform(-3, 3)),
        "heads_factor": lambda i: lower.heads_factor(i, heads, min(D_HEAD, d), d, rng.choice([0.0, 2.0])),
        "heads_add": lambda i: lower.heads_add(i, heads, min(D_HEAD, d), v(), rng.uniform(-2, 2)),
        "affine": affine,
    }


COLUMNAR = ("neurons", "heads_factor")
CONSTANT = ("add", "heads_add")


def draw(d: int, seed: int, kinds: tuple[str, ...] | None = None, n_blocks: int | None = None) -> Program:
    """A program of a few blocks of the ``kinds``, gated and norm-preserving at times unless ``kinds`` are plain."""
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    blocks = []
    for i in range(rng.randint(1, 5) if n_blocks is None else n_blocks):
        made = ops(d, rng, g)
        block = made[rng.choice(kinds or tuple(made))](i)
        if kinds != CONSTANT:
            block = replace(block, gate=rng.choice([-1, -1, *range(N_GATES)]))
        if kinds is None:
            block = replace(block, preserve_norm=rng.random() < 0.25)
        blocks.append(block)
    return Program(tuple(blocks), d)


def naive(x: Tensor, program: Program, gates: Tensor) -> tuple[Tensor, Tensor]:
    """x' and ‖Δ‖ [n, n_blocks], each block applied to the whole vector as the one before left it, in float64."""
    x = x.double()
    norms = []
    for b in program.blocks:
        p = b.bias.double().expand(len(x), -1)
        if b.read is not None:
            p = p + x @ b.read.to_dense(torch.float64).T
        a = p * (p > b.threshold.double())
        new = torch.minimum(torch.maximum(b.gain.double() * a + b.offset.double(), b.low.double()), b.high.double())
        step = new - a
        if b.only_if_active:
            step = step * (p > b.threshold.double())
        if b.gate >= 0:
            step = step * gates[:, b.gate, None].double()
        length = x.norm(dim=-1, keepdim=True)
        if b.relative:
            step = step * length
        after = x + step @ b.write.to_dense(torch.float64)
        if b.preserve_norm:
            after = after * length / after.norm(dim=-1, keepdim=True)
        norms.append((after - x).norm(dim=-1))
        x = after
    return x, torch.stack(norms, dim=1) if norms else x.new_zeros(len(x), 0)


def gates_of(n: int, seed: int) -> Tensor:
    return (torch.rand(n, N_GATES, generator=torch.Generator().manual_seed(seed)) < 0.6).float()
