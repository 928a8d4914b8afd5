"""ADT: adversarial distributional training (Dong et al., NeurIPS 2020, arXiv 2002.05999)."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import Tensor, nn

from fastseq import _check
from fastseq.functional import adt_backward, adt_direction, adt_entropy, adt_moved, adt_sample
from fastseq.recipes.adt_generator import LatentEncoder, PerturbationGenerator
from fastseq.recipes.threat import (
    Model,
    Objective,
    Threat,
    channel_dim,
    cross_entropy,
    folded,
    input_gradient,
    network,
    quiet,
    valid_numbers,
)

VARIANTS = ("exp", "exp_am", "imp_am")
LATENT = 64  # size of the noise of imp_am
_FOLD = 2**18  # numbers of an input; with 10 times as many an LSTM takes 1.2 to 1.4 times as long per row (Xeon, H 256)
_TINY = 1e-8  # below the step of the authors' optimizer


class ADT(nn.Module):
    """The loss of a model on inputs from the worst distribution of perturbations, instead of the worst perturbation.

    For each example ADT looks for the distribution within the threat that makes the model's loss, plus ``lam`` times
    the entropy, large; the model then learns on a sample of it. The model's parameters get their gradients from
    ``loss.backward()`` alone, and its mode and running statistics are as they were.

    - "exp": for each number of the input, eps * tanh of a normal with a mean and a spread of its own, which are sought
      by ``steps`` ascents with ``samples`` samples each. The samples are folded into the batch, and only gradients of
      the input are formed.
    - "exp_am": a generator gives means and spreads in one pass, from the input and two gradients. It learns at the same
      time as the model, from the same ``loss.backward()`` with the sign turned: give its parameters, those of the ADT,
      an optimizer (the authors have Adam with a rate of 2e-4 and betas of 0.5 and 0.999).
    - "imp_am": a generator gives perturbations from noise too, and an encoder guesses the noise from them. In place of
      the entropy stands its bound: that guess's -log density, as far as it is above ``threshold``.

    >>> adt = ADT(model, eps=0.1, normalise="batch")
    >>> loss = adt(x, labels, mask=mask)
    >>> loss.backward()

    The two modes differ in "exp" and in the threshold. "compat" is what the authors' code does: gradients add up over
    the steps, so a step goes by the sign of all gradients so far, and the entropy is a mean over all numbers of the
    batch. "fixed" goes by the sign of the present gradient, where each example has its own objective, so that it does
    not depend on the others. Logarithms have no 1e-8 added to what they are of, in both.

    Args:
        model: called as ``model(x, *args)``, gives logits [B, K] (or [B, K, T] with labels [B, T]; -100 for none).
        eps, clamp, normalise: of the ``Threat``: at most eps, in units of ``normalise``, within ``clamp``.
        lam: >= 0, of the entropy. The authors' 0.01 is for its mean over numbers.
        steps, samples: of "exp".
        rate: of a step on means and spreads in "exp", > 0; means stay within steps * rate.
        entropy: "mean" over the valid numbers of an example, or their "sum", which is the entropy of its distribution;
            "sum" only in "fixed".
        mode: "fixed" or "compat".
        channels, dims: for the generator, as of ``PerturbationGenerator``; or give it, or a network like it, as
            ``generator``: features [B, ...] with three times the channels to means and raw spreads, or from those and
            noise [B, 64] to raw perturbations.
        threshold: of "imp_am"; None for 0.5 in "fixed" and 0.9 in "compat". From 0.87 up, an encoder that looks at
            nothing satisfies it; below log 2 = 0.69 the noise must show in the perturbations.
        objective: outputs and labels to a loss of each row.
        module: the network behind ``model``, where that is a plain function.
        fold: rows, of all samples, that go through the model as one batch in "exp"; None for all of them on a GPU, and
            on a CPU for as many as the cache is good for.
        seed: of all noise; processes of ``torch.distributed`` draw different noise. The state dict counts the calls.

    Raises:
        ArgumentError: naming the argument.
    """

    def __init__(
        self,
        model: Model,
        eps: float,
        lam: float = 0.01,
        variant: str = "exp",
        *,
        steps: int = 7,
        samples: int = 5,
        rate: float = 0.3,
        clamp: tuple[float, float] | None = None,
        normalise: Tensor | str | None = None,
        entropy: str = "mean",
        mode: str = "fixed",
        channels: int | None = None,
        dims: int = 1,
        generator: nn.Module | None = None,
        threshold: float | None = None,
        objective: Objective = cross_entropy,
        module: nn.Module | None = None,
        fold: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.threat = Threat(eps, clamp, normalise)
        _check.not_negative("ADT", "lam", lam)
        _check.one_of("ADT", "variant", variant, VARIANTS)
        _check.one_of("ADT", "mode", mode, ("fixed", "compat"))
        _check.one_of("ADT", "entropy", entropy, ("mean",) if mode == "compat" else ("mean", "sum"))
        _check.count("ADT", "steps", steps)
        _check.count("ADT", "samples", samples)
        _check.positive("ADT", "rate", rate)
        if fold is not None:
            _check.count("ADT", "fold", fold)
        self.lam, self.variant, self.mode, self.entropy = lam, variant, mode, entropy
        self.steps, self.samples, self.rate, self.objective = steps, samples, rate, objective
        self.threshold = (0.9 if mode == "compat" else 0.5) if threshold is None else threshold
        self.fold, self.seed, self.calls = fold, seed, 0
        self._model = (model, *network(model, module))  # in a tuple, so that its parameters are not those of ADT
        self.generator, self.encoder = self._networks(channels, dims, generator)

    def _networks(
        self, channels: int | None, dims: int, generator: nn.Module | None
    ) -> tuple[nn.Module | None, nn.Module | None]:
        if self.variant == "exp":
            return None, None
        if channels is None and (generator is None or self.variant == "imp_am"):
            _check.fail("ADT", "channels", f"given, of the input, with variant={self.variant!r}", "None")
        if channels is not None:
            _check.count("ADT", "channels", channels)
        explicit = self.variant == "exp_am"
        if generator is None:
            parts, latent = (2, 0) if explicit else (1, LATENT)
            generator = PerturbationGenerator(channels or 1, dims, parts, latent=latent)
        return generator, None if explicit else LatentEncoder(channels or 1, dims, LATENT)

    def forward(self, x: Tensor, labels: Tensor, *args: Any, mask: Tensor | None = None) -> Tensor:
        """The mean loss on perturbed inputs, the model in the mode that it is in.

        Args:
            x: [B, ...], of floating point. labels: [B, ...].
            args: for the model after x; tensors have B rows.
            mask: bool, [B, T] of [B, T, ...] or broadcast to x; what is not valid stays as it is.

        Returns:
            A number. In the amortized variants its gradient also reaches the generator, with the other sign.
        """
        adversarial, penalty = self._perturbed(x, labels, args, mask)
        if penalty is not None:
            turned: Any = _Turned
            adversarial = turned.apply(adversarial)
        loss = self.objective(self._model[0](adversarial, *args), labels).mean()
        return loss if penalty is None else loss + (penalty - penalty.detach())

    @torch.no_grad()
    def perturb(self, x: Tensor, labels: Tensor, *args: Any, mask: Tensor | None = None) -> Tensor:
        """A sample of the perturbed inputs that ``forward`` would learn from, like x."""
        return self._perturbed(x, labels, args, mask)[0]

    def _perturbed(
        self, x: Tensor, labels: Tensor, args: tuple[Any, ...], mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if x.dim() < 2 or len(x) != len(labels):
            expected = f"[B, ...] with B = {len(labels)}, that of labels"
            _check.fail("ADT", "x", expected, list(x.shape))
        x, radius = x.detach(), self.threat.radius(x, mask)
        noise = self._noise(x.device)
        if self.variant == "exp":
            mu, rho = self._ascended(x, labels, args, radius, valid_numbers(x, mask), noise)
            last = torch.randn(1, *x.shape, generator=noise, device=x.device, dtype=radius.dtype)
            return adt_sample(x, mu, rho, last, radius, self.threat.clamp)[0], None
        return self._generated(x, labels, args, radius, mask, noise)

    def _ascended(
        self,
        x: Tensor,
        labels: Tensor,
        args: tuple[Any, ...],
        radius: Tensor,
        valid: Tensor,
        noise: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """mu and rho after the steps."""
        model, module = self._model[1:]
        weight = self._weight(valid, radius.dtype)
        mu, rho = (torch.zeros_like(x, dtype=radius.dtype) for _ in range(2))
        totals = torch.zeros_like(mu), torch.zeros_like(rho)
        with quiet(module):
            for _ in range(self.steps):
                r = torch.randn(self.samples, *x.shape, generator=noise, device=x.device, dtype=mu.dtype)
                a = adt_direction(mu, rho, r)
                g = self._gradients(model, adt_moved(x, a, radius, self.threat.clamp), labels, args)
                found = adt_backward(g, x, a, rho, r, radius, weight, self.threat.clamp)
                for value, total, d in zip((mu, rho), totals, found, strict=True):
                    if self.mode == "compat":
                        value.add_(total.add_(d) / (total.abs() + _TINY), alpha=self.rate)
                    else:
                        value.add_(d.sign_(), alpha=self.rate)
        return mu, rho

    def _gradients(self, model: Model, adversarial: Tensor, labels: Tensor, args: tuple[Any, ...]) -> Tensor:
        """Of the perturbed inputs, [S, B, ...], as many rows at a time as one call of the model should see."""
        rows = adversarial.flatten(0, 1)
        together = self.fold
        if together is None:
            together = max(1, _FOLD * len(rows) // max(1, rows.numel())) if rows.device.type == "cpu" else len(rows)
        many, *more = folded(len(adversarial), labels, *args)
        found = []
        for start in range(0, len(rows), together):
            part = slice(start, start + together)
            rest = tuple(v[part] if isinstance(v, Tensor) and v.dim() else v for v in more)
            found.append(input_gradient(model, rows[part], many[part], rest, self.objective))
        g = (found[0] if len(found) == 1 else torch.cat(found)).view_as(adversarial)
        return g / len(labels) if self.mode == "compat" else g  # there of the mean over the batch

    def _weight(self, valid: Tensor, dtype: torch.dtype) -> Tensor:
        """Of the entropy of each number."""
        if self.entropy == "sum":
            return self.lam * valid.to(dtype)
        count = valid.sum() if self.mode == "compat" else valid.flatten(1).sum(1).view(-1, *(1,) * (valid.dim() - 1))
        return self.lam * valid.to(dtype) / count.clamp_min(1)

    def _generated(
        self,
        x: Tensor,
        labels: Tensor,
        args: tuple[Any, ...],
        radius: Tensor,
        mask: Tensor | None,
        noise: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """A perturbed input, and what the generator and the encoder make small beside minus the model's loss."""
        assert self.generator is not None
        features, C = self._features(x, labels, args, radius), channel_dim(x)
        if self.variant == "exp_am":
            mu, rho = (v.contiguous() for v in self.generator(features).chunk(2, C))
            r = torch.randn(1, *x.shape, generator=noise, device=x.device, dtype=radius.dtype)
            weight = self._weight(valid_numbers(x, mask), radius.dtype) / (1 if self.mode == "compat" else len(x))
            gained = (adt_entropy(mu, rho, r, radius) * weight).sum()
            return adt_sample(x, mu, rho, r, radius, self.threat.clamp)[0], -gained
        assert self.encoder is not None
        z = 2 * torch.rand(len(x), LATENT, generator=noise, device=x.device, dtype=radius.dtype) - 1
        direction = self.generator(features, z).tanh() * (radius > 0)
        mean, log_variance = self.encoder(direction)
        surprise = ((z - mean).square() / log_variance.exp() + log_variance + math.log(2 * math.pi)) / 2
        return (x + radius * direction).clamp(*self.threat.limits).to(x.dtype), self.lam * (
            surprise.mean() - self.threshold
        ).relu()

    def _features(self, x: Tensor, labels: Tensor, args: tuple[Any, ...], radius: Tensor) -> Tensor:
        """x, the gradient there, and that where its sign leads, both with a mean size of 1 in each row."""
        model, module = self._model[1:]

        def scaled(at: Tensor) -> Tensor:
            g = input_gradient(model, at, labels, args, self.objective).to(radius.dtype) * (radius > 0)
            size = g.abs().flatten(1).mean(1).clamp_min(torch.finfo(g.dtype).tiny)
            return g / size.view(-1, *(1,) * (g.dim() - 1))

        with quiet(module):
            first = scaled(x)
            second = scaled(self.threat.project(x, x + radius * first.sign(), radius).to(x.dtype))
        return torch.cat([x.to(radius.dtype) * (radius > 0), first, second], channel_dim(x))

    def _noise(self, device: torch.device) -> torch.Generator:
        """Of one call, of this process."""
        distributed = torch.distributed
        rank = distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
        words = hashlib.sha256(f"{self.seed} {rank} {self.calls}".encode()).digest()
        self.calls += 1
        return torch.Generator(device).manual_seed(int.from_bytes(words[:8], "big") >> 1)

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": self.calls}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.calls = state["calls"]

    def extra_repr(self) -> str:
        return f"eps={self.threat.eps:g}, lam={self.lam:g}, variant={self.variant!r}, mode={self.mode!r}"


class _Turned(torch.autograd.Function):
    """As it is; its gradient with the other sign."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return -g
