"""Layers of vector quantization as providers: an evaluation, or a training step with its moving averages."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import CannotRun
from benchmarks.vq_case import WIDTH, Case, Provider, Work, inputs
from benchmarks.vq_gate import DECAY
from benchmarks.vq_plain import PlainVQ

Layer = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]  # x [1, N, width] to quantized, index, loss
# that vector-quantize-pytorch needs at once, per row and code: 16.5 and 24.5 for N4096_K512_D64, and some air
BYTES_PER_PAIR = {"eval": 20, "train": 28}


def _work(
    case: Case, layer: Layer, module: nn.Module, state: Callable[[], dict[str, Tensor]], device: str = "cpu"
) -> Work:
    """Training step or evaluation of ``layer``, which is ``module`` or calls it."""
    given = inputs(case)
    module.train(case.trains).to(device)
    x = given.x[None].to(device, copy=True).requires_grad_(case.trains)
    dy = given.dy[None].to(device)
    weights = dict(module.named_parameters())
    start = copy.deepcopy(module.state_dict())

    def train() -> tuple[Tensor, Tensor, Tensor]:
        for leaf in (x, *weights.values()):
            leaf.grad = None
        quantized, index, loss = layer(x)
        torch.autograd.backward((quantized, loss), (dy, torch.ones_like(loss)))
        return quantized, index, loss

    def evaluate() -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            return layer(x)

    run = train if case.trains else evaluate

    def outputs() -> dict[str, Tensor]:
        module.load_state_dict(start)
        quantized, index, loss = run()
        found = {"index": index.reshape(case.N, case.M), "quantized": quantized[0]}
        if case.trains:
            found |= {"loss": loss.reshape(case.M), "dx": x.grad[0], **state()}
            for name, weight in weights.items():  # project_in.weight is dweight_in
                end, _, kind = name.removeprefix("project_").partition(".")
                found[f"d{kind}_{end}"] = weight.grad
        return {name: value.detach().to("cpu", copy=True) for name, value in found.items()}

    return Work(run, outputs)


def _plain(case: Case, provider: Provider, threads: int) -> Work:
    module = PlainVQ(inputs(case).codebooks[0], DECAY, provider.rotation)
    return _work(case, module, module, functools.partial(_plain_state, module), provider.device)


def _plain_state(module: PlainVQ) -> dict[str, Tensor]:
    return {"cluster_size": module.cluster_size[None], "codebook": module.codebook[None]}


def _compile(case: Case, provider: Provider, threads: int) -> Work:
    import torch._inductor.config as inductor

    inductor.compile_threads = 1
    _forget_compiled(case)
    module = PlainVQ(inputs(case).codebooks[0], DECAY, provider.rotation)
    layer = torch.compile(module, fullgraph=True, dynamic=False)
    return _work(case, layer, module, functools.partial(_plain_state, module), provider.device)


@functools.lru_cache(maxsize=1)
def _forget_compiled(case: Case) -> None:
    """What was compiled for other cases: each call looks through all of it, and there may not be much of it."""
    torch.compiler.reset()


def _vector_quantize_pytorch(case: Case, provider: Provider, threads: int) -> Work:
    import vector_quantize_pytorch as theirs

    needed, there = BYTES_PER_PAIR[case.mode] * case.N * case.K, _available(provider.device)
    if there is not None and needed > there:
        raise CannotRun(f"needs about {needed / 1e9:.0f} GB of memory, {there / 1e9:.0f} GB are available")
    return _drop_in(case, provider, theirs.ResidualVQ if case.M > 1 else theirs.VectorQuantize)


def _fastseq(case: Case, provider: Provider, threads: int) -> Work:
    import fastseq.nn

    return _drop_in(case, provider, fastseq.nn.ResidualVQ if case.M > 1 else fastseq.nn.VectorQuantize)


def _drop_in(case: Case, provider: Provider, layer_class: Any) -> Work:
    """Of a class with the arguments and the state of vector-quantize-pytorch."""
    given = inputs(case)
    options = {"codebook_size": case.K, "decay": DECAY, "commitment_weight": 1.0, "rotation_trick": provider.rotation}
    if case.M > 1:
        options |= {"dim": WIDTH, "codebook_dim": case.D, "num_quantizers": case.M}
    module = layer_class(**{"dim": case.D, **options})
    codebooks = [layer._codebook for layer in (module.layers if case.M > 1 else [module])]
    with torch.no_grad():
        for codebook, codes in zip(codebooks, given.codebooks, strict=True):
            codebook.embed.copy_(codes[None])
            codebook.embed_avg.copy_(codes[None])
    if given.project:
        for layer, other in zip((module.project_in, module.project_out), given.project, strict=True):
            layer.load_state_dict(other.state_dict())

    def state() -> dict[str, Tensor]:
        return {
            "cluster_size": torch.cat([codebook.cluster_size for codebook in codebooks]),
            "codebook": torch.cat([codebook.embed for codebook in codebooks]),
        }

    return _work(case, module, module, state, provider.device)


def _available(device: str) -> int | None:
    """Bytes of memory that can be had, where the system (Linux) says so."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


PROVIDERS: dict[str, Callable[[Case, Provider, int], Work]] = {
    "fastseq": _fastseq,
    "vector-quantize-pytorch": _vector_quantize_pytorch,
    "plain": _plain,
    "compile": _compile,
}
