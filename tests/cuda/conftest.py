from __future__ import annotations

from pathlib import Path

import pytest

from tests.cuda import library


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a fastseq with a library for CUDA; skips where there is no nvcc."""
    reason = library.why_no_nvcc()
    if reason is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("cuda")
    library.build(folder)
    return folder
