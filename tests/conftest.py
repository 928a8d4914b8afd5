"""What every test shares: memory that is NaN until written, seeds, thread counts, devices and hypothesis profiles."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests import interpreter

    interpreter.patch()

os.environ["FASTSEQ_POISON"] = "1"  # scratch of the compiled core is NaN at the start of every call
# Every fresh allocation of torch is NaN, also those that compiled operators make: what is not written shows.
torch.use_deterministic_algorithms(True)

settings.register_profile(
    "ci",
    derandomize=True,  # the same draws in every run, so a red run can be repeated
    deadline=None,
    database=None,
    max_examples=200,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)
settings.register_profile("explore", parent=settings.get_profile("ci"), derandomize=False, max_examples=2000)
settings.register_profile("interpreted", parent=settings.get_profile("ci"), max_examples=12)  # a kernel takes seconds
# a set that was asked for runs the code of the native one, which has all draws
settings.register_profile("other set", parent=settings.get_profile("ci"), max_examples=50)
OTHER = "other set" if os.environ.get("FASTSEQ_ISA") else "ci"
settings.load_profile("interpreted" if os.environ.get("TRITON_INTERPRET") == "1" else OTHER)

DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "sanitizer: builds the core with sanitizers and drives it, about a minute")


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Every device of this machine."""
    return str(request.param)


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """The same random state and thread count at the start of every test."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
