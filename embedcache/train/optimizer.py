"""AdamW with a linear warm-up and a cosine to zero."""

import math

import torch
from torch import nn

from embedcache.train.settings import OptimizerSettings


def make_optimizer(trained: nn.Module, settings: OptimizerSettings) -> torch.optim.AdamW:
    """Make AdamW, fused; matrices decay, while biases, norms and the temperature do not."""
    matrices = [parameter for parameter in trained.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in trained.parameters() if parameter.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, fused=True)


def learning_rate(settings: OptimizerSettings, step: int, num_steps: int) -> float:
    """Get the learning rate of one of `num_steps` steps, counted from 0."""
    warmup = max(1, round(settings.warmup_share * num_steps))
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    share = (step - warmup) / max(1, num_steps - warmup)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


def update(trained: nn.Module, optimizer: torch.optim.Optimizer, rate: float, gradient_norm: float) -> None:
    """Take one step along the gradients, scaled down to a length of at most `gradient_norm`, and forget them."""
    nn.utils.clip_grad_norm_(trained.parameters(), gradient_norm)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
