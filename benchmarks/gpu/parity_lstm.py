"""What the parity calls of the LSTM family, most important first."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from benchmarks.gpu.parity import Check, Kernels, definition
from benchmarks.gpu.routes import route
from fastseq import reference
from fastseq.ops import lstm, lstm_layer
from tests.ops import lstm_cases
from tests.ops.lstm_cases import Case
from tests.tolerance import GRADIENTS, OUTPUTS

INPUTS = 40  # size of x where there is an input product
OURS = {  # what small sizes do not reach: tiles of 16 rows, a program for many units, weights that stay, several graphs
    "tiles": Case(6, 37, 64),
    "resident": Case(9, 20, 128, reset=True),
    "graphs": Case(70, 3, 96),
    "wide": Case(3, 18, 256),
    "large": Case(3, 16, 1024),
}
SIZES = ("one", "prime", "over_tile", "row", "deep", "no_steps", "no_rows")
FEWER = ("prime", "one", "all_lengths", "all_packed_reverse", "projection_wide", "noise")  # in a dtype like another
LAYERS = ("tiles", "prime", "all_lengths", "all_packed", "projection", "noise", "one", "no_rows")
STEPS = ("tiles", "prime", "resident", "all_lengths")  # by steps, where a program could hold the weights
PAIRS = ("tiles", "prime", "wide", "lengths", "packed", "start", "noise")  # of both directions
DRY = ("prime",)
LAYER_GRADIENTS = f"dx dweight_ih dbias {lstm_cases.GRADIENTS.split(maxsplit=1)[1]}"
PRODUCTS = {"odd": (37, 29, 53), "tile": (64, 128, 96), "one": (1, 1, 1), "long": (3, 40, 4100), "tall": (300, 24, 16)}


def case_of(name: str) -> Case:
    return OURS[name] if name in OURS else lstm_cases.CASES[name]


def shortened(values: list[Any], dtype: torch.dtype, wide: set[int]) -> list[Any]:
    """Floating-point arguments in ``dtype``, but for those at the places ``wide``: states c, which stay in float32."""

    def one(n: int, value: Any) -> Any:
        floats = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(torch.float32 if n in wide else dtype) if floats else value

    return [one(n, value) for n, value in enumerate(values)]


def arguments(name: str, dtype: torch.dtype) -> list[Any]:
    """Of ``lstm_forward``, with save 2."""
    args = lstm_cases.inputs(case_of(name), torch.float32)
    return shortened([*args[:4], *args.options, 2], dtype, {3, 9})


def outputs(args: list[Any], dtype: torch.dtype) -> list[Tensor]:
    """h, c, gates, h_n, c_n by the definition, as a kernel would have kept them."""
    exact = [v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in args]
    return shortened(list(definition("lstm_forward", lstm.BACKENDS)(*exact)), dtype, {1, 4})


def compare(
    kernels: Kernels, module: str, op: str, table: Any, names: str, args: list[Any], sizes: Any, factor: int = OUTPUTS
) -> None:
    """A host function and its definition; batch_sizes (``sizes``) stay on the CPU, where torch has them."""
    kernels.within_budget(names, kernels.call(module, op, args, (sizes,)), definition(op, table), args, factor)


def forward(kernels: Kernels, name: str) -> None:
    args = arguments(name, kernels.torch_dtype)
    compare(kernels, "lstm", "lstm_forward", lstm.BACKENDS, lstm_cases.OUTPUTS, args, args[6])


def by_route(kernels: Kernels, call: Callable[[Kernels, str], None], name: str, chosen: str) -> None:
    """The same by a route that the plan would not take."""
    with route(chosen):
        call(kernels, name)


def rebuilt(kernels: Kernels, name: str) -> None:
    args = arguments(name, kernels.torch_dtype)
    h, c = outputs(args, kernels.torch_dtype)[:2]
    compare(kernels, "lstm", "lstm_gates", lstm.BACKENDS, "gates", [args[0], h, c, *args[1:-1]], args[6])


def backward(kernels: Kernels, name: str) -> None:
    args = arguments(name, kernels.torch_dtype)
    kept = outputs(args, kernels.torch_dtype)
    grads = kernels.gradients(kept)
    h, c, gates = kept[:3]
    given = [*grads, gates, h, c, *args[1:10], *args[15:18], True]
    compare(kernels, "lstm", "lstm_backward", lstm.BACKENDS, lstm_cases.GRADIENTS, given, args[6], GRADIENTS)


def _layer(name: str, dtype: torch.dtype) -> list[Any]:
    """Arguments of ``lstm_layer_forward``."""
    args = arguments(name, dtype)
    generator = torch.Generator().manual_seed(29)
    shapes = ((*args[0].shape[:-1], INPUTS), (args[1].shape[0], INPUTS), (args[1].shape[0],))
    first = [(torch.randn(shape, generator=generator) / (1, INPUTS**0.5, 1)[n]) for n, shape in enumerate(shapes)]
    return [*(t.to(dtype) for t in first), *args[1:]]


def layer_forward(kernels: Kernels, name: str) -> None:
    args = _layer(name, kernels.torch_dtype)
    compare(kernels, "lstm_layer", "lstm_layer_forward", lstm_layer.BACKENDS, lstm_cases.OUTPUTS, args, args[8])


def layer_backward(kernels: Kernels, name: str) -> None:
    args = _layer(name, kernels.torch_dtype)
    exact = [v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in args]
    kept = shortened(list(definition("lstm_layer_forward", lstm_layer.BACKENDS)(*exact)), kernels.torch_dtype, {1, 4})
    h, c, gates = kept[:3]
    given = [*kernels.gradients(kept), *args[:3], gates, h, c, *args[3:-1], True, True, True, True]
    table = lstm_layer.BACKENDS
    compare(kernels, "lstm_layer", "lstm_layer_backward", table, LAYER_GRADIENTS, given, args[8], GRADIENTS)


def _both(name: str, dtype: torch.dtype) -> list[Any]:
    """Arguments of ``lstm_layer_both_forward``: the reverse direction has weights and states of its own."""
    args = _layer(name, dtype)

    def pair(n: int) -> list[Tensor]:
        return [] if args[n] is None else [args[n], args[n].flip(0) * 0.5]

    return [args[0], *(pair(n) for n in range(1, 6)), *args[7:10], pair(10), pair(11), *args[12:19], args[20]]


def _singles(args: Sequence[Any]) -> list[list[Any]]:
    """Arguments of ``lstm_layer_forward`` for each direction."""
    x, lists, sizes, starts, rest = args[0], args[1:6], args[6:9], args[9:11], args[11:]
    seed, rows, offset, stream, *options, save = rest

    def one(n: int) -> list[Any]:
        mine = [v[n] if v else None for v in (*lists, *starts)]
        return [x, *mine[:5], None, *sizes, *mine[5:], seed, rows, offset, stream + n, *options, n == 1, save]

    return [one(n) for n in (0, 1)]


def _both_defined(*args: Any) -> list[Tensor]:
    one = definition("lstm_layer_forward", lstm_layer.BACKENDS)
    return [v for pair in zip(*(one(*single) for single in _singles(args)), strict=True) for v in pair]


def both_forward(kernels: Kernels, name: str) -> None:
    args = _both(name, kernels.torch_dtype)
    got = kernels.call("lstm_layer", "lstm_layer_both_forward", args, (args[7],))
    names = " ".join(f"{n}_forward {n}_reverse" for n in lstm_cases.OUTPUTS.split())
    kernels.within_budget(names, got, _both_defined, args)


def both_backward(kernels: Kernels, name: str) -> None:
    args = _both(name, kernels.torch_dtype)
    exact = pytree.tree_map(lambda v: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v, args)
    kept = shortened(_both_defined(*exact), kernels.torch_dtype, {2, 3, 8, 9})
    h, c, gates = kept[0:2], kept[2:4], kept[4:6]
    grads = kernels.gradients(kept)
    given = [[*grads], *args[:3], gates, h, c, *args[3:-1], True, True, True, True]
    got = kernels.call("lstm_layer", "lstm_layer_both_backward", given, (args[7],))

    def defined(*given: Any) -> list[Tensor]:
        one = definition("lstm_layer_backward", lstm_layer.BACKENDS)
        grads, gates, h, c = given[0], *given[4:7]
        singles = _singles((*given[1:4], *given[7:-4], 2))
        found = [
            one(*grads[n::2], *s[:3], gates[n], h[n], c[n], *s[3:-1], True, True, True, True)
            for n, s in enumerate(singles)
        ]
        (dx, *first), (dx_too, *second) = found
        return [dx + dx_too, *(v for pair in zip(first, second, strict=True) for v in pair)]

    names = LAYER_GRADIENTS.split()
    names = ["dx", *(f"{n}_{way}" for n in names[1:] for way in ("forward", "reverse") if n != "dweight_hr")]
    kernels.within_budget(" ".join(names), got, lambda *a: _without_projection(defined(*a)), given, GRADIENTS)


def _without_projection(found: list[Tensor]) -> list[Tensor]:
    """Without dweight_hr of both directions, which is the seventh pair but one of nine gradients."""
    return [*found[:11], *found[13:]]


def noise(kernels: Kernels, rows: bool, probability: float) -> None:
    numbers = torch.tensor([4, 0, 2**31, 7, 1]) if rows else None
    given = [torch.tensor([-0x0123456789ABCDEF]), 9, 5, 70, numbers, 3, 1, probability]
    got = kernels.call("lstm_noise", "lstm_noise", given)
    assert_words = reference.gate_noise(*given, dtype=torch.float64)
    assert torch.equal(got[0] == 0, assert_words == 0), "noise: zeros elsewhere"
    inputs = [*given, torch.float64]
    Kernels(kernels.context, "float32").within_budget("noise", got, reference.gate_noise, inputs)


def product(kernels: Kernels, name: str, transpose_a: bool, transpose_b: bool) -> None:
    M, N, K = PRODUCTS[name]
    generator = torch.Generator().manual_seed(31)
    shapes = ((K, M) if transpose_a else (M, K), (N, K) if transpose_b else (K, N), (N,))
    args = [torch.randn(shape, generator=generator).to(kernels.torch_dtype) for shape in shapes]
    given = [*args, transpose_a, transpose_b]
    got = kernels.call("gemm", "gemm", given)
    kernels.within_budget("out", got, reference.linear, given)


def checks(kernels: Kernels) -> Iterator[Check]:
    dry = kernels.context.dry
    rest = FEWER if kernels.dtype in ("float16", "tf32") else (*SIZES, *lstm_cases.OPTIONS)
    names = DRY if dry else (*OURS, *rest)
    if kernels.dtype != "float32":  # in other dtypes a rounding of h turns a gate now and then
        names = tuple(name for name in names if not case_of(name).hard)
    if kernels.dtype == "float32":
        for rows, probability in ((False, 1.0), (True, 0.2))[: 1 if dry else 2]:
            call = functools.partial(noise, kernels, rows, probability)
            yield Check("lstm_noise", "lstm_noise", f"rows {rows} p {probability}", call)
    for name in names:
        yield Check("lstm", "lstm_forward", name, functools.partial(forward, kernels, name))
        if not dry:
            yield Check("lstm", "lstm_backward", name, functools.partial(backward, kernels, name))
    if dry:
        return
    for name in STEPS:
        for call in (forward, backward):
            run = functools.partial(by_route, kernels, call, name, "step")
            yield Check("lstm", f"lstm_{call.__name__}", f"{name} by steps", run)
    for name in PAIRS if kernels.dtype != "tf32" else ():
        call = functools.partial(both_forward, kernels, name)
        yield Check("lstm_layer", "lstm_layer_both_forward", name, call)
        call = functools.partial(both_backward, kernels, name)
        yield Check("lstm_layer", "lstm_layer_both_backward", name, call)
    for name in LAYERS:
        yield Check("lstm", "lstm_gates", name, functools.partial(rebuilt, kernels, name))
        yield Check("lstm_layer", "lstm_layer_forward", name, functools.partial(layer_forward, kernels, name))
        yield Check("lstm_layer", "lstm_layer_backward", name, functools.partial(layer_backward, kernels, name))
    if kernels.dtype == "tf32":
        return
    for name in PRODUCTS:
        for ta, tb in ((False, True), (True, False)):
            yield Check("gemm", "gemm", f"{name} {ta} {tb}", functools.partial(product, kernels, name, ta, tb))
