"""An LSTM as a layer of a deployed model: a plain description, and numpy arrays of what it keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from fastseq import _check
from fastseq.functional import Matrix, Part
from fastseq.nn._matrices import matrices_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

Arrays: TypeAlias = "dict[str, NDArray[Any]]"


def array(value: Tensor) -> NDArray[Any]:
    """As it is kept; float64 as float32, and bfloat16, which numpy lacks, as the uint16 of its bits."""
    value = value.detach().cpu().contiguous()
    if value.dtype == torch.float64:
        value = value.float()
    return value.view(torch.int16).numpy().view("uint16") if value.dtype == torch.bfloat16 else value.numpy()


def matrix_arrays(name: str, matrix: Matrix) -> Arrays:
    """Gates that are whole and alike in one array, else each of its own, factors as ``up`` and ``down``."""
    alike = {(gate.rows.values.dtype, gate.rows.group, gate.down is None) for gate in matrix}
    if len(alike) == 1 and matrix[0].down is None:
        scales = [gate.rows.scale for gate in matrix if gate.rows.scale is not None]
        values = torch.cat([gate.rows.values for gate in matrix])
        return _part(name, Part(values, torch.cat(scales) if scales else None))
    found: Arrays = {}
    for letter, (rows, down) in zip([".i", ".f", ".g", ".o"] if len(matrix) == 4 else [""], matrix, strict=True):
        if down is None:
            found |= _part(name + letter, rows)
        else:
            found |= {**_part(f"{name}{letter}.up", rows), **_part(f"{name}{letter}.down", down)}
    return found


def _part(name: str, part: Part) -> Arrays:
    found = {name: array(part.values)}
    return found if part.scale is None else found | {f"{name}.scale": array(part.scale)}


def group_of(function: str, matrices: Mapping[str, tuple[Matrix, int]]) -> int | None:
    """The number of columns that share a scale, one for a whole layer; ``matrices``: with their columns."""
    parts: list[tuple[Part, int]] = []
    for matrix, K in matrices.values():
        for rows, down in matrix:
            parts += [(rows, K if down is None else down.values.shape[0]), *([] if down is None else [(down, K)])]
    found = {part.group for part, _ in parts if part.group}
    group = next(iter(found), None)
    whole = [K for part, K in parts if part.scale is not None and not part.group]
    if len(found) > 1 or (group is not None and any(K > group for K in whole)):
        _check.fail(function, "group", "the same for all matrices of a layer", sorted({*found, *whole}))
    return group


def lstm_state(
    module: Any, matrices: Mapping[str, tuple[Matrix, int]], biases: Mapping[str, Tensor], name: str
) -> dict[str, Any]:
    """``export_state`` of one LSTM. ``matrices`` by the names of torch's parameters, with their columns."""
    tau, hard = 1.0, False
    if hasattr(module, "gates"):
        tau, hard = (module.tau if module.gates == "sharpened" else 1.0), module.gates == "binary" and module.hard_eval
    layer: dict[str, Any] = {
        "type": "lstm",
        "name": name,
        "input_size": module.input_size,
        "hidden_size": module.hidden_size,
        "num_layers": module.num_layers,
        "bidirectional": module.bidirectional,
        "proj_size": module.proj_size,
        "tau": tau,
        "hard": hard,
    }
    group = group_of("export_state", matrices)
    layer |= {} if group is None else {"group": group}
    tensors: Arrays = {}
    for key, (matrix, _) in matrices.items():
        tensors |= matrix_arrays(f"{name}.{key}", matrix)
    tensors |= {f"{name}.{key}": array(value.float()) for key, value in biases.items()}
    return {"layers": [layer], "tensors": tensors}


def plain_lstm_state(module: nn.RNNBase, name: str) -> dict[str, Any]:
    """Of ``torch.nn.LSTM`` and ours."""
    state = {key: getattr(module, key) for key in module.state_dict()}
    biases = {k: v for k, v in state.items() if k.startswith(("h_start", "c_start"))}
    for key, value in state.items():
        if key.startswith("bias_ih"):
            suffix = key.removeprefix("bias_ih")
            biases[f"bias{suffix}"] = value.detach().float() + state[f"bias_hh{suffix}"].detach().float()
    return lstm_state(module, matrices_of(module), biases, name)
