"""Published products as deployed models: what needs no product, and the products where they are installed."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import products
from fastseq import reference


def folder(name: str) -> Path:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnx", reason="onnx is not installed")
    try:
        return Path(str(importlib.metadata.distribution(name).locate_file(".")))
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{name} is not installed (pip install --no-deps {name})")


def test_names_and_words() -> None:
    names = products.joined_names(50)
    assert len(set(names)) == 50 and all(name.isalpha() and len(name) <= 64 for name in names)
    assert names == products.joined_names(50)
    index, lengths = products.dksplit_input(["ab0", "-"])
    assert index.T.tolist() == [[2, 3, 28], [1, 0, 0]] and lengths.tolist() == [3, 1]
    labels = np.array([[1, 0], [0, -1], [1, -1]])
    assert products.dksplit_words(["ab0", "-"], labels) == [["ab", "0"], ["-"]]


def test_integers_in_place_of_the_weights() -> None:
    weights = {f"lstm.weight_{key}_l0": torch.randn(16, n).numpy() for key, n in (("ih", 5), ("hh", 4))}
    layer = {"type": "lstm", "name": "lstm", "input_size": 5, "hidden_size": 4}
    model, x = {"layers": [layer], "tensors": weights}, torch.randn(6, 2, 5)
    y = reference.run_model([layer], weights, x)[0]
    for bits, group, most in ((8, None, 0.05), (8, 4, 0.05), (4, 4, 0.5)):
        small = products.int8_rows(model, bits, group)
        assert 0 < (reference.run_model(small["layers"], small["tensors"], x)[0] - y).abs().max() < most


def test_frames_of_sound() -> None:
    frames = products.silero_frames(torch.arange(1.0, 601.0))
    assert frames.shape == (2, 576) and not frames[0, :64].any() and frames[1, 0] == 512 - 63
    assert frames[1, 64] == 513 and not frames[1, 64 + 88 :].any()


def test_dksplit() -> None:
    found = products.check_dksplit(folder("dksplit"), 20)
    assert found["equal to exact=True"] >= 18


def test_silero() -> None:
    path = folder("silero-vad") / "silero_vad/data/silero_vad_16k_sequence.onnx"
    sound = 0.1 * torch.randn(20 * 512)
    model = products.silero_model(path)
    y, _ = reference.run_model(model["layers"], model["tensors"], products.silero_features(path, sound))
    theirs = products._onnx_outputs(path, [sound], "speech_probs")[0]
    torch.testing.assert_close(y.flatten(), theirs.flatten())
