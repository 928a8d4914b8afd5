"""Whole models: torch's results, whole and in pieces, alone and with others, in Python and in C."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fastseq import deploy
from tests.deploy import models
from tests.tolerance import assert_within_budget

COMPILER = shutil.which(os.environ.get("CC", "gcc"))


@pytest.fixture
def tagger(tmp_path: Path) -> tuple[deploy.Model, nn.ModuleList]:
    state, modules = models.tagger()
    deploy.save(state, tmp_path / "tagger.fastseq")
    return deploy.Model.load(str(tmp_path / "tagger.fastseq")), modules


def text(T: int, B: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 30, (T, B)).astype(np.int32)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_tagger(tagger: tuple[deploy.Model, nn.ModuleList], threads: int) -> None:
    model, modules = tagger
    x = text(25, 3)
    y, state = model.run(x, threads=threads)
    assert y.shape == (13, 3, 7) and state.shape == (3, model.state_size)

    def plain(weight: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(models.tagged(modules.to(weight.dtype), x))

    assert_within_budget("y", torch.from_numpy(y), plain, (torch.zeros(1),))


@pytest.mark.parametrize("bits", [32, 8, 4])
def test_in_pieces(tagger: tuple[deploy.Model, nn.ModuleList], tmp_path: Path, bits: int) -> None:
    """Chunks, streams, and many streams at once give the bits of the whole, whoever else is in the batch."""
    state, _ = models.tagger()
    if bits < 32:
        state = models.quantized(state, bits, 8 if bits == 4 else None)
    deploy.save(state, tmp_path / "m")
    model = deploy.Model.load(str(tmp_path / "m"))
    x = text(25, 3)
    y, last = model.run(x)
    carried, parts = None, []
    for begin, end in ((0, 1), (1, 2), (2, 9), (9, 9), (9, 25)):
        part, carried = model.run(x[begin:end], state=carried)
        parts.append(part)
    np.testing.assert_array_equal(np.concatenate(parts), y)
    np.testing.assert_array_equal(carried, last)
    for b in range(3):
        stream = model.stream()
        alone = np.concatenate([stream.step(x[t : t + 1, b]) for t in range(25)])
        np.testing.assert_array_equal(alone, y[:, b])
        np.testing.assert_array_equal(stream.save(), last[b])
    streams = [model.stream() for _ in range(3)]
    together = np.concatenate([model.step_batch(streams, x[t : t + 1], threads=2) for t in range(25)])
    np.testing.assert_array_equal(together, y)


def test_an_ensemble_in_pieces(tmp_path: Path) -> None:
    """Each step and each row alone give the bits of the whole."""
    torch.manual_seed(3)
    parts = models.lstm(nn.LSTM(5, 9)), models.linear(nn.Linear(9, 12)), models.plain("ensemble", members=3)
    deploy.save(models.chain(*parts), tmp_path / "m")
    model = deploy.Model.load(str(tmp_path / "m"))
    x = torch.randn(11, 3, 5).numpy() * 8
    y, _ = model.run(x, threads=2)
    assert 0 < deploy.split_ensemble(y).disagreement.mean() < 1
    streams = [model.stream() for _ in range(3)]
    np.testing.assert_array_equal(np.concatenate([model.step_batch(streams, x[t : t + 1]) for t in range(11)]), y)
    for b in range(3):
        stream = model.stream()
        np.testing.assert_array_equal(np.concatenate([stream.step(x[t : t + 1, b]) for t in range(11)]), y[:, b])
        short, _ = model.run(x, lengths=np.array([11, 4, 0]))
        length = (11, 4, 0)[b]
        np.testing.assert_array_equal(short[:length, b], y[:length, b])
        assert not short[length:, b].any()


def test_states_are_saved_and_restored(tagger: tuple[deploy.Model, nn.ModuleList]) -> None:
    model, _ = tagger
    x = text(20, 1)[:, 0]
    first, second = model.stream(), model.stream()
    first.step(x[:11])
    second.load(first.save())
    np.testing.assert_array_equal(first.step(x[11:]), second.step(x[11:]))
    first.reset()
    np.testing.assert_array_equal(first.step(x), model.run(x[:, None])[0][:, 0])
    with pytest.raises(deploy.ModelError, match=r"a state must be finite, got nan at 0"):
        second.load(np.full(model.state_size, np.nan, np.float32))


def test_lengths(tagger: tuple[deploy.Model, nn.ModuleList]) -> None:
    model, _ = tagger
    x = text(25, 3)
    y, _ = model.run(x, lengths=np.array([25, 11, 0]))
    for b, (length, results) in enumerate(((25, 13), (11, 6), (0, 0))):
        np.testing.assert_array_equal(y[:results, b], model.run(x[:length, b : b + 1])[0][:, 0])
        assert not y[results:, b].any()
    with pytest.raises(deploy.ModelError, match=r"lengths must lie in 0 .. T = 25, got lengths\[1\] = 26"):
        model.run(x, lengths=np.array([25, 26, 0]))


@pytest.mark.parametrize("P", [0, 6])
@pytest.mark.parametrize("threads", [1, 2])
def test_two_directions(tmp_path: Path, P: int, threads: int) -> None:
    torch.manual_seed(0)
    module = nn.LSTM(5, 16, 2, bidirectional=True, proj_size=P)
    deploy.save(models.lstm(module), tmp_path / "m")
    model = deploy.Model.load(str(tmp_path / "m"))
    x, lengths = torch.randn(9, 4, 5), [9, 4, 2, 1]

    def plain(x: torch.Tensor) -> torch.Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths)
        return nn.utils.rnn.pad_packed_sequence(module.to(x.dtype)(packed)[0])[0].detach()

    y, state = model.run(x.numpy(), lengths=np.array(lengths), threads=threads)
    assert state is None
    assert_within_budget("y", torch.from_numpy(y), plain, (x,))
    for call in (model.stream, lambda: model.run(x.numpy(), state=np.zeros((4, model.state_size), np.float32))):
        with pytest.raises(deploy.ModelError, match=r"cannot run piece by piece: layer 'lstm': its reverse direction"):
            call()


def test_several_threads_share_a_model(tagger: tuple[deploy.Model, nn.ModuleList]) -> None:
    model, _ = tagger
    x = text(200, 4)
    expected, failures = model.run(x)[0], []

    def work() -> None:
        for _ in range(10):
            if not np.array_equal(model.run(x)[0], expected):
                failures.append("other results")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_without_torch(tagger: tuple[deploy.Model, nn.ModuleList], tmp_path: Path) -> None:
    x = text(12, 2)
    np.save(tmp_path / "x.npy", x)
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import numpy, fastseq.deploy as deploy\n"
        "y, _ = deploy.Model.load('tagger.fastseq').run(numpy.load('x.npy'))\n"
        "numpy.save('y.npy', y)"
    )
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=tmp_path)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), tagger[0].run(x)[0])


@pytest.mark.skipif(COMPILER is None, reason="no C compiler")
def test_from_c(tagger: tuple[deploy.Model, nn.ModuleList], tmp_path: Path) -> None:
    """The example in C, and its results beside those of Python."""
    source, program = Path(__file__).with_name("stream.c"), tmp_path / "stream"
    flags = ["-std=c99", "-Wall", "-Wextra", "-Werror", f"-I{deploy.include()}", f"-L{deploy.library()}"]
    link = ["-lfastseq", f"-Wl,-rpath,{deploy.library()}"]
    subprocess.run([str(COMPILER), *flags, str(source), "-o", str(program), *link], check=True)
    x = text(25, 1)[:, 0]
    command = [str(program), str(tmp_path / "tagger.fastseq")]
    done = subprocess.run(command, input=" ".join(map(str, x)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    got = np.array([[float(v) for v in line.split()] for line in done.stdout.splitlines()], np.float32)
    np.testing.assert_array_equal(got, tagger[0].run(x[:, None])[0][:, 0])
    done = subprocess.run([str(program), str(tmp_path / "none")], capture_output=True, text=True)
    assert done.returncode == 1 and "cannot open it" in done.stderr
