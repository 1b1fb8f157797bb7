"""What a pair of projectors costs."""

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from embedcache.projectors.saved import PairConfig, build


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of both towers.

    Args:
        parameters: trained, the temperature included.
        flops_a_pair: of matrix products, forward, for one image and one text; a multiply-add is two.
    """

    parameters: int
    flops_a_pair: int


def cost(config: PairConfig, image_shape: tuple[int, ...], text_shape: tuple[int, ...]) -> Cost:
    """Count without memory for the weights.

    Args:
        config: of the pair.
        image_shape: of one item: (D,) or (T, D).
        text_shape: alike.
    """
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        pair = build(config).eval()
        pair.image(torch.zeros(1, *image_shape))
        pair.text(torch.zeros(1, *text_shape))
    parameters = sum(parameter.numel() for parameter in pair.parameters() if parameter.requires_grad)
    return Cost(parameters=parameters, flops_a_pair=counter.get_total_flops())
