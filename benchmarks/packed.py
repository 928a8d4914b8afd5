"""Packed weights at work, as deployed models: layers, streams, a C program, start-up, and a product.

Beside the speed of each provider stands how near it comes to the layer before its weights were packed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness, packed_c, packed_case, packed_dksplit, packed_layer, packed_load
from benchmarks.packed_case import FORMS, Case, Provider, Work, inputs, remaining, snr, truth

NAME = "packed"
OURS = ("fastseq",)  # the other providers are rivals
PACKAGES = ("onnxruntime", "openvino", "ncnn", "dksplit")  # whose versions each row notes
JUDGED = 8  # steps in which ours are held against the definition of their form, in which integers are slow
LEAST, MOST = 20.0, 120.0  # decibels: below, something else was computed; above, all of it in float32

MODES: dict[str, dict[str, Callable[[Case, Provider, int], Work]]] = {
    "int8": packed_layer.PROVIDERS,
    "forms": packed_layer.PROVIDERS,
    "stream": packed_layer.PROVIDERS,
    "cabi": packed_c.PROVIDERS,
    "load": packed_load.PROVIDERS,
    "dksplit": packed_dksplit.PROVIDERS,
}
PROVIDERS = {name: make for makers in MODES.values() for name, make in makers.items()}


def setup(case: Case, provider: Provider, threads: int) -> Work:
    """The callable of one provider on one case.

    Raises:
        ModuleNotFoundError: when the provider's package is not installed.
        CannotRun: when the case is not for this machine.
    """
    return MODES[case.mode][provider.name](case, provider, threads)


def judge(case: Case, provider: Provider, work: Work) -> tuple[str, dict[str, Any]]:
    """The verdict of the gate, and the decibels of the output.

    Ours must be nearer to the definition of their form than twice what the form itself changes; float32 of rivals may
    be off by twice what float32 makes of the definition; integers of rivals must be recognisable.
    """
    if case.mode == "dksplit":
        return packed_dksplit.judge(case, provider, work)
    got = work.outputs()
    if got.shape != truth(case).shape:
        return f"y: shape {list(got.shape)}, expected {list(truth(case).shape)}", {}
    found = snr(got, truth(case))
    facts = {"snr_db": round(found, 2)}
    if provider.name in OURS:
        wanted = _defined(case, work)
        least = snr(wanted, truth(case)[: len(wanted)]) - 6
        found = snr(got[: len(wanted)], wanted)
    else:
        least = snr(truth(case, torch.float32), truth(case)) - 6 if provider.form == "float32" else LEAST
    least = min(max(least, LEAST), MOST)
    return ("passed" if found >= least else f"y: {found:.1f} dB, at least {least:.1f} dB expected"), facts


def _defined(case: Case, work: Work) -> Tensor:
    """The first steps of y by the definition of a deployed model."""
    from fastseq import reference

    bits = {name: torch.from_numpy(value) for name, value in work.state["tensors"].items()}
    tensors = {name: v.view(torch.bfloat16) if v.dtype == torch.uint16 else v for name, v in bits.items()}
    y, _ = reference.run_model(work.state["layers"], tensors, inputs(case).x[:JUDGED])
    return y


def describe(provider: Provider) -> dict[str, Any]:
    """What a row says about its provider."""
    name = f"fastseq/{backend()}" if provider.name in OURS else provider.name
    return {"provider": name, "form": provider.form, "dtype": _dtype(provider.form)}


def _dtype(form: str) -> str:
    """Of the weights; those of the product are int8."""
    if form not in FORMS:
        return "int8"
    return next((dtype for dtype in ("int8", "int4", "bfloat16") if dtype in form.split()), "float32")


def every(case: Case, provider: Provider) -> int:
    return 1


def flops(case: Case, provider: Provider) -> float:
    """Of one call, or of one step where steps are timed."""
    calls = case.T if case.streams else 1
    return case.flops * remaining(provider.form) / calls


def reads(case: Case, provider: Provider) -> harness.Reads:
    return packed_case.reads(case, provider.form)


def backend() -> str:
    from fastseq import _core

    return f"deploy-{_core.isa()}"
