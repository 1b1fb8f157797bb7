"""Contrastive losses over a softmax: CLIP's, and with any number of positives."""

import torch
from torch import Tensor, nn

from embedcache.train.losses.contract import Related
from embedcache.train.losses.tiles import log_sum_exp, logits_of


class InfoNce(nn.Module):
    """Symmetric InfoNCE: each image finds its own text among those of the batch, and each text its image.

    Others that belong together are no negatives: they are left out. The loss of CLIP, "Learning Transferable Visual
    Models From Natural Language Supervision" (2021), figure 3.
    """

    def forward(self, images_BP: Tensor, texts_BP: Tensor, scale: Tensor, related: Related) -> Tensor:
        """Give the mean over both directions of the cross-entropy, a scalar."""
        is_other = related.images != related.texts
        hidden = (related.images[is_other], related.texts[is_other])
        over_texts, over_images = log_sum_exp(images_BP, texts_BP, scale, hidden)
        own = scale * (images_BP * texts_BP).sum(dim=1)
        return (over_texts + over_images).mean() / 2 - own.mean()


class MultiPositive(nn.Module):
    """Symmetric InfoNCE where all that belong together are positives, each with an equal share.

    The cross-entropy between the softmax of the similarities and an even distribution over the positives, averaged
    over both directions. With one positive a row it is `InfoNce`. As SupCon's L_out, "Supervised Contrastive Learning"
    (2020), equation 2, between two modalities.
    """

    def forward(self, images_BP: Tensor, texts_MP: Tensor, scale: Tensor, related: Related) -> Tensor:
        """Give the mean over both directions of the cross-entropy, a scalar."""
        over_texts, over_images = log_sum_exp(images_BP, texts_MP, scale)
        logits_E = logits_of(images_BP, texts_MP, scale, (related.images, related.texts))
        of_images = over_texts.mean() - (_share(related.images, logits_E.dtype) * logits_E).sum() / len(images_BP)
        of_texts = over_images.mean() - (_share(related.texts, logits_E.dtype) * logits_E).sum() / len(texts_MP)
        return (of_images + of_texts) / 2


def _share(positions_E: Tensor, dtype: torch.dtype) -> Tensor:
    """Give each pair its part of the positives of its image, or of its text."""
    return torch.bincount(positions_E)[positions_E].to(dtype).reciprocal()
