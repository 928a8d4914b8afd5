"""``RankTensors``: a module with tensors of one rank alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class RankTensors(nn.Module):
    """Has tensors that are moved, saved and loaded like buffers, but are none.

    ``DistributedDataParallel`` overwrites the buffers of every rank by rank 0's, and averages over a model's buffers
    would mix them.
    """

    rank_tensors: tuple[str, ...]  # their names

    def load_refused(self, tensors: dict[str, Tensor]) -> str | None:
        """Why these cannot be loaded, or None."""
        for name, value in tensors.items():
            own = getattr(self, name).shape
            if value.shape != own:
                return f"{name} must be {list(own)}, got {list(value.shape)}"
        return None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RankTensors:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name in self.rank_tensors:
            setattr(self, name, fn(getattr(self, name)))
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: getattr(self, name) for name in self.rank_tensors})

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        names = {prefix + name: name for name in self.rank_tensors}
        rest = {key: value for key, value in state_dict.items() if key not in names}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        missing = [key for key in names if key not in state_dict]
        if missing:
            missing_keys.extend(missing if strict else [])
            return
        given: dict[str, Tensor] = {name: state_dict[key] for key, name in names.items()}
        refused = self.load_refused(given)
        if refused is not None:
            error_msgs.append(f"{type(self).__name__}: {prefix}{refused}")
            return
        for name, value in given.items():
            setattr(self, name, value.detach().to(getattr(self, name), copy=True).contiguous())
