"""An image codec: convolutions, codes, packed bytes. With and without the recipe against collapse, on scikit-learn's
digits.

python examples/image_codec.py [--quick]
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fastseq
from fastseq.nn import AfterWarmup, Reinit, attach, codebook_parameter_groups, next_epoch

K, BITS = 256, 8


class Codec(nn.Module):
    """Images [B, 1, 8, 8] to 4 codes each."""

    def __init__(self, recipe: bool) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 4, stride=4), nn.ReLU(), nn.Conv2d(64, 16, 1)
        )
        self.vq = fastseq.nn.VectorQuantize(
            16,
            codebook_size=K,
            accept_image_fmap=True,
            learnable_codebook=True,
            ema_update=False,
            batch_norm="codes" if recipe else None,
            reinit=Reinit(AfterWarmup(from_epoch=3), reservoir_size=4096) if recipe else None,
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(16, 64, 1),
            nn.ReLU(),
            nn.ConvTranspose2d(64, 32, 4, stride=4),
            nn.ReLU(),
            nn.Conv2d(32, 1, 3, padding=1),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        quantized, indices, loss = self.vq(self.encoder(x))
        return self.decoder(quantized), indices, loss

    def encode(self, x: Tensor) -> Tensor:
        """Bytes, a line for each image."""
        return fastseq.functional.vq_pack(self.vq(self.encoder(x))[1].flatten(1), BITS)

    def decode(self, packed: Tensor) -> Tensor:
        indices = fastseq.functional.vq_unpack(packed, BITS, 4)
        return self.decoder(self.vq.get_output_from_indices(indices.view(-1, 2, 2)))


def train(model: Codec, x: Tensor, epochs: int) -> None:
    optimizer = torch.optim.Adam(codebook_parameter_groups(model, lr=2e-3, multiplier=10))
    attach(model, optimizer)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(128):
            y, _, loss = model(x[rows])
            optimizer.zero_grad()
            ((y - x[rows]).square().mean() + loss).backward()
            optimizer.step()
        next_epoch(model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes")
    quick = parser.parse_args().quick
    x = torch.tensor(load_digits().images / 16, dtype=torch.float32)[:, None]
    train_x, test_x = x[:1400], x[1400:]
    for recipe in (False, True):
        torch.manual_seed(0)
        model = Codec(recipe)
        train(model, train_x, 6 if quick else 60)
        with torch.no_grad():
            packed = model.eval().encode(test_x)
            y = model.decode(packed)
        torch.testing.assert_close(y, model(test_x)[0].detach())  # what was packed is all that the decoder needs
        usage = fastseq.nn.CodebookUsage()
        usage.update(fastseq.functional.vq_unpack(packed, BITS, 4), K)
        psnr = -10 * (y - test_x).square().mean().log10()
        print(
            f"{'with' if recipe else 'without'} the recipe: {8 * packed.shape[1] / 64:.1f} bits a pixel, "
            f"{psnr:.1f} dB, {int(usage.compute().used)} of {K} codes in use"
        )


if __name__ == "__main__":
    main()
