"""ADT: adversarial distributional training (Dong et al., NeurIPS 2020, arXiv 2002.05999)."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastseq import _check
from fastseq.functional import adt_ascend, adt_entropy, adt_sample
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
      an optimizer (the authors have Adam with a rate of 2e-4 and betas of 0.5 and 0.999). With a model in
      DistributedDataParallel they start as those of the first process, and their gradients are averaged too.
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
        self._averaged: tuple[Any, ...] = ()  # the same two where processes share them; a tuple, as above

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
        weight, seed = self._weight(x, mask, radius.dtype), self._seed(x.device)
        if self.variant == "exp":
            mu, rho = self._ascended(x, labels, args, radius, weight, seed)
            return adt_sample(x, mu, rho, seed, radius, self.threat.clamp, step=self.steps)[0], None
        return self._generated(x, labels, args, radius, weight, seed)

    def _ascended(
        self, x: Tensor, labels: Tensor, args: tuple[Any, ...], radius: Tensor, weight: Tensor, seed: Tensor
    ) -> tuple[Tensor, Tensor]:
        """mu and rho after the steps."""
        model, module = self._model[1:]
        mu, rho = (torch.zeros_like(x, dtype=radius.dtype) for _ in range(2))
        totals = torch.stack((mu, rho)) if self.mode == "compat" else None
        clamp = self.threat.clamp
        with quiet(module):
            for step in range(self.steps):
                moved = adt_sample(x, mu, rho, seed, radius, clamp, samples=self.samples, step=step)
                g = self._gradients(model, moved, labels, args)
                state = (x, mu, rho, seed, radius)
                mu, rho, totals = adt_ascend(g, *state, weight, self.rate, clamp, step=step, totals=totals)
        return mu, rho

    def _gradients(self, model: Model, adversarial: Tensor, labels: Tensor, args: tuple[Any, ...]) -> Tensor:
        """Of the perturbed inputs, [S, B, ...], as many rows at a time as one call of the model should see."""
        rows = adversarial.flatten(0, 1)
        together = self.fold
        if together is None:
            together = max(1, _FOLD * len(rows) // max(1, rows.numel())) if rows.device.type == "cpu" else len(rows)
        many, *more = folded(len(adversarial), labels, *args)
        share = 1 / len(labels) if self.mode == "compat" else 1.0  # there of the mean over the batch
        found = []
        for start in range(0, len(rows), together):
            part = slice(start, start + together)
            rest = tuple(v[part] if isinstance(v, Tensor) and v.dim() else v for v in more)
            found.append(input_gradient(model, rows[part], many[part], rest, self.objective, share))
        return (found[0] if len(found) == 1 else torch.cat(found)).view_as(adversarial)

    def _weight(self, x: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Of the entropy of each number of a row, [B] or []."""
        count = valid_numbers(x, mask).flatten(1).sum(1)
        if self.entropy == "sum":
            count = torch.ones_like(count)
        elif self.mode == "compat":
            count = count.sum()
        return self.lam / count.clamp_min(1).to(dtype)

    def _generated(
        self,
        x: Tensor,
        labels: Tensor,
        args: tuple[Any, ...],
        radius: Tensor,
        weight: Tensor,
        seed: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """A perturbed input, and what the generator and the encoder make small beside minus the model's loss."""
        generator, encoder = self._learners()
        features, C = self._features(x, labels, args, radius), channel_dim(x)
        if self.variant == "exp_am":
            mu, rho = generator(features).chunk(2, C)
            entropy = adt_entropy(mu, rho, seed, radius)[0].flatten(1).sum(1)
            gained = (entropy * weight).sum() / (1 if self.mode == "compat" else len(x))
            return adt_sample(x, mu, rho, seed, radius, self.threat.clamp)[0], -gained
        noise = torch.Generator(x.device).manual_seed(int(seed))
        z = 2 * torch.rand(len(x), LATENT, generator=noise, device=x.device, dtype=radius.dtype) - 1
        direction = generator(features, z).tanh() * (radius > 0)
        mean, log_variance = encoder(direction)
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

    def _learners(self) -> tuple[Any, Any]:
        """Generator and encoder; where the model's gradients are averaged over processes, so are theirs."""
        model, own = self._model[0], (self.generator, self.encoder)
        if not (isinstance(model, DistributedDataParallel) and torch.is_grad_enabled()):
            return own
        if not self._averaged:  # not before: all processes meet here, and parameters are where they will stay
            group = model.process_group
            self._averaged = tuple(m and DistributedDataParallel(m, process_group=group) for m in own)
        return self._averaged

    def _seed(self, device: torch.device) -> Tensor:
        """Of one call, of this process."""
        distributed = torch.distributed
        rank = distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
        words = hashlib.sha256(f"{self.seed} {rank} {self.calls}".encode()).digest()
        self.calls += 1
        return torch.tensor([int.from_bytes(words[:8], "big") >> 1], device=device)

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
