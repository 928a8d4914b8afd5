"""A layer in one call, ``lstm_layer_*``: the input product and the recurrence, against their definition and parts."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastseq import reference
from fastseq.ops.lstm_autograd import layer
from fastseq.ops.lstm_layer import BACKENDS
from tests import tolerance
from tests.core.constants import BLOCK_K, TILE_ROWS
from tests.ops import lstm_cases as cases
from tests.ops.lstm_cases import CASES, DTYPES, Case, Inputs
from tests.tolerance import assert_same_bits, assert_within_budget

each_backend = pytest.mark.parametrize("backend", cases.backends("lstm_layer_forward", BACKENDS))
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
PRODUCT = ["dx", "dweight_ih", "dbias"]
GRADIENTS = [*PRODUCT, *cases.GRADIENTS.split()[1:]]


class Product(NamedTuple):
    """The input product of one call."""

    x: Tensor
    weight_ih: Tensor
    bias: Tensor | None


def inputs(case: Case, I: int, bias: bool, dtype: torch.dtype, seed: int = 0) -> tuple[Product, Inputs]:  # noqa: E741
    """A product that gives pre-activations like those of ``cases.inputs``, and the rest of the call."""
    args = cases.inputs(case, dtype, seed)
    generator = torch.Generator().manual_seed(1000 * seed + 5)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    lead, width = args.x_gates.shape[:-1], args.x_gates.shape[-1]
    product = Product(normal(*lead, I), normal(width, I, scale=I**-0.5), normal(width) if bias else None)
    return product, args


def run(op: str, name: str, *args: Any) -> Any:
    return cases.run(op, name, *args, table=BACKENDS)


def definition(x: Tensor, weight_ih: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    """What ``lstm_layer_forward`` means; after weight_hh, h0 and c0 come options and noise."""
    x_gates = reference.linear(x.flatten(0, -2), weight_ih, bias, False, True).unflatten(0, x.shape[:-1])
    return cases.definition(x_gates, *rest)


def definition_gradients(*args: Any) -> tuple[Tensor, ...]:
    """Gradients of ``definition``: those of the product, then those of ``cases.differentiable`` but x_gates."""
    product = Product(*(None if t is None else t.detach().requires_grad_() for t in args[:3]))
    call = Inputs(product.x, *args[3:7])
    leaves = {n: t.detach().requires_grad_() for n, t in cases.differentiable(call).items() if n != "x_gates"}
    options = call.options._replace(**{n: leaves.get(n) for n in ("weight_hr", "h_start", "c_start")})
    outputs = definition(*product, *(leaves[n] for n in ("weight_hh", "h0", "c0")), options, args[7])
    pairs = [(v, d) for v, d in zip(outputs, args[8], strict=True) if v.requires_grad]
    present, grads = zip(*pairs, strict=True)
    wanted = [*(t for t in product if t is not None), *leaves.values()]
    found = torch.autograd.grad(present, wanted, grads, allow_unused=True)
    return tuple(torch.zeros_like(leaf) if d is None else d for d, leaf in zip(found, wanted, strict=True))


def names_of(product: Product, args: Inputs) -> list[str]:
    given = [n for n, t in zip(PRODUCT, product, strict=True) if t is not None]
    return given + [f"d{n}" for n in cases.differentiable(args) if n != "x_gates"]


def backward_arguments(
    product: Product,
    args: Inputs,
    outputs: Any,
    grads: Any,
    rebuild: bool = False,
    needs: tuple[bool, ...] = (True,) * 4,
) -> list[Any]:
    """Arguments of ``lstm_layer_backward``; ``rebuild`` withholds the gates."""
    h, c, gates = outputs[:3]
    wanted = (needs[0], needs[1], needs[2] and product.bias is not None, needs[3])
    return [*grads, *product, None if rebuild else gates, h, c, *args[1:4], *args.options, *wanted]


def check(backend: str, product: Product, args: Inputs, seed: int = 0) -> None:
    """Outputs and gradients within the budget, with kept and with rebuilt gates; the core gives the same bits."""
    exact = cases.exact(args)
    outputs = run("lstm_layer_forward", backend, *product, *args[1:4], *args.options, 2)
    assert_within_budget(cases.OUTPUTS, outputs, definition, (*product, *exact[1:]))
    grads = cases.upstream(outputs, seed)
    kept = run("lstm_layer_backward", backend, *backward_arguments(product, args, outputs, grads))
    rebuilt = run("lstm_layer_backward", backend, *backward_arguments(product, args, outputs, grads, rebuild=True))
    if backend != "triton":  # there the product that rebuilds the gates sums in another order
        assert_same_bits(GRADIENTS, rebuilt, kept)
    names = names_of(product, args)
    for found in (kept, rebuilt) if backend == "triton" else (kept,):
        got = [d for name, d in zip(GRADIENTS, found, strict=True) if name in names]
        assert_within_budget(names, got, definition_gradients, (*product, *exact[1:], grads), tolerance.GRADIENTS)


@each_case
@each_dtype
@each_backend
def test_layer(backend: str, dtype: torch.dtype, case: Case) -> None:
    if backend == "triton" and case.T * case.H > 400:
        pytest.skip("triton: half a minute interpreted; the recurrence itself is tested at this size")
    check(backend, *inputs(case, 7, True, dtype))


@given(
    case=cases.shapes(st.integers(0, 6), st.integers(0, 14), st.integers(1, 40), st.integers(1, 40)),
    width=st.integers(1, 50),
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    threads=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**20),
)
@each_backend
def test_small(backend: str, case: Case, width: int, bias: bool, dtype: torch.dtype, threads: int, seed: int) -> None:
    cases.assume_runs(backend, dtype)
    product, args = inputs(case, width, bias, dtype, seed)
    assume(not case.hard or cases.decided(with_x_gates(product, args)))
    torch.set_num_threads(threads)
    check(backend, product, args, seed)


wide = st.integers(BLOCK_K + 1, BLOCK_K + 40)


@settings(max_examples=40)
@given(
    case=cases.shapes(st.just(2), st.integers(TILE_ROWS + 1, TILE_ROWS + 6), wide, wide),
    width=wide,
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    threads=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**20),
)
@pytest.mark.parametrize("backend", cases.compiled("lstm_layer_forward", BACKENDS))
def test_large(backend: str, case: Case, width: int, bias: bool, dtype: torch.dtype, threads: int, seed: int) -> None:
    product, args = inputs(case, width, bias, dtype, seed)
    assume(not case.hard or cases.decided(with_x_gates(product, args)))
    torch.set_num_threads(threads)
    check(backend, product, args, seed)


def with_x_gates(product: Product, args: Inputs) -> Inputs:
    """``args`` with the pre-activations that the product gives."""
    x_gates = reference.linear(product.x.flatten(0, -2), product.weight_ih, product.bias, False, True)
    return args._replace(x_gates=x_gates.unflatten(0, product.x.shape[:-1]))


BITS = {name: CASES[name] for name in ("one", "over_tile", "all_lengths_reverse", "all_packed", "no_steps")}
BITS |= {"large": Case(3, 37, 150, P=141, **cases.ALL), "deep": Case(2, 2, 700)}


@cases.needs_compiled()
@pytest.mark.parametrize("case", BITS.values(), ids=BITS.keys())
@each_dtype
def test_same_bits_as_its_parts(case: Case, dtype: torch.dtype) -> None:
    """One call gives what ``gemm``, ``lstm_forward`` and ``lstm_backward`` give, with any number of threads."""
    product, args = inputs(case, 33, True, dtype)
    ops = torch.ops.fastseq
    torch.set_num_threads(1)
    flat = product.x.flatten(0, -2)
    x_gates = ops.gemm(flat, product.weight_ih, product.bias, False, True).unflatten(0, product.x.shape[:-1])
    outputs = ops.lstm_forward(x_gates, *args[1:4], *args.options, 2)
    grads = cases.upstream(outputs)
    d, *rest = ops.lstm_backward(*cases.backward_arguments(args, outputs, grads))
    d = d.flatten(0, -2)
    dx = ops.gemm(d, product.weight_ih, None, False, False).view_as(product.x)
    expected = [dx, ops.gemm(d, flat, None, True, False), *rest]
    sums = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        got = ops.lstm_layer_forward(*product, *args[1:4], *args.options, 2)
        assert_same_bits(cases.OUTPUTS, got, outputs)
        found = list(ops.lstm_layer_backward(*backward_arguments(product, args, outputs, grads)))
        sums.append(found.pop(2))
        assert_same_bits([n for n in GRADIENTS if n != "dbias"], found, expected)
        assert_same_bits("dbias", sums[-1], sums[0])


@pytest.mark.parametrize("wanted", range(4))
@each_backend
def test_only_what_is_needed(backend: str, wanted: int) -> None:
    """A gradient that is not asked for has no elements, and the others are the same bits."""
    product, args = inputs(CASES["all_lengths"], 7, True, torch.float32)
    outputs = run("lstm_layer_forward", backend, *product, *args[1:4], *args.options, 2)
    grads = cases.upstream(outputs)
    needs = tuple(n == wanted for n in range(4))
    full = run("lstm_layer_backward", backend, *backward_arguments(product, args, outputs, grads))
    part = run("lstm_layer_backward", backend, *backward_arguments(product, args, outputs, grads, needs=needs))
    place = {"dx": 0, "dweight_ih": 1, "dbias": 2, "dweight_hh": 3, "dweight_hr": 3}
    for name, a, b in zip(GRADIENTS, part, full, strict=True):
        assert_same_bits(name, a, b if needs[place[name]] else b.new_empty(0)) if name in place else None
        assert name in place or torch.equal(a, b), name


@pytest.mark.parametrize("save", [0, 1, 2])
@each_backend
def test_save(backend: str, save: int) -> None:
    product, args = inputs(CASES["all_packed"], 7, True, torch.float32)
    full = run("lstm_layer_forward", backend, *product, *args[1:4], *args.options, 2)
    part = run("lstm_layer_forward", backend, *product, *args[1:4], *args.options, save)
    kept = [True, save >= 1, save >= 2, True, True]
    expected = [v if keep else v.new_empty(0) for keep, v in zip(kept, full, strict=True)]
    assert_same_bits(cases.OUTPUTS, part, expected)


@pytest.mark.parametrize("case", ["prime", "all_lengths_reverse", "all_packed", "no_steps"])
@each_dtype
def test_recompute(case: str, dtype: torch.dtype) -> None:
    """Rebuilding the gates in backward changes no gradient by a bit."""
    found = []
    for recompute in (False, True):
        product, args = inputs(CASES[case], 7, True, dtype)
        wanted = [t.requires_grad_() for t in (*product, *cases.differentiable(args).values()) if t is not args.x_gates]
        outputs = layer(*product, *args[1:], recompute=recompute)
        h, c, _, h_n, c_n = outputs
        assert (outputs[2].numel() == 0) == (recompute or h.numel() == 0)
        torch.autograd.backward([h, c, h_n, c_n], cases.upstream((h, c, h_n, c_n)))
        found.append([t.grad for t in wanted])
    assert_same_bits([str(n) for n in range(len(found[0]))], found[1], found[0])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_gradgradcheck(layout: str, recompute: bool) -> None:
    case = Case(3, 2, 2, P=3, layout=layout, reset=True, noise=0.5, tau=0.8)
    product, args = inputs(case, 2, True, torch.float64)
    leaves = [t.requires_grad_() for t in (*product, *args[1:4], args.options.weight_hr)]

    def call(*values: Tensor) -> tuple[Tensor, ...]:
        out = layer(*values[:6], args.options._replace(weight_hr=values[6]), recompute=recompute)
        return out[0], out[1], *out[3:]

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("case", ["all_lengths_reverse", "all_packed", "no_steps"])
@pytest.mark.parametrize("rebuild", [False, True])
def test_opcheck(case: str, rebuild: bool) -> None:
    product, args = inputs(CASES[case], 7, True, torch.float32)
    forward = (*product, *args[1:4], *args.options, 2)
    ops = torch.ops.fastseq
    outputs = ops.lstm_layer_forward(*forward)
    backward = backward_arguments(product, args, outputs, cases.upstream(outputs), rebuild)
    for op, call in ((ops.lstm_layer_forward, forward), (ops.lstm_layer_backward, tuple(backward))):
        assert set(torch.library.opcheck(op.default, call).values()) == {"SUCCESS"}


WRONG = {
    "x_rank": (0, lambda t: t[0], r"x must be \[T, B, .*\], got \[3, .*\]"),
    "x_stride": (0, lambda t: t.mT.contiguous().mT, "x must be contiguous"),
    "x_dtype": (0, lambda t: t.half(), "x must be float32( or float64)?, got"),
    "weight_ih_size": (1, lambda t: t[1:], r"weight_ih must be \[4\*H, I\] = \[20, 7\], got \[19, 7\]"),
    "weight_ih_dtype": (1, lambda t: t.double(), "weight_ih must be float32, got float64"),
    "bias_size": (2, lambda t: t[1:], r"bias must be \[4\*H\] = \[20\], got \[19\]"),
    "weight_hh_size": (3, lambda t: t[1:], r"weight_hh must be \[4\*H, P\] = \[20, 2\], got \[19, 2\]"),
}


@cases.needs_compiled()
@pytest.mark.parametrize("place, wrong, says", WRONG.values(), ids=WRONG.keys())
def test_wrong_argument(place: int, wrong: Any, says: str) -> None:
    product, args = inputs(Case(4, 3, 5, P=2, **cases.ALL), 7, True, torch.float32)
    forward = [*product, *args[1:4], *args.options, 2]
    outputs = torch.ops.fastseq.lstm_layer_forward(*forward)
    forward[place] = wrong(forward[place])
    with pytest.raises(ValueError, match=f"lstm_layer_forward: {says}"):
        torch.ops.fastseq.lstm_layer_forward(*forward)
    backward = backward_arguments(product, args, outputs, cases.upstream(outputs))
    at = 5 + place if place < 3 else 8 + place
    backward[at] = wrong(backward[at])
    with pytest.raises(ValueError, match=f"lstm_(layer_)?backward: {says}"):
        torch.ops.fastseq.lstm_layer_backward(*backward)
