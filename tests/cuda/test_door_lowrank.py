"""The door of the low-rank kernels in a torch without CUDA: schemas, fakes, and what it refuses, up to the device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.cuda.library import python

# Arguments of both operators, for any sizes and dtype; `change` replaces some.
CALLS = """
import torch
from torch._C import DispatchKey, DispatchKeySet
from torch._subclasses.fake_tensor import FakeTensorMode
from fastseq.ops import lstm_persist_lowrank
ops, CUDA = torch.ops.fastseq, DispatchKeySet(DispatchKey.CUDA)


def forward(T=3, B=2, H=8, r=5, low=torch.bfloat16, packed=None, device="cpu", **change):
    lead = (T, B) if packed is None else (packed,)
    whole = lambda n: torch.zeros(n, dtype=torch.int64, device=device)
    some = lambda *size, dtype=low: torch.zeros(*size, dtype=dtype, device=device)
    rows = {"lengths": None, "offsets": None} if packed is None else {"lengths": whole(B), "offsets": whole(T)}
    factors = {"up": some(4, H, r), "down": some(1, r, H)}
    state = {"h0": some(B, H), "c0": some(B, H, dtype=torch.float32)}
    gate = {"tau": 1.0, "hard": False, "reverse": False, "tile": 0}
    out = {"h": some(*lead, H), "c": some(*lead, H, dtype=torch.float32), "gates": some(*lead, 4 * H)}
    ends = {"h_n": some(B, H), "c_n": some(B, H, dtype=torch.float32)}
    return list({"x_gates": some(*lead, 4 * H), **factors, **state, **rows, **gate, **out, **ends, **change}.values())


def backward(*sizes, **change):
    names = [a.name for a in ops.lstm_persist_lowrank_forward.default._schema.arguments]
    own = {name: change.pop(name) for name in ("T", "B", "H", "r", "low", "packed", "device") if name in change}
    f = dict(zip(names, forward(*sizes, **own), strict=True))
    grads = {"dh": f["h"], "dh_n": f["h_n"], "dc_n": None}
    given = {n: f[n] for n in ("gates", "c", "up", "down", "c0", "lengths", "offsets")}
    gate = {n: f[n] for n in ("tau", "hard", "reverse", "tile")}
    out = {"dx_gates": f["x_gates"], "dh0": f["h0"], "dc0": f["c_n"]}
    return list({**grads, **given, **gate, **out, **change}.values())


def refused(op, args):
    try:
        getattr(ops, op).default.redispatch(CUDA, *args)
    except (ValueError, RuntimeError) as error:
        return str(error).splitlines()[0]
    return "nothing was wrong"
"""


def test_schemas_tiles_and_fakes(package: Path) -> None:
    code = """
print(ops.lstm_persist_lowrank_forward.default._schema)
print(lstm_persist_lowrank.TILES)
with FakeTensorMode():
    for device in ("cuda", "cpu"):
        args = forward(device=device, packed=5), backward(device=device, low=torch.float16)
        print(ops.lstm_persist_lowrank_forward(*args[0]), ops.lstm_persist_lowrank_backward(*args[1]))
"""
    schema, tiles, *fakes = python(package, CALLS + code).splitlines()
    assert schema.startswith("fastseq::lstm_persist_lowrank_forward(Tensor x_gates, Tensor up, Tensor down, Tensor h0,")
    assert schema.endswith("Tensor(a!) h, Tensor(b!)? c, Tensor(c!)? gates, Tensor(d!) h_n, Tensor(e!) c_n) -> ()")
    assert tiles.startswith("(LowRankTile(units=128, rows=8, rank=32, downs=1, threads=256),")
    assert fakes == ["None None"] * 2


REFUSED = {
    "forward()": "x_gates must be on cuda",
    "forward(packed=4)": "lengths must be on cuda",
    "forward(c=None, gates=None)": "x_gates must be on cuda",
    "forward(low=torch.float32)": "x_gates must be bfloat16 or float16, got float32",
    "forward(low=torch.float16, up=torch.zeros(4, 8, 5))": "up must be float16, got float32",
    "forward(up=torch.zeros(32, 5))": "up must be [4, H, r], got [32, 5]",
    "forward(up=torch.zeros(4, 7, 5).bfloat16())": "up must be [4, H, r] = [4, 8, 5], got [4, 7, 5]",
    "forward(down=torch.zeros(5, 8))": "down must be [4, r, H] or [1, r, H], got [5, 8]",
    "forward(down=torch.zeros(1, 4, 8).bfloat16())": "down must be [1, r, H] = [1, 5, 8], got [1, 4, 8]",
    "forward(down=torch.zeros(4, 5, 8).bfloat16())": "down must be [1, r, H] with tile 0, got [4, 5, 8]",
    "forward(tile=6)": "down must be [4, r, H] with tile 6, got [1, 5, 8]",
    "forward(r=0)": "r must lie in 1 .. 32 with tile 0, got 0",
    "forward(r=33)": "r must lie in 1 .. 32 with tile 0, got 33",
    "forward(tile=-1)": "tile must lie in 0 .. 10, got -1",
    "forward(tile=1000)": "tile must lie in 0 .. 10, got 1000",
    "forward(h_n=torch.zeros(8, 2).mT.bfloat16())": "h_n must be contiguous",
    "forward(c_n=torch.zeros(2, 8).bfloat16())": "c_n must be float32, got bfloat16",
    "forward(lengths=torch.zeros(3, dtype=torch.int64))": "lengths must be [B] = [2], got [3]",
    "forward(packed=4, lengths=None)": "lengths must be given with offsets",
    "forward(B=0)": "T, B and H must be at least 1, got 3, 0 and 8",
    "forward(tau=0.0)": "tau must be greater than 0, got 0",
    "backward()": "dh must be on cuda",
    "backward(dh=None, dh_n=None)": "gates must be on cuda",
    "backward(c=torch.zeros(3, 2, 9))": "c must be [T, B, H] = [3, 2, 8], got [3, 2, 9]",
    "backward(dc_n=torch.zeros(2, 8).bfloat16())": "dc_n must be float32, got bfloat16",
    "backward(r=33)": "r must lie in 1 .. 32 with tile 0, got 33",
    "backward(dx_gates=torch.zeros(3, 2, 8).bfloat16())": "dx_gates must be [T, B, 4*H] = [3, 2, 32], got [3, 2, 8]",
}


@pytest.fixture(scope="module")
def messages(package: Path) -> dict[str, str]:
    """What was said of each call, from one process."""
    lines = [f"print(refused('lstm_persist_lowrank_{call.split('(')[0]}', {call}))" for call in REFUSED]
    return dict(zip(REFUSED, python(package, CALLS + "\n".join(lines)).splitlines(), strict=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a torch without CUDA")
@pytest.mark.parametrize("call", REFUSED)
def test_what_the_door_refuses(call: str, messages: dict[str, str]) -> None:
    assert messages[call] == f"lstm_persist_lowrank_{call.split('(')[0]}: {REFUSED[call]}"
