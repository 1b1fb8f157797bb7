"""A text model made ready to run: its features found by a trial run, its backend chosen."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from embedcache.arrays import Ints
from embedcache.encoders.contract import EncoderSettings
from embedcache.encoders.derived import own_features
from embedcache.encoders.graph import Backend, Exportable, Graph, make_graph
from embedcache.encoders.shapes import ItemShape
from embedcache.encoders.text import IDS, MASK, pad


@dataclass(frozen=True, kw_only=True)
class TextGraph:
    """What a text encoder needs of its model.

    Args:
        graph: runs it.
        backend: what runs it.
        features: name -> shape of one item: the model's own in its order, then those asked for that it can give.
    """

    graph: Graph
    backend: Backend
    features: Mapping[str, ItemShape]


def text_graph(
    module: torch.nn.Module, *, settings: EncoderSettings, weights: str, what: Mapping[str, Any], pad_id: int
) -> TextGraph:
    """Make a text model ready to run.

    Args:
        module: takes token ids and mask, gives a dict of tensors: its own features, and for each block asked for the
            same named `layerN.`; those called `tokens` are (B, T, D).
        settings: device, precision, backend and the names of features asked for.
        weights: the hash of all weights.
        what: JSON values that, with the weights, decide the model; `name` starts the name of an exported file.
        pad_id: the token that fills short texts up.
    """
    example = _texts((5, 9), pad_id)
    with torch.inference_mode():
        outputs = module.eval()(**{name: torch.from_numpy(array) for name, array in example.items()})
    shapes = {name: _item_shape(output) for name, output in outputs.items()}
    asked = [name for name in settings.features if name in shapes]
    features = {name: shapes[name] for name in [*own_features(shapes), *asked]}
    exportable = Exportable(
        module=module,
        example=example,
        other=_texts((7, 1, 14), pad_id),
        outputs=tuple(features),
        axes={
            **{name: {0: "batch", 1: "tokens"} for name in (IDS, MASK)},
            **{name: {0: "batch", 1: "tokens"} if shape[0] == -1 else {0: "batch"} for name, shape in features.items()},
        },
        what=what,
    )
    graph, backend = make_graph(exportable, settings, weights)
    return TextGraph(graph=graph, backend=backend, features=features)


def _texts(lengths: tuple[int, ...], pad_id: int) -> dict[str, Ints]:
    return pad([np.arange(2, length + 2, dtype=np.int64) for length in lengths], pad_id)


def _item_shape(output: torch.Tensor) -> ItemShape:
    width = int(output.shape[-1])
    return (-1, width) if output.ndim == 3 else (width,)
