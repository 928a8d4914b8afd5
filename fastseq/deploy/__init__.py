"""Models without torch: numpy in, numpy out, from one file::

    model = fastseq.deploy.Model.load("tagger.fastseq")
    y, state = model.run(x)                      # x [T, B, C] float32, or [T, B] int32 for characters and words
    stream = model.stream()                      # and then stream.step(x) for what comes piece by piece

Needs numpy to run, and safetensors to write. A ``Model`` never changes and may be used by several threads at once; a
``Stream`` holds the state of one client. All that runs here also runs from C: see ``include()`` and ``library()``.
"""

from __future__ import annotations

import os

from fastseq._core import FileError, Model, ModelError, Stream
from fastseq.deploy.ensemble import Ensemble, split_ensemble
from fastseq.deploy.file import description, read_state, save
from fastseq.deploy.inspection import contents

__all__ = [
    "Ensemble",
    "FileError",
    "Model",
    "ModelError",
    "Stream",
    "contents",
    "description",
    "include",
    "library",
    "read_state",
    "save",
    "split_ensemble",
]

_HERE = os.path.dirname(os.path.abspath(__file__))


def include() -> str:
    """The folder of ``fastseq.h``, for a C compiler's -I."""
    return os.path.join(_HERE, "include")


def library() -> str:
    """The folder of ``libfastseq.so``, for -L and -rpath.

    Raises:
        FileNotFoundError: where this build has none; it is built on Linux.
    """
    folder = os.path.dirname(_HERE)
    if not os.path.exists(os.path.join(folder, "libfastseq.so")):
        raise FileNotFoundError(f"fastseq.deploy: {folder} has no libfastseq.so; it is built on Linux")
    return folder
