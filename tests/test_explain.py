"""``explain``, and the choice of backends on devices that this machine does not have."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest
import torch
from fastseq_kernels import _launch, _sources, _verified
from torch._subclasses.fake_tensor import FakeTensorMode

import fastseq
from fastseq.ops import _library, _triton
from fastseq.ops._select import Backend, choose, consider


@pytest.fixture(autouse=True)
def _free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastseq.ops._select._told", set())
    monkeypatch.delenv("FASTSEQ_BACKEND", raising=False)


def test_explain_tells_forward_and_backward() -> None:
    module = fastseq.nn.LSTM(4, 6, num_layers=2, gates="binary")
    found = fastseq.explain(module, torch.randn(5, 3, 4))
    forward, backward = found
    assert [(s.operator, s.backend, s.times) for s in forward] == [("lstm_layer_forward", "cpu", 2)]
    assert [(s.operator, s.backend, s.times) for s in backward] == [("lstm_layer_backward", "cpu", 2)]
    on_cpu = {name: "input is on cpu" for name in ("cuda", "triton")}
    assert forward[0].others == {**on_cpu, "reference": "cpu comes first"}
    lines = str(found).splitlines()
    assert lines[:2] == ["forward", "  lstm_layer_forward x2: cpu, the first that can run here"]
    assert "    triton: input is on cpu" in lines


def test_explain_changes_nothing() -> None:
    module = fastseq.nn.VectorQuantize(8, codebook_size=16, decay=0.5)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    x, random = torch.randn(3, 40, 8, requires_grad=True), torch.get_rng_state()
    found = fastseq.explain(module, x)
    assert [s.operator for s in found.forward] == ["vq_quantize"]
    assert [s.operator for s in found.backward] == ["vq_backward"]
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert x.grad is None


def test_explain_without_our_operators_and_without_gradients() -> None:
    found = fastseq.explain(torch.nn.Linear(3, 2).requires_grad_(False), torch.ones(1, 3))
    assert found == ([], [])
    assert str(found) == "forward: no operator of fastseq"


def test_explain_of_a_forced_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSEQ_BACKEND", "torch")
    found = fastseq.explain(fastseq.nn.LSTM(4, 6), torch.randn(5, 3, 4))
    assert [(s.operator, s.backend, s.why) for s in found.forward] == [("lstm", "torch", "FASTSEQ_BACKEND=torch")]
    assert found.forward[0].others == {"layers": "FASTSEQ_BACKEND=torch"}


@pytest.mark.parametrize("device", ["mps", "xpu"])
def test_other_devices_run_the_reference_and_say_so_once(device: str, caplog: pytest.LogCaptureFixture) -> None:
    with FakeTensorMode(), caplog.at_level(logging.WARNING, "fastseq"):
        x = torch.empty(1, 3, 4, device=device)
        assert [choose("vq_sums", _library.TABLES["vq_sums"], x).name for _ in range(2)] == ["reference"] * 2
    reasons = f"cpu: input is on {device}; triton: input is on {device}"
    assert [r.getMessage() for r in caplog.records] == [f"vq_sums: using reference, because {reasons}"]


def on_cuda(monkeypatch: pytest.MonkeyPatch, op: str = "vq_sums", dtype: torch.dtype = torch.float32) -> Any:
    monkeypatch.setattr(_triton, "interpreted", lambda: False)
    with FakeTensorMode():
        x = torch.empty(1, 3, 4, device="cuda", dtype=dtype)
        return consider(op, _library.TABLES[op], x, torch.empty(1, 3, device="cuda", dtype=torch.int64), 2)


@pytest.mark.parametrize(
    "version, words",
    [
        (None, "triton is not installed; pip install 'triton>=3.5'"),
        ("3.2.1", "triton 3.2.1 is older than 3.5; pip install --upgrade triton"),
    ],
)
def test_triton_missing_or_too_old(version: str | None, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(name: str) -> str:
        if version is None:
            raise _triton.importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(_triton.importlib.metadata, "version", found)
    _triton.why_not_triton.cache_clear()
    try:
        choice = on_cuda(monkeypatch)
    finally:
        _triton.why_not_triton.cache_clear()
    assert (choice.backend.name, choice.reasons["triton"]) == ("reference", words)


def test_a_gpu_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_verified, "capability", lambda index: 75)
    choice = on_cuda(monkeypatch)
    assert (choice.backend.name, choice.reasons["triton"]) == ("reference", "sm_75 is older than sm_80")


def test_a_gpu_of_another_make(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    choice = on_cuda(monkeypatch)
    assert (choice.backend.name, choice.reasons["triton"]) == ("reference", "no kernels for ROCm")


def test_float64_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = on_cuda(monkeypatch, dtype=torch.float64)
    assert (choice.backend.name, choice.reasons["triton"]) == ("reference", "no kernel for float64")


def test_an_unverified_kernel_gives_way_but_not_to_the_reference(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def able(*args: Any) -> None:
        return None

    doubtful = Backend("triton", print, able, lambda *args: "unverified: no result row of op for sm_90")
    sure, reference = Backend("torch", print, able), Backend("reference", print, able)
    x = torch.zeros(1)
    with caplog.at_level(logging.WARNING, "fastseq"):
        assert choose("op", (doubtful, sure, reference), x).name == "torch"
        assert not caplog.records
        assert [choose("op", (doubtful, reference), x).name for _ in range(2)] == ["triton"] * 2
    told = "op: using triton, the first that can run here; unverified: no result row of op for sm_90"
    assert [r.getMessage() for r in caplog.records] == [told]
    assert consider("op", (doubtful, sure), x).reasons["triton"] == "unverified: no result row of op for sm_90"


def test_a_kernel_is_verified_by_a_row_of_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    module = "lstm_noise"
    monkeypatch.setattr(_verified, "capability", lambda index: 90)
    row = {"source": _sources.source_hash(module), "dtypes": ["float32"]}
    missing = f"unverified: no result row of {module} for sm_90"
    for rows, dtype, doubt in (
        ({}, torch.float32, missing),
        ({"sm_80": {module: row}}, torch.float32, missing),
        (
            {"sm_90": {module: {**row, "source": "0" * 16}}},
            torch.float32,
            f"unverified: {module} has changed since its result row for sm_90",
        ),
        (
            {"sm_90": {module: row}},
            torch.bfloat16,
            f"unverified: no result row of {module} in bfloat16 for sm_90",
        ),
        ({"sm_90": {module: row}}, torch.float32, None),
        ({"sm_90": {module: row}}, torch.int64, None),
    ):
        monkeypatch.setattr(_verified, "rows", lambda rows=rows: rows)
        assert _verified.doubt(module, torch.device("cuda", 0), dtype) == doubt


def test_the_route_of_an_lstm_and_why() -> None:
    """What does not fit into shared memory takes another way, and the reason is told."""
    x, weight_ih, weight_hh = torch.empty(5, 3, 64), torch.empty(512, 64), torch.empty(512, 128)
    h0, c0 = torch.empty(3, 128), torch.empty(3, 128)
    low = (x.bfloat16(), weight_ih.bfloat16(), None, weight_hh.bfloat16(), h0.bfloat16(), c0)
    options = (None, None, None, None, None, None, None, None, 0, 0, 1.0, 1.0, False, False, 2)
    detail = _triton.kernels("lstm_layer").lstm_layer_forward_detail
    with _launch.targeting(_launch.TARGETS[90]):
        assert detail(*low, *options) == "resident: one kernel for all steps, which holds weight_hh"
    with _launch.targeting(_launch.TARGETS[86]):
        assert re.match(r"step: a launch per step: .*\b128\b", detail(*low, *options))
    assert detail(x[:1].bfloat16(), *low[1:], *options).startswith("cell: one step")


def test_mixed_devices_are_named() -> None:
    with FakeTensorMode():
        x = torch.empty(5, 3, 4, device="cuda")
        with pytest.raises(ValueError, match=r"weights\[0\].weight_ih must be on cuda:0, got one on cpu"):
            fastseq.nn.LSTM(4, 6)(x)
        with pytest.raises(ValueError, match="vq_nearest: codebook must be on cuda:0, got one on cpu"):
            fastseq.functional.vq_nearest(x, torch.empty(7, 4))
        with pytest.raises(ValueError, match=r"vq_residual: codebooks\[1\] must be on cuda:0, got one on cpu"):
            fastseq.functional.vq_residual(
                torch.empty(3, 4, device="cuda"), [torch.empty(7, 4, device="cuda"), torch.empty(7, 4)]
            )
        with pytest.raises(ValueError, match="lengths must be on the CPU or cuda:0, got one on cuda:1"):
            weights = [fastseq.functional.Weights(torch.empty(24, 4, device="cuda"), torch.empty(24, 6, device="cuda"))]
            fastseq.functional.lstm(x, weights, lengths=torch.empty(3, dtype=torch.int64, device="cuda:1"))
