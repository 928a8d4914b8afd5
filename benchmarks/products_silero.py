"""The LSTM of Silero VAD through ``compress``, ``export_state`` and ``fastseq.deploy``, beside the network itself."""

from __future__ import annotations

import copy
import tempfile
import time
import wave
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

import fastseq
from fastseq.convert import from_onnx
from fastseq.deploy import Model

ONNX = "silero_vad/data/silero_vad_16k_sequence.onnx"  # the .safetensors beside it is another training
INSIDE = "/Transpose_output_0"  # what the LSTM of the ONNX file takes
RATE, SAMPLES, CONTEXT = 16000, 512, 64  # of a frame, and of the frame before it
EQUAL, LARGEST = 0.995, 0.02  # what a deployed model must keep: share of the decisions, difference of any probability

# Integers round what they multiply to 8 bits too; f bears that best, and in the state's matrix o. MIXED is the least
# that kept LARGEST, of those tried among the 256 ways to give each gate of each matrix bfloat16 or int8, by rows and by
# 32, on asterisk-core-sounds in five languages (November 2026). asterisk-prompt-it-menardi-wav had no part in it.
_IH = {"i": "bfloat16", "f": "int8", "g": "bfloat16", "o": "bfloat16"}
MIXED = {"weights": {"weight_ih": _IH, "weight_hh": {**_IH, "o": "int8"}}, "group": 32}
FORMS: dict[str, dict[str, Any] | None] = {
    "float32": None,
    "bfloat16": {"weights": "bfloat16"},
    "mixed": MIXED,
    "int8 by 32": {"weights": "int8", "group": 32},
    "int8": {"weights": "int8"},
}


class Decoder(nn.Module):
    """Features of frames [T, B, 128] to the probability of speech [T, B, 1]."""

    ORDER = ("lstm", "relu", "head", "sigmoid")

    def __init__(self, input_size: int = 128, hidden_size: int = 128) -> None:
        super().__init__()
        self.lstm = nn.LSTM(input_size, hidden_size)
        self.head = nn.Linear(hidden_size, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.head(torch.relu(self.lstm(x)[0])))


def decoder(path: Path) -> Decoder:
    """With the weights of the package's ONNX file."""
    saved = {name: torch.tensor(v) for name, v in from_onnx(path, input=INSIDE)["tensors"].items()}
    found = Decoder()
    state = {name.replace("linear.", "head."): value for name, value in saved.items() if "bias_l0" not in name}
    bias = saved["lstm.bias_l0"]
    found.load_state_dict(state | {"lstm.bias_ih_l0": bias, "lstm.bias_hh_l0": torch.zeros_like(bias)})
    return found.eval()


def deployed(model: Decoder, form: dict[str, Any] | None) -> tuple[Model, int]:
    """Compressed, written, and read again; and the bytes of the file."""
    small = copy.deepcopy(model) if form is None else fastseq.compress(model, **form).model
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "silero.fastseq"
        fastseq.deploy.save(fastseq.export_state(small, order=Decoder.ORDER), path)
        return Model.load(str(path)), path.stat().st_size


def recording(path: Path) -> NDArray[np.float32]:
    """A WAV file as 16 kHz sound in -1 .. 1; 8 kHz doubled in its spectrum, with zeros above 4 kHz."""
    with wave.open(str(path)) as file:
        rate, channels, width = file.getframerate(), file.getnchannels(), file.getsampwidth()
        if (channels, width) != (1, 2) or rate not in (RATE // 2, RATE):
            raise ValueError(f"{path} is no recording of one channel, 16 bits, and 8 or 16 kHz")
        sound = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float64) / 32768
    if rate < RATE and len(sound):
        spectrum = np.fft.rfft(sound)
        sound = np.fft.irfft(np.pad(spectrum, (0, len(sound) // 2)), 2 * len(sound)) * 2
    return sound.astype(np.float32)


def frames(sound: NDArray[np.float32]) -> NDArray[np.float32]:
    """[T, 576]: each frame with the end of the one before; the last one is filled with zeros."""
    padded = F.pad(torch.from_numpy(sound), (CONTEXT, -len(sound) % SAMPLES))
    return padded.unfold(0, SAMPLES + CONTEXT, SAMPLES).numpy()


class Heard(NamedTuple):
    """One recording as the network sees it."""

    features: NDArray[np.float32]  # [T, 128]
    speech: NDArray[np.float32]  # [T], the network's own probabilities


def hear(path: Path, sounds: Sequence[NDArray[np.float32]]) -> list[Heard]:
    """By the package's ONNX file, each sound from a state of zeros."""
    import onnx
    import onnxruntime

    model, options = onnx.load(str(path)), onnxruntime.SessionOptions()
    model.graph.output.append(onnx.helper.make_tensor_value_info(INSIDE, onnx.TensorProto.FLOAT, None))
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    state = np.zeros((1, 1, 128), np.float32)
    feeds = ({"input": frames(sound), "h": state, "c": state} for sound in sounds)
    found = [session.run([INSIDE, "speech_probs"], feed) for feed in feeds]
    return [Heard(np.ascontiguousarray(features[:, 0]), speech.reshape(-1)) for features, speech in found]


def streamed(model: Model, heard: Sequence[Heard]) -> tuple[list[NDArray[np.float32]], float]:
    """Probabilities frame by frame, each recording a stream; and the seconds that took."""
    found, seconds = [], 0.0
    for features, _ in heard:
        stream, speech = model.stream(), np.empty(len(features), np.float32)
        begin = time.perf_counter()
        for t, x in enumerate(features):
            speech[t] = stream.step(x)[0]
        seconds += time.perf_counter() - begin
        found.append(speech)
    return found, seconds


def whole(model: Model, heard: Sequence[Heard], batch: int = 64) -> list[NDArray[np.float32]]:
    """Probabilities of many recordings in one call, those of like length together."""
    found = [np.empty(0, np.float32) for _ in heard]
    order = sorted(range(len(heard)), key=lambda n: len(heard[n].features))
    for first in range(0, len(order), batch):
        part = order[first : first + batch]
        lengths = np.array([len(heard[n].features) for n in part], np.int64)
        x = np.zeros((lengths.max(), len(part), heard[0].features.shape[1]), np.float32)
        for b, n in enumerate(part):
            x[: lengths[b], b] = heard[n].features
        y = model.run(x, lengths)[0]
        for b, n in enumerate(part):
            found[n] = y[: lengths[b], b, 0]
    return found


def compared(model: Model, heard: Sequence[Heard]) -> dict[str, Any]:
    """What the deployed model gives beside the network, whole and in streams."""
    alone, seconds = streamed(model, heard)
    same = all(np.array_equal(a, b) for a, b in zip(alone, whole(model, heard), strict=True))
    ours, theirs = np.concatenate(alone), np.concatenate([h.speech for h in heard])
    difference, equal = np.abs(ours - theirs), (ours > 0.5) == (theirs > 0.5)
    return {
        "recordings": len(heard),
        "frames": len(ours),
        "speech": int((theirs > 0.5).sum()),
        "decisions_that_differ": int((~equal).sum()),
        "equal": float(equal.mean()),
        "largest_difference": float(difference.max()),
        "mean_difference": float(difference.mean()),
        "beyond": int((difference > LARGEST).sum()),
        "within_limits": bool(equal.mean() >= EQUAL and difference.max() <= LARGEST),
        "stream_is_batch": same,
        "real_time_factor": seconds / (len(ours) * SAMPLES / RATE),  # of the LSTM and what follows, not of the encoder
    }


def rows(folder: Path, files: Sequence[Path], source: str | None) -> Iterator[dict[str, Any]]:
    sounds = [sound for sound in map(recording, files) if len(sound)]
    heard, model = hear(folder / ONNX, sounds), decoder(folder / ONNX)
    for name, form in FORMS.items():
        found, size = deployed(model, form)
        told = {"form": name, "options": form, "bytes": size, "source": source}
        yield told | {"seconds_of_sound": round(sum(map(len, sounds)) / RATE, 1)} | compared(found, heard)


def line(row: dict[str, Any]) -> str:
    return (
        f"{row['form']:10s}  {row['bytes']:7,} bytes, {row['frames']:,} frames: {row['equal']:.3%} equal, largest "
        f"difference {row['largest_difference']:.4f} ({row['beyond']} beyond {LARGEST}), "
        f"{'within' if row['within_limits'] else 'NOT within'} the limits; one stream: "
        f"{row['real_time_factor']:.6f} of real time, {'the bits' if row['stream_is_batch'] else 'NOT the bits'} of all"
    )
