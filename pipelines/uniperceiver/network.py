"""One small transformer on frozen features, shared by all modalities and tasks, for inputs and candidates alike.

    SPE, tokens of images or sounds, words  ->  adapters  ->  transformer  ->  representation, read at SPE or at a blank

"Uni-Perceiver: Pre-training Unified Architecture for Generic Perception for Zero-shot and Few-shot Tasks" (CVPR 2022)
on features of frozen encoders, as in "Uni-Perceiver v2" (CVPR 2023). It reads texts only as word numbers, see
`pipelines.uniperceiver.words`: there is no argument for features that were computed from a whole text.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from embedcache.arrays import Floats
from embedcache.errors import DataError, SettingError
from embedcache.store.layout import Axis
from pipelines.sequence import LayerSizes, sinusoids, valid_frames
from pipelines.uniperceiver.candidates import CosineClassifier
from pipelines.uniperceiver.layers import Adapter, KeysValues, Packing, SharedLayer, WordAdapter, positions_of
from pipelines.uniperceiver.words import BLANK, Vocabulary

Side: TypeAlias = Literal["input", "target"]
"""Inputs and candidates pass the same network; only their prompts differ."""
ReadOut: TypeAlias = Literal["task", "blank"]
"""The position at which a representation is read: SPE, or each blank among the words."""


class Tokens(NamedTuple):
    """Tokens of one modality of B items.

    Args:
        values_BTD: (B, T, D) any float, padded.
        lengths_B: (B,) int64; None if all have T tokens.
    """

    values_BTD: Tensor
    lengths_B: Tensor | None = None


class Words(NamedTuple):
    """Words of B texts.

    Args:
        numbers_BL: (B, L) int64, padded with any number.
        lengths_B: (B,) int64.
    """

    numbers_BL: Tensor
    lengths_B: Tensor


class SharedNetwork(nn.Module):
    """The shared transformer with its adapters, and a classifier for each family of tasks.

    An embedding is LN(adapter + type + position), with one LayerNorm for all modalities; SPE has neither type nor
    position. Positions follow the axis of the tokens: the place in the image, the time, or the number of the word.

    Args:
        modalities: name of a modality -> `width` of its feature and `axis` of its tokens as JSON values, or None.
        words: the vocabulary, whose vectors `set_words` sets.
        word_width: width of these vectors.
        families: families of tasks, each with a separate scale.
        num_prompts: vectors per layer that inputs attend to, and as many for candidates, for prompt tuning.
    """

    def __init__(
        self,
        *,
        modalities: Mapping[str, Mapping[str, Any]],
        words: Sequence[str],
        word_width: int,
        families: Sequence[str] = (),
        num_prompts: int = 0,
        width: int = 128,
        num_layers: int = 3,
        num_heads: int = 4,
        feed_forward: int = 384,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if width % (4 * num_heads):
            raise SettingError(f"width: expected a multiple of {4 * num_heads}, 4 times the heads, got {width}")

        sizes = LayerSizes(num_heads, feed_forward, dropout)
        self.width = width
        self.vocabulary = Vocabulary(words)
        self.axes: dict[str, Axis | None] = {}

        # Each modality has an adapter; everything after it is shared.
        adapters = {}
        for name, modality in modalities.items():
            self.axes[name] = Axis(**modality["axis"]) if modality.get("axis") else None
            adapters[name] = Adapter(int(modality["width"]), width)
        self.adapters = nn.ModuleDict(adapters)

        self.words = WordAdapter(len(self.vocabulary), word_width, width)
        self.embedding_norm = nn.LayerNorm(width)
        self.task_token = nn.Parameter(torch.randn(width) * 0.02)

        self.layers = nn.ModuleList(SharedLayer(width, sizes) for _ in range(num_layers))
        self.final_norm = nn.LayerNorm(width)
        self.readout = nn.Linear(width, width)
        self.prompts = nn.ParameterDict(_prompts(num_prompts, num_layers, width))
        self.classifiers = nn.ModuleDict({name: CosineClassifier() for name in families})

    def parts(self) -> dict[str, list[str]]:
        """Return the parts that can be loaded or trained separately.

        `shared` is everything that all tasks use, and `norms` its LayerNorms. The other parts are each modality's
        adapter, `prompts`, `scales`, and `scale-caption` and the like for one family. The vectors of words belong to no
        part, because they come from the word table.
        """
        words = [f"words.{name}" for name in ("mean", "scale", "linear", "special", "type_embedding")]
        norms = [name for name, module in self.named_modules() if isinstance(module, nn.LayerNorm)]
        shared = [*words, "embedding_norm", "task_token", "layers", "final_norm", "readout"]

        parts = {"shared": shared, "norms": norms, **{name: [f"adapters.{name}"] for name in self.adapters}}
        parts |= {"prompts": ["prompts"]} if len(self.prompts) else {}
        parts |= {"scales": ["classifiers"]} if len(self.classifiers) else {}
        return parts | {f"scale-{family}": [f"classifiers.{family}"] for family in self.classifiers}

    def set_words(self, vectors_VD: Floats) -> None:
        """Set the vectors of the words, (V, D), and standardize their channels."""
        self.words.set_table(torch.from_numpy(vectors_VD))

    def standardize(self, name: str, tokens_ND: Floats) -> None:
        """Standardize a modality's channels by the moments of some of its tokens, (N, D)."""
        self._adapter(name).standardize(torch.from_numpy(tokens_ND))

    def classifier(self, family: str) -> CosineClassifier:
        """Return the classifier of a family of tasks.

        A family that was never trained has the initial scale, which does not change the order of candidates.
        """
        classifier = self.classifiers[family] if family in self.classifiers else CosineClassifier()
        assert isinstance(classifier, CosineClassifier)
        return classifier

    def encode(
        self,
        tokens: Mapping[str, Tokens] | None = None,
        words: Words | None = None,
        *,
        side: Side = "input",
        read: ReadOut = "task",
    ) -> Tensor:
        """Encode B items, each a sequence of SPE, the tokens of each modality, and words. All positions see each other.

        Args:
            tokens: modality -> tokens; may be empty, with words.
            words: words, with `BLANK` in place of the words to predict.
            side: side whose prompts are used.
            read: positions at which representations are read.

        Returns:
            (B, P), or (number of blanks, P) in the order of items, then of words.

        Raises:
            DataError: the network has no such modality, or tokens do not fit its axis.
        """
        hidden_BSD, is_valid_BS = self.embed_context(tokens or {}, num_items=None if words is None else len(words[0]))
        num_context = hidden_BSD.shape[1]

        if words is not None:
            is_word_BL = valid_frames(words.lengths_B, words.numbers_BL.shape[1])
            hidden_BSD = torch.cat([hidden_BSD, self.embed_words(words.numbers_BL)], dim=1)
            is_valid_BS = torch.cat([is_valid_BS, is_word_BL], dim=1)

        # Without padding no mask is needed, and attention is faster.
        mask = None if bool(is_valid_BS.all()) else is_valid_BS[:, None, None]

        if read == "task":
            return self.read(self._transform(hidden_BSD, is_valid_BS, mask, side, slice(0, 1)))[:, 0]

        if words is None:
            raise DataError("read=blank: expected words with blanks, got no words")
        hidden_BLD = self._transform(hidden_BSD, is_valid_BS, mask, side, slice(num_context, None))
        return self.read(hidden_BLD[(words.numbers_BL == BLANK) & is_word_BL])

    def predict_words(self, tokens: Mapping[str, Tokens], words: Words) -> Tensor:
        """Encode a blank after each prefix of each text, in one pass: (B, L + 1, P).

        The two streams of the paper: SPE and tokens see each other, and each word sees them and the words up to itself.
        Then follow L + 1 blanks. The blank of position t sees SPE, tokens, the words before t, and itself.

        Args:
            tokens: tokens of the items.
            words: words of the texts, without an end. Ignore the rows after the end of a text.
        """
        num_words = words.numbers_BL.shape[1]
        context_BSD, is_valid_BS = self.embed_context(tokens, num_items=len(words.numbers_BL))
        blanks_BL = torch.full_like(words.numbers_BL[:, :1], BLANK).expand(-1, num_words + 1)
        streams = [context_BSD, self.embed_words(words.numbers_BL), self.embed_words(blanks_BL)]

        num_context = context_BSD.shape[1]
        mask = two_streams(num_context, num_words, device=context_BSD.device)[None, None]

        # Valid positions decide only which ones are computed; the mask decides what they see.
        is_word_BL = valid_frames(words.lengths_B, num_words)
        is_blank_BL = valid_frames(words.lengths_B + 1, num_words + 1)

        # Only tokens can hide from the blanks: no blank sees a word behind its own.
        if not bool(is_valid_BS.all()):
            is_stream_BS = is_valid_BS.new_ones(len(is_valid_BS), 2 * num_words + 1)
            mask = mask & torch.cat([is_valid_BS, is_stream_BS], dim=1)[:, None, None]
        is_valid_BS = torch.cat([is_valid_BS, is_word_BL, is_blank_BL], dim=1)

        blanks = slice(num_context + num_words, None)
        return self.read(self._transform(torch.cat(streams, dim=1), is_valid_BS, mask, "input", blanks))

    def embed_context(self, tokens: Mapping[str, Tokens], *, num_items: int | None = None) -> tuple[Tensor, Tensor]:
        """Embed SPE and tokens: (B, 1 + T, D), and whether each belongs to the item: (B, 1 + T) bool."""
        unknown = [name for name in tokens if name not in self.adapters]
        if unknown:
            raise DataError(f"expected tokens of the modalities {', '.join(self.adapters)}, got {unknown[0]}")

        count = num_items if num_items is not None else len(next(iter(tokens.values())).values_BTD)

        # Prompt tuning also shifts SPE, which all tasks read.
        task_D = self.task_token + self.prompts["task"] if "task" in self.prompts else self.task_token
        hidden = [task_D.expand(count, 1, -1)]
        is_valid = [torch.ones(count, 1, dtype=torch.bool, device=task_D.device)]

        for name in self.adapters:
            if name in tokens:
                values_BTD, lengths_B = tokens[name]
                num_tokens = values_BTD.shape[1]

                embedded_BTD = self._adapter(name)(values_BTD)
                positions_TD = positions_of(self.axes[name], num_tokens, self.width, device=task_D.device)
                hidden.append(self.embedding_norm(embedded_BTD + positions_TD))

                all_valid_BT = is_valid[0].expand(-1, num_tokens)
                is_valid.append(all_valid_BT if lengths_B is None else valid_frames(lengths_B, num_tokens))
        return torch.cat(hidden, dim=1), torch.cat(is_valid, dim=1)

    def embed_words(self, numbers_BL: Tensor, first: int = 0) -> Tensor:
        """Embed words whose positions start at `first`: (B, L, D)."""
        num_words = numbers_BL.shape[1]
        positions_LD = sinusoids(first + num_words, self.width, device=numbers_BL.device)[first:]
        embedded_BLD: Tensor = self.embedding_norm(self.words(numbers_BL) + positions_LD)
        return embedded_BLD

    def prompt_keys(self, number: int, side: Side) -> KeysValues | None:
        """Return the keys and values of a layer's prompts for one item, or None without prompts."""
        if side not in self.prompts:
            return None
        layer = self.layers[number]
        assert isinstance(layer, SharedLayer)
        return layer.key_values(self.prompts[side][number][None])

    def read(self, hidden: Tensor) -> Tensor:
        """Return the representations of hidden states: (…, D) -> (…, P)."""
        representations: Tensor = self.readout(self.final_norm(hidden))
        return representations

    def _transform(
        self, hidden_BSD: Tensor, is_valid_BS: Tensor, mask: Tensor | None, side: Side, read: slice
    ) -> Tensor:
        """Apply all layers to the valid positions, and the last layer only to the positions that are read."""
        packing = Packing.of(is_valid_BS)
        hidden = packing.pack(hidden_BSD)

        for number, layer in enumerate(self.layers):
            assert isinstance(layer, SharedLayer)
            key_values = layer.key_values(hidden, packing)

            # The last layer needs only the positions that are read, but the keys of all.
            if number == len(self.layers) - 1:
                hidden_read = packing.unpack(hidden)[:, read]
                packing = Packing.of(is_valid_BS[:, read])
                hidden = packing.pack(hidden_read)
                mask = mask[:, :, read] if mask is not None and mask.shape[2] > 1 else mask
            prompts = self.prompt_keys(number, side)
            hidden = layer(hidden, key_values, mask, prompts=prompts, packing=packing)
        return packing.unpack(hidden)

    def _adapter(self, name: str) -> Adapter:
        adapter = self.adapters[name]
        assert isinstance(adapter, Adapter)
        return adapter


def two_streams(num_context: int, num_words: int, *, device: torch.device | None = None) -> Tensor:
    """Return the mask of `SharedNetwork.predict_words`: (S, S) bool, where S is context + words + blanks."""
    order_L = torch.arange(num_words + 1, device=device)
    words_L = order_L[:num_words]
    num_positions = num_context + 2 * num_words + 1
    sees = torch.zeros(num_positions, num_positions, dtype=torch.bool).to(device)

    words = slice(num_context, num_context + num_words)
    blanks = slice(num_context + num_words, None)
    sees[:, :num_context] = True
    sees[words, words] = words_L[:, None] >= words_L
    sees[blanks, words] = order_L[:, None] > words_L
    sees[blanks, blanks] = torch.eye(num_words + 1, dtype=torch.bool, device=device)
    return sees


def _prompts(num_prompts: int, num_layers: int, width: int) -> dict[str, nn.Parameter]:
    """Return prompts per layer for inputs and for candidates, and a bias of SPE that starts at zero."""
    if not num_prompts:
        return {}
    sides = {side: nn.Parameter(torch.randn(num_layers, num_prompts, width) * 0.02) for side in ("input", "target")}
    return {**sides, "task": nn.Parameter(torch.zeros(width))}
