"""Calls of the low-rank and int8 LSTM: every route, dtype and option that compiles anew."""

from __future__ import annotations

from typing import Any

import torch

from tests.kernels._call import BF16, FP16, FP32, call, new
from tests.kernels.lstm_calls import recurrence


def lowrank(
    T: int = 3, B: int = 20, H: int = 512, R: int = 32, dtype: torch.dtype = BF16, words: str = "shared", save: int = 2
) -> tuple[Any, ...]:
    r = recurrence(T, B, H, None, dtype, words)
    up, down = new(4, H, R, dtype=dtype), new(1 if "shared" in words else 4, R, H, dtype=dtype)
    return (new(*r.lead, 4 * H, dtype=dtype), up, down, r.h0, r.c0, *r.state[1:], *r.noise, *r.gate, save)


def lowrank_backward(
    T: int = 3, B: int = 20, H: int = 512, R: int = 32, dtype: torch.dtype = BF16, words: str = "shared"
) -> tuple[Any, ...]:
    r = recurrence(T, B, H, None, dtype, words)
    up, down = new(4, H, R, dtype=dtype), new(1 if "shared" in words else 4, R, H, dtype=dtype)
    h, c, gates = new(*r.lead, H, dtype=dtype), new(*r.lead, H), new(*r.lead, 4 * H, dtype=dtype)
    grads = (new(*h.shape, dtype=dtype), new(*c.shape), new(*gates.shape, dtype=dtype), r.h0, r.c0)
    grads = (grads[0], *(None,) * 4) if "bare" in words else grads
    return (*grads, gates, h, c, up, down, r.h0, r.c0, *r.state[1:], *r.gate, True)


LOWRANK: dict[str, dict[str, Any]] = {
    "bf16": {},
    "bf16 reset start": {"words": "shared lengths reset start"},
    "bf16 separate": {"H": 256, "words": "lengths reset start"},
    "bf16 reverse hard": {"words": "shared packed hard reverse"},
    "bf16 small": {"H": 64, "R": 8},
    "bf16 middle": {"H": 300, "R": 20},
    "bf16 large": {"H": 1024, "R": 64, "words": "shared lengths reset start"},
    "bf16 large separate": {"H": 1024, "R": 64, "words": "lengths"},
    "bf16 steps": {"H": 2048, "R": 256},
    "fp16": {"dtype": FP16},
    "fp32": {"dtype": FP32},
    "fp32 separate": {"dtype": FP32, "H": 256, "words": "lengths reset start reverse"},
    "fp32 steps": {"dtype": FP32, "H": 2048, "R": 128},
}
for _name, _sizes in LOWRANK.items():
    call("lstm_lowrank", "lstm_lowrank_forward", _name, lowrank, **_sizes)
    call("lstm_lowrank", "lstm_lowrank_backward", _name, lowrank_backward, **_sizes)
call("lstm_lowrank", "lstm_lowrank_forward", "bf16 inference", lowrank, save=0)
call("lstm_lowrank", "lstm_lowrank_forward", "bf16 noise", lowrank, words="shared noise rows")
call("lstm_lowrank", "lstm_lowrank_backward", "bf16 bare", lowrank_backward, words="shared bare")


def int8(
    T: int = 3, B: int = 20, H: int = 128, dtype: torch.dtype = BF16, words: str = "", save: int = 2
) -> tuple[Any, ...]:
    r = recurrence(T, B, H, None, dtype, words)
    weight, scale = new(4 * H, H, dtype=torch.int8), new(4 * H)
    return (new(*r.lead, 4 * H, dtype=dtype), weight, scale, r.h0, r.c0, *r.state[1:], *r.noise, *r.gate, save)


INT8: dict[str, dict[str, Any]] = {
    "bf16": {},
    "bf16 reset start": {"words": "lengths reset start"},
    "bf16 reverse hard inference": {"words": "packed hard reverse", "save": 0},
    "bf16 small": {"H": 24},
    "bf16 loop": {"H": 256, "words": "lengths reset start"},
    "bf16 loop odd": {"H": 300},
    "bf16 steps": {"H": 1024},
    "fp32": {"dtype": FP32},
    "fp32 loop": {"dtype": FP32, "H": 512},
    "fp32 steps": {"dtype": FP32, "H": 1024, "words": "lengths reset start reverse"},
}
for _name, _sizes in INT8.items():
    call("lstm_int8", "lstm_int8_forward", _name, int8, **_sizes)
