"""Real weights: the voice activity detector Silero VAD (PyPI: silero-vad, MIT) with an LSTMCell in its decoder."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastseq
from fastseq.nn import LSTMCell
from tests.tolerance import assert_within_budget

FILE = "silero_vad/data/silero_vad_16k.safetensors"
SAMPLES, CONTEXT = 512, 64  # of 16 kHz sound per frame, and of the frame before it


class Detector(nn.Module):
    """The network of silero_vad/tinygrad_model.py: spectrum, four convolutions, one LSTMCell, one output."""

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, stride=128, bias=False)
        self.conv1 = nn.Conv1d(129, 128, 3, padding=1)
        self.conv2 = nn.Conv1d(128, 64, 3, stride=2, padding=1)
        self.conv3 = nn.Conv1d(64, 64, 3, stride=2, padding=1)
        self.conv4 = nn.Conv1d(64, 128, 3, padding=1)
        self.lstm_cell = nn.LSTMCell(128, 128)
        self.final_conv = nn.Conv1d(128, 1, 1)

    def encode(self, x: Tensor) -> Tensor:
        x = self.stft_conv(F.pad(x.unsqueeze(1), (0, 64), "reflect"))
        x = (x[:, :129] ** 2 + x[:, 129:] ** 2).sqrt()
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = conv(x).relu()
        return x.squeeze(-1)

    def decode(self, x: Tensor, state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        h, c = self.lstm_cell(x, state)
        return self.final_conv(h.unsqueeze(-1).relu()).sigmoid().squeeze(1).mean(1), (h, c)

    def forward(self, wave: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        wave = F.pad(wave, (CONTEXT, 0))
        state, speech = None, []
        for end in range(CONTEXT + SAMPLES, wave.shape[1] + 1, SAMPLES):
            p, state = self.decode(self.encode(wave[:, end - SAMPLES - CONTEXT : end]), state)
            speech.append(p)
        assert state is not None
        return torch.stack(speech, 1), *state


@pytest.fixture(scope="module")
def detector() -> Detector:
    try:
        distribution = importlib.metadata.distribution("silero-vad")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("silero-vad is not installed (pip install --no-deps silero-vad)")
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    model = Detector()
    model.load_state_dict(safetensors.load_file(str(distribution.locate_file(FILE))))
    return model.eval()


def sound(frames: int) -> Tensor:
    """Two rows that alternate between silence and a voiced sound: 120 Hz with formants, falling with their distance."""
    t = torch.arange(frames * SAMPLES) / 16000
    harmonics = torch.arange(1, 30)[:, None] * 120
    formants = torch.tensor([700.0, 1200.0, 2600.0])[:, None, None]
    strength = (1 / (1 + ((harmonics - formants) / 120) ** 2)).sum(0)
    voice = (strength * torch.sin(2 * torch.pi * harmonics * t)).sum(0)
    on = ((t * 3).long() % 2).float()
    rows = torch.stack((voice * on, voice * (1 - on)))
    return 0.3 * rows / rows.abs().max() + 1e-3 * torch.randn(rows.shape)


def test_the_network_is_the_one_that_was_trained(detector: Detector) -> None:
    """It tells the sound from silence; with a wrong gate order or encoder it would not."""
    with torch.no_grad():
        speech = detector(sound(60))[0]
        silence = detector(1e-3 * torch.randn(1, 60 * SAMPLES))[0]
    assert speech.max() > 0.5 and silence.max() < 0.3, (speech.max(), silence.max())


def test_replace_keeps_the_outputs(detector: Detector) -> None:
    parameters = {n: p for n, p in detector.named_parameters()}
    stock = Detector().eval()
    stock.load_state_dict(detector.state_dict())
    model = fastseq.replace(detector)
    assert model is detector and isinstance(model.lstm_cell, LSTMCell)
    assert [r.name for r in fastseq.replaced(model)] == ["lstm_cell"]
    assert all(p is parameters[n] for n, p in model.named_parameters())

    def reference(frames: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
        plain = Detector().to(frames.dtype)
        plain.load_state_dict(dict(zip(parameters, weights, strict=True)))
        return decoded(plain, frames)

    with torch.no_grad():
        frames = stock.encode(sound(60)[:, : 59 * SAMPLES].unfold(1, SAMPLES + CONTEXT, SAMPLES).reshape(-1, 576))
        frames = frames.view(2, -1, 128).transpose(0, 1)
        assert_within_budget("speech h c", decoded(model, frames), reference, [frames, list(parameters.values())])


def decoded(model: Detector, frames: Tensor) -> list[Tensor]:
    state, speech = None, []
    for frame in frames:
        p, state = model.decode(frame, state)
        speech.append(p)
    assert state is not None
    return [torch.stack(speech), *state]
