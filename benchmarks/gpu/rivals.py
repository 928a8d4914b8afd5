"""Other libraries that are measured where they are installed. They come with their own layouts; what they return is not
judged where that would mean to rebuild it here, and their rows say so."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from benchmarks.gpu.lstm_case import Case, Inputs, Work
    from benchmarks.gpu.part import Context


def flashrnn(case: Case, context: Context, given: Inputs) -> Work:
    """The recurrence alone, one head: its call takes the product of the inputs as given."""
    from flashrnn import flashrnn as theirs

    from benchmarks.gpu.lstm_case import Work

    wx = torch.randn(case.B, case.T, 4, 1, case.H, device=context.device, dtype=case.dtype, requires_grad=case.trains)
    rest = [
        (torch.randn(*shape, device=context.device, dtype=case.dtype) / case.H**0.5).requires_grad_(case.trains)
        for shape in ((4, 1, case.H, case.H), (4, 1, case.H))
    ]

    def call(_: Tensor) -> Any:
        states, _last = theirs(wx, *rest, function="lstm", backend="cuda_fused", dtype=str(case.dtype)[6:])
        return states[0][:, :, 0].transpose(0, 1), (states[0], states[1])

    return Work(call, [wx, *rest], judged="the recurrence alone, with weights of its own")


def torchrl(case: Case, context: Context, given: Inputs) -> Work:
    """Its Triton backend, whose products are in the dtype of the case and everything else in float32."""
    from tensordict import TensorDict
    from torchrl.modules import LSTMModule, set_recurrent_mode

    from benchmarks.gpu.lstm_case import Work
    from benchmarks.harness import CannotRun

    if "recurrent_backend" not in inspect.signature(LSTMModule.__init__).parameters:
        raise CannotRun("this torchrl has no recurrent_backend")
    options: dict[str, Any] = {"recurrent_backend": "triton"}
    if case.dtype == torch.bfloat16:
        options["recurrent_compute_dtype"] = torch.bfloat16
    keys = {"in_keys": ["x", "h", "c"], "out_keys": ["y", ("next", "h"), ("next", "c")]}
    module = LSTMModule(input_size=case.H, hidden_size=case.H, device=context.device, **keys, **options)
    size = (case.B, case.T)
    state = torch.zeros(*size, 1, case.H, device=context.device)
    first = torch.zeros(*size, 1, dtype=torch.bool, device=context.device)
    x = given.x.detach().float().transpose(0, 1).contiguous().requires_grad_(case.trains)

    def call(_: Tensor) -> Any:
        with set_recurrent_mode(True):
            out = module(TensorDict({"x": x, "h": state, "c": state, "is_init": first}, size))
        y = out["y"].transpose(0, 1)
        return y.to(case.dtype), (y[-1:], y[-1:])

    return Work(call, list(module.parameters()), judged="float32 with a layout of its own")


def flash_kmeans(x: Tensor, codebook: Tensor) -> Callable[[], Tensor]:
    """The assignment step of flash-kmeans (PyPI), for one batch; some versions want the squares of the rows."""
    from flash_kmeans.assign_euclid_triton import euclid_assign_triton

    rows, codes = x[None], codebook.to(x.dtype)[None]
    wants = "x_sq" in inspect.signature(euclid_assign_triton).parameters
    if not wants:
        return lambda: euclid_assign_triton(rows, codes)[0]
    return lambda: euclid_assign_triton(rows, codes, rows.float().square().sum(-1))[0]


def cuvs(x: Tensor, codebook: Tensor) -> Callable[[], Tensor]:
    """The fused nearest neighbour of RAFT, or the exact index of cuVS, in float32."""
    rows, codes = x.float().contiguous(), codebook.float().contiguous()
    try:
        from pylibraft.distance import fused_l2_nn_argmin
    except ImportError:
        from cuvs.neighbors import brute_force

        index = brute_force.build(codes, metric="sqeuclidean")
        return lambda: torch.as_tensor(brute_force.search(index, rows, 1)[1], device=x.device)[:, 0]
    found = torch.empty(len(rows), dtype=torch.int32, device=x.device)

    def call() -> Tensor:
        fused_l2_nn_argmin(rows, codes, found, False)
        return found

    return call
