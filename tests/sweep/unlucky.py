"""A loss that is no number with every seed but 0."""

import torch
from torch import Tensor

from embedcache.train.losses import MultiPositive, Positives


class Unlucky(torch.nn.Module):
    """`multi_positive`, times NaN where torch was seeded with anything but 0."""

    def forward(self, first_BP: Tensor, second_MP: Tensor, scale: Tensor, positives: Positives) -> Tensor:
        loss: Tensor = MultiPositive()(first_BP, second_MP, scale, positives)
        return loss * (float("nan") if torch.initial_seed() else 1.0)
