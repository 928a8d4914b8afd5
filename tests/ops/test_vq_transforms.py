"""The operators of vector quantization under opcheck, ``torch.func``, compile, export, and with codes that change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.export import Dim, export

from fastseq import functional, reference
from tests import tolerance
from tests.ops import vq_cases as cases
from tests.ops.vq_cases import Case
from tests.tolerance import assert_same_bits, assert_within_budget

pytestmark = cases.needs_compiled()
each_gradient = pytest.mark.parametrize("gradient", cases.GRADIENTS)
OPS = torch.ops.fastseq


def raw_calls(case: Case) -> dict[str, tuple[Any, ...]]:
    """Arguments of every operator."""
    x, codebook, mask = cases.inputs(case)
    index, K = cases.places(case.G, case.N, case.K), case.K
    codes = reference.vq_gather(codebook, index)
    d, e = cases.normals(*x.shape), cases.normals(*x.shape[:2])
    books, levels = [codebook[0], codebook[0, :2].contiguous()], cases.places(1, case.N, 3)[0]
    places = cases.places(1, 2 * case.N, 2).view(-1, 2)
    whole = torch.cat(books)
    return {
        "vq_nearest": (x, codebook, mask, False, 1, 64, True, True, 2),
        "vq_nearest several": (x, codebook, None, True, 2, 16, False, True, 0),
        "vq_quantize": (x, codebook, mask, False, True),
        "vq_quantize alone": (x, codebook, None, True, False),
        "vq_sums": (x, index, K),
        "vq_backward": (d, e, e, x, codes, index, K, 1, True, True),
        "vq_backward some": (None, e, None, x, codes, index, K, 0, True, False),
        "vq_residual": (x[0], books, mask[0], levels, True, True),
        "vq_residual alone": (x[0], books, None, None, False, False),
        "vq_residual_backward": (d[0], cases.normals(2, case.N), x[0], whole, [K, 2], places, 1),
        "vq_residual_backward some": (d[0], None, x[0], whole, [K, 2], places, 0),
        "vq_pack": (index.clamp_min(0), 5),
        "vq_unpack": (torch.full((3, 5), 255, dtype=torch.uint8), 8, 5),
    }


@pytest.mark.parametrize("name", raw_calls(Case(1, 2, 1, masked=True)))
def test_opcheck(name: str) -> None:
    for case in (Case(9, 7, 5, G=2, masked=True), Case(0, 3, 4, masked=True)):
        op = getattr(OPS, name.split()[0]).default
        assert set(torch.library.opcheck(op, raw_calls(case)[name]).values()) == {"SUCCESS"}


@each_gradient
def test_func_grad(gradient: str) -> None:
    x, codebook, mask = cases.inputs(Case(20, 7, 5, G=2, masked=True))
    grads = cases.upstream(2, 20, 5, "quantized commitment codebook_error", torch.float32)

    def outputs(x: Tensor, codebook: Tensor) -> list[Tensor]:
        out = functional.vq_quantize(x, codebook, mask=mask, gradient=gradient)
        return [out.quantized, out.commitment, out.codebook_error]

    def loss(x: Tensor, codebook: Tensor) -> Tensor:
        return sum((v * d).sum() for v, d in zip(outputs(x, codebook), grads, strict=True))

    call = (x, codebook, reference.vq_nearest(x, codebook, mask)[..., 0], grads, gradient)
    pulled = torch.func.vjp(outputs, x, codebook)[1](grads)
    for got in (torch.func.grad(loss, (0, 1))(x, codebook), pulled):
        assert_within_budget("dx dcodebook", got, cases.by_autograd, call, tolerance.GRADIENTS)


@pytest.mark.parametrize("gradient", cases.GRADIENTS[:2])
def test_func_grad_of_the_residual_quantizer(gradient: str) -> None:
    x, books = cases.normals(20, 5), [cases.normals(7, 5, seed=1), cases.normals(4, 5, seed=2)]
    d, dc = cases.normals(20, 5, seed=3), cases.normals(2, 20, seed=4)

    def loss(x: Tensor) -> Tensor:
        out = functional.vq_residual(x, books, gradient=gradient)
        return (out.quantized * d).sum() + (out.commitment * dc).sum()

    call = (d, dc, x, books, reference.vq_residual(x, books)[1], gradient)
    assert_within_budget("dx", torch.func.grad(loss)(x), reference.vq_residual_backward, call, tolerance.GRADIENTS)


@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 0)])
def test_vmap(in_dims: tuple[int | None, ...]) -> None:
    """One call per element of the mapped dimension, with and without a gradient inside."""
    x, codebook = cases.normals(3, 20, 5), cases.normals(3, 7, 5, seed=1)
    args = [t if d == 0 else t[0] for t, d in zip((x, codebook), in_dims, strict=True)]

    def outputs(x: Tensor, codebook: Tensor) -> tuple[Tensor, ...]:
        near = functional.vq_nearest(x, codebook, best=2, return_distance=True)
        assert near.distance is not None
        return near.index, near.distance, *functional.vq_quantize(x, codebook, sums=True)

    def gradients(x: Tensor, codebook: Tensor) -> tuple[Tensor, ...]:
        def loss(x: Tensor, codebook: Tensor) -> Tensor:
            out = functional.vq_quantize(x, codebook, gradient="codes")
            return out.quantized.sin().sum() + out.commitment.sum() + out.codebook_error.sum()

        return torch.func.grad(loss, (0, 1))(x, codebook)

    for function, names in (
        (outputs, "near distance quantized index commitment error counts sums"),
        (gradients, "dx dcodebook"),
    ):
        got = torch.func.vmap(function, in_dims)(*args)
        each = [function(*(t if d is None else t[n] for t, d in zip(args, in_dims, strict=True))) for n in range(3)]
        assert_same_bits(names, got, [torch.stack(v) for v in zip(*each, strict=True)])


def test_vmap_of_the_residual_quantizer() -> None:
    x, books = cases.normals(3, 20, 5), [cases.normals(7, 5, seed=1), cases.normals(4, 5, seed=2)]
    got = torch.func.vmap(lambda x: functional.vq_residual(x, books)[:3])(x)
    each = [functional.vq_residual(v, books)[:3] for v in x]
    assert_same_bits("quantized index commitment", got, [torch.stack(v) for v in zip(*each, strict=True)])


def test_forward_mode_is_refused() -> None:
    x, codebook = cases.normals(4, 3), cases.normals(5, 3, seed=1)
    says = "{}: forward-mode differentiation \\(jvp\\) is not supported"
    with pytest.raises(NotImplementedError, match=says.format("vq_quantize")):
        torch.func.jvp(lambda x: functional.vq_quantize(x, codebook).commitment, (x,), (x,))
    with pytest.raises(NotImplementedError, match=says.format("vq_residual")):
        torch.func.jvp(lambda x: functional.vq_residual(x, [codebook]).commitment, (x,), (x,))
    with forward_ad.dual_level():  # tensors without a tangent may pass
        assert functional.vq_quantize(x, codebook).index.shape == (4,)
        assert functional.vq_residual(x, [codebook]).index.shape == (4, 1)


def test_mixed_second_derivatives() -> None:
    """Commitment holds the codes fixed and codebook_error the rows: as their definitions, they have none."""
    x, codebook, mask = cases.inputs(Case(9, 5, 3, masked=True), torch.float64)
    x, codebook = x.requires_grad_(), codebook.requires_grad_()
    v = cases.normals(1, 9, dtype=torch.float64)
    out = functional.vq_quantize(x, codebook, mask=mask)
    for name, of, other in (("commitment", x, codebook), ("codebook_error", codebook, x)):
        (d,) = torch.autograd.grad(getattr(out, name), of, v, create_graph=True)
        (again,) = torch.autograd.grad(d.square().sum(), other, retain_graph=True, allow_unused=True)
        assert again is None or not again.any(), name


# ---- compile, export, and codes that change ----


def of_quantize(gradient: str, moving: bool) -> Callable[..., tuple[Tensor, ...]]:
    """Codes and losses; with ``moving`` the codebook moves to the means of its rows in between, as an EMA moves it."""

    def function(x: Tensor, codebook: Tensor) -> tuple[Tensor, ...]:
        out = functional.vq_quantize(x, codebook, gradient=gradient, sums=True)
        assert out.counts is not None and out.sums is not None
        if moving:
            with torch.no_grad():
                codebook.lerp_(out.sums / (out.counts[:, None] + 1), 0.5)
        return out.quantized, out.commitment

    return function


def of_residual(gradient: str, moving: bool) -> Callable[..., tuple[Tensor, ...]]:
    def function(x: Tensor, codebook: Tensor) -> tuple[Tensor, ...]:
        out = functional.vq_residual(x, [codebook, codebook * 0.5], gradient=gradient, sums=True)
        assert out.counts is not None and out.sums is not None
        if moving:
            with torch.no_grad():
                codebook.lerp_(out.sums[0] / (out.counts[0][:, None] + 1), 0.5)
        return out.quantized, out.commitment

    return function


def gradient_of(function: Callable[..., tuple[Tensor, ...]], rows: int, after: bool = False) -> list[Tensor]:
    """Outputs and dx; with ``after`` the codebook changes between forward and backward."""
    x, codebook = cases.normals(rows, 6).requires_grad_(), cases.normals(9, 6, seed=1)
    quantized, commitment = function(x, codebook)
    if after:
        codebook.mul_(3).add_(1)
    torch.autograd.backward((quantized.sin(), commitment), (cases.normals(rows, 6, seed=2), commitment.detach()))
    assert x.grad is not None
    return [quantized.detach(), commitment.detach(), x.grad]


@pytest.mark.parametrize("make", [of_quantize, of_residual])
@pytest.mark.parametrize("gradient", cases.GRADIENTS[:2])
def test_a_codebook_that_changes_before_backward(make: Any, gradient: str) -> None:
    """The gradient is that of the codes which forward saw, whoever changed the codebook, eager or compiled."""
    plain, moving = make(gradient, False), make(gradient, True)
    expected = gradient_of(plain, 50)
    names = "quantized commitment dx"
    assert_same_bits(names, gradient_of(plain, 50, after=True), expected)
    assert_same_bits(names, gradient_of(moving, 50), expected)
    # runs what it traced, so bits can be asked for, and chooses as inductor does what backward gets
    options = {"fullgraph": True, "dynamic": True, "backend": "aot_eager_decomp_partition"}
    torch._dynamo.reset()
    for function, after in ((plain, True), (moving, False)):
        compiled = torch.compile(function, **options)
        got = gradient_of(compiled, 50, after)
        assert_same_bits(names.split()[:2], got[:2], expected[:2])
        assert torch.equal(got[2], expected[2])  # the sign of a zero may differ
        more = gradient_of(compiled, 31, after)  # other sizes, same graph
        assert torch.equal(more[2], gradient_of(plain, 31)[2])


@each_gradient
def test_compile_with_every_gradient(gradient: str) -> None:
    """Codes, losses and both gradients, with a mask, groups and rows of any number."""

    def function(x: Tensor, codebook: Tensor, mask: Tensor) -> Tensor:
        out = functional.vq_quantize(x, codebook, mask=mask, gradient=gradient)
        return out.quantized.sin().sum() + out.commitment.sum() / 4 + out.codebook_error.sum()

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (20, 33):
        x, codebook, mask = cases.inputs(Case(rows, 7, 5, G=2, masked=True))
        found = []
        for run in (function, compiled):
            leaves = [t.clone().requires_grad_() for t in (x, codebook)]
            value = run(*leaves, mask)
            found.append([value.detach(), *torch.autograd.grad(value, leaves)])
        assert_same_bits("loss dx dcodebook", found[1], found[0])


def test_compile_with_inductor() -> None:
    """Once with torch's own compiler, forward and backward; it may round what is not ours in another way."""
    torch._dynamo.reset()
    compiled = torch.compile(of_residual("rotation", True), fullgraph=True, dynamic=True)
    expected, got = gradient_of(of_residual("rotation", False), 50), gradient_of(compiled, 50)
    assert torch.equal(got[0], expected[0])

    def dx(x: Tensor, codebook: Tensor, d: Tensor, index: Tensor, dc: Tensor) -> Tensor:
        books = [codebook, codebook * 0.5]
        total = sum(reference.vq_gather(b[None], index[None, :, m])[0] for m, b in enumerate(books))
        return reference.vq_residual_backward(d * total.cos(), dc, x, books, index, "rotation")

    x, codebook = cases.normals(50, 6), cases.normals(9, 6, seed=1)
    index = reference.vq_residual(x, [codebook, codebook * 0.5])[1]
    call = (x, codebook, cases.normals(50, 6, seed=2), index, expected[1])
    assert_within_budget("dx", got[2], dx, call, tolerance.GRADIENTS)


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_any_number_of_rows(strict: bool) -> None:
    class Lookup(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.codebook = torch.nn.Buffer(cases.normals(9, 6, seed=1))

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            near = functional.vq_nearest(x, self.codebook, metric="cosine", best=2, return_score=True)
            assert near.score is not None
            out, deep = functional.vq_quantize(x, self.codebook), functional.vq_residual(x, [self.codebook])
            packed = functional.vq_pack(out.index, functional.code_bits(9))
            return near.index, near.score, out.quantized, out.index, deep.quantized, deep.index, packed

    module = Lookup()
    sizes = ({0: Dim("rows", min=4, max=4096)},)
    program = export(module, (cases.normals(20, 6),), dynamic_shapes=sizes, strict=strict)
    names = "near score quantized index deep deep_index packed"
    for rows in (20, 4, 77):
        x = cases.normals(rows, 6, seed=rows)
        assert_same_bits(names, program.module()(x), module(x))


def test_autocast_changes_nothing() -> None:
    """An operator computes in the type of its arguments."""
    x, codebook = cases.normals(20, 6), cases.normals(9, 6, seed=1)
    expected = functional.vq_quantize(x, codebook, sums=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = functional.vq_quantize(x, codebook, sums=True)
        through = cases.run("vq_quantize", "reference", x[None], codebook[None], None, False, True)
    assert_same_bits("quantized index commitment error counts sums", got, expected)
    assert_same_bits("codes index", (through[0][0], through[1][0]), expected[:2])
