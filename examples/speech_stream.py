"""A speech encoder with a residual quantizer: trained with torch, streamed by a process that has none.

Speech is spoken vowels, made here from pulses through two resonances; ``--wav`` takes a recording of 16 bits instead.

python examples/speech_stream.py [--quick] [--wav FILE]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import wave

import numpy as np

RATE, FRAME = 16_000, 320  # samples a second, and of a frame of 20 ms
FORMANTS = {"a": (730, 1090), "e": (530, 1840), "i": (270, 2290), "o": (570, 840), "u": (300, 870)}
BANDS = 40


def spoken(seconds: float, seed: int) -> np.ndarray:
    """A vowel every 200 ms, float32 in -1..1."""
    rng, pieces = np.random.default_rng(seed), []
    for _ in range(int(seconds / 0.2)):
        pulses = np.zeros(RATE // 5)
        pulses[:: rng.integers(80, 160)] = 1.0
        decay = np.arange(400) / RATE
        for resonance in FORMANTS[rng.choice(list(FORMANTS))]:
            pulses = np.convolve(pulses, np.exp(-300 * decay) * np.sin(2 * np.pi * resonance * decay))[: len(pulses)]
        pieces.append(pulses / np.abs(pulses).max())
    sound = np.concatenate(pieces)
    return (sound + 0.01 * rng.standard_normal(len(sound))).astype(np.float32)


def recorded(path: str) -> np.ndarray:
    with wave.open(path) as file:
        if file.getsampwidth() != 2:
            raise SystemExit(f"speech_stream: --wav must have 16 bits, got {8 * file.getsampwidth()}")
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        return samples.reshape(-1, file.getnchannels()).mean(1).astype(np.float32) / 32768


def features(sound: np.ndarray) -> np.ndarray:
    """Log energies [frames, BANDS] of frames of 20 ms."""
    frames = sound[: len(sound) // FRAME * FRAME].reshape(-1, FRAME) * np.hanning(FRAME)
    power = np.abs(np.fft.rfft(frames, axis=1)[:, 1:]) ** 2  # [frames, 160]
    return np.log(power.reshape(len(power), BANDS, -1).sum(-1) + 1e-4).astype(np.float32)


def train(x: np.ndarray, steps: int, path: str) -> None:
    import torch
    from torch import nn

    import fastseq

    torch.manual_seed(0)
    frames = torch.from_numpy(x)
    vq = fastseq.nn.ResidualVQ(dim=32, num_quantizers=4, codebook_size=64, decay=0.9, threshold_ema_dead_code=1)
    encoder = nn.ModuleDict({"lstm": fastseq.nn.LSTM(BANDS, 64), "project": nn.Linear(64, 32), "vq": vq})
    decoder = nn.ModuleDict({"lstm": fastseq.nn.LSTM(32, 64), "head": nn.Linear(64, BANDS)})
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=3e-3)
    for _ in range(steps):
        begin = torch.randint(len(frames) - 50, (16,))
        batch = torch.stack([frames[n : n + 50] for n in begin], 1)  # [50, 16, BANDS]
        z = encoder["project"](encoder["lstm"](batch)[0])
        quantized, _, losses = encoder["vq"](z)
        error = (decoder["head"](decoder["lstm"](quantized)[0]) - batch).square().mean()
        optimizer.zero_grad()
        (error + losses.sum()).backward()
        optimizer.step()
    print(f"error {error / frames.var():.1%} of the variance")
    encoder.eval()
    fastseq.deploy.save(fastseq.export_state(encoder, ["lstm", "project", "vq"]), path)


def stream(x: np.ndarray, path: str) -> None:
    """Frame by frame, as they would come from a microphone."""
    sys.modules["torch"] = None  # type: ignore[assignment]  # from here on an import of it fails
    from fastseq import deploy

    encoder = deploy.Model.load(path).stream()
    begin = time.perf_counter()
    codes = np.concatenate([encoder.step(frame).reshape(1, -1) for frame in x])  # [frames, 4 levels]
    spent = (time.perf_counter() - begin) / (len(x) * FRAME / RATE)
    bits = codes.shape[1] * 6 * RATE / FRAME
    print(f"{len(x)} frames without torch: {bits:.0f} bits a second, {spent:.2%} of real time; the first {codes[0]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--wav", help="a recording to train on and stream")
    parser.add_argument("--stream", metavar="MODEL", help="only stream, with this model")
    given = parser.parse_args()
    x = features(recorded(given.wav) if given.wav else spoken(20 if given.quick else 120, seed=0))
    x = (x - x.mean(0)) / (x.std(0) + 1e-3)
    if given.stream:
        return stream(x[:500], given.stream)
    train(x, 60 if given.quick else 1000, "speech.fastseq")
    subprocess.run([sys.executable, *sys.argv, "--stream", "speech.fastseq"], check=True)


if __name__ == "__main__":
    main()
