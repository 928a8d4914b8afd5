"""The LSTM on a GPU: ours by every route, stock nn.LSTM, the loop over steps, and other libraries where installed."""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu import providers, rivals
from benchmarks.gpu.lstm_case import Case, Inputs, Work, inputs, judge, run
from benchmarks.gpu.part import Context, Row, Unit, backend
from benchmarks.gpu.routes import route
from benchmarks.harness import CannotRun
from benchmarks.lstm import SEED, TAU, WEIGHTS

SECONDS = 1.2  # of the rounds of one case
T = 1024
OURS, BINARY, AUTO = "fastseq", "fastseq binary p=0.2", "fastseq as it chooses"
PERSIST = "fastseq persist"  # the kernels of csrc/cuda
ROUTES = ("resident", "step", "graph")
USUAL = (OURS, "stock", BINARY)
ALL = (*USUAL, *(f"fastseq {route}" for route in ROUTES), AUTO, "stock float16", "loop", "loop compiled", "TorchRL")
BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
# rows, units, dtype, providers; most important first
CASES: list[tuple[int, int, torch.dtype, tuple[str, ...]]] = [
    (16, 512, BFLOAT16, ALL),
    *((B, H, BFLOAT16, USUAL) for H in (512, 256, 1024) for B in (1, 16) if (B, H) != (16, 512)),
    (16, 128, BFLOAT16, ALL[:8]),
    (16, 512, FLOAT32, (*USUAL, "loop")),
    (16, 512, FLOAT16, USUAL),
    (64, 512, BFLOAT16, ALL[:7]),
    (1, 256, BFLOAT16, (OURS, *ALL[3:6], "loop")),
    (256, 1024, BFLOAT16, USUAL),
    (16, 2048, BFLOAT16, USUAL),
    (256, 128, BFLOAT16, USUAL),
    (64, 1024, BFLOAT16, USUAL),
    (256, 512, BFLOAT16, USUAL),
    (256, 2048, BFLOAT16, USUAL),
]
DRY = [(2, 8, FLOAT32, (OURS, "stock", BINARY, "loop", "TorchRL"))]


class Provider(NamedTuple):
    """route: of ours, None for its own choice. force: the backend, or None."""

    make: Callable[[Case, Context, Inputs], Work]
    force: str | None = None
    route: str | None = None


def _stock(case: Case, context: Context, given: Inputs, dtype: torch.dtype | None = None) -> Work:
    if dtype is None or dtype == case.dtype:
        return Work(given.stock, [getattr(given.stock, f"{name}_l0") for name in WEIGHTS])
    module = torch.nn.LSTM(case.H, case.H, device=context.device, dtype=dtype)
    x = given.x.detach().to(dtype).requires_grad_(case.trains)

    def call(_: Tensor) -> Any:
        y, state = module(x)
        return y.to(case.dtype) if case.trains else y, state

    return Work(call, list(module.parameters()), judged=f"it is here for its time in {dtype}")


def _fastseq(case: Case, context: Context, given: Inputs, p: float | None = None) -> Work:
    import fastseq.nn

    options: dict[str, Any] = {}
    if p is not None:
        options = {"gates": "binary", "tau": TAU, "noise_probability": p}
    module = fastseq.nn.LSTM(case.H, case.H, **options).to(context.device, case.dtype)
    module.load_state_dict(given.stock.state_dict())
    module.train(case.trains)
    weights = [getattr(module, f"{name}_l0") for name in WEIGHTS]
    noise = (lambda steps: None) if p is None or not case.trains else functools.partial(_noise, case, context, p)
    return Work(module, weights, noise)


def _noise(case: Case, context: Context, p: float, steps: int) -> Tensor:
    """What fastseq draws after ``torch.manual_seed(SEED)``, by its definition."""
    import fastseq.functional
    from fastseq import reference

    torch.manual_seed(SEED)
    seed = fastseq.functional.draw_seed(context.device)
    noise = reference.gate_noise(seed.cpu(), steps, case.B, case.H, None, 0, 0, p, torch.float64)
    return noise.to(context.device)


def _step(x: Tensor, h: Tensor, c: Tensor, weight_hh: Tensor) -> tuple[Tensor, Tensor]:
    i, f, g, o = (x + h @ weight_hh.t()).chunk(4, 1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _loop(case: Case, context: Context, given: Inputs, compiled: bool = False) -> Work:
    """The input product for all steps at once, then step by step; what is compiled is a step, not 1024 of them."""
    weights = [getattr(given.stock, f"{name}_l0") for name in WEIGHTS]
    step = torch.compile(_step, dynamic=False) if compiled else _step

    def call(x: Tensor) -> Any:
        weight_ih, weight_hh, bias_ih, bias_hh = weights
        x_gates = F.linear(x, weight_ih, bias_ih + bias_hh)
        h = c = x.new_zeros(case.B, case.H)
        outs = []
        for x_t in x_gates.unbind(0):
            h, c = step(x_t, h, c, weight_hh)
            outs.append(h)
        return torch.stack(outs), (h[None], c[None])

    return Work(call, weights)


PROVIDERS: dict[str, Provider] = {
    OURS: Provider(_fastseq, "triton"),
    BINARY: Provider(functools.partial(_fastseq, p=0.2), "triton"),
    **{f"fastseq {route}": Provider(_fastseq, "triton", route) for route in ROUTES},
    PERSIST: Provider(_fastseq, "cuda"),
    AUTO: Provider(_fastseq),
    "stock": Provider(_stock),
    **{f"stock {n}": Provider(functools.partial(_stock, dtype=getattr(torch, n))) for n in ("float16", "float32")},
    "loop": Provider(_loop),
    "loop compiled": Provider(functools.partial(_loop, compiled=True)),
    "FlashRNN": Provider(rivals.flashrnn),
    "TorchRL": Provider(rivals.torchrl),
}


def _judged(case: Case, work: Work, given: Inputs) -> tuple[str, float | None]:
    """``judge``.

    Raises:
        CannotRun: the only backend that is allowed does not take the call.
    """
    try:
        return judge(case, work, given)
    except RuntimeError as error:
        refused = re.search(r"no backend can run this call \(.*?cuda: (?!FASTSEQ_BACKEND)([^;)]*)", str(error))
        if refused is None:
            raise
        raise CannotRun(refused[1]) from error


def measure(
    case: Case, context: Context, labels: tuple[str, ...], table: str = "lstm", seconds: float = SECONDS
) -> list[Row]:
    given = inputs(case, context.device)

    @contextlib.contextmanager
    def around(label: str) -> Iterator[None]:
        provider = PROVIDERS[label]
        with backend(None if context.dry else provider.force), route(provider.route):
            yield

    def prepare(label: str) -> tuple[providers.Call, Row]:
        work = PROVIDERS[label].make(case, context, given)
        verdict, error = _judged(case, work, given)
        call = functools.partial(run, case, work, given.x, given.dy)
        return call, {"gate": verdict, "error": error, "gate_steps": case.gate_steps}

    shared: Row = {"op": "lstm", "table": table, "case": case.name, "mode": case.mode}
    shared |= {"dtype": str(case.dtype).removeprefix("torch.")}
    rows = providers.measure(context, shared, labels, prepare, seconds, around=around)
    for row in rows:
        if "ms" in row:
            row["us_per_step"] = round(row["ms"] * 1e3 / case.T, 4)
            row["tflops"] = float(f"{case.flops / row['ms'] / 1e9:.4g}")
    return rows


def units(context: Context) -> list[Unit]:
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")
    found = []
    for B, H, dtype, labels in context.pick(CASES, DRY):
        for mode in ("train", "infer"):
            case = Case(context.pick(T, 5), B, H, dtype, mode)
            own = tuple(label for label in labels if mode == "train" or label != "loop compiled")  # it compiles long
            seconds = 3.0 + 0.5 * len(own) + (12.0 if "loop compiled" in own else 0.0)
            name = f"{mode} {case.name} {str(dtype).removeprefix('torch.')}"
            found.append(Unit(name, seconds, functools.partial(measure, case, context, own)))
    if not context.dry:  # it compiles for minutes: the last one
        case = Case(T, 16, 512, torch.bfloat16, "train")
        call = functools.partial(measure, case, context, (PERSIST, "stock", "FlashRNN"))
        found.append(Unit(f"FlashRNN {case.name}", 60.0, call))
    return found
