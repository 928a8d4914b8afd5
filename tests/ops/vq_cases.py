"""Inputs of the operators of vector quantization: rows and codes that are hard to look up, and both doors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import strategies as st
from torch import Generator, Tensor

from fastseq import reference
from fastseq.ops.vq import BACKENDS as VQ
from fastseq.ops.vq_codes import BACKENDS as CODES
from fastseq.ops.vq_residual import BACKENDS as RESIDUAL
from tests.core.constants import PANEL_WIDTH, constant
from tests.ops import lstm_cases

BACKENDS = {**VQ, **CODES, **RESIDUAL}
DTYPES = lstm_cases.DTYPES
GRADIENTS = ("straight", "rotation", "codes")
SCREENS = (0, 1, 2)  # never, always, automatic
SCREEN_MOST_D = constant("vq_screen.h", "kScreenMostD")
SCREEN_WINDOW = constant("vq_screen.h", "kScreenWindow")
SUM_BLOCK = constant("vq.h", "kSumBlock")  # rows of a code that are one chain of additions
BLOCK_ROWS = 32 * PANEL_WIDTH  # no block of rows that a thread works on is larger
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


class Case(NamedTuple):
    """One lookup: sizes, and what rows and codes are like."""

    N: int
    K: int
    D: int
    G: int = 1
    kind: str = "normal"
    masked: bool = False
    dot: bool = False


Pair = tuple[Tensor, Tensor]
KINDS: dict[str, Callable[[Tensor, Tensor, Generator], Pair]] = {}  # of rows [G, N, D] and codes [G, K, D]


def kind(make: Callable[[Tensor, Tensor, Generator], Pair]) -> Callable[[Tensor, Tensor, Generator], Pair]:
    """Adds ``make``, which takes normal numbers in float64 and what else is random."""
    KINDS[make.__name__] = make
    return make


@kind
def normal(x: Tensor, c: Tensor, g: Generator) -> Pair:
    return x, c


@kind
def mean(x: Tensor, c: Tensor, g: Generator) -> Pair:
    """A mean of five standard deviations."""
    return x + 5, c + 5


@kind
def far(x: Tensor, c: Tensor, g: Generator) -> Pair:
    """Another mean in each dimension, far from zero."""
    at = 1000 * torch.randn(x.shape[-1], generator=g, dtype=x.dtype)
    return x + at, c + at


@kind
def whole(x: Tensor, c: Tensor, g: Generator) -> Pair:
    """Small whole numbers: scores are exact, and many are equal."""
    return (2 * x).round(), (2 * c).round()


@kind
def duplicates(x: Tensor, c: Tensor, g: Generator) -> Pair:
    return x, c[:, torch.randint(0, max(1, c.shape[1] // 3), (c.shape[1],), generator=g)]


@kind
def same(x: Tensor, c: Tensor, g: Generator) -> Pair:
    return x, c[:, :1].expand_as(c)


@kind
def rows_are_codes(x: Tensor, c: Tensor, g: Generator) -> Pair:
    return c[:, torch.randint(0, c.shape[1], (x.shape[1],), generator=g)], c


@kind
def neighbours(x: Tensor, c: Tensor, g: Generator) -> Pair:
    """Codes that differ from one another by a unit in the last place, here and there."""
    first = c[:, :1].float().expand(c.shape)
    way = torch.randint(0, 6, c.shape, generator=g)
    up, down = (torch.nextafter(first, torch.full_like(first, end)) for end in (torch.inf, -torch.inf))
    return x, torch.where(way == 0, down, torch.where(way == 1, up, first)).double()


@kind
def sphere(x: Tensor, c: Tensor, g: Generator) -> Pair:
    """Rows near the centre of a sphere of codes: all distances are equal but for roundings."""
    return x * 1e-6, torch.nn.functional.normalize(c, dim=-1)


@kind
def column(x: Tensor, c: Tensor, g: Generator) -> Pair:
    """One dimension so large that the others round to nothing beside it in 8 bits."""
    at = int(torch.randint(0, max(1, x.shape[-1]), (1,), generator=g))
    scale = torch.ones(x.shape[-1], dtype=x.dtype)
    scale[at : at + 1] = 1e4
    return x, c * scale


@kind
def constant(x: Tensor, c: Tensor, g: Generator) -> Pair:
    """Every second dimension is the same everywhere."""
    x, c = x.clone(), c.clone()
    x[..., ::2] = c[..., ::2] = 300
    return x, c


@kind
def extremes(x: Tensor, c: Tensor, g: Generator) -> Pair:
    """Rows and codes whose numbers are all equal: sums of integers become as large as they can."""
    return x[..., :1].expand_as(x), c[..., :1].expand_as(c)


@kind
def corners(x: Tensor, c: Tensor, g: Generator) -> Pair:
    """Numbers of one size and either sign."""
    return x.sign(), c.sign()


@kind
def clusters(x: Tensor, c: Tensor, g: Generator) -> Pair:
    return c[:, torch.randint(0, c.shape[1], (x.shape[1],), generator=g)] + 0.01 * x, c


def powers(like: Tensor, low: int, high: int, g: Generator) -> Tensor:
    """A power of ten for each row."""
    return 10.0 ** torch.randint(low, high, (*like.shape[:-1], 1), generator=g, dtype=like.dtype)


@kind
def magnitudes(x: Tensor, c: Tensor, g: Generator) -> Pair:
    return x * powers(x, -15, 16, g), c * powers(c, -15, 16, g)


def opposite(c: Tensor) -> Tensor:
    """Codes in pairs whose sum is zero."""
    half = c[:, : (c.shape[1] + 1) // 2]
    return torch.stack((half, -half), 2).flatten(1, 2)[:, : c.shape[1]]


@kind
def tiny_rows(x: Tensor, c: Tensor, g: Generator) -> Pair:
    """Squares of the rows are below what float32 can hold, their products with codes are not."""
    return x * powers(x, -32, -18, g), opposite(c)


@kind
def tiny_codes(x: Tensor, c: Tensor, g: Generator) -> Pair:
    return x, c * powers(c[:, :1], -32, -18, g)


@kind
def tiny(x: Tensor, c: Tensor, g: Generator) -> Pair:
    return x * 1e-22, c * 1e-22


@kind
def huge(x: Tensor, c: Tensor, g: Generator) -> Pair:
    """Squares and products on either side of what float32 can hold."""
    return x * powers(x, 15, 25, g), c * powers(c, 15, 21, g)


@kind
def strange(x: Tensor, c: Tensor, g: Generator) -> Pair:
    """Some rows and codes hold what is not finite, or nearly so."""
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38, -3e38], dtype=x.dtype)

    def spoil(t: Tensor) -> Tensor:
        where = torch.rand(t.shape, generator=g) < 0.3 / max(1, t.shape[-1])
        return torch.where(where, values[torch.randint(0, len(values), t.shape, generator=g)], t)

    return spoil(x), spoil(c)


@kind
def no_code(x: Tensor, c: Tensor, g: Generator) -> Pair:
    """No code is finite."""
    return x, torch.full_like(c, torch.inf)


ORDINARY = ("normal", "mean", "whole", "duplicates", "rows_are_codes", "clusters")  # of float64 too


def inputs(case: Case, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows, codes and mask."""
    generator = torch.Generator().manual_seed(1000 * seed + 17)
    x, c = (torch.randn(case.G, size, case.D, generator=generator, dtype=torch.float64) for size in (case.N, case.K))
    x, c = KINDS[case.kind](x, c, generator)
    mask = torch.rand(case.G, case.N, generator=generator) < 0.7 if case.masked else None
    return x.to(dtype).contiguous(), c.to(dtype).contiguous(), mask


def normals(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal numbers."""
    generator = torch.Generator().manual_seed(1000 * seed + 19)
    return torch.randn(shape, generator=generator, dtype=dtype)


def places(G: int, N: int, K: int, masked: bool = True, seed: int = 0) -> Tensor:
    """Random places [G, N] in 0..K-1; with ``masked`` some are -1."""
    generator = torch.Generator().manual_seed(1000 * seed + 23)
    return torch.randint(-1 if masked else 0, K, (G, N), generator=generator)


def cases(N: Any, K: Any, D: Any, G: Any = None, kinds: tuple[str, ...] = tuple(KINDS)) -> st.SearchStrategy[Case]:
    """Cases of drawn sizes, of every kind."""
    return st.builds(
        Case,
        N=N,
        K=K,
        D=D,
        G=st.just(1) if G is None else G,
        kind=st.sampled_from(kinds),
        masked=st.booleans(),
        dot=st.booleans(),
    )


def expected_scores(x: Tensor, codebook: Tensor, mask: Tensor | None, dot: bool, index: Tensor) -> Tensor:
    """Scores of the codes [G, N, best] that ``index`` names, as ``vq_nearest`` returns them."""
    codes = reference.vq_gather(codebook, index.long().flatten(1)).view(-1, 1, x.shape[-1])
    rows = x[:, :, None].expand(*index.shape, x.shape[-1]).reshape(codes.shape)
    found = reference.vq_scores(rows, codes, dot).view(index.shape)
    counts = (index >= 0) & x.isfinite().all(-1, keepdim=True) & ~found.isnan()
    return torch.where(counts, found, torch.inf)


def distances(x: Tensor, codebook: Tensor, index: Tensor) -> Tensor:
    """Squared distances [G, N, best] of rows and the codes that ``index`` names."""
    codes = reference.vq_gather(codebook, index.long().flatten(1)).view(*index.shape, x.shape[-1])
    return torch.where(index >= 0, (x[:, :, None] - codes).square().sum(-1), 0.0)


def distance(x: Tensor, codebook: Tensor, index: Tensor) -> Tensor:
    return distances(x, codebook, index[..., None])[..., 0]


def upstream(G: int, N: int, D: int, names: str, dtype: torch.dtype, seed: int = 0) -> list[Tensor | None]:
    """Random gradients of those outputs that are named, None of the others."""
    shapes = {"quantized": (G, N, D), "commitment": (G, N), "codebook_error": (G, N)}
    return [
        normals(*shape, dtype=dtype, seed=seed + n) if name in names.split() else None
        for n, (name, shape) in enumerate(shapes.items())
    ]


def by_autograd(x: Tensor, codebook: Tensor, index: Tensor, grads: list[Tensor | None], gradient: str) -> Any:
    """dx and dcodebook by torch, of the definitions' outputs at a given index."""
    x, codebook = (t.detach().requires_grad_() for t in (x, codebook))
    codes = reference.vq_gather(codebook, index)
    made = {"straight": reference.vq_straight_through, "rotation": reference.vq_rotation}
    quantized = codes if gradient == "codes" else made[gradient](x, codes, index)
    outputs = (quantized, distance(x, codebook.detach(), index), distance(x.detach(), codebook, index))
    total = sum(((v * d).sum() for v, d in zip(outputs, grads, strict=True) if d is not None), x.sum() * 0)
    found = torch.autograd.grad(total, (x, codebook), allow_unused=True)
    return tuple(torch.zeros_like(t) if d is None else d for d, t in zip(found, (x, codebook), strict=True))


def run(op: str, backend: str, *args: Any) -> Any:
    """One operator by the backend of that name."""
    return lstm_cases.run(op, backend, *args, table=BACKENDS)


def backends(op: str) -> list[Any]:
    return lstm_cases.backends(op, BACKENDS)


def compiled(op: str) -> list[Any]:
    return lstm_cases.compiled(op, BACKENDS)


def needs_compiled() -> Any:
    """Mark for what only the compiled core promises: a skip with the reason where it does not run."""
    reason = VQ["vq_nearest"][0].why_not(torch.zeros(1))
    return pytest.mark.skipif(reason is not None, reason=f"cpu: {reason}")


numpy_door = lstm_cases.numpy_door


def by_numpy(op: str, *args: Any, threads: int = 1) -> list[Tensor]:
    """The operator of that name through the numpy door."""
    out = getattr(numpy_door(), op)(*arrays(args), threads=threads)
    return [torch.from_numpy(v) for v in (out if isinstance(out, tuple) else (out,))]


def arrays(values: Any) -> list[Any]:
    """Tensors, lists of them too, as numpy arrays."""

    def one(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [one(v) for v in value]
        return value.detach().numpy() if isinstance(value, Tensor) else value

    return [one(value) for value in values]
