"""Device functions that two or more kernels use. Arithmetic is float32."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)); 0 and 1 at the ends, never NaN from overflow."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    """Odd series near zero, where the quotient would cancel; beyond, exp of what is not positive."""
    square = x * x
    near = x * (1.0 + square * (-0.33333333 + square * (0.13333333 + square * -0.053968254)))
    away = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - away) / (1.0 + away)
    return tl.where(square < 0.04, near, tl.where(x < 0, -far, far))


@triton.jit
def gate(a, inverse_tau, HARD: tl.constexpr):
    """An input or forget gate from its pre-activation: sigmoid(a / tau), or 1 where a > 0."""
    if HARD:
        return tl.where(a > 0, 1.0, 0.0)
    else:
        return sigmoid(a * inverse_tau)


@triton.jit
def add_product(total, lost, a, b, PRECISION: tl.constexpr):
    """total + a @ b, and what that sum lost to rounding, which the next product begins with; zeros at the start.

    One float32 chain over K in the thousands is less exact than what torch does on a CPU. TF32 and 16 bits round more
    than any chain does: they go without.
    """
    if PRECISION == "ieee" and a.dtype == tl.float32:
        part = tl.dot(a, b, lost, input_precision=PRECISION)
        longer = total + part
        lost = tl.where(longer - longer == 0, part - (longer - total), 0.0)  # of an infinite sum nothing is lost
        total = longer
    else:
        total = tl.dot(a, b, total, input_precision=PRECISION)
    return total, lost
