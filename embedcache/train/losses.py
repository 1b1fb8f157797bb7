"""Losses: functions of two batches of unit vectors and a temperature."""

from torch import Tensor
from torch.nn.functional import log_softmax


def info_nce(image_BP: Tensor, text_BP: Tensor, temperature: Tensor, positive_BB: Tensor) -> Tensor:
    """Symmetric InfoNCE with any number of positives a row.

    The cross-entropy between the softmax of the similarities and an even distribution over the positives, averaged
    over both directions. With one positive a row it is the loss of CLIP, "Learning Transferable Visual Models From
    Natural Language Supervision" (2021), figure 3.

    Args:
        image_BP: (B, P) rows of length 1.
        text_BP: (B, P) rows of length 1.
        temperature: scalar above 0; similarities are divided by it.
        positive_BB: (B, B) bool, image i with text j; every row and column needs at least one.

    Returns:
        A scalar.
    """
    logits_BB = image_BP @ text_BP.T / temperature
    target_BB = positive_BB.to(logits_BB.dtype)
    return (_cross_entropy(logits_BB, target_BB) + _cross_entropy(logits_BB.T, target_BB.T)) / 2


def _cross_entropy(logits_BB: Tensor, target_BB: Tensor) -> Tensor:
    even_BB = target_BB / target_BB.sum(dim=1, keepdim=True)
    return -(even_BB * log_softmax(logits_BB, dim=1)).sum(dim=1).mean()
