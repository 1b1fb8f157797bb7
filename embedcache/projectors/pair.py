"""The aligned pair, which is two towers, such as one for images and one for texts, and a temperature."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from embedcache.errors import DataError, SettingError, one_line
from embedcache.modeling.heads import AnyTower, RawTower, TokenTower, Tower
from embedcache.projectors.base import bind_projector, has_token_input, split_names

_INITIAL_TEMPERATURE = 0.07
_TEMPERATURE_RANGE = (0.001, 0.5)


class AlignedPair(nn.Module):
    """Two towers and a temperature, trained together.

    Each tower maps the feature of one modality into the shared space, where items of both are compared by cosine. The
    losses divide the cosines by the temperature. It is stored as the log of its inverse and clamped to 0.001 … 0.5, as
    in the code of "From Unimodal to Multimodal" (CVPR 2025).

    Args:
        projector: name of the projector of both towers, or `FIRST+SECOND`.
        widths: modality -> width of its feature. There are two modalities, or one for an adapter. Each tower is a
            submodule with the name of its modality.
        shared_width: width of the shared space.
        dropout: fraction of each tower's input that is set to zero in training.

    Example:
        >>> pair = AlignedPair("mlp", widths={"image": 768, "text": 384}, shared_width=256)
        >>> pair.tower("text")(torch.ones(2, 384)).shape
        torch.Size([2, 256])
        >>> round(pair.temperature.item(), 3)
        0.07
    """

    def __init__(self, projector: str, *, widths: Mapping[str, int], shared_width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.modalities = tuple(widths)
        for name, (modality, width) in zip(split_names(projector), widths.items(), strict=len(widths) > 1):
            self.add_module(modality, _tower(name, width, shared_width, dropout))
        self.log_scale = nn.Parameter(torch.tensor(-math.log(_INITIAL_TEMPERATURE)))

    @property
    def temperature(self) -> Tensor:
        """The temperature, a scalar clamped to its range."""
        return torch.exp(-self.log_scale).clamp(*_TEMPERATURE_RANGE)

    def set_temperature(self, temperature: float) -> None:
        """Replace the temperature."""
        with torch.no_grad():
            self.log_scale.fill_(-math.log(temperature))

    @property
    def scale(self) -> Tensor:
        """The factor of the cosines, a scalar: the inverse of the temperature."""
        return 1 / self.temperature

    @property
    def towers(self) -> tuple[AnyTower, AnyTower]:
        """Both towers, in the order of `modalities`."""
        first, second = self.modalities
        return self.tower(first), self.tower(second)

    def parts(self) -> dict[str, list[str]]:
        """Return the parts that may be loaded or trained separately: both towers by modality, and the temperature."""
        parts = {modality: [modality] for modality in self.modalities}
        parts["temperature"] = ["log_scale"]
        return parts

    def tower(self, modality: str) -> AnyTower:
        """Return the tower of a modality.

        Raises:
            DataError: the pair does not have that modality.
        """
        if modality not in self.modalities:
            raise DataError(f"expected a run with the modality {modality}, got one of {' and '.join(self.modalities)}")
        tower: AnyTower = self.get_submodule(modality)  # type: ignore[assignment]
        return tower


def _tower(projector: str, input_width: int, output_width: int, dropout: float) -> AnyTower:
    """Build the tower that the projector needs, and the projector."""
    build = bind_projector(projector)
    if has_token_input(projector):
        return TokenTower(build(input_width, output_width, dropout=dropout), input_width, output_width)

    # A plug-in may reject the widths with an error of its own, which becomes one line.
    try:
        module = build(input_width, output_width)
    except (ValueError, RuntimeError) as error:
        raise SettingError(f"projector {projector}: {one_line(error)}") from error

    tower = RawTower if getattr(module, "has_raw_input", False) else Tower
    return tower(module, input_width, output_width, dropout=dropout)
