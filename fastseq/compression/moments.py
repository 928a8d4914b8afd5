"""Second moments of what the matrices of LSTMs meet in a call of the model: inputs of each layer, and states."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastseq.compression.measure import observe
from fastseq.nn import LSTM


class Moments:
    """E[x x^T] [K, K] by the name of a parameter, such as ``weight_hh_l1_reverse``."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, name: str, x: Tensor) -> None:
        rows = x.detach().flatten(0, -2).double()
        self._sums[name] = self._sums.get(name, 0) + rows.mT @ rows
        self._counts[name] = self._counts.get(name, 0) + len(rows)

    def get(self, name: str) -> Tensor | None:
        return self._sums[name] / max(1, self._counts[name]) if name in self._sums else None


def moments(model: nn.Module, modules: dict[str, nn.Module], inputs: tuple[Any, ...]) -> dict[str, Moments]:
    """By module, from one call of the model in evaluation mode. States are those after each step."""
    found = {name: Moments() for name in modules}

    def meet(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if isinstance(module, nn.RNNBase):
            _through_layers(module, found[name], args, kwargs)
        else:
            state = args[1] if len(args) > 1 else kwargs.get("hx")
            found[name].add("weight_ih", args[0].reshape(-1, args[0].shape[-1]))
            if state is not None:
                found[name].add("weight_hh", state[0].reshape(-1, state[0].shape[-1]))

    handles = [
        module.register_forward_pre_hook(
            lambda m, args, kwargs, name=name: meet(name, m, args, kwargs), with_kwargs=True
        )
        for name, module in modules.items()
    ]
    observe(model, handles, inputs)
    return found


def _through_layers(module: nn.RNNBase, found: Moments, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Layer by layer, each by a module of its own."""
    x, hx = args[0], args[1] if len(args) > 1 else kwargs.get("hx")
    rest = {name: value for name, value in kwargs.items() if name in ("lengths", "reset")}
    D = 2 if module.bidirectional else 1
    for n in range(module.num_layers):
        layer = _layer(module, n)
        state = None if hx is None else tuple(v[n * D : (n + 1) * D] for v in hx)
        out = layer(x, state, **rest)[0]
        data, after = (v.data if isinstance(v, PackedSequence) else v for v in (x, out))
        for direction, suffix in enumerate(("", "_reverse")[:D]):
            found.add(f"weight_ih_l{n}{suffix}", data)
            found.add(f"weight_hh_l{n}{suffix}", after.chunk(D, -1)[direction])
        x = out


def _layer(module: nn.RNNBase, n: int) -> nn.Module:
    size = module.input_size if n == 0 else (module.proj_size or module.hidden_size) * (1 + module.bidirectional)
    own = {v: getattr(module, v) for v in ("gates", "tau", "noise_probability", "hard_eval") if hasattr(module, v)}
    own["learnable_state"] = getattr(module, "learnable_state", False)
    sizes = (size, module.hidden_size, 1, module.bias, module.batch_first, 0.0, module.bidirectional, module.proj_size)
    weight: Any = module.weight_ih_l0
    layer = LSTM(*sizes, weight.device, weight.dtype, **own)
    state = module.state_dict()
    layer.load_state_dict({name: state[name.replace("_l0", f"_l{n}")] for name in layer.state_dict()})
    return layer.eval()
