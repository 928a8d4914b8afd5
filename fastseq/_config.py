"""What was built, what runs, and why."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
from typing import Any

from fastseq import __version__


def show_config() -> dict[str, Any]:
    """Print what was built, which instruction set and which backend run, and why; works without torch.

    Returns:
        What was printed: ``version``; ``build`` (the doors with None or the reason why not, compiler, flags, the
        instruction sets and their flags, the torch built against, of ``cuda`` the targets and nvcc, or None);
        ``instruction_set`` and ``backend`` of tensors on the CPU (``runs``, ``why`` and ``not``, the others with their
        reasons); ``torch`` (version or None); ``gpu`` (``device`` or None, ``triton``: its version or why it cannot be
        used, and ``verified``, the kernels whose results were seen to be right on such a device); ``threads`` (of
        torch, or None, and the number of cores).
    """
    build, core, torch = build_record(), _load("fastseq._core"), _load("torch")
    doors = {"core": core if isinstance(core, str) else None, "torch": None, "cuda": None, **build.get("missing", {})}
    threads: dict[str, int | None] = {"torch": None, "cores": os.cpu_count()}
    if not isinstance(torch, str):
        from fastseq.ops import _cuda, _library

        doors["torch"] = build.get("missing", {}).get("torch") or _library.why_not_compiled
        doors["cuda"] = build.get("missing", {}).get("cuda") or _cuda.why_not_loaded
        threads["torch"] = torch.get_num_threads()
    config = {
        "version": __version__,
        "build": {"doors": doors, **{key: value for key, value in build.items() if key not in ("built", "missing")}},
        "instruction_set": instruction_set(),
        "backend": _backend(torch),
        "torch": None if isinstance(torch, str) else torch.__version__,
        "gpu": _gpu(torch),
        "threads": threads,
    }
    print("\n".join(_lines(config)))
    return config


def build_record() -> dict[str, Any]:
    """The record that the build wrote beside this file; empty when nothing was compiled here."""
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "_build.json")
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as file:
        record: dict[str, Any] = json.load(file)
    return record


def _load(name: str) -> Any:
    """The module, or the reason why it cannot be imported."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            return str(error)
        return "not built" if name.startswith("fastseq.") else "not installed"
    except ImportError as error:
        return str(error)


def instruction_set() -> dict[str, Any]:
    """The one that runs or None, why, and why not the others that were built."""
    core, wanted = _load("fastseq._core"), os.environ.get("FASTSEQ_ISA")
    built = build_record().get("instruction_sets", {})
    if isinstance(core, str):
        return {"runs": None, "why": f"core: {core}", "not": {}}
    supported = core.isas()
    no = {name: "not supported by this processor or operating system" for name in built if name not in supported}
    try:
        runs = core.isa()
    except (RuntimeError, ValueError) as error:
        return {"runs": None, "why": str(error), "not": no}
    why = f"FASTSEQ_ISA={wanted}" if wanted else "the best that is built and supported here"
    return {"runs": runs, "why": why, "not": {**no, **{name: f"{runs} runs" for name in supported if name != runs}}}


def _backend(torch: Any) -> dict[str, Any]:
    """The backend of ``lstm_forward`` on CPU tensors."""
    if isinstance(torch, str):
        return {"runs": None, "why": f"torch: {torch}; fastseq._core works without it", "not": {}}
    from fastseq.ops._select import allowed
    from fastseq.ops.lstm import BACKENDS

    only, probe = allowed(), torch.empty(0)
    no: dict[str, str] = {}
    for backend in BACKENDS["lstm_forward"]:
        reason = f"FASTSEQ_BACKEND={only}" if only and only != backend.name else backend.why_not(probe)
        if reason is None:
            why = f"FASTSEQ_BACKEND={only}" if only else "the first that can run here"
            return {"runs": backend.name, "why": why, "not": no}
        no[backend.name] = reason
    return {"runs": None, "why": "none can run", "not": no}


def _gpu(torch: Any) -> dict[str, Any]:
    """What ``explain`` tells per operator, in short."""
    if isinstance(torch, str):
        return {"device": None, "triton": f"torch: {torch}", "verified": []}
    from fastseq.ops._cuda import unverified, why_not_loaded
    from fastseq.ops._triton import kernels, why_not_triton

    why_not = why_not_triton()
    found: dict[str, Any] = {"device": None, "triton": why_not or importlib.metadata.version("triton"), "verified": []}
    if torch.cuda.is_available():
        found["device"] = f"{torch.cuda.get_device_name()}, sm_{kernels('_verified').capability(0)}"
        if why_not is None:
            device, dtype = torch.device("cuda", 0), torch.int64  # of any dtype
            modules = kernels("_sources").modules()
            found["verified"] = [m for m in modules if kernels("_verified").doubt(m, device, dtype) is None]
            compiled = ("lstm_persist", "lstm_persist_lowrank", "vq_lookup", "vq_screen")
            if why_not_loaded is None:
                found["verified"] += [m for m in compiled if unverified(m, device, dtype) is None]
    return found


def _lines(config: dict[str, Any]) -> list[str]:
    build, threads = config["build"], config["threads"]

    def choice(found: dict[str, Any]) -> str:
        rest = "; ".join(f"{name}: {why}" for name, why in found["not"].items())
        return f"{found['runs'] or 'none'}, {found['why']}" + (f" ({rest})" if rest else "")

    lines = [f"fastseq {config['version']}"]
    lines += [f"  {name + ' door':<16} {'built' if why is None else why}" for name, why in build["doors"].items()]
    if "compiler" in build:
        lines.append(f"  {'compiler':<16} {build['compiler']}, {' '.join(build['flags'])}")
        sets = (f"{name} ({' '.join(flags)})" if flags else name for name, flags in build["instruction_sets"].items())
        lines.append(f"  {'sets built':<16} {', '.join(sets)}")
    if build.get("cuda"):
        lines.append(f"  {'cuda built':<16} {', '.join(build['cuda']['targets'])} by nvcc {build['cuda']['nvcc']}")
    lines.append(f"  {'instruction set':<16} {choice(config['instruction_set'])}")
    lines.append(f"  {'backend':<16} {choice(config['backend'])}")
    if config["torch"]:
        lines.append(f"  {'torch':<16} {config['torch']}, {threads['torch']} threads")
    gpu = config["gpu"]
    lines.append(f"  {'triton':<16} {gpu['triton']}")
    verified = f"; kernels verified: {', '.join(gpu['verified']) or 'none'}" if gpu["device"] else ""
    lines.append(f"  {'gpu':<16} {gpu['device'] or 'none'}{verified}")
    lines.append(f"  {'cores':<16} {threads['cores']}")
    return lines
