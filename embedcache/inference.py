"""Use a trained pair on raw items: its frozen encoders, as the run used them, and the projectors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from scipy.special import softmax
from torch import Tensor

from embedcache.arrays import Array, Floats, Inputs, check_finite, normalize, to_numbers
from embedcache.dataset.inputs import to_inputs
from embedcache.dataset.raw_items import ItemLike, item_name, list_items, prepare_item
from embedcache.encoders.base import Modality
from embedcache.encoders.open import EncoderSpec, why_no_encoder
from embedcache.encoders.views import FeatureEncoder, open_feature_encoder
from embedcache.errors import DataError, SettingError
from embedcache.files import AnyPath
from embedcache.modalities import list_distinct, list_texts
from embedcache.modeling.heads import AnyTower, TokenTower
from embedcache.processes import AUTO, torch_device
from embedcache.projectors.base import project
from embedcache.runs import TOWERS, Run
from embedcache.sources.images import ImageLike

PairedItems: TypeAlias = ImageLike | ItemLike | Sequence[ImageLike | ItemLike]
"""One item, or N items, of a modality that a run pairs with texts."""
_VECTOR_AXES = 2


def load(run: AnyPath, *, device: str = AUTO) -> "Model":
    """Load a trained run: an aligned pair of `train_projectors`, or an adapter of `fit_adapter`.

    Encoders are opened on first use, so a model that only embeds texts never loads the image encoder.

    Args:
        run: folder of the run.
        device: torch device of encoders and projectors, or `auto`, the first of `cuda`, `mps` and `cpu` that this
            machine has. An encoder that ran on onnxruntime stays on the CPU.

    Raises:
        PathError: the folder is not a finished run.
        DataError: the run is neither an aligned pair nor an adapter.
        CorruptError: the weights do not match the config.
        SettingError: the device does not exist.

    Example:
        >>> model = embedcache.load("run", device="cpu")
        >>> model.encode(["a red box", "a boat"]).shape
        (2, 16)
    """
    return Model(Run.open(run, kind=TOWERS, device=str(torch_device(device))).load())


@dataclass(frozen=True)
class Scores:
    """Probabilities of candidates, such as classes, for each of N items.

    Args:
        names: the C candidates.
        probs_NC: (N, C) float32. Rows sum to 1.

    Example:
        >>> scores = Scores(names=("boat", "box"), probs_NC=np.float32([[0.25, 0.75]]))
        >>> scores.best, scores.top(1)
        (['box'], [[('box', 0.75)]])
    """

    names: tuple[str, ...]
    probs_NC: Floats

    @property
    def best(self) -> list[str]:
        """The most probable candidate of each item."""
        return [self.names[number] for number in self.probs_NC.argmax(axis=1).tolist()]

    def top(self, k: int = 5) -> list[list[tuple[str, float]]]:
        """Return the k most probable candidates of each item with their probabilities, or all if there are fewer.

        SettingError if k is below 1.
        """
        if k < 1:
            raise SettingError(f"k: expected a whole number of at least 1, got {k}")

        # A stable order breaks ties by the order of the names.
        order_NK = np.argsort(-self.probs_NC, axis=1, kind="stable")[:, :k]
        probs_NK = np.take_along_axis(self.probs_NC, order_NK, axis=1)
        top = []
        for numbers, probs in zip(order_NK.tolist(), probs_NK.tolist(), strict=True):
            names = [self.names[number] for number in numbers]
            top.append(list(zip(names, probs, strict=True)))
        return top


class Model:
    """A trained pair with its frozen encoders. It embeds items of both modalities in a shared space; see `load`.

    Example:
        >>> model = embedcache.load("run", device="cpu")
        >>> images = ["images/00000.png", "images/00001.png"]
        >>> model.encode(images, "image").shape
        (2, 16)
        >>> model.similarity(images, ["a red box", "a boat", "a tree"]).shape
        (2, 3)
        >>> model.classify(images, ["red", "blue"], template="a {} box").probs_NC.shape
        (2, 2)
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._encoders: dict[str, ProjectedEncoder] = {}

    def __repr__(self) -> str:
        features = " + ".join(side.feature for side in self.run.info.inputs.values())
        return f"Model({features} -> {self.width})"

    def __fspath__(self) -> str:
        """Return the folder of the run, so that functions that accept the path of a run accept a `Model`."""
        return str(self.run.path)

    @property
    def width(self) -> int:
        """P, the width of the shared space."""
        return self.run.shared_width

    @property
    def scale(self) -> float:
        """Inverse temperature by which training multiplied cosine similarities. Use it for probabilities."""
        return self.run.pair.scale.item()

    def encode_image(self, images: ImageLike | Sequence[ImageLike]) -> Floats:
        """Embed images, one batch of the encoder at a time.

        EXIF orientation, transparency and color modes are handled as in extraction.

        Args:
            images: one image, or N: paths, bytes of files, or open PIL images.

        Returns:
            (N, P) float32, rows of length 1. A single image gives (1, P), an empty list (0, P).

        Raises:
            PathError: a file does not exist.
            DataError: an item is not an image or cannot be decoded. The message names it.
            FingerprintError: the encoder is not the one whose features the run was trained on.
            MissingExtraError: the encoder's package is not installed.
        """
        return self.encode(images, "image")

    def encode_text(self, texts: str | Sequence[str]) -> Floats:
        """Embed texts, one batch of the encoder at a time. Spaces around a text are removed, as in captions.

        Args:
            texts: one string, or N in a sequence or an iterator.

        Returns:
            (N, P) float32, rows of length 1. A single text gives (1, P), an empty list (0, P).

        Raises:
            DataError: a text is empty, or is not a string.
            FingerprintError, MissingExtraError: as in `encode_image`.
        """
        listed = list_texts(texts)
        encoder = self._encoder("text")
        return encoder.encode(len(listed), lambda rows: encoder.prepare(list(map(_load_text, listed[rows]))))

    def encode(self, items: Any, modality: Modality = "text") -> Floats:
        """Embed items of either modality of the run, one batch at a time.

        Args:
            items: one item, or N. A text is a string. Any other item is the path or the bytes of a file, or decoded: an
                open PIL image, (n,) float32 mono samples in [-1, 1] at 16 kHz, a `Video`, or arrays of points by name.
            modality: one of the two modalities of the run, such as `audio`.

        Returns:
            (N, P) float32, rows of length 1. A single item gives (1, P), an empty list (0, P).

        Raises:
            PathError: a file does not exist.
            DataError: the run does not have the modality, or an item, which is named, cannot be decoded or encoded.
            FingerprintError, MissingExtraError: as in `encode_image`.
        """
        if modality == "text":
            return self.encode_text(items)
        encoder = self._encoder(modality)
        listed = list_items(items)

        # Errors name an item by its path or its position in the list.
        names = [item_name(item, modality, number) for number, item in enumerate(listed)]

        def prepare(rows: slice) -> list[Array]:
            pairs = zip(listed[rows], names[rows], strict=True)
            return [prepare_item(item, name, encoder.source) for item, name in pairs]

        return encoder.encode(len(listed), prepare)

    def project(self, vectors: Any, modality: Modality) -> Floats:
        """Embed stored features, or vectors from the tool that computed the features of the cache.

        No encoder is opened, so a run on imported vectors embeds new items by this method.

        Args:
            vectors: (N, D) of any float type, an array or a tensor, with the width D and the scale of the run's
                feature. (D,) is one vector. (N, T, D) are tokens, if the run was trained on tokens.
            modality: modality of the features, such as `text`.

        Returns:
            (N, P) float32, rows of length 1.

        Raises:
            DataError: the run does not have the modality, the vectors have another width, or one contains NaN or
                infinity.
        """
        tower = self.run.pair.tower(modality)
        side = self.run.input(modality)
        has_tokens = isinstance(tower, TokenTower)
        values = np.atleast_2d(to_numbers(vectors, "vectors"))
        if values.shape[-1] != side.width or values.ndim > 2 + has_tokens:
            shape = f"(N, {'T, ' * has_tokens}{side.width})"
            raise DataError(f"vectors: expected shape {shape}, as {side.feature} has, got {values.shape}")

        # A float64 beyond the range of float32 becomes infinite, which is an error here.
        with np.errstate(over="ignore"):
            values = values.astype(np.float32)
        check_finite(values, "the array of vectors")
        return project(tower, Inputs(values), device=self.run.device)

    def similarity(self, items: PairedItems | Tensor, texts: str | Sequence[str] | Array | Tensor) -> Floats:
        """Compute the cosine similarity of every item with every text, or of vectors with vectors.

        An array or a tensor of two axes counts as vectors, (N, P) as `encode` and `project` return them for items of
        any modality. Any other argument is encoded.

        Args:
            items: vectors, or items of the modality that the run pairs with texts, such as images, as in `encode`.
            texts: vectors, or texts, as in `encode_text`.

        Returns:
            (N, Q) float32 of N items and Q texts, from -1 to 1.

        Raises:
            DataError: vectors have another width, or one contains NaN or infinity. Encoding raises the errors of
                `encode`.
        """
        items_NP = self._to_vectors(items, self._encode_items)
        texts_QP = self._to_vectors(texts, self.encode_text)
        similarities_NQ: Floats = np.clip(items_NP @ texts_QP.T, -1, 1)
        return similarities_NQ

    def classify(
        self,
        items: PairedItems,
        names: str | Sequence[str],
        *,
        template: str | Sequence[str] = "{}",
    ) -> Scores:
        """Compute the probability of each class for items, without training (zero-shot).

        A class is the mean of its embedded prompts. Probabilities are the softmax of the cosines times `scale`.

        Args:
            items: one item, or N, of the modality that the run pairs with texts, such as an image, as in `encode`.
            names: names of the C classes.
            template: one prompt or several, in which `{}` stands for the name, such as `a photo of a {}`.

        Returns:
            `Scores`: `best`, the name of each item's class, `top(k)`, and `probs_NC`, (N, C) float32.

        Raises:
            DataError: no name, one twice, an empty prompt, or a run without texts. Encoding raises the errors of
                `encode`.
            SettingError: a template without `{}`.
            FingerprintError, MissingExtraError: as in `encode_image`.
        """
        names = list_distinct(names, "names", "names of classes")
        templates = list_texts(template, "template")
        for prompt in templates or ("",):
            if "{}" not in prompt:
                raise SettingError(f"template: expected a text with {{}} for the name, got {prompt!r}")

        # The prompts of a class follow each other, so that they form one axis.
        prompts = []
        for name in names:
            for prompt in templates:
                prompts.append(prompt.replace("{}", name))
        prompts_CMP = self.encode_text(prompts).reshape(len(names), len(templates), self.width)
        cosines_NC = self._encode_items(items) @ normalize(prompts_CMP.mean(axis=1)).T
        return Scores(names=names, probs_NC=softmax(self.scale * cosines_NC, axis=1).astype(np.float32))

    def _encode_items(self, items: PairedItems) -> Floats:
        """Embed items of the modality that the run pairs with texts, or raise a `DataError` if it has no texts."""
        return self.encode(items, cast(Modality, self.run.other_modality("text")))

    def _to_vectors(self, items: Any, encode: Callable[[Any], Floats]) -> Floats:
        """Encode items, unless they are vectors in the shared space, which are scaled to length 1."""
        if getattr(items, "ndim", None) != _VECTOR_AXES:
            return encode(items)

        vectors_NP = to_numbers(items, "vectors")
        if vectors_NP.shape[1] != self.width:
            raise DataError(f"vectors: expected shape (N, {self.width}), as encode returns, got {vectors_NP.shape}")
        check_finite(vectors_NP, "the array of vectors")
        return normalize(vectors_NP)

    def _encoder(self, modality: Modality) -> "ProjectedEncoder":
        """Return the encoder of a modality, which is opened on first use."""
        if modality not in self._encoders:
            self._encoders[modality] = open_projected_encoder(modality, self.run)
        return self._encoders[modality]


@dataclass(frozen=True, kw_only=True)
class ProjectedEncoder:
    """A frozen encoder with a trained projector, from raw items to the shared space.

    `source` computes the features that the projector reads.
    """

    source: FeatureEncoder
    tower: AnyTower
    device: str

    def prepare(self, items: Sequence[Any]) -> list[Array]:
        """Convert RGB images or texts to the encoder's inputs, one array per item."""
        return self.source.prepare(items)

    def embed(self, prepared: Sequence[Array]) -> Floats:
        """Encode and project prepared items: (N, P) float32, rows of length 1."""
        return self.encode(len(prepared), lambda rows: list(prepared[rows]))

    def encode(self, num_items: int, prepare: Callable[[slice], list[Array]]) -> Floats:
        """Prepare, encode and project items, a batch at a time: (N, P) float32, rows of length 1."""
        parts = [np.empty((0, self.tower.output_width), np.float32)]

        # Projectors were trained in float32, so a caller's autocast must not reach them.
        with torch.autocast(torch.device(self.device).type, enabled=False):
            for values in self.source.batches(num_items, prepare):
                parts.append(project(self.tower, to_inputs(values), device=self.device))
        return np.concatenate(parts)


def open_projected_encoder(modality: Modality, run: Run) -> ProjectedEncoder:
    """Open the encoder of one tower of a run on its device, with the view that it was used with.

    Raises:
        FingerprintError: the encoder or view is not the one that the run was trained on.
        SettingError: no encoder computed the feature.
    """
    tower_input = run.input(modality)
    next_step = f'embed vectors of that feature with project(vectors, "{modality}")'
    if reason := why_no_encoder(EncoderSpec.parse(tower_input.spec), modality, next_step=next_step):
        raise SettingError(reason)

    source = open_feature_encoder(
        tower_input.spec,
        modality=modality,
        feature=tower_input.feature,
        fingerprint=tower_input.fingerprint,
        device=run.device,
    )
    return ProjectedEncoder(source=source, tower=run.pair.tower(modality), device=run.device)


def _load_text(text: str) -> str:
    """Return a text without spaces around it, as captions are stored."""
    if not text.strip():
        raise DataError("expected texts with at least one word, got an empty text")
    return text.strip()
