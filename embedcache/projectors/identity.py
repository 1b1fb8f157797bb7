"""The feature as it is."""

from torch import Tensor, nn

from embedcache.errors import SettingError


class IdentityProjector(nn.Module):
    """y = x: (B, D) -> (B, D) float32. Nothing is learned on this side.

    Args:
        input_width: D.
        output_width: the same.

    Raises:
        SettingError: the shared space has another width.
    """

    def __init__(self, input_width: int, output_width: int) -> None:
        super().__init__()
        if input_width != output_width:
            raise SettingError(
                f"the projector identity keeps the feature's width of {input_width}, and the shared space has "
                f"{output_width}; use --shared-width {input_width}"
            )

    def forward(self, vectors_BD: Tensor) -> Tensor:
        """Give the batch."""
        return vectors_BD
