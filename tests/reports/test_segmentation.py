import numpy as np
import pytest

from embedcache.errors import DataError
from embedcache.reports.segmentation import CLASS_COLORS, FrameRow, draw_frames


def test_classes_have_colors_of_their_own() -> None:
    names = [f"class {number}" for number in range(len(CLASS_COLORS) + 1)]
    classes_N = np.arange(-1, len(CLASS_COLORS))
    image, uv_N2 = np.zeros((8, 16, 3), np.uint8), np.full((len(classes_N), 2), 0.5, np.float32)
    frame = FrameRow(title="frame", image=image, uv_N2=uv_N2, panels={"truth": classes_N})
    legend = draw_frames([frame], names[:-1]).legends[0]
    assert [text.get_text() for text in legend.get_texts()] == names[:-1]
    with pytest.raises(DataError, match="expected at most 9 classes, one per color, got 10"):
        draw_frames([frame], names)
