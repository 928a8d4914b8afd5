"""Two published products as deployed models, and the check that they still give the product's answers.

- DKSplit (PyPI: dksplit, by ABTdomain, https://abtdomain.com, CC BY 4.0) splits names like "openaikey" into words:
  lookup, three bidirectional LSTM layers of 8 bits, a linear layer, a CRF.
- Silero VAD (PyPI: silero-vad, MIT) tells speech from the rest: an LSTM cell and one output behind a small encoder.

    python -m benchmarks.products dksplit FOLDER          the folder that holds the package dksplit
    python -m benchmarks.products silero FOLDER WAV...    the folder that holds the package silero_vad, and recordings
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import wave
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from fastseq import reference
from fastseq.convert import from_checkpoint, from_onnx

Model = dict[str, Any]
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
LONGEST = 64  # what DKSplit reads of a name
SAMPLES, CONTEXT = 512, 64  # of 16 kHz sound in a frame of Silero VAD, and of the frame before it
INSIDE = "/Transpose_output_0"  # what the LSTM of its ONNX file takes


def dksplit_model(onnx_path: str | Path, npz_path: str | Path, dequantize: bool = False) -> Model:
    """Labels of letters, 1 where a word begins. dequantize: with the float32 values of the integers."""
    found = from_onnx(onnx_path, dequantize=dequantize)
    saved = np.load(npz_path)
    crf = {"transitions": "transitions", "start": "start_transitions", "end": "end_transitions"}
    tensors = {f"crf.{name}": saved[key].astype(np.float32) for name, key in crf.items()}
    layer = {"type": "crf", "name": "crf", "labels": len(tensors["crf.start"])}
    return {"layers": [*found["layers"], layer], "tensors": found["tensors"] | tensors}


def dksplit_input(names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Indices of letters [T, B], time-major, and the lengths [B]."""
    lengths = np.array([len(name) for name in names], np.int64)
    index = np.zeros((lengths.max(initial=0), len(names)), np.int64)
    for b, name in enumerate(names):
        index[: len(name), b] = [LETTERS.find(letter) + 2 for letter in name]  # 1: none of them
    return index, lengths


def dksplit_words(names: Sequence[str], labels: np.ndarray) -> list[list[str]]:
    """The words of each name from its labels [T, B]."""
    found = []
    for b, name in enumerate(names):
        starts = [0, *(t for t in range(1, len(name)) if labels[t, b] == 1)]
        found.append([name[a:z] for a, z in zip(starts, [*starts[1:], len(name)], strict=True)])
    return found


def joined_names(count: int, seed: int = 0) -> list[str]:
    """Names of two to four words of Python's own documentation, joined; 64 letters at most."""
    from pydoc_data import topics

    words = sorted(set(re.findall(r"[a-z]{3,12}", " ".join(topics.topics.values()).lower())))
    draw = random.Random(seed)
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(draw.choices(words, k=draw.randint(2, 4)))[:LONGEST]] = None
    return list(names)


def silero_model(path: str | Path) -> Model:
    """Features of frames [T, B, 128] to the probability of speech [T, B, 1].

    The package holds two trainings of one network: the one that it runs, from silero_vad_16k_sequence.onnx, and
    another in silero_vad_16k.safetensors.
    """
    if Path(path).suffix == ".onnx":
        return from_onnx(path, input=INSIDE)
    return from_checkpoint(path, order=["lstm_cell", "relu", "final_conv", "sigmoid"])


def silero_frames(sound: torch.Tensor) -> torch.Tensor:
    """[T, 576]: each frame with the end of the one before; the last one is filled with zeros."""
    return F.pad(sound, (CONTEXT, -len(sound) % SAMPLES)).unfold(0, SAMPLES + CONTEXT, SAMPLES)


def silero_features(path: str | Path, sound: torch.Tensor) -> torch.Tensor:
    """What the network's encoder gives its LSTM, [T, 1, 128], of 16 kHz sound [samples] in -1 .. 1.

    Of an ONNX file by ONNX Runtime; else a spectrum and four convolutions, as in silero_vad/tinygrad_model.py.
    """
    if Path(path).suffix == ".onnx":
        return _onnx_outputs(path, [sound], INSIDE)[0]
    from safetensors.torch import load_file

    weights = load_file(str(path))
    x = F.conv1d(F.pad(silero_frames(sound)[:, None], (0, 64), "reflect"), weights["stft_conv.weight"], stride=128)
    x = (x[:, :129].square() + x[:, 129:].square()).sqrt()
    for n, stride in enumerate((1, 2, 2, 1), 1):
        x = F.conv1d(x, weights[f"conv{n}.weight"], weights[f"conv{n}.bias"], stride, padding=1).relu()
    return x.permute(0, 2, 1).contiguous()


def _onnx_outputs(path: str | Path, sounds: Iterable[torch.Tensor], name: str) -> list[torch.Tensor]:
    """One tensor of the package's ONNX file for each sound, from a state of zeros, by ONNX Runtime."""
    import onnx
    import onnxruntime

    model, options = onnx.load(str(path)), onnxruntime.SessionOptions()
    if name not in [value.name for value in model.graph.output]:
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    state = np.zeros((1, 1, 128), np.float32)
    feeds = ({"input": silero_frames(sound).numpy(), "h": state, "c": state} for sound in sounds)
    return [torch.from_numpy(session.run([name], feed)[0]) for feed in feeds]


def int8_rows(model: Model, bits: int = 8, group: int | None = None) -> Model:
    """The matrices of its LSTMs as integers, with a scale for each row or each ``group`` of its columns."""
    layers = [layer | ({"group": group} if group and layer["type"] == "lstm" else {}) for layer in model["layers"]]
    tensors = dict(model["tensors"])
    for name, value in model["tensors"].items():
        if re.search(r"\.weight_[a-z]+_l\d+(_reverse)?$", name) and value.dtype == np.float32:
            integers, scale = reference.integer_rows(torch.from_numpy(value), bits, group)
            if bits == 4:
                even = F.pad(integers, (0, integers.shape[1] % 2)) + 8
                integers = (even[:, ::2] | even[:, 1::2] << 4).to(torch.uint8)
            tensors |= {name: integers.numpy(), f"{name}.scale": scale.numpy()}
    return {"layers": layers, "tensors": tensors}


def answers(model: Model, names: Sequence[str], batch: int = 1024) -> list[list[str]]:
    """The words of names by the definition of a deployed model; names of like length go together."""
    order = sorted(range(len(names)), key=lambda n: len(names[n]))
    found: list[list[str]] = [[] for _ in names]
    for first in range(0, len(names), batch):
        part = [names[n] for n in order[first : first + batch]]
        index, lengths = dksplit_input(part)
        labels, _ = reference.run_model(model["layers"], model["tensors"], index, lengths)
        for n, words in zip(order[first : first + batch], dksplit_words(part, labels.numpy()), strict=True):
            found[n] = words
    return found


def check_dksplit(folder: Path, count: int) -> dict[str, Any]:
    """How many names get the product's words, and what the float32 values of its weights give for the rest."""
    sys.path.insert(0, str(folder))
    import dksplit  # type: ignore[import-not-found]

    paths = (folder / "dksplit/models/dksplit-int8.onnx", folder / "dksplit/models/dksplit.npz")
    names = joined_names(count)
    splitter = dksplit.Splitter(num_threads=1)
    theirs, batched = (splitter.split_batch(names, exact=exact) for exact in (True, False))
    ours, floats = (answers(dksplit_model(*paths, dequantize=d), names) for d in (False, True))
    rows = list(zip(names, theirs, ours, floats, strict=True))
    differ = [row for row in rows if row[1] != row[2]]
    return {
        "names": count,
        "equal to exact=True": sum(row[1] == row[2] for row in rows),
        "exact=False equal to exact=True": sum(a == b for a, b in zip(theirs, batched, strict=True)),
        "equal to float32: product": sum(row[1] == row[3] for row in rows),
        "equal to float32: ours": sum(row[2] == row[3] for row in rows),
        "where they differ, equal to float32: product": sum(row[1] == row[3] for row in differ),
        "where they differ, equal to float32: ours": sum(row[2] == row[3] for row in differ),
        "first": [{"product": " ".join(a), "ours": " ".join(b), "float32": " ".join(c)} for _, a, b, c in differ[:12]],
    }


def recording(path: Path) -> torch.Tensor:
    """A WAV file of 8 or 16 kHz and 16 bits as 16 kHz sound in -1 .. 1."""
    with wave.open(str(path)) as file:
        rate, channels, width = file.getframerate(), file.getnchannels(), file.getsampwidth()
        if (channels, width) != (1, 2) or rate not in (8000, 16000):
            raise ValueError(f"{path} is no recording of one channel, 16 bits, and 8 or 16 kHz")
        sound = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float64) / 32768
    if rate == 8000:
        spectrum = np.fft.rfft(sound)
        sound = np.fft.irfft(np.pad(spectrum, (0, len(sound) // 2)), 2 * len(sound)) * 2
    return torch.from_numpy(sound.astype(np.float32))


def check_silero(folder: Path, files: Sequence[Path]) -> dict[str, Any]:
    """Probabilities of forms of the weights against float32, of both trainings, and of float32 against the product."""
    sounds = [recording(file) for file in files]
    paths = [folder / "silero_vad/data" / f"silero_vad_16k{end}" for end in ("_sequence.onnx", ".safetensors")]
    found: dict[str, Any] = {path.name: _check_forms(path, sounds) for path in paths}
    theirs = torch.cat(_onnx_outputs(paths[0], sounds, "speech_probs"))
    ours = found[paths[0].name].pop("probabilities")
    del found[paths[1].name]["probabilities"]
    return {
        "recordings": len(files),
        "product and float32, largest difference": float((theirs - ours).abs().max()),
    } | found


def _check_forms(path: Path, sounds: Sequence[torch.Tensor]) -> dict[str, Any]:
    features = [silero_features(path, sound)[:, 0] for sound in sounds]
    lengths, x = torch.tensor([len(x) for x in features]), torch.nn.utils.rnn.pad_sequence(features)

    def speech(model: Model) -> torch.Tensor:
        y, _ = reference.run_model(model["layers"], model["tensors"], x, lengths)
        return torch.cat([y[:length, b, 0] for b, length in enumerate(lengths.tolist())])

    whole = silero_model(path)
    true = speech(whole)
    found: dict[str, Any] = {"frames": len(true), "speech": int((true > 0.5).sum()), "probabilities": true}
    forms = {"int8": int8_rows(whole), "int8 by 32": int8_rows(whole, 8, 32), "int4 by 32": int8_rows(whole, 4, 32)}
    for form, model in forms.items():
        given = speech(model)
        difference = (given - true).abs()
        found[form] = {
            "equal decisions": f"{int(((given > 0.5) == (true > 0.5)).sum())} of {len(true)}",
            "largest difference": float(difference.max()),
            "beyond 0.02": int((difference > 0.02).sum()),
            "mean difference": float(difference.mean()),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("product", choices=("dksplit", "silero"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("recordings", type=Path, nargs="*")
    parser.add_argument("--names", type=int, default=2000)
    given = parser.parse_args()
    if given.product == "dksplit":
        found = check_dksplit(given.folder, given.names)
    else:
        found = check_silero(given.folder, sorted(given.recordings))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
