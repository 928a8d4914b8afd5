"""The door of csrc/cuda in a torch without CUDA: schemas, fakes, and what it refuses, up to the device."""

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
from fastseq.ops import _cuda, lstm_persist
ops, CUDA = torch.ops.fastseq, DispatchKeySet(DispatchKey.CUDA)


def forward(T=3, B=2, H=8, low=torch.bfloat16, count=1, packed=None, device="cpu", **change):
    lead = (T, B) if packed is None else (packed,)
    whole = lambda n: torch.zeros(n, dtype=torch.int64, device=device)
    some = lambda *size, dtype=low: [torch.zeros(*size, dtype=dtype, device=device) for _ in range(count)]
    kept = lambda width, dtype=low: some(*lead, width, dtype=dtype)
    rows = {"lengths": None, "offsets": None} if packed is None else {"lengths": whole(B), "offsets": whole(T)}
    state = {"h0": some(B, H), "c0": some(B, H, dtype=torch.float32)}
    gate = {"tau": 1.0, "hard": False, "reverse": False, "tile": 0}
    out = {"h": kept(H), "c": kept(H, torch.float32), "gates": kept(4 * H), "h_n": some(B, H)}
    ends = {"c_n": some(B, H, dtype=torch.float32)}
    given = {"x_gates": kept(4 * H), "weight_hh": some(4 * H, H), "scale": [], **state, **rows, **gate, **out, **ends}
    return list({**given, **change}.values())


def backward(T=3, B=2, H=8, low=torch.bfloat16, count=1, packed=None, device="cpu", **change):
    f = dict(zip([a.name for a in ops.lstm_persist_forward.default._schema.arguments],
                 forward(T, B, H, low, count, packed, device), strict=True))
    grads = {"dh": f["h"], "dh_n": f["h_n"], "dc_n": [None] * count}
    given = {name: f[name] for name in ("gates", "c", "weight_hh", "c0", "lengths", "offsets")}
    gate = {name: f[name] for name in ("tau", "hard", "reverse", "tile")}
    out = {"dx_gates": f["x_gates"], "dh0": f["h0"], "dc0": f["c_n"]}
    return list({**grads, **given, **gate, **out, **change}.values())


def int8(H=8, **change):
    own = {"weight_hh": [torch.zeros(4 * H, H, dtype=torch.int8)], "scale": [torch.ones(4 * H)]}
    return forward(H=H, **{**own, **change})


def refused(op, args):
    try:
        getattr(ops, op).default.redispatch(CUDA, *args)
    except (ValueError, RuntimeError) as error:
        return str(error).splitlines()[0]
    return "nothing was wrong"
"""


def test_schemas_and_tiles(package: Path) -> None:
    code = "print(_cuda.why_not_loaded, ops.lstm_persist_forward.default._schema)\nprint(lstm_persist.TILES)\n"
    code += "with FakeTensorMode(): print(len(ops.lstm_persist_tiles()) == 6 * len(lstm_persist.TILES))"
    first, tiles, fake = python(package, CALLS + code).splitlines()
    assert first.startswith("None fastseq::lstm_persist_forward(Tensor[] x_gates, Tensor[] weight_hh, Tensor[] scale,")
    assert first.endswith("Tensor(d!)[] h_n, Tensor(e!)[] c_n) -> ()")
    assert tiles.startswith("(Tile(units=") and fake == "True"


def test_fake_tensors_go_through(package: Path) -> None:
    code = """
with FakeTensorMode():
    for sizes in ({}, {"count": 2}, {"packed": 5, "low": torch.float16}):
        for device in ("cuda", "cpu"):
            args = forward(device=device, **sizes), backward(device=device, **sizes)
            print(ops.lstm_persist_forward(*args[0]), ops.lstm_persist_backward(*args[1]))
"""
    assert python(package, CALLS + code) == "None None\n" * 6


def test_cpu_tensors_have_no_kernel(package: Path) -> None:
    code = """
for op, args in (("lstm_persist_forward", forward()), ("lstm_persist_backward", backward())):
    try:
        getattr(ops, op)(*args)
    except NotImplementedError as error:
        print(str(error).split(" with arguments")[0])
"""
    words = "Could not run 'fastseq::lstm_persist_{}'\n"
    assert python(package, CALLS + code) == words.format("forward") + words.format("backward")


REFUSED = {
    "forward()": "x_gates must be on cuda",
    "forward(count=2)": "x_gates[0] must be on cuda",
    "forward(packed=4)": "lengths must be on cuda",
    "forward(c=[], gates=[])": "x_gates must be on cuda",
    "forward(low=torch.float32)": "x_gates must be bfloat16 or float16, got float32",
    "forward(low=torch.float16, h0=[torch.zeros(2, 8)])": "h0 must be float16, got float32",
    "forward(x_gates=[])": "x_gates must list 1 or 2 directions, got 0",
    "forward(count=3)": "x_gates must list 1 or 2 directions, got 3",
    "forward(count=2, h=[])": "h must list 2 directions, got 0",
    "forward(count=2, c=[torch.zeros(3, 2, 8)])": "c must list 2 directions or none, got 1",
    "forward(weight_hh=[torch.zeros(32, 7)])": "weight_hh must be [4*H, H] = [32, 8], got [32, 7]",
    "forward(h_n=[torch.zeros(8, 2).mT.bfloat16()])": "h_n must be contiguous",
    "forward(c_n=[torch.zeros(2, 8).bfloat16()])": "c_n must be float32, got bfloat16",
    "forward(lengths=torch.zeros(2, dtype=torch.int32))": "lengths must be int64, got int32",
    "forward(lengths=torch.zeros(3, dtype=torch.int64))": "lengths must be [B] = [2], got [3]",
    "forward(packed=4, lengths=None)": "lengths must be given with offsets",
    "forward(packed=4, h=[torch.zeros(3, 8).bfloat16()])": "h must be [N, H] = [4, 8], got [3, 8]",
    "forward(T=0)": "T, B and H must be at least 1, got 0, 2 and 8",
    "forward(tau=0.0)": "tau must be greater than 0, got 0",
    "forward(tile=-1)": "tile must lie in 0 .. {tiles}, got -1",
    "forward(tile=1000)": "tile must lie in 0 .. {tiles}, got 1000",
    "forward(H=lstm_persist.TILES[0].depth + 1)": "H must be at most {depth} with tile 0, got {more}",
    "int8()": "x_gates must be on cuda",
    "forward(scale=[torch.ones(32)])": "weight_hh must be int8, got bfloat16",
    "forward(count=2, scale=[torch.ones(32)])": "scale must list 2 directions or none, got 1",
    "int8(scale=[torch.ones(31)])": "scale must be [4*H] = [32], got [31]",
    "int8(scale=[torch.ones(32).double()])": "scale must be float32, got float64",
    "int8(H=lstm_persist.TILES[0].int8_depth + 1)": "H must be at most {int8} with tile 0 and int8 weights, got {over}",
    "int8(tile=9)": "H must be at most 0 with tile 9 and int8 weights, got 8",
    "backward()": "dh must be on cuda",
    "backward(count=2, dh=[None] * 2, dh_n=[None] * 2)": "gates[0] must be on cuda",
    "backward(dh=[])": "dh must list 1 directions, got 0",
    "backward(c=[torch.zeros(3, 2, 9)])": "c must be [T, B, H] = [3, 2, 8], got [3, 2, 9]",
    "backward(dc_n=[torch.zeros(2, 8).bfloat16()])": "dc_n must be float32, got bfloat16",
    "backward(packed=4, dx_gates=[torch.zeros(3, 2, 32)])": "dx_gates must be [N, 4*H] = [4, 32], got [3, 2, 32]",
}


def operator(call: str) -> str:
    return "lstm_persist_backward" if call.startswith("backward") else "lstm_persist_forward"


@pytest.fixture(scope="module")
def messages(package: Path) -> dict[str, tuple[str, str]]:
    """Of each call what was said and what is expected, from one process."""
    lines = ["print(len(lstm_persist.TILES) - 1, lstm_persist.TILES[0].depth, lstm_persist.TILES[0].int8_depth)"]
    lines += [f"print(refused('{operator(call)}', {call}))" for call in REFUSED]
    numbers, *said = python(package, CALLS + "\n".join(lines)).splitlines()
    tiles, depth, int8 = map(int, numbers.split())
    known = {"tiles": tiles, "depth": depth, "more": depth + 1, "int8": int8, "over": int8 + 1}
    expected = (words.format(**known) for words in REFUSED.values())
    return dict(zip(REFUSED, zip(said, expected, strict=True), strict=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a torch without CUDA")
@pytest.mark.parametrize("call", REFUSED)
def test_what_the_door_refuses(call: str, messages: dict[str, tuple[str, str]]) -> None:
    said, expected = messages[call]
    assert said == f"{operator(call)}: {expected}"
