"""The lookup that screens in 8-bit integers: its index is the plain one's, also where its bound is hardest to keep."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops import vq_cases as cases
from tests.ops.vq_cases import KINDS, SCREEN_MOST_D, SCREEN_WINDOW, Case
from tests.tolerance import assert_same_bits

pytestmark = cases.needs_compiled()
NEVER, ALWAYS, AUTOMATIC = cases.SCREENS
PANEL = 16  # codes, at least; 32 where vectors are twice as wide


def lookup(x: Tensor, codebook: Tensor, mask: Tensor | None, dot: bool, screen: int) -> tuple[Tensor, ...]:
    return torch.ops.fastseq.vq_nearest(x, codebook, mask, dot, 1, 64, True, True, screen)


def check(case: Case, seed: int = 0) -> None:
    """See ``compare``, on random inputs."""
    compare(*cases.inputs(case, seed=seed), case.dot)


def compare(x: Tensor, codebook: Tensor, mask: Tensor | None = None, dot: bool = False, screen: int = ALWAYS) -> None:
    """The screen gives what the plain lookup gives, which other tests hold to the definition."""
    expected = lookup(x, codebook, mask, dot, NEVER)
    got = lookup(x, codebook, mask, dot, screen)
    assert_same_bits("index distance", got[:2], expected[:2])
    assert torch.equal(got[2], expected[2]), "score"  # not the same bits: a zero of either sign is the same score


def opened(x: Tensor, codebook: Tensor, dot: bool = False, threads: int = 1) -> tuple[int, int]:
    """Panels of codes beyond one per row that were scored in float32, and rows that had such."""
    core = cases.numpy_door()
    if core.isa() == "scalar":
        pytest.skip("scalar: has no products of bytes, so nothing is screened")
    return core.vq_screen_opened(x.numpy(), codebook.numpy(), dot, threads=threads)


drawn = cases.cases(st.integers(1, 90), st.integers(1, 200), st.integers(1, 200), st.integers(1, 2))


@settings(max_examples=400)
@given(case=drawn, threads=st.sampled_from([1, 2, 3]), seed=st.integers(0, 2**20))
def test_drawn(case: Case, threads: int, seed: int) -> None:
    torch.set_num_threads(threads)
    check(case, seed)


# Beyond a block of rows, the codes that meet it together, and the work of three threads.
wide = cases.cases(st.integers(130, 200), st.integers(260, 300), st.integers(45, 70))


@settings(max_examples=60)
@given(case=wide, threads=st.sampled_from([1, 2, 3]), seed=st.integers(0, 2**20))
def test_large(case: Case, threads: int, seed: int) -> None:
    torch.set_num_threads(threads)
    check(case, seed)


@pytest.mark.parametrize("dot", [False, True], ids=["l2", "dot"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_remainder_of_dimensions(kind: str, dot: bool) -> None:
    """Lengths of every remainder by 4, 16 and 32, and codes that leave places in their last panel or do not."""
    for D in range(1, 2 * SCREEN_WINDOW + 3):
        check(Case(19, (33, 48, 64, 97)[D % 4], D, kind=kind, dot=dot), seed=D)


@pytest.mark.parametrize("kind", ["normal", "mean", "extremes", "corners", "magnitudes"])
@pytest.mark.parametrize("D", [SCREEN_MOST_D - 1, SCREEN_MOST_D, SCREEN_MOST_D + 1])
def test_long_codes(D: int, kind: str) -> None:
    """Up to the longest that are screened, and those beyond, which are not."""
    check(Case(5, 19, D, kind=kind))


@pytest.mark.parametrize("D", [8, 15, 16, 31, 32, 33, 64, 100])
@pytest.mark.parametrize("dot", [False, True], ids=["l2", "dot"])
def test_sums_as_large_as_16_bits_hold(D: int, dot: bool) -> None:
    """Rows and codes of the largest numbers only, all of one sign, and of alternating sign in the pairs that are
    added first; the codes differ so little from one another that a wrong sum changes the index."""
    random = torch.Generator().manual_seed(D)
    pattern = torch.ones(4, D)
    pattern[1, 1::2] = pattern[2, 2::4] = pattern[2, 3::4] = pattern[3, D // 2 :] = -1
    size = 1 + torch.rand(2, 40, 1, generator=random) / 8
    for lines in pattern:
        codes = torch.cat((lines * size[0], -lines * size[1]))  # their mean is near zero: they keep all their bits
        x = torch.cat((lines * size[0, :9], -lines * size[1, :9], 3 * lines * size[0, :9]))
        for rows in (x, x * (1 + 1e-3 * torch.randn(x.shape, generator=random))):
            compare(rows[None], codes[None], dot=dot)


@pytest.mark.parametrize("dot", [False, True], ids=["l2", "dot"])
def test_near_ties_across_panels(dot: bool) -> None:
    """Each row lies between two codes of different panels, whose scores differ by some units in the last place."""
    D, pairs = 48, 40
    middle, apart = (cases.normals(1, pairs, D, seed=n) for n in (1, 2))
    middle = 5 * middle if dot else middle
    turned = apart - (apart * middle).sum(-1, keepdim=True) / middle.square().sum(-1, keepdim=True) * middle
    x = middle.clone()
    for scale in (1.0, 0.3, 1e-2, 1e-4, 1e-6):
        codebook = torch.cat((middle + scale * turned, middle - scale * turned), 1)
        compare(x, codebook, dot=dot)


def test_nothing_opens_where_codes_are_far_apart() -> None:
    codes = 100 * torch.eye(64)[None]
    assert opened(codes.clone(), codes) == (0, 0)


def test_one_panel_never_opens_another() -> None:
    for K in (1, 2, PANEL):
        x, codebook, _ = cases.inputs(Case(40, K, 40, kind="same"))
        assert opened(x, codebook) == (0, 0)


@pytest.mark.parametrize("threads", [1, 3])
def test_everything_opens_where_all_codes_are_equal(threads: int) -> None:
    x, codebook, _ = cases.inputs(Case(50, 320, 40, G=2, kind="same"))
    panels, rows = opened(x, codebook, threads=threads)
    assert rows == 100
    assert panels in (100 * (320 // PANEL - 1), 100 * (320 // (2 * PANEL) - 1))


@pytest.mark.parametrize("dot", [False, True], ids=["l2", "dot"])
def test_a_row_that_is_too_long_opens_everything(dot: bool) -> None:
    """The bound does not reach numbers whose squares are infinite; a row that is not finite has nothing to open."""
    x, codebook, _ = cases.inputs(Case(20, 64, 40))
    x[0, 3] *= 1e19
    x[0, 5, 2], x[0, 6, 2] = torch.nan, torch.inf
    rest, _ = opened(x[:, 7:].contiguous(), codebook, dot)
    panels, _ = opened(torch.cat((x[:, 3:4], x[:, 5:]), 1), codebook, dot)
    assert panels - rest in (64 // PANEL - 1, 64 // (2 * PANEL) - 1)
    assert_same_bits("index", lookup(x, codebook, None, dot, ALWAYS)[0], lookup(x, codebook, None, dot, NEVER)[0])


def test_the_bound_is_worth_having() -> None:
    """Of ordinary data most panels stay closed, and centring keeps it so where the mean is large."""
    for kind in ("normal", "mean", "clusters"):
        x, codebook, _ = cases.inputs(Case(200, 512, 64, kind=kind))
        panels, _ = opened(x, codebook)
        assert panels < 0.25 * 200 * (512 // PANEL)


def test_codes_that_are_not_finite_open_nothing() -> None:
    codes = torch.cat((100 * torch.eye(64), torch.full((64, 64), torch.nan), torch.full((32, 64), torch.inf)))[None]
    x = 100 * torch.eye(64)[None]
    assert opened(x, codes) == (0, 0)
    assert torch.equal(lookup(x, codes, None, False, ALWAYS)[0][0, :, 0], torch.arange(64))


def test_no_screen_where_there_is_none() -> None:
    core = cases.numpy_door()
    x, codebook, _ = cases.inputs(Case(3, 4, 5))
    wrong = [
        (x.double(), codebook.double()),
        tuple(t.expand(-1, -1, SCREEN_MOST_D + 5).contiguous() for t in (x[..., :1], codebook[..., :1])),
    ]
    if core.isa() == "scalar":
        wrong.append((x, codebook))
    for pair in wrong:
        with pytest.raises(ValueError, match="vq_screen_opened: there is no screen for this call"):
            core.vq_screen_opened(*cases.arrays(pair))


def test_automatic() -> None:
    """Of a size that is screened unasked: the same index, with and without a mask."""
    for masked in (False, True):
        x, codebook, mask = cases.inputs(Case(1100, 530, 33, kind="clusters", masked=masked))
        for threads in (1, 2):
            torch.set_num_threads(threads)
            compare(x, codebook, mask, screen=AUTOMATIC)


@pytest.mark.parametrize("threads", [1, 3])
def test_automatic_where_the_screen_pays_for_some_rows_only(threads: int) -> None:
    """Rows between all codes, for which it stops, then rows near one code, for which it begins again, and so on."""
    torch.set_num_threads(threads)
    codes = torch.nn.functional.normalize(cases.normals(1, 512, 32), dim=-1)
    near = codes[:, cases.places(1, 3000, 512, masked=False)[0]] + 0.01 * cases.normals(1, 3000, 32, seed=1)
    between = 1e-5 * cases.normals(1, 3000, 32, seed=2)
    between[0, ::100] = torch.nan
    compare(torch.cat((near[:, :500], between, near[:, 500:], between[:, :300]), 1), codes, screen=AUTOMATIC)
