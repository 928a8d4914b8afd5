"""``from_g2_lstm``: language models of the code that Li et al. (ICML 2018) published, zhuohan123/g2-lstm."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from fastseq.convert.checkpoint import from_checkpoint, tensors_of
from fastseq.convert.matrices import Array
from fastseq.convert.official import Official, needed
from fastseq.convert.onnx_read import ConversionError

_NAME = "from_g2_lstm"
_CELL = re.compile(r"((?:.*\.)?)cell_(\d+)\.(\w+)")
_GATES = (1, 0, 3, 2)  # where i, f, g, o stand in f, i, o, g


def from_g2_lstm(source: Any, *, fields: Mapping[str, Mapping[str, Any]] | None = None) -> Official:
    """A language model of g2-lstm, or its LSTMs alone: gates reordered, matrices transposed, one bias made two.

    Its cells keep ``weight_ih`` [I, 4*H], ``weight_hh`` [H, 4*H] and one ``bias`` [4*H], gates in the order f, i, o, g.
    Here they are [4*H, I], [4*H, H] and two biases, the second of zeros, gates in the order i, f, g, o.

    Args:
        source: names to tensors, or a file of them, as of ``from_checkpoint``. The files of its main.py hold the whole
            module as code, so they are refused: save its ``state_dict()`` where that code is.
        fields: of layers of the deployed model, such as {"rnns.0": {"tau": 0.2}} for gates that were sharpened.

    Returns:
        ``Official``. What it computes is that of evaluation mode: no noise, no dropout.

    Raises:
        ConversionError: there are no such cells, something of one is missing, or sizes do not fit.
    """
    tensors = tensors_of(_NAME, source)
    cells = sorted({(m[1], int(m[2])) for m in map(_CELL.fullmatch, tensors) if m})
    if not cells:
        some = ", ".join([*tensors][:6]) or "nothing"
        raise ConversionError(f"{_NAME}: the file has no cell_0.weight_ih, as g2-lstm calls it (there is {some})")
    state = {name: value for name, value in tensors.items() if not _CELL.fullmatch(name)}
    for front, layer in cells:
        state |= _cell(tensors, f"{front}cell_{layer}.", front, layer)
    lstms = list(dict.fromkeys(front.removesuffix(".") for front, _ in cells))
    known = ["encoder", *sorted(lstms, key=_numbers), "decoder"]
    names = [name for name in known if any(key.rpartition(".")[0] == name for key in state)]
    types = {"encoder": {"type": "embedding"}, "decoder": {"type": "linear"}}
    given: dict[str, Mapping[str, Any]] = {n: types[n] for n in types if n in names}
    for name, more in (fields or {}).items():
        given[name] = {**given.get(name, {}), **more}
    _check_all_taken(state, names)
    model = from_checkpoint(state, order=names, fields=given)
    return Official(state, _module(state, names), model, "", _notes(state, lstms))


def _numbers(name: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", name)]


def _cell(tensors: Mapping[str, Array], at: str, front: str, layer: int) -> dict[str, Array]:
    """One layer in the names and the layout of torch."""
    weight_hh = needed(_NAME, tensors, f"{at}weight_hh", "H, 4*H", None, None)
    H = len(weight_hh)
    needed(_NAME, tensors, f"{at}weight_hh", "H, 4*H", H, 4 * H)
    weight_ih = needed(_NAME, tensors, f"{at}weight_ih", "I, 4*H", None, 4 * H)
    bias = _reordered(needed(_NAME, tensors, f"{at}bias", "4*H", 4 * H))
    own = {"weight_ih": _reordered(weight_ih.T), "weight_hh": _reordered(weight_hh.T)}
    own |= {"bias_ih": bias, "bias_hh": np.zeros_like(bias)}
    return {f"{front}{name}_l{layer}": value for name, value in own.items()}


def _reordered(rows: Array) -> Array:
    """f, i, o, g to i, f, g, o along the first dimension."""
    blocks = rows.reshape(4, -1, *rows.shape[1:])
    return np.ascontiguousarray(blocks[list(_GATES)].reshape(rows.shape))


def _check_all_taken(state: Mapping[str, Array], names: list[str]) -> None:
    left = [key for key in state if key.rpartition(".")[0] not in names]
    if left:
        raise ConversionError(f"{_NAME}: what these tensors are is not known: {', '.join(left)}")


def _module(state: Mapping[str, Array], names: list[str]) -> str:
    lines = []
    for name in names:
        weights = [key for key in state if key.startswith(f"{name}.weight" if name else "weight")]
        if name in ("encoder", "decoder"):
            N, K = state[weights[0]].shape
            lines.append(f"{name}: nn.Embedding({N}, {K})" if name == "encoder" else f"{name}: nn.Linear({K}, {N})")
            continue
        layers = sum("weight_hh" in key for key in weights)
        H, inputs = state[next(k for k in weights if "weight_hh_l0" in k)].shape[1], state[weights[0]].shape[1]
        depth = f", {layers}" if layers > 1 else ""
        lines.append(f'{name or "the module"}: fastseq.nn.LSTM({inputs}, {H}{depth}, gates="binary")')
    return "; ".join(lines)


def _notes(state: Mapping[str, Array], lstms: list[str]) -> list[str]:
    lstm = lstms[0] or "lstm"
    notes = [
        "the file does not say whether gates were sharpened (divide_temp); where they were, each LSTM needs its field "
        f"tau, such as {lstm}.tau=0.2",
        "it does not hold the noise of training (gumbel_noise_p and gumbel_noise_t, which the paper set to 0.2 and "
        "0.9), nor dropout; in evaluation neither plays a part",
    ]
    pair = [state.get(f"{name}.weight") for name in ("encoder", "decoder")]
    if pair[0] is not None and pair[1] is not None and np.array_equal(pair[0], pair[1]):
        notes.append("encoder and decoder have the same weights; they are kept twice, so training would part them")
    return notes
