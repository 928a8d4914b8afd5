"""Triton's interpreter made to compute as a GPU does, where it does not.

It multiplies and adds with two roundings, truncates when it narrows to bfloat16, and takes the bits of bfloat16 for
whole numbers in products of matrices. And it is spared what comes to nothing, half of its time: each call of a device
function prepares the language, which the launch has done, and each sum of integers looks for an overflow, which is told
in debugging only.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

ADDRESS = np.dtype(np.uint64)


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """``a * b + c`` of float32, rounded once: the algorithm of ``fastseq.reference.vq.fused``."""
    with np.errstate(all="ignore"):
        product, c = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
        total = product + c
        back = total - product
        rest = (product - (total - back)) + (c - back)
        bits = np.asarray(total).view(np.int64)
        away = (rest > 0) == (total > 0)
        inexact = (rest != 0) & np.isfinite(total) & (bits % 2 == 0)
        odd = np.where(inexact, np.where(away, bits + 1, bits - 1), bits)
        return odd.view(np.float64).astype(np.float32)


def narrow(a: np.ndarray) -> np.ndarray:
    """The bits, uint16, of the nearest bfloat16; of two, the even one."""
    return torch.from_numpy(np.array(a, np.float32)).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def widen(bits: np.ndarray) -> np.ndarray:
    """The float32 that these bits of bfloat16 mean."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


@functools.cache
def languages(fn: Callable[..., Any]) -> list[types.ModuleType]:
    """Those modules that the interpreter prepares for ``fn``."""
    return [module for module in (tl, tl.core) if any(value is module for value in fn.__globals__.values())]


def patch() -> None:
    """Once, before the first kernel runs."""
    plain_prepare = interpreter._patch_lang

    def prepare(fn: Callable[..., Any]) -> Any:
        found = languages(fn)
        if found and not any(tl.core.is_builtin(language.load) for language in found):  # they are the interpreter's
            return interpreter._LangPatchScope()
        return plain_prepare(fn)

    builder = interpreter.interpreter_builder
    assert not builder.options.debug  # and so what it finds of an overflow is dropped, here as on a GPU
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    plain_numpy_type = functools.cache(interpreter._get_np_dtype)
    interpreter._patch_lang = prepare
    interpreter._get_np_dtype = lambda dtype: ADDRESS if dtype.scalar.is_ptr() else plain_numpy_type(dtype.scalar)
    plain_fma, plain_cast, plain_dot = (
        getattr(InterpreterBuilder, f) for f in ("create_fma", "cast_impl", "create_dot")
    )

    def fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if z.data.dtype != np.float32:
            return plain_fma(self, x, y, z)
        return TensorHandle(fused(x.data, y.data, z.data), z.dtype.scalar)

    def cast(self: Any, src: Any, dst_type: Any) -> Any:
        pair = (src.dtype.scalar, dst_type.scalar)
        if pair == (tl.float32, tl.bfloat16):
            return TensorHandle(narrow(src.data), dst_type.scalar)
        if pair == (tl.bfloat16, tl.float32):
            return TensorHandle(widen(src.data), dst_type.scalar)
        return plain_cast(self, src, dst_type)

    def dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        if a.dtype.scalar == b.dtype.scalar == tl.bfloat16:
            a, b = (TensorHandle(widen(v.data), tl.float32) for v in (a, b))
        return plain_dot(self, a, b, d, *rest)

    InterpreterBuilder.create_fma, InterpreterBuilder.create_dot = fma, dot
    InterpreterBuilder.cast_impl = cast
