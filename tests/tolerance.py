"""The only way in which a test compares floating-point numbers that need not be equal bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

OUTPUTS, GRADIENTS = 2, 3  # factors over the error of the plain computation


def assert_within_budget(
    names: str | Sequence[str],
    got: Tensor | Sequence[Tensor | None],
    reference: Callable[..., Any],
    inputs: Sequence[Any],
    factor: int = OUTPUTS,
) -> None:
    """Fail unless ``got`` is nearly as good as ``reference`` computed plainly in the same dtype.

    Truth is ``reference(*inputs)`` in float64, naive the same in the dtype of ``got``. The error, relative to the
    largest true value of each output, may be ``factor`` times that of naive, plus four roundings.

    A naive result of few numbers can be right by luck. For these the worst of several runs counts, all but the first
    from inputs that are moved by one rounding at most.

    A float64 result has no wider type to be judged by. There naive is the error that the reference makes in float32
    on the same inputs rounded to float32, scaled by the ratio of the two roundings; truth is the reference in
    float64, which is off by that much itself and adds one to the factor.

    Args:
        names: of the outputs, for the message; one string may hold several, separated by blanks.
        got: one tensor, or a sequence as ``reference`` returns it; None is compared as None.
        reference: takes ``inputs``; tensors (and dtypes) in them are cast, nested ones too.
        factor: OUTPUTS or GRADIENTS.
    """
    got = (got,) if isinstance(got, Tensor) else tuple(got)
    names = names.split() if isinstance(names, str) else list(names)
    dtype = next(g.dtype for g in got if g is not None)
    truth = _evaluate(reference, _cast(inputs, torch.float64))
    assert len(got) == len(truth) == len(names), f"{len(got)} outputs, {len(truth)} expected, {len(names)} named"
    scaled = dtype == torch.float64
    plain = _cast(inputs, torch.float32 if scaled else dtype)
    naive = _naive(reference, plain, _evaluate(reference, _cast(plain, torch.float64)) if scaled else truth)
    eps = torch.finfo(dtype).eps
    for name, g, t, n in zip(names, got, truth, naive, strict=True):
        if g is None or t is None:
            assert g is None and t is None, f"{name}: one of {g} and {t} is None"
            continue
        assert g.shape == t.shape, f"{name}: shape {list(g.shape)}, expected {list(t.shape)}"
        assert g.dtype == dtype, f"{name}: {g.dtype}, expected {dtype}"
        error, budget = _error(g, t), factor * n + 4 * eps
        if scaled:
            budget = (factor + 1) * n * eps / torch.finfo(torch.float32).eps + 4 * eps
        assert error <= budget, f"{name}: error {error:.2e}, budget {budget:.2e} of {dtype}"


def assert_same_bits(names: str | Sequence[str], got: Any, expected: Any) -> None:
    """Fail unless two results (tensors, arrays, or sequences of them) have the same shapes, dtypes and bits."""
    names = names.split() if isinstance(names, str) else list(names)
    got, expected = (_tensors(v) for v in (got, expected))
    assert len(got) == len(expected) == len(names), f"{len(got)} and {len(expected)} results, {len(names)} named"
    for name, g, e in zip(names, got, expected, strict=True):
        assert (g.shape, g.dtype) == (e.shape, e.dtype), f"{name}: {g.shape} {g.dtype}, expected {e.shape} {e.dtype}"
        if g.numpy().tobytes() != e.numpy().tobytes():
            different = (g != e).nonzero()
            first = tuple(different[0].tolist()) if len(different) else "only in NaN or the sign of zero"
            raise AssertionError(f"{name}: {len(different)} of {g.numel()} values differ, first at {first}")


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread of torch: what the definitions run on, whose many small operators only lose by sharing."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _tensors(values: Any) -> list[Tensor]:
    values = list(values) if isinstance(values, (tuple, list)) else [values]
    return [torch.as_tensor(v).detach().contiguous() for v in values]


def _naive(reference: Callable[..., Any], inputs: Sequence[Any], truth: tuple[Tensor | None, ...]) -> list[float]:
    """The error of each output of the plain computation: the worst run, and more runs where there are few numbers."""

    def errors(inputs: Sequence[Any]) -> list[float]:
        return [_error(o, t) for o, t in zip(_evaluate(reference, inputs), truth, strict=True)]

    generator = torch.Generator().manual_seed(0)
    fewest = min((t.numel() for t in truth if t is not None and t.numel()), default=512)
    runs = [errors(inputs)]
    for _ in range(1, min(8, 512 // fewest)):
        runs.append(errors([_moved(value, generator) for value in inputs]))
    return [max(of_one) for of_one in zip(*runs, strict=True)]


def _evaluate(reference: Callable[..., Any], inputs: Sequence[Any]) -> tuple[Tensor | None, ...]:
    with one_thread():
        out = reference(*inputs)
    out = (out,) if isinstance(out, Tensor) else tuple(out)
    return tuple(None if v is None else v.detach() for v in out)


def _cast(inputs: Sequence[Any], dtype: torch.dtype) -> list[Any]:
    """Floating-point tensors and dtypes in ``inputs``, however deep, become ``dtype``; requires_grad stays."""

    def one(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().to(dtype, copy=True).requires_grad_(value.requires_grad)
        if isinstance(value, torch.dtype) and value.is_floating_point:
            return dtype
        return value

    return [pytree.tree_map(one, value) for value in inputs]


def _moved(value: Any, generator: torch.Generator) -> Any:
    """``value`` with each floating-point number replaced by itself or, half of the times, a neighbour."""

    def one(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            return tensor
        way, here = torch.randint(0, 4, tensor.shape, generator=generator), tensor.detach().cpu()
        up, down = (torch.nextafter(here, here.new_tensor(end)) for end in (torch.inf, -torch.inf))
        out = torch.where(way == 0, down, torch.where(way == 1, up, here)).to(tensor.device)
        return out.requires_grad_(tensor.requires_grad)

    return pytree.tree_map(one, value)


def _error(got: Tensor | None, truth: Tensor | None) -> float:
    if got is None or truth is None or not truth.numel():
        return 0.0
    scale = truth.abs().max().clamp_min(torch.finfo(got.dtype).tiny)
    return float((got.detach().double() - truth.double()).abs().max() / scale)
