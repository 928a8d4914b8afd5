"""The binary-gate LSTM as one writes it without a kernel: a Python loop over time."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class StepLoop(nn.LSTM):
    """``nn.LSTM`` (one direction, no projection) whose training noise is added in a loop over steps in plain torch.

    As fast as such a loop gets without a kernel of its own: the input product and the noise of a whole chunk are
    computed at once, and only the recurrence is in the loop.

    Args:
        tau, noise_probability: as in ``fastseq.nn.LSTM``. others: as in ``nn.LSTM``.
    """

    def __init__(self, *sizes: int, tau: float = 0.9, noise_probability: float = 0.2) -> None:
        super().__init__(*sizes)
        self.tau, self.noise_probability = tau, noise_probability

    def forward(  # type: ignore[override]
        self, x: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """As ``nn.LSTM``, with noise in training mode. x: [T, B, I]."""
        T, B, H = x.shape[0], x.shape[1], self.hidden_size
        if state is None:
            zeros = x.new_zeros(self.num_layers, B, H)
            state = (zeros, zeros)
        last_h, last_c = [], []
        for layer in range(self.num_layers):
            weight_ih, weight_hh, bias_ih, bias_hh = self.all_weights[layer]
            x_gates = nn.functional.linear(x, weight_ih, bias_ih + bias_hh)
            if self.training:
                x_gates = x_gates + self._noise(T, B, H)
            h, c, outs = state[0][layer], state[1][layer], []
            for t in range(T):
                i_f, g, o = torch.split(x_gates[t] + h @ weight_hh.T, [2 * H, H, H], -1)
                i, f = torch.sigmoid(i_f / self.tau if self.training else i_f).chunk(2, -1)
                c = f * c + i * torch.tanh(g)
                h = torch.sigmoid(o) * torch.tanh(c)
                outs.append(h)
            x = torch.stack(outs)
            last_h.append(h)
            last_c.append(c)
        return x, (torch.stack(last_h), torch.stack(last_c))

    def _noise(self, T: int, B: int, H: int) -> Tensor:
        """[T, B, 4*H]: Bernoulli mask times logistic noise for i and f, zeros for g and o."""
        u = torch.rand(T, B, 2 * H).clamp(1e-7, 1 - 1e-7)
        mask = torch.rand(T, B, 2 * H) < self.noise_probability
        return torch.cat((torch.logit(u) * mask, torch.zeros(T, B, 2 * H)), -1)
