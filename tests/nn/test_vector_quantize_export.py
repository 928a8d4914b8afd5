"""``VectorQuantize`` in ``torch.compile``, ``torch.export``, ONNX and ``torch.func``."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastseq.nn.vector_quantize import VectorQuantize
from tests.tolerance import assert_same_bits, assert_within_budget

B, D, K = 2, 8, 16
SEPARATE: dict[str, Any] = {"heads": 2, "codebook_dim": 4, "separate_codebook_per_head": True}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "many": {
        "threshold_ema_dead_code": 2,
        "batch_norm": "codes",
        "affine_param": True,
        "kmeans_init": True,
        "index_dtype": torch.int32,
    },
}


def make(name: str, **options: Any) -> VectorQuantize:
    torch.manual_seed(0)
    vq = VectorQuantize(D, K, **OPTIONS.get(name, {}), **options)
    vq(torch.randn(B, 5, D))
    return vq


@pytest.mark.parametrize(("name", "training"), [*((name, True) for name in OPTIONS), ("plain", False)])
def test_compiles_to_one_graph_for_every_length(name: str, training: bool) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    vq, twin = make(name).train(training), make(name).train(training)
    compiled = torch.compile(twin, fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (7, 12, 30):
        ends = []
        x, mask = torch.randn(B, T, D), torch.rand(B, T) > 0.3
        for call in (vq, compiled):
            given = x.clone().requires_grad_()
            torch.manual_seed(1)
            quantized, index, loss = call(given, mask=mask)
            grads: list[Tensor] = []
            if training:
                (quantized.sin().sum() + loss).backward()
                assert given.grad is not None
                grads = [given.grad]
            module = vq if call is vq else twin
            ends.append([quantized, index, loss, *grads, *(v.clone() for v in module.state_dict().values())])
        for n, (want, got) in enumerate(zip(*ends, strict=True)):
            if want.is_floating_point():
                assert_within_budget(f"{name}{n}", got, lambda v: v, (want,))  # aot_eager: the same operators
            else:
                assert torch.equal(got, want), n
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


LAYOUTS: dict[str, tuple[dict[str, Any], tuple[int, ...], int]] = {  # options, sizes, the dynamic dimension
    "sequence": ({}, (B, 7, D), 1),
    "heads": ({**SEPARATE, "codebook_dim": 3}, (B, 7, D), 1),
    "shared heads": ({"heads": 2, "codebook_dim": 4}, (B, 7, D), 1),
    "cosine": ({"use_cosine_sim": True, "codebook_dim": 5}, (B, 7, D), 1),
    "norm": ({"batch_norm": "codes", "index_dtype": torch.int32}, (B, 7, D), 1),
    "channels first": ({"channel_last": False}, (B, D, 7), 2),
    "image": ({"accept_image_fmap": True}, (B, D, 7, 4), 2),
}


def longer(sizes: tuple[int, ...], along: int) -> Tensor:
    return torch.randn([23 if n == along else s for n, s in enumerate(sizes)])


@pytest.mark.parametrize(("layout", "strict"), [*((layout, False) for layout in LAYOUTS), ("sequence", True)])
def test_exports(layout: str, strict: bool) -> None:
    options, sizes, along = LAYOUTS[layout]
    vq = VectorQuantize(D, K, **options).eval()
    free = ({along: torch.export.Dim("T")},)
    program = torch.export.export(vq, (torch.randn(sizes),), dynamic_shapes=free, strict=strict)
    x = longer(sizes, along)
    assert_same_bits("quantized index loss", [*program.module()(x)], [*vq(x)])
    kept = io.BytesIO()
    torch.export.save(program, kept)
    kept.seek(0)
    assert_same_bits("quantized index loss", [*torch.export.load(kept).module()(x)], [*vq(x)])


def test_exports_with_a_mask_and_the_decoder() -> None:
    vq = VectorQuantize(D, K).eval()
    x, mask = torch.randn(B, 7, D), torch.rand(B, 7) > 0.5
    program = torch.export.export(vq, (x,), {"mask": mask})
    want = vq(x, mask=mask)
    assert_same_bits("quantized index loss", [*program.module()(x, mask=mask)], [*want])

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vq = vq

        def forward(self, index: Tensor) -> Tensor:
            return self.vq.get_output_from_indices(index)

    program = torch.export.export(Decoder(), (want[1],))
    assert_same_bits("output", program.module()(want[1]), want[0])


@pytest.mark.parametrize(
    ("layout", "dynamo"), [*((layout, False) for layout in LAYOUTS), ("heads", True), ("image", True)]
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_runs_in_onnxruntime(layout: str, dynamo: bool, tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="onnx is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    if dynamo:
        pytest.importorskip("onnxscript", reason="onnxscript is not installed, which torch.onnx needs for dynamo=True")
    options, sizes, along = LAYOUTS[layout]
    vq = VectorQuantize(D, K, **options).eval()
    path = tmp_path / "vq.onnx"
    free: dict[str, Any] = {"dynamic_axes": {"x": {along: "T"}}, "input_names": ["x"]}
    if dynamo:
        free = {"dynamic_shapes": ({along: torch.export.Dim("T")},)}
    torch.onnx.export(vq, (torch.randn(sizes),), path, dynamo=dynamo, verbose=False, **free)
    x = longer(sizes, along)
    session = runtime.InferenceSession(path)
    got = [torch.from_numpy(v) for v in session.run(None, {session.get_inputs()[0].name: x.numpy()})]
    want = vq(x)
    assert_same_bits("index", got[1], want[1])
    for name, g, w in (("quantized", got[0], want[0]), ("loss", got[2], want[2])):
        assert_within_budget(name, g, lambda v: v, (w,), 16)  # with a projection, sums of 8 in another order
    assert "fastseq" not in path.read_bytes().decode("latin1").replace("fastseq.nn", "").replace("fastseq/", "")


def test_functional_call_and_vmap() -> None:
    vq = VectorQuantize(D, K, learnable_codebook=True).eval()
    x = torch.randn(3, B, 5, D)
    each = torch.func.vmap(lambda row: vq(row)[0])(x)
    assert_same_bits("quantized", each, torch.stack([vq(row)[0] for row in x]))
    parameters = {k: v.detach() * 2 for k, v in vq.named_parameters()}
    grads = torch.func.grad(lambda p: torch.func.functional_call(vq, p, (x[0],))[0].sum())(parameters)
    counts = torch.bincount((torch.func.functional_call(vq, parameters, (x[0],))[1]).flatten(), minlength=K)
    assert_same_bits("dembed", grads["_codebook.embed"][0], counts[:, None].float().expand(K, D))
