"""Dropout that costs a CPU little."""

import torch
from torch import Tensor, nn


class Dropout(nn.Dropout):
    """`nn.Dropout` with sixteen random bits a number on CPU, where drawing them is a third of its time.

    The share set to zero is `p` to within 1 / 65,536.
    """

    def forward(self, values: Tensor) -> Tensor:
        """Set some numbers to zero and scale the others up, in training: any shape -> the same."""
        if not self.training or not 0 < self.p < 1 or values.device.type != "cpu":
            return super().forward(values)
        bits = torch.empty(-(-values.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        is_kept = bits.view(torch.int16)[: values.numel()].view(values.shape) >= round(self.p * 2**16) - 2**15
        return values * is_kept.to(values.dtype).div_(1 - self.p)
