"""The definition of a deployed model: against torch's modules, against numpy's integers, and cut into chunks."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fastseq import reference
from fastseq.reference import matrix_of, matrix_product, matrix_values, run_model
from tests import model_cases as cases
from tests.tolerance import assert_same_bits, assert_within_budget

LENGTHS = torch.tensor([4, 7, 1])


def plain(module: nn.Module, x: Tensor, weights: list[Tensor], lengths: Tensor | None) -> list[Tensor]:
    """What torch's LSTM gives with these weights, h_n and c_n too."""
    module = module.to(x.dtype)
    module.load_state_dict(dict(zip(module.state_dict(), weights, strict=True)))
    given = x if lengths is None else pack_padded_sequence(x, lengths, enforce_sorted=False)
    y, (h, c) = module(given)
    return [y if lengths is None else pad_packed_sequence(y, total_length=len(x))[0], h, c]


@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize("projection", [0, 3])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_lstm_is_that_of_torch(bidirectional: bool, projection: int, lengths: Tensor | None) -> None:
    module = nn.LSTM(5, 6, 2, bidirectional=bidirectional, proj_size=projection)
    layers, tensors = cases.lstm(module)
    x, weights = torch.randn(7, 3, 5), [value.clone() for value in module.state_dict().values()]
    y, state = run_model(layers, tensors, x, lengths)
    got = [y, state["lstm.h"], state["lstm.c"]]
    assert_within_budget("y h c", got, lambda x, w: plain(module, x, w, lengths), [x, weights])


@pytest.mark.parametrize("hard", [False, True])
def test_gates_and_start(hard: bool) -> None:
    """Fields that torch's LSTM does not have: those of the definition of one layer."""
    layers, tensors = cases.lstm(nn.LSTM(4, 5), tau=0.5, hard=hard)
    tensors |= {"lstm.h_start_l0": torch.randn(5), "lstm.c_start_l0": torch.randn(5)}
    x = torch.randn(6, 2, 4)

    def definition(x: Tensor, t: dict[str, Tensor]) -> Tensor:
        h, c = (t[f"lstm.{key}_start_l0"].expand(2, 5) for key in "hc")
        gates = x @ t["lstm.weight_ih_l0"].mT + t["lstm.bias_l0"]
        return reference.lstm(gates, t["lstm.weight_hh_l0"], h, c, tau=0.5, hard=hard)[0]

    y, state = run_model(layers, tensors, x)
    assert_within_budget("y", y, definition, [x, tensors])
    del tensors["lstm.bias_l0"], tensors["lstm.h_start_l0"]
    assert not torch.equal(run_model(layers, tensors, x)[0], y)


@pytest.mark.parametrize(
    ("stride", "dilation", "left", "right"), [(1, 1, 2, 0), (1, 2, 1, 3), (3, 1, 0, 0), (2, 2, 4, 1)]
)
@pytest.mark.parametrize("lengths", [None, torch.tensor([9, 5, 11])])
def test_conv1d_is_that_of_torch(stride: int, dilation: int, left: int, right: int, lengths: Tensor | None) -> None:
    layers, tensors = cases.conv1d(4, 5, 3, stride=stride, dilation=dilation, left=left, right=right)
    x = torch.randn(11, 3, 5)

    def definition(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        outs = []
        for b, length in enumerate([11] * 3 if lengths is None else lengths.tolist()):
            alone = F.pad(x[:length, b].mT, (left, right))
            y = F.conv1d(alone, weight.unflatten(1, (3, 5)).mT, bias, stride, dilation=dilation)
            outs.append(y.mT)
        return nn.utils.rnn.pad_sequence(outs)

    y, _ = run_model(layers, tensors, x, lengths)
    assert_within_budget("y", y, definition, [x, tensors["conv1d.weight"], tensors["conv1d.bias"]])


def test_small_layers_are_those_of_torch() -> None:
    layers, tensors = cases.chain(cases.embedding(7, 5), cases.linear(4, 5))
    index = torch.randint(0, 7, (6, 3))

    def definition(weight: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.linear(F.embedding(index, weight), w, b)

    inputs = [tensors["embedding.weight"], tensors["linear.weight"], tensors["linear.bias"]]
    assert_within_budget("y", run_model(layers, tensors, index)[0], definition, inputs)
    x = torch.randn(6, 3, 4)
    for name, function in {
        "relu": F.relu,
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
        "softmax": lambda x: x.softmax(-1),
    }.items():
        y = run_model([{"type": name, "name": name}], {}, x, LENGTHS - 1)[0]
        mask = torch.arange(6)[:, None] < LENGTHS - 1
        assert_within_budget("y", y, lambda x, f=function, m=mask: torch.where(m[..., None], f(x), 0.0), [x])


def test_an_ensemble_is_the_mean_of_its_members() -> None:
    x = torch.randn(6, 3, 12)
    layers = [{"type": "ensemble", "name": "ensemble", "members": 3}]
    y, _ = run_model(layers, {}, x, LENGTHS - 1)
    mask = torch.arange(6)[:, None] < LENGTHS - 1

    def mean(x: Tensor) -> Tensor:
        return torch.where(mask[..., None], sum(part.softmax(-1) for part in x.chunk(3, -1)) / 3, 0.0)

    assert_within_budget("probability", y[..., :4], mean, [x])
    best = [part.argmax(-1) for part in x.chunk(3, -1)]
    differ = sum((a != b).float() for a, b in itertools.combinations(best, 2))
    assert_within_budget("disagreement", y[..., 4], lambda d: torch.where(mask, d / 3, 0.0), [differ])
    with pytest.raises(ValueError, match="ensemble takes as many channels for each of 3 members"):
        run_model(layers, {}, x[..., 1:])


def test_layers_that_join() -> None:
    layers, tensors = cases.chain(cases.linear(4, 4, name="a"), cases.linear(4, 4, name="b"))
    layers[1]["from"] = "input"
    layers += [
        {"type": "add", "name": "sum", "from": ["a", "b", "input"]},
        {"type": "concat", "name": "both", "from": ["sum", "a"]},
    ]
    x = torch.randn(3, 2, 4)
    a, b = (run_model(layers[n : n + 1], tensors, x)[0] for n in (0, 1))
    assert_same_bits("y", run_model(layers, tensors, x)[0], torch.cat((a + b + x, a), -1))
    layers = cases.conv1d(4, 4, 2)[0] + [{"type": "add", "name": "sum", "from": ["conv1d", "input"]}]
    with pytest.raises(ValueError, match="sum takes layers of one length"):
        run_model(layers, cases.conv1d(4, 4, 2)[1], x)


def integer_product(x: np.ndarray, q: np.ndarray, scale: np.ndarray, group: int | None, unit: bool) -> np.ndarray:
    """The contract in numpy, row by row."""
    one, out = np.float32(127), np.zeros((len(x), len(q)), np.float32)
    group = group or x.shape[1]
    for r, row in enumerate(x):
        m = np.float32(1) if unit else np.abs(row).max()
        if not np.isfinite(m):
            out[r] = np.nan
        elif m >= 2.0**-118:
            scaled = np.rint(row * one if unit else row * (one / m))
            integers = np.nan_to_num(np.clip(scaled, -127, 127)).astype(np.int64)
            for g in range(scale.shape[1]):
                columns = slice(g * group, (g + 1) * group)
                dot = (q[:, columns].astype(np.int64) @ integers[columns]).astype(np.float32)
                out[r] += dot * (scale[:, g] / one if unit else scale[:, g])
            if not unit:
                out[r] *= m / one
    return out


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("form", ["int8", "int8 by 4", "int4", "int4 by 8"])
@pytest.mark.parametrize("K", [1, 9, 1300])
def test_integer_products_are_those_of_numpy(K: int, form: str, unit: bool) -> None:
    weight, x = torch.randn(5, K), torch.randn(6, K)
    x = x.clamp(-1.2, 1.2) if unit else x * torch.tensor([1e-38, 1e-20, 1, 1e20, 1, 1])[:, None]
    x[4, K // 2], x[5, 0] = torch.inf, torch.nan
    group = cases.group(form).get("group")
    tensors = cases.stored("w", weight, form)
    integers, scale = reference.integer_rows(weight, int(form[3]), group)
    got = matrix_product(x[:, None], matrix_of(tensors, "w", group), unit)[:, 0].numpy()
    expected = integer_product(x.numpy(), integers.numpy(), scale.numpy(), group, unit)
    np.testing.assert_array_equal(got, expected)
    assert np.isfinite(got[:4]).all() and (unit or np.isnan(got[4:]).all())


@pytest.mark.parametrize("form", cases.FORMS)
def test_every_form_stands_for_its_values(form: str) -> None:
    """Products and rows with a matrix in each form are near those with its values, as near as its integers allow."""
    weight, x = torch.randn(8, 12), torch.randn(5, 3, 12)
    tensors, group = cases.stored("w", weight, form), cases.group(form).get("group")
    matrix = matrix_of(tensors, "w", group)
    values = matrix_values(matrix, 12)
    exact, got = x @ values.mT, matrix_product(x, matrix)
    rounding = 0.01 if "int" in form or form == "gates" else 1e-6
    assert (got - exact).norm() <= rounding * exact.norm()
    assert (values - weight).norm() <= (0.7 if "rank" in form or form == "gates" else 0.1) * weight.norm()
    if form != "gates":
        layers = [{"type": "embedding", "name": "w", "size": 8, "dim": 12, **cases.group(form)}]
        named = {key.replace("w", "w.weight", 1): value for key, value in tensors.items()}
        y = run_model(layers, named, torch.arange(8)[:, None])[0]
        assert_same_bits("rows", y[:, 0], values)


@pytest.mark.parametrize("projection", [0, 3])
@pytest.mark.parametrize("form", cases.FORMS)
def test_chunks_are_the_whole(form: str, projection: int) -> None:
    """Bit for bit, and a row of a batch in float32 is what it is alone in integers."""
    layers, tensors = cases.chain(
        cases.embedding(9, 8),
        cases.conv1d(8, 8, 3, form, name="causal", left=2, dilation=2),
        cases.conv1d(8, 8, 2, form, name="strided", stride=3),
        cases.lstm(nn.LSTM(8, 8, 2, proj_size=projection), form),
        cases.linear(4, projection or 8, form),
        ([{"type": "relu", "name": "relu"}], {}),
    )
    index = torch.randint(0, 9, (31, 2))
    whole, end = run_model(layers, tensors, index)
    parts, state = [], None
    for part in index.split([1, 2, 0, 10, 3, 7, 8]):
        y, state = run_model(layers, tensors, part, state=state)
        parts.append(y)
    assert_same_bits("y", torch.cat(parts), whole)
    assert state is not None and state.keys() == end.keys()
    assert all(torch.equal(state[key], end[key]) for key in end)


def test_chunks_with_lengths() -> None:
    """Rows that end in the first call go on in the second from where they ended."""
    layers, tensors = cases.chain(
        cases.conv1d(4, 4, 3, name="strided", stride=2, left=1),
        cases.conv1d(4, 4, 1, name="skipping", stride=2),
        cases.lstm(nn.LSTM(4, 4)),
    )
    x, lengths = torch.randn(16, 3, 4), torch.tensor([9, 2, 5])
    first, state = run_model(layers, tensors, x[:9], lengths)
    second = run_model(layers, tensors, x[9:], torch.tensor([7, 7, 4]), state)[0]
    for b, (n, m) in enumerate(zip(lengths.tolist(), [7, 7, 4], strict=True)):
        alone = run_model(layers, tensors, torch.cat((x[:n, b], x[9 : 9 + m, b]))[:, None])[0][:, 0]
        made = (run_model(layers, tensors, x[:n, b, None])[0]).shape[0]
        found = torch.cat((first[:made, b], second[: len(alone) - made, b]))
        torch.testing.assert_close(found, alone)
        assert not first[made:, b].any() and not second[len(alone) - made :, b].any()


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_residual_vq(metric: str) -> None:
    codebooks = F.normalize(torch.randn(3, 6, 4), dim=-1) if metric == "cosine" else torch.randn(3, 6, 4)
    layer = {"type": "residual_vq", "name": "q", "dim": 4, "size": 6, "levels": 3, "metric": metric}
    x = torch.randn(5, 2, 4)
    codes = run_model([{**layer, "output": "codes"}], {"q.codebooks": codebooks}, x, torch.tensor([5, 2]))[0]
    vectors = run_model([{**layer, "output": "vectors"}], {"q.codebooks": codebooks}, x)[0]
    assert codes.dtype == torch.int32 and codes.shape == (5, 2, 3) and (codes[2:, 1] == -1).all()
    rest, total = x.clone(), torch.zeros_like(x)
    for codebook, index in zip(codebooks, codes.long().unbind(-1), strict=True):
        scores = rest @ codebook.mT if metric == "cosine" else -torch.cdist(rest, codebook)
        live = index >= 0
        assert torch.equal(scores.argmax(-1)[live], index[live])
        total, rest = total + codebook[scores.argmax(-1)], rest - codebook[scores.argmax(-1)]
    torch.testing.assert_close(vectors, total)


@pytest.mark.parametrize("K", [1, 2, 3])
@pytest.mark.parametrize("quarters", [False, True])  # quarters make equal sums likely, and add without error
def test_crf_is_the_best_path(K: int, quarters: bool) -> None:
    def random(*shape: int) -> Tensor:
        return torch.randint(-2, 3, shape) / 4 if quarters else torch.randn(shape)

    tensors: dict[str, Any] = {"crf.transitions": random(K, K), "crf.start": random(K), "crf.end": random(K)}
    x, lengths = random(5, 4, K), torch.tensor([5, 3, 1, 0])
    labels = run_model([{"type": "crf", "name": "crf", "labels": K}], tensors, x, lengths)[0]
    assert labels.dtype == torch.int32 and (labels[torch.arange(5)[:, None] >= lengths] == -1).all()
    for b, T in enumerate(lengths.tolist()):
        if T == 0:
            continue

        def score(path: tuple[int, ...], b: int = b) -> float:
            moves = sum(tensors["crf.transitions"][i, j].double() for i, j in itertools.pairwise(path))
            emitted = sum(x[t, b, k].double() for t, k in enumerate(path))
            return float(tensors["crf.start"][path[0]].double() + emitted + moves + tensors["crf.end"][path[-1]])

        best = max(score(path) for path in itertools.product(range(K), repeat=T))
        found = tuple(labels[:T, b].tolist())
        assert score(found) == pytest.approx(best, abs=1e-5)
        if quarters:  # of equal paths the one whose last label is least, then the one before it, and so on
            paths = [p for p in itertools.product(range(K), repeat=T) if score(p) == best]
            assert found == min(paths, key=lambda path: path[::-1])


def test_errors() -> None:
    x = torch.randn(3, 2, 4)
    with pytest.raises(ValueError, match="gru has the unknown type 'gru'"):
        run_model([{"type": "gru", "name": "gru"}], {}, x)
    with pytest.raises(ValueError, match="no tensor weight"):
        run_model(cases.linear(3, 4)[0], {}, x)
    layers, tensors = cases.linear(3, 4, "int8")
    with pytest.raises(ValueError, match=r"scales of weight, \[3, 4\] by 2, are \[3, 1\]"):
        run_model([{**layers[0], "group": 2}], tensors, x)
    layers, tensors = cases.embedding(4, 2)
    with pytest.raises(ValueError, match=r"embedding takes integers in 0..3"):
        run_model(layers, tensors, torch.tensor([[4]]))


def test_bits_of_a_row_do_not_depend_on_its_batch() -> None:
    for form in ("int8", "int4 by 8"):
        layers, tensors = cases.chain(cases.lstm(nn.LSTM(8, 8, bidirectional=True), form), cases.linear(3, 16, form))
        x = torch.randn(6, 3, 8)
        together = run_model(layers, tensors, x, torch.tensor([6, 2, 4]))[0]
        for b, length in enumerate((6, 2, 4)):
            assert_same_bits("row", run_model(layers, tensors, x[:length, b, None])[0], together[:length, b, None])


def test_nothing_to_do() -> None:
    layers, tensors = cases.chain(
        cases.conv1d(4, 4, 3, left=2), cases.lstm(nn.LSTM(4, 4), "int8"), cases.linear(2, 4, "int8")
    )
    assert run_model(layers, tensors, torch.randn(0, 2, 4))[0].shape == (0, 2, 2)
    assert run_model(layers, tensors, torch.randn(3, 0, 4))[0].shape == (3, 0, 2)
    assert run_model([], {}, torch.ones(2, 1, 1))[0].shape == (2, 1, 1)
