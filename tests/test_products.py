"""Published products as deployed models: what needs no product, and the products where they are installed."""

from __future__ import annotations

import importlib.metadata
import wave
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import products
from benchmarks import products_dksplit as dksplit
from benchmarks import products_silero as silero


def folder(product: str) -> Path:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnx", reason="onnx is not installed")
    try:
        return products.installed(product, None)[0]
    except importlib.metadata.PackageNotFoundError as error:
        pytest.skip(f"{error.name} is not installed (pip install --no-deps {error.name})")


def test_names_and_words() -> None:
    names = dksplit.joined_names(50)
    assert len(set(names)) == 50 and all(name.isalpha() and len(name) <= 64 for name in names)
    assert names == dksplit.joined_names(50)
    index, lengths = dksplit.dksplit_input(["ab0", "-"])
    assert index.T.tolist() == [[2, 3, 28], [1, 0, 0]] and lengths.tolist() == [3, 1]
    assert dksplit.dksplit_words("ab0", [1, 0, 1]) == ["ab", "0"] and dksplit.dksplit_words("-", [0]) == ["-"]


def tagger(seed: int = 0) -> dict[str, object]:
    """A small one of DKSplit's kind."""
    draw, H = np.random.default_rng(seed), 8
    sizes = {"lstm.weight_ih_l0": (4 * H, 6), "lstm.weight_hh_l0": (4 * H, H), "lstm.bias_l0": (4 * H,)}
    sizes |= {f"{name}_reverse": size for name, size in sizes.items()}
    sizes |= {"embedding.weight": (38, 6), "linear.weight": (2, 2 * H), "linear.bias": (2,)}
    sizes |= {"crf.transitions": (2, 2), "crf.start": (2,), "crf.end": (2,)}
    lstm = {"type": "lstm", "name": "lstm", "input_size": 6, "hidden_size": H, "bidirectional": True}
    layers = [
        {"type": "embedding", "name": "embedding", "size": 38, "dim": 6},
        lstm,
        {"type": "linear", "name": "linear", "in": 2 * H, "out": 2},
        {"type": "crf", "name": "crf", "labels": 2},
    ]
    return {"layers": layers, "tensors": {n: draw.standard_normal(size).astype("f") for n, size in sizes.items()}}


def test_labels_are_the_best_path_of_the_scores() -> None:
    state, names = tagger(), dksplit.joined_names(40)
    model, scorer = dksplit.loaded(state)[0], dksplit.loaded(dksplit.without_crf(state))[0]
    assert dksplit.same_bits(model, names) and dksplit.same_bits(scorer, names)
    tensors: dict[str, np.ndarray] = state["tensors"]  # type: ignore[assignment]
    crf = dksplit.Crf(*(tensors[f"crf.{name}"].astype(np.float64) for name in ("start", "transitions", "end")))
    labels, scores = dksplit.answers(model, names, 7), dksplit.answers(scorer, names, 7)
    for own, given in zip(labels, scores, strict=True):
        first, second = crf.best(given)
        assert own.tolist() == first
        assert crf.score(given, first) >= crf.score(given, second)
        every = [[n >> t & 1 for t in range(4)] for n in range(16)]
        ranked = sorted(every, key=lambda path: -crf.score(given[:4], path))
        assert crf.best(given[:4]) == ranked[:2]


def test_margins_of_names_whose_labels_differ() -> None:
    """The answer that float32 gives has a positive margin in it, and every answer one in its own scores."""
    state, names = tagger(), dksplit.joined_names(60)
    crf = dksplit.Crf(np.zeros(2), np.zeros((2, 2)), np.zeros(2))
    true = dksplit.answers(dksplit.loaded(dksplit.without_crf(state))[0], names, 64)
    draw = np.random.default_rng(1)
    ours, theirs = ([s + 0.1 * draw.standard_normal(s.shape).astype("f") for s in true] for _ in range(2))
    found = dksplit.explained(crf, names, ours, theirs, true)
    assert 0.09 < found["rms_error_of_scores"]["deployed"] < 0.11 and found["differ"]
    for row in found["differ"]:
        assert row["margin"]["deployed"] > 0 > row["margin"]["product"] and row["deployed"] != row["product"]
        sign = {"deployed": 1, "product": -1, "neither": 0}[row["float32"]]
        assert sign * row["margin"]["float32"] >= 0
    same = dksplit.explained(crf, names, true, true, true)
    assert not same["differ"] and same["equal_to_float32"] == {"deployed": 60, "product": 60}


def test_frames_of_sound() -> None:
    frames = silero.frames(np.arange(1.0, 601.0, dtype=np.float32))
    assert frames.shape == (2, 576) and not frames[0, :64].any() and frames[1, 0] == 512 - 63
    assert frames[1, 64] == 513 and not frames[1, 64 + 88 :].any()


@pytest.mark.parametrize("rate", [8000, 16000])
def test_recordings_are_sound_of_16_khz(tmp_path: Path, rate: int) -> None:
    for seconds in (0, 1):
        given = np.round(20000 * np.sin(2 * np.pi * 440 * np.arange(seconds * rate) / rate)).astype("<i2")
        with wave.open(str(tmp_path / f"{seconds}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(rate)
            file.writeframes(given.tobytes())
        sound = silero.recording(tmp_path / f"{seconds}.wav")
        expected = 20000 / 32768 * np.sin(2 * np.pi * 440 * np.arange(seconds * 16000) / 16000)
        assert sound.dtype == np.float32 and len(sound) == seconds * 16000
        assert np.abs(sound - expected).max(initial=0) < 1e-4
    assert products.recordings([tmp_path]) == [tmp_path / "0.wav", tmp_path / "1.wav"]


@pytest.mark.parametrize("form", silero.FORMS)
@torch.no_grad()
def test_from_an_lstm_to_streams(form: str) -> None:
    """compress, export_state, save, load, stream: each as a whole, frame by frame, and beside float32."""
    torch.manual_seed(0)
    model = silero.Decoder(40, 48).eval()
    features = [torch.randn(T, 40) for T in (7, 1, 30)]
    heard = [silero.Heard(x.numpy(), model(x[:, None]).flatten().numpy()) for x in features]
    deployed, size = silero.deployed(model, silero.FORMS[form])
    found = silero.compared(deployed, heard)
    assert found["frames"] == 38 and found["recordings"] == 3 and found["stream_is_batch"]
    assert found["largest_difference"] < (1e-6 if form == "float32" else 0.02)
    assert size == silero.deployed(model, silero.FORMS[form])[1]


def test_dksplit() -> None:
    rows = list(dksplit.rows(folder("dksplit"), 20))
    assert [row["form"] for row in rows] == list(dksplit.FORMS)
    for row in rows:
        assert row["equal_words"] >= 18 and row["same_bits_alone_and_in_batches"]
        assert dksplit.line(row)


@torch.no_grad()
def test_silero() -> None:
    path = folder("silero") / silero.ONNX
    sound = (0.1 * torch.randn(60 * 512)).numpy()
    model, heard = silero.decoder(path), silero.hear(path, [sound])
    y = model(torch.from_numpy(heard[0].features)[:, None])
    torch.testing.assert_close(y.flatten(), torch.from_numpy(heard[0].speech))
    for form in ("bfloat16", "mixed"):
        assert silero.compared(silero.deployed(model, silero.FORMS[form])[0], heard)["within_limits"]
