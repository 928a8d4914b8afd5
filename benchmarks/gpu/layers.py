"""Layers on a GPU: training steps and evaluations of quantizers, and of an LSTM of two layers in both directions."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import vq_gate, vq_layers
from benchmarks.gpu import providers
from benchmarks.gpu.part import Context, Row, Unit
from benchmarks.gpu.providers import Call
from benchmarks.harness import Budget, CannotRun, gate, relative_error
from benchmarks.vq_case import Case, Provider

SECONDS = 0.8  # of the rounds of one case
CASES = [
    Case(16384, 1024, 64, 1, "train"),
    Case(4096, 1024, 8, 8, "train"),
    Case(16384, 1024, 64, 1, "eval"),
    Case(4096, 1024, 8, 8, "eval"),
]
DRY = [Case(64, 16, 8, 1, "train")]
LABELS = ("fastseq", "vector-quantize-pytorch", "plain", "compile")
STACK = 256, 32, 512  # steps, rows, units of the LSTM
GRADIENTS = frozenset({"dx", "dweight_ih_l0", "dweight_hh_l1_reverse"})


def quantizer(case: Case, context: Context) -> list[Row]:
    def prepare(label: str) -> tuple[Call, Row]:
        provider = Provider(label, device=context.device.type)
        if label in ("plain", "compile") and case.M > 1:
            raise CannotRun("it has one level")
        work = vq_layers.PROVIDERS[label](case, provider, torch.get_num_threads())
        verdict, facts = vq_gate.judge(case, False, work.outputs())
        return work.run, {"gate": verdict, **facts}

    shared: Row = {"op": "vq", "table": "layers", "case": case.name, "mode": case.mode, "dtype": "float32"}
    return providers.measure(context, shared, LABELS[: context.pick(4, 3)], prepare, SECONDS)


def stack(context: Context, mode: str) -> list[Row]:
    """Two layers, both directions, in bfloat16: outside of what cuDNN has its fast kernels for."""
    T, B, H = context.pick(STACK, (4, 2, 8))
    dtype = context.pick(torch.bfloat16, torch.float32)
    torch.manual_seed(0)
    stock = nn.LSTM(H, H, num_layers=2, bidirectional=True).to(context.device, dtype)
    x, dy = (torch.randn(T, B, n, device=context.device).to(dtype) for n in (H, 2 * H))

    def step(module: Any, x: Tensor, dy: Tensor) -> Tensor:
        if mode == "infer":
            with torch.no_grad():
                return module(x)[0]
        module.zero_grad(set_to_none=True)
        y = module(x)[0]
        y.backward(dy)
        return y

    def results(module: Any, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
        x = x.clone().requires_grad_(mode == "train")
        found = {"y": step(module, x, dy)}
        if mode == "train":
            named = dict(module.named_parameters())
            found |= {"dx": x.grad, **{f"d{n}": named[n].grad for n in ("weight_ih_l0", "weight_hh_l1_reverse")}}
        return {name: value.detach().clone() for name, value in found.items()}

    wide = nn.LSTM(H, H, num_layers=2, bidirectional=True).to(context.device, torch.float64)
    wide.load_state_dict(stock.state_dict())
    truth, naive = results(wide, x.double(), dy.double()), results(stock, x, dy)
    budgets = {name: Budget(value, relative_error(naive[name], value)) for name, value in truth.items()}

    def prepare(label: str) -> tuple[Call, Row]:
        import fastseq.nn

        module: Any = stock
        if label != "stock":
            gates: dict[str, Any] = {"gates": "binary", "noise_probability": 0.2} if "binary" in label else {}
            module = fastseq.nn.LSTM(H, H, num_layers=2, bidirectional=True, **gates).to(context.device, dtype)
            module.load_state_dict(stock.state_dict())
        call = functools.partial(step, module, x.clone().requires_grad_(mode == "train"), dy)
        if "binary" in label:  # its noise is judged layer by layer, in the part lstm
            return call, {"gate": "passed", "judged": "one layer, in the table of the LSTM"}
        got = results(module, x, dy)
        error = max(relative_error(got[name], value) for name, value in truth.items())
        return call, {"gate": gate(got, budgets, GRADIENTS), "error": float(f"{error:.3g}")}

    name = f"T{T}_B{B}_H{H}_L2_bidirectional"
    shared: Row = {"op": "lstm", "table": "layers", "case": name, "mode": mode}
    shared |= {"dtype": str(dtype).removeprefix("torch.")}
    return providers.measure(context, shared, ("fastseq", "stock", "fastseq binary p=0.2"), prepare, SECONDS)


def units(context: Context) -> list[Unit]:
    quantizers = [
        Unit(f"{case.mode} {case.name}", 10.0, functools.partial(quantizer, case, context))
        for case in context.pick(CASES, DRY)
    ]
    stacks = [
        Unit(f"{mode} stack", 8.0, functools.partial(stack, context, mode))
        for mode in context.pick(("train", "infer"), ("train",))
    ]
    return [quantizers[0], *stacks, *quantizers[1:]]
