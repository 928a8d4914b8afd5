"""``load_codebooks``: the codebooks of other libraries' checkpoints as modules of ours.

Which names mean what is written down in ``_KEYS``; what the layouts have in common is that every library looks up the
nearest code. Checkpoints are mappings of names to tensors, or safetensors files; nothing is unpickled.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastseq._check import ArgumentError, fail
from fastseq.nn.factorized_residual_vq import FactorizedResidualVQ
from fastseq.nn.residual_vq import ResidualVQ
from fastseq.nn.split_residual_vq import SplitResidualVQ, projected
from fastseq.nn.vector_quantize import VectorQuantize
from fastseq.nn.vq_distsup import MARK, bottleneck

_NAME = "load_codebooks"
_LEAST_USAGE = 1e-5  # what Mimi divides a sum of rows by at least
_AVERAGES = {  # names in EnCodec and SpeechTokenizer, in moshi, in transformers -> what they hold
    "inited": "initted",
    "_initialized": "initted",
    "initialized": "initted",
    "cluster_size": "cluster_size",
    "cluster_usage": "cluster_size",
    "embed_avg": "embed_avg",
    "embedding_sum": "embed_avg",
    "embed_sum": "embed_avg",
    "embed": "embed",
}
_KEYS = {  # names end like this; groups: what stands in front of all levels, the level, what of it
    "averages": rf"(.*?)layers\.(\d+)\.(?:_codebook|codebook)\.({'|'.join(_AVERAGES)})",
    "dac": r"(.*?)quantizers\.(\d+)\.((?:codebook|in_proj|out_proj)\..+)",
    "taming": r"((?:|.*\.)quantize\.|)()(embedding\.weight)",
    "vqtorch": r"((?:|.*\.))()(codebook\.weight)",
    "distsup": rf"((?:|.*\.))()({MARK})",
}
_SPLIT = (  # ends of the two fronts of Mimi: in moshi, in transformers
    ("rvq_first.vq.", "rvq_rest.vq."),
    ("semantic_residual_vector_quantizer.", "acoustic_residual_vector_quantizer."),
)
KINDS = ("encodec", "speechtokenizer", "mimi", "dac", "taming", "vqtorch", "distsup")
_SAME = {"encodec": "speechtokenizer"}


class _Part(NamedTuple):
    """Levels at one place of a checkpoint."""

    front: str  # what their names begin with
    levels: dict[int, dict[str, str]]  # level -> what of it -> name


def load_codebooks(
    source: Mapping[str, Tensor] | str | os.PathLike[str],
    prefix: str = "",
    kind: str | None = None,
    *,
    affine_lr: float | None = None,
    **options: Any,
) -> nn.Module:
    """A quantizer with the codebooks of a checkpoint, which finds the codes that its own library finds.

    Layouts, and what comes back (rows are [B, N, dim], channels last, unless said otherwise):

    - "encodec": EnCodec, and Meta's and transformers' variants; "speechtokenizer" has the same names. ``ResidualVQ``.
    - "mimi": moshi's and transformers' Mimi, two residual quantizers side by side. ``SplitResidualVQ``. With the prefix
      of one of the two: ``ResidualVQ``, as "encodec".
    - "dac": the Descript audio codec, as published and as in transformers. ``FactorizedResidualVQ``; its weight norm
      is multiplied out.
    - "taming": the VQGAN of taming-transformers. ``VectorQuantize`` of image maps [B, dim, H, W].
    - "vqtorch": its ``VectorQuant`` without norms; an affine transform is multiplied out. ``VectorQuantize``.
    - "distsup": DistSup, the code of Lancucki et al. (2020), with batch norm and projection: ``nn.Sequential`` that
      ends in a ``VectorQuantize``; without projection, and with its many codebooks (image maps, a head for each), a
      ``VectorQuantize``.

    Args:
        source: names and tensors of a whole model or of its quantizer, or the path of a safetensors file.
        prefix: only names that begin with it count, without it.
        kind: one of ``KINDS``; None: whichever is recognized.
        affine_lr: what vqtorch's layer was made with, which its checkpoints do not say; needed for
            ``affine_transform.scale`` alone.
        options: of the class that is made. Gradients go straight through the lookup unless these say otherwise.

    Returns:
        The module, in evaluation mode, float32, on the CPU.

    Raises:
        ArgumentError: nothing or several things were recognized, or names or numbers are missing or wrong.
        TypeError: a value is no tensor.
    """
    if kind is not None and kind not in KINDS:
        fail(_NAME, "kind", "None or one of " + ", ".join(repr(k) for k in KINDS), repr(kind))
    checkpoint = _Checkpoint(source, prefix)
    found = _recognized(checkpoint.names)
    wanted = {key: parts for key, parts in found.items() if kind in (None, key[0], _SAME.get(key[0]))}
    if len(wanted) != 1:
        _tell(kind, prefix, checkpoint.names, [*(wanted or found)])
    (((chosen, _), parts),) = wanted.items()
    if affine_lr is not None and chosen != "vqtorch":
        fail(_NAME, "affine_lr", f"None for {chosen}", affine_lr)
    given = {"affine_lr": affine_lr, **options} if chosen == "vqtorch" else options
    with torch.no_grad():
        return _MAKE[chosen](checkpoint, *parts, **given).eval()


def _tell(kind: str | None, prefix: str, names: list[str], found: list[tuple[str, str]]) -> None:
    """Raise, saying what was found instead of one thing."""
    expected = f"a checkpoint with {kind or 'known'} codebooks at one place"
    if found:
        seen = ", ".join(f"{k} at {prefix + front!r}" for k, front in sorted(found))
        fail(_NAME, "source", expected, f"{seen}: choose by kind and prefix")
    some = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    fail(_NAME, "source", expected, f"{len(names)} names with prefix {prefix!r}: {some}" if names else "no names")


class _Checkpoint:
    """Names behind a prefix, and their tensors."""

    def __init__(self, source: Any, prefix: str) -> None:
        self.prefix = prefix
        if isinstance(source, Mapping):
            self._read: Callable[[str], Any] = source.__getitem__
            names = [str(name) for name in source]
        elif isinstance(source, (str, os.PathLike)) and os.fspath(source).endswith(".safetensors"):
            names = self._open(os.fspath(source))
        else:
            got = os.fspath(source) if isinstance(source, (str, os.PathLike)) else type(source).__name__
            expected = "a mapping of names to tensors or the path of a .safetensors file (pickles are not opened: "
            fail(_NAME, "source", expected + "give torch.load(path, weights_only=True))", got)
        self.names = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]

    def _open(self, path: str) -> list[str]:
        from safetensors import SafetensorError, safe_open

        try:
            file = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ArgumentError(f"{_NAME}: {path} is no whole safetensors file ({error})") from error
        self._read = file.get_tensor
        return list(file.keys())  # type: ignore[no-untyped-call]

    def tensor(self, name: str, *sizes: int | None) -> Tensor:
        """A tensor as float32 on the CPU, with these sizes; None stands for any."""
        value = self._read(self.prefix + name)
        if not isinstance(value, Tensor):
            raise TypeError(f"{_NAME}: {self.prefix}{name} should be a tensor, got: {type(value).__name__}")
        right = value.dim() == len(sizes) and all(s in (None, v) for s, v in zip(sizes, value.shape, strict=True))
        flag = value.dtype == torch.bool and sizes == (1,)
        if not right or not (value.is_floating_point() or flag):
            shown = ", ".join("any" if s is None else str(s) for s in sizes)
            fail(_NAME, self.prefix + name, f"[{shown}] of floating point", f"{list(value.shape)} of {value.dtype}")
        value = value.detach().to("cpu", torch.float32)
        if not value.isfinite().all():
            fail(_NAME, self.prefix + name, "finite", "NaN or infinite values")
        return value


def _recognized(names: list[str]) -> dict[tuple[str, str], list[_Part]]:
    """(kind, front) -> parts: two for Mimi, whose front is what stands before both, else one."""
    found: dict[str, dict[str, _Part]] = {}
    for name in names:
        for kind, pattern in _KEYS.items():
            match = re.fullmatch(pattern, name)
            if match is not None:
                part = found.setdefault(kind, {}).setdefault(match[1], _Part(match[1], {}))
                part.levels.setdefault(int(match[2] or 0), {})[_AVERAGES.get(match[3], match[3])] = name
                break
    for front in found.get("distsup", {}):
        found.get("taming", {}).pop(front, None)  # its codes are called alike
    averages = found.pop("averages", {})
    parts = {(kind, front): [part] for kind, fronts in found.items() for front, part in fronts.items()}
    for first, second in _SPLIT:
        for front in [f for f in averages if f.endswith(first)]:
            before = front.removesuffix(first)
            if before + second in averages:
                parts["mimi", before] = [averages.pop(front), averages.pop(before + second)]
    return parts | {("encodec", front): [part] for front, part in averages.items()}


def _in_order(checkpoint: _Checkpoint, part: _Part, required: tuple[str, ...]) -> list[dict[str, str]]:
    """The levels from 0 on; none may be missing, nor anything of one that is required."""
    M = max(part.levels) + 1
    for number in range(M):
        level = part.levels.get(number, {})
        for what in required:
            if what not in level:
                there = ", ".join(level.values()) or "nothing"
                message = f"{checkpoint.prefix}{part.front}: level {number} of {M} has no {what} (there is {there})"
                raise ArgumentError(f"{_NAME}: {message}")
    return [part.levels[number] for number in range(M)]


class _Averages(NamedTuple):
    """One level of EnCodec or Mimi."""

    embed: Tensor  # [K, D]
    cluster_size: Tensor  # [K]
    embed_avg: Tensor  # [K, D]


def _averages(checkpoint: _Checkpoint, part: _Part, derived: bool) -> list[_Averages]:
    """The levels; codes that were not stored are computed from sums and counts where they are so by definition."""
    required = ("cluster_size", "embed_avg") if derived else ("cluster_size", "embed_avg", "embed")
    levels = []
    D: int | None = None
    for number, names in enumerate(_in_order(checkpoint, part, required)):
        for other in ("project_in", "project_out"):
            if f"{part.front}layers.{number}.{other}.weight" in checkpoint.names:
                expected = "without projections inside a level"
                fail(_NAME, "source", expected, f"{checkpoint.prefix}{part.front}layers.{number}.{other}.weight")
        if "initted" in names and not checkpoint.tensor(names["initted"], 1).all():
            raise ArgumentError(f"{_NAME}: {checkpoint.prefix}{names['initted']} says that it holds no codes yet")
        total = checkpoint.tensor(names["embed_avg"], None, D)
        K, D = total.shape
        counts = checkpoint.tensor(names["cluster_size"], K)
        if "embed" in names:
            embed = checkpoint.tensor(names["embed"], K, D)
        else:
            embed = total / counts.clamp_min(_LEAST_USAGE)[:, None]
        levels.append(_Averages(embed, counts, total))
    return levels


def _fill(rvq: ResidualVQ, levels: list[_Averages]) -> None:
    layer: Any
    for layer, level in zip(rvq.layers, levels, strict=True):
        layer._codebook.set_codes(level.embed[None], level.cluster_size[None])
        layer._codebook.embed_avg.copy_(level.embed_avg[None])


def _projections(checkpoint: _Checkpoint, part: _Part, D: int) -> tuple[Tensor, Tensor] | None:
    """Those before and after all levels of Mimi, 1x1 convolutions without bias: [D, dim] and [dim, D]."""
    before, after = (f"{part.front.removesuffix('vq.')}{name}.weight" for name in ("input_proj", "output_proj"))
    if before not in checkpoint.names:
        return None
    inner = checkpoint.tensor(before, D, None, 1)[..., 0]
    return inner, checkpoint.tensor(after, inner.shape[1], D, 1)[..., 0]


def _residual(checkpoint: _Checkpoint, part: _Part, **options: Any) -> nn.Module:
    of_mimi = any(level.get("cluster_size", "").endswith("cluster_usage") for level in part.levels.values())
    levels = _averages(checkpoint, part, derived=of_mimi)
    D = levels[0].embed.shape[1]
    projections = _projections(checkpoint, part, D)
    dim = D if projections is None else projections[0].shape[1]
    sizes = tuple(len(level.embed) for level in levels)
    options = {"decay": 0.99, "rotation_trick": False, **options}
    rvq = ResidualVQ(dim=dim, codebook_size=sizes, codebook_dim=D, **options)
    if projections is not None:
        _project(projected(rvq), projections)
    _fill(rvq, levels)
    return rvq


def _project(rvq: ResidualVQ, projections: tuple[Tensor, Tensor]) -> None:
    layer: Any
    for layer, weight in zip((rvq.project_in, rvq.project_out), projections, strict=True):
        layer.weight.copy_(weight)


def _split(checkpoint: _Checkpoint, first: _Part, second: _Part, **options: Any) -> nn.Module:
    parts = [(part, _averages(checkpoint, part, derived=True)) for part in (first, second)]
    shapes = {level.embed.shape for _, levels in parts for level in levels}
    if len(shapes) != 1:
        fail(_NAME, "source", "codebooks of one size", " and ".join(str(list(s)) for s in sorted(shapes)))
    ((K, D),) = shapes
    projections = [_projections(checkpoint, part, D) for part, _ in parts]
    dims = {D if found is None else found[0].shape[1] for found in projections}
    if len(dims) != 1 or (projections[0] is None) != (projections[1] is None):
        fail(_NAME, "source", "the same projections around both quantizers", f"inputs of size {sorted(dims)}")
    M, S = sum(len(levels) for _, levels in parts), len(parts[0][1])
    options = {"decay": 0.99, "rotation_trick": False, **options}
    around = projections[0] is not None
    module = SplitResidualVQ(dims.pop(), M, K, D, num_semantic=S, projections=around, **options)
    for rvq, (_, levels), found in zip((module.semantic, module.acoustic), parts, projections, strict=True):
        _fill(rvq, levels)
        if found is not None:
            _project(rvq, found)
    return module


def _factorized(checkpoint: _Checkpoint, part: _Part, **options: Any) -> nn.Module:
    required = ("codebook.weight", "in_proj.bias", "out_proj.bias")
    given = _in_order(checkpoint, part, required)
    codebooks = [checkpoint.tensor(names["codebook.weight"], None, None) for names in given]
    K, sizes = codebooks[0].shape[0], [codebook.shape[1] for codebook in codebooks]
    dim = checkpoint.tensor(given[0]["out_proj.bias"], None).shape[0]
    level: Any
    module = FactorizedResidualVQ(dim, len(given), K, sizes, **options)
    for level, names, codebook, D in zip(module.layers, given, codebooks, sizes, strict=True):
        if len(codebook) != K:
            fail(_NAME, checkpoint.prefix + names["codebook.weight"], f"[{K}, {D}]", list(codebook.shape))
        level.codebook.weight.copy_(codebook)
        for ours, theirs, shape in (("project_in", "in_proj", (D, dim)), ("project_out", "out_proj", (dim, D))):
            layer = getattr(level, ours)
            layer.weight.copy_(_convolution(checkpoint, names, theirs, shape))
            layer.bias.copy_(checkpoint.tensor(names[f"{theirs}.bias"], shape[0]))
    return module


def _convolution(checkpoint: _Checkpoint, names: dict[str, str], layer: str, shape: tuple[int, int]) -> Tensor:
    """The weight of a 1x1 convolution, its weight norm multiplied out."""
    if f"{layer}.weight" in names:
        return checkpoint.tensor(names[f"{layer}.weight"], *shape, 1)[..., 0]
    for length, direction in (("weight_g", "weight_v"), _PARAMETRIZED):
        pair = [names.get(f"{layer}.{name}") for name in (length, direction)]
        if pair[0] is not None and pair[1] is not None:
            v, g = checkpoint.tensor(pair[1], *shape, 1)[..., 0], checkpoint.tensor(pair[0], shape[0], 1, 1)[..., 0]
            weight: Tensor = v * (g / torch.linalg.vector_norm(v, dim=1, keepdim=True))
            return weight
    there = ", ".join(n for n in names.values())
    raise ArgumentError(f"{_NAME}: there is no {layer}.weight, nor weight_g and weight_v of it (there is {there})")


def _single(codebook: Tensor, **options: Any) -> nn.Module:
    """A quantizer whose codes are parameters, as those of taming-transformers and vqtorch."""
    K, D = codebook.shape
    learned: dict[str, Any] = {"learnable_codebook": True, "ema_update": False, "rotation_trick": False}
    vq = VectorQuantize(dim=D, codebook_size=K, **{**learned, **options})
    vq._codebook.set_codes(codebook[None])
    return vq


def _taming(checkpoint: _Checkpoint, part: _Part, **options: Any) -> nn.Module:
    if f"{part.front}used" in checkpoint.names:
        fail(_NAME, "source", "without remapped indices", f"{checkpoint.prefix}{part.front}used")
    codebook = checkpoint.tensor(part.levels[0]["embedding.weight"], None, None)
    return _single(codebook, **{"accept_image_fmap": True, **options})


def _vqtorch(checkpoint: _Checkpoint, part: _Part, affine_lr: float | None, **options: Any) -> nn.Module:
    codebook = checkpoint.tensor(part.levels[0]["codebook.weight"], None, None)
    K, D = codebook.shape
    front = f"{part.front}affine_transform."
    learned, running = f"{front}scale" in checkpoint.names, f"{front}running_ze_mean" in checkpoint.names
    if affine_lr is None and learned:
        fail(_NAME, "affine_lr", f"given where the checkpoint has {checkpoint.prefix}{front}scale", None)
    if affine_lr is not None and not learned:
        fail(_NAME, "affine_lr", f"None where the checkpoint has no {checkpoint.prefix}{front}scale", affine_lr)
    if learned or running:
        names = (
            ("scale", "bias") if learned else ("running_ze_mean", "running_ze_var", "running_c_mean", "running_c_var")
        )
        read = [checkpoint.tensor(front + name, None, D) for name in names if front + name in checkpoint.names]
        if len(read) != len(names) or len({len(t) for t in read}) != 1 or K % len(read[0]):
            fail(
                _NAME, checkpoint.prefix + front, f"{', '.join(names)} of [groups, {D}], groups of {K} codes", len(read)
            )
        if learned:
            scale, bias = 1 + float(affine_lr or 0) * read[0], float(affine_lr or 0) * read[1]
        else:
            scale = (read[1] / (read[3] + 1e-8)).sqrt()
            bias = read[0] - scale * read[2]
        codebook = (scale[:, None] * codebook.view(len(scale), -1, D) + bias[:, None]).view(K, D)
    return _single(codebook, **options)


def _distsup(checkpoint: _Checkpoint, part: _Part, **options: Any) -> nn.Module:
    names = {n.removeprefix(part.front) for n in checkpoint.names if n.startswith(part.front)}

    def get(name: str, *sizes: int | None) -> Tensor:
        if name not in names:
            message = f"{checkpoint.prefix}{part.front} has no {name} (there is {', '.join(sorted(names))})"
            raise ArgumentError(f"{_NAME}: {message}")
        return checkpoint.tensor(part.front + name, *sizes)

    return bottleneck(names, get, _NAME, **options)


_PARAMETRIZED = ("parametrizations.weight.original0", "parametrizations.weight.original1")
_MAKE: dict[str, Callable[..., nn.Module]] = {
    "encodec": _residual,
    "mimi": _split,
    "dac": _factorized,
    "taming": _taming,
    "vqtorch": _vqtorch,
    "distsup": _distsup,
}
