"""One small transformer on frozen features, shared by all modalities and tasks, for inputs and candidates alike.

    SPE, tokens of images or sounds, words  ->  adapters  ->  transformer  ->  representation, read at SPE or at a blank

"Uni-Perceiver: Pre-training Unified Architecture for Generic Perception for Zero-shot and Few-shot Tasks" (CVPR 2022)
on features of frozen encoders, as in "Uni-Perceiver v2" (CVPR 2023). Of texts it reads word numbers alone, see
`embedcache.networks.words`: there is no argument for features that were computed from a whole text.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding, scaled_dot_product_attention

from embedcache.arrays import Floats
from embedcache.axis import Axis
from embedcache.errors import DataError, SettingError
from embedcache.networks.candidates import Candidates, Likelihood
from embedcache.networks.sequence import LayerSizes, StandardizedInput, sinusoids, sinusoids_at, valid_frames
from embedcache.networks.words import BLANK, NUM_SPECIAL, Vocabulary

Side: TypeAlias = Literal["input", "target"]
"""Inputs and candidates pass the same network; only prompts differ."""
ReadOut: TypeAlias = Literal["task", "blank"]
"""Where a representation is read: at SPE, or at each blank among the words."""
KeysValues: TypeAlias = tuple[Tensor, Tensor]
"""Keys and values of S positions: two (B, heads, S, D / heads)."""

_IMAGE_SIDE, _RATE_HZ = 16.0, 25.0  # positions per side of an image, and per second


class Tokens(NamedTuple):
    """Tokens of one modality of B items.

    Args:
        values_BTD: (B, T, D) any float, padded.
        lengths_B: (B,) int64; None: T tokens each.
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
    """The shared transformer with its adapters, and the likelihood of each family of tasks.

    An embedding is LN(adapter + type + position), with one LayerNorm for all modalities; SPE has neither type nor
    position. Positions follow the axis of the tokens: the place in the image, the time, or the number of the word.

    Args:
        modalities: name of a modality -> `width` of its feature and `axis` of its tokens as JSON values, or None.
        words: the vocabulary, whose vectors `set_words` takes.
        word_width: width of these vectors.
        families: families of tasks, each with a scale of its own.
        heads: name of a closed set of candidates -> its size; each gets a `LabelHead`.
        num_prompts: vectors per layer that inputs attend to, and as many for candidates, for prompt tuning; 0: none.
        output_width: width of the representations; None: that of the transformer.
    """

    def __init__(
        self,
        *,
        modalities: Mapping[str, Mapping[str, Any]],
        words: Sequence[str],
        word_width: int,
        families: Sequence[str] = (),
        heads: Mapping[str, int] | None = None,
        num_prompts: int = 0,
        width: int = 128,
        num_layers: int = 3,
        num_heads: int = 4,
        feed_forward: int = 384,
        dropout: float = 0.0,
        output_width: int | None = None,
    ) -> None:
        super().__init__()
        if width % (4 * num_heads) or num_layers < 1:
            raise SettingError(
                f"expected a width that is a multiple of {4 * num_heads} and at least one layer, got {width} and "
                f"{num_layers}"
            )
        if "text" in modalities:
            raise SettingError(
                "modalities: expected none with the features of texts, which would tell the network the words that it "
                "is to predict, got text; pass texts as word numbers"
            )
        sizes = LayerSizes(num_heads, feed_forward, dropout)
        self.width, self.output_width = width, output_width or width
        self.vocabulary = Vocabulary(words)
        self.axes = {name: _read_axis(given.get("axis")) for name, given in modalities.items()}
        self.adapters = nn.ModuleDict({name: Adapter(int(given["width"]), width) for name, given in modalities.items()})
        self.words = WordAdapter(len(self.vocabulary), word_width, width)
        self.embedding_norm = nn.LayerNorm(width)
        self.task_token = nn.Parameter(torch.randn(width) * 0.02)
        self.layers = nn.ModuleList(SharedLayer(width, sizes) for _ in range(num_layers))
        self.final_norm = nn.LayerNorm(width)
        self.readout = nn.Linear(width, self.output_width)
        self.prompts = nn.ParameterDict(_prompts(num_prompts, num_layers, width))
        self.likelihoods = nn.ModuleDict({name: Likelihood() for name in families})
        self.heads = nn.ModuleDict({name: LabelHead(self.output_width, size) for name, size in (heads or {}).items()})

    def parts(self) -> dict[str, list[str]]:
        """Return the parts that may be loaded or trained alone.

        `shared` is all that every task uses, `norms` its LayerNorms, then each modality's adapter, `prompts`, `scales`,
        or `scale-caption` of one family, and `heads`. The vectors of words belong to no part: they come from the word
        table.
        """
        words = [f"words.{name}" for name in ("mean", "scale", "linear", "special", "type_embedding")]
        norms = [name for name, module in self.named_modules() if isinstance(module, nn.LayerNorm)]
        shared = [*words, "embedding_norm", "task_token", "layers", "final_norm", "readout"]
        parts = {"shared": shared, "norms": norms, **{name: [f"adapters.{name}"] for name in self.adapters}}
        parts |= {"prompts": ["prompts"]} if len(self.prompts) else {}
        parts |= {"scales": ["likelihoods"]} if len(self.likelihoods) else {}
        parts |= {f"scale-{family}": [f"likelihoods.{family}"] for family in self.likelihoods}
        return parts | ({"heads": ["heads"]} if len(self.heads) else {})

    def set_words(self, vectors_VD: Floats) -> None:
        """Take the vectors of the words, (V, D), and standardize their channels.

        Raises:
            DataError: another number of vectors or another width than the network was built for.
        """
        self.words.set_table(torch.from_numpy(vectors_VD))

    def standardize(self, name: str, tokens_ND: Floats) -> None:
        """Set the moments by which a modality's channels are standardized to those of some of its tokens, (N, D)."""
        self._adapter(name).standardize(torch.from_numpy(tokens_ND))

    def likelihood(self, family: str) -> Likelihood:
        """Return the likelihood of a family of tasks.

        A family that was never trained has the initial scale, which does not change the order of candidates.
        """
        likelihood = self.likelihoods[family] if family in self.likelihoods else Likelihood(is_learned=False)
        assert isinstance(likelihood, Likelihood)
        return likelihood

    def compare(
        self, queries_BP: Tensor, candidates: Candidates, *, family: str, head: str | None = None
    ) -> tuple[Tensor, Candidates]:
        """Return queries and candidates whose dot products, with the bias, are the logits.

        Args:
            queries_BP: representations of inputs.
            candidates: representations of candidates; with a head, all of its closed set.
            family: family of the task.
            head: name of a closed set; without a `LabelHead` for it, the likelihood alone decides.
        """
        scaled_BP, vectors_CP = self.likelihood(family).scaled(queries_BP, candidates.vectors_CP)
        if head is None or head not in self.heads:
            return scaled_BP, Candidates(vectors_CP, candidates.bias_C)
        module = self.heads[head]
        assert isinstance(module, LabelHead)
        extended_BP, vectors_CP, bias_C = module.extend(scaled_BP, vectors_CP, queries_BP)
        return extended_BP, Candidates(vectors_CP, bias_C)

    def encode(
        self,
        tokens: Mapping[str, Tokens] | None = None,
        words: Words | None = None,
        *,
        side: Side = "input",
        read: ReadOut = "task",
    ) -> Tensor:
        """Encode B items, each a sequence of SPE, the tokens of each modality, and words; all see all.

        Args:
            tokens: modality -> tokens; may be empty, with words.
            words: words; with `BLANK` where something is to be predicted.
            side: which prompts are used.
            read: where representations are read.

        Returns:
            (B, P), or (number of blanks, P) in the order of items, then of words.

        Raises:
            DataError: a modality that the network has not, or tokens that do not fit its axis.
        """
        hidden_BSD, is_valid_BS = self.embed_context(tokens or {}, num_items=None if words is None else len(words[0]))
        num_context = hidden_BSD.shape[1]
        if words is not None:
            is_word_BL = valid_frames(words.lengths_B, words.numbers_BL.shape[1])
            hidden_BSD = torch.cat([hidden_BSD, self.embed_words(words.numbers_BL)], dim=1)
            is_valid_BS = torch.cat([is_valid_BS, is_word_BL], dim=1)
        mask = None if bool(is_valid_BS.all()) else is_valid_BS[:, None, None]
        if read == "task":
            return self.read(self._transform(hidden_BSD, is_valid_BS, mask, side, slice(0, 1)))[:, 0]
        if words is None:
            raise DataError("read=blank: expected words with blanks, got no words")
        hidden_BLD = self._transform(hidden_BSD, is_valid_BS, mask, side, slice(num_context, None))
        return self.read(hidden_BLD[(words.numbers_BL == BLANK) & is_word_BL])

    def encode_words(self, numbers_C: Tensor) -> Tensor:
        """Encode words as candidates, each as a text of one word: (C,) int64 -> (C, P)."""
        return self.encode(words=Words(numbers_C[:, None], torch.ones_like(numbers_C)), side="target")

    def predict_words(self, tokens: Mapping[str, Tokens], words: Words) -> Tensor:
        """Encode a blank after each prefix of each text, in one pass: (B, L + 1, P).

        The two streams of the paper: SPE and tokens see each other; each word sees them and the words up to itself;
        then L + 1 blanks, of which the one of position t sees SPE, tokens, the words before t, and itself.

        Args:
            tokens: what the texts are about.
            words: words of the texts, without an end. Rows behind the length of a text are of no use.
        """
        num_words = words.numbers_BL.shape[1]
        context_BSD, is_valid_BS = self.embed_context(tokens, num_items=len(words.numbers_BL))
        blanks_BL = torch.full_like(words.numbers_BL[:, :1], BLANK).expand(-1, num_words + 1)
        streams = [context_BSD, self.embed_words(words.numbers_BL), self.embed_words(blanks_BL)]
        num_context = context_BSD.shape[1]
        mask = two_streams(num_context, num_words, device=context_BSD.device)[None, None]
        is_word_BL = valid_frames(words.lengths_B, num_words)
        is_blank_BL = valid_frames(words.lengths_B + 1, num_words + 1)
        if not bool(is_valid_BS.all()):  # only of the context: no blank sees a word behind its own
            others_BS = is_valid_BS.new_ones(len(is_valid_BS), 2 * num_words + 1)
            mask = mask & torch.cat([is_valid_BS, others_BS], dim=1)[:, None, None]
        is_valid_BS = torch.cat([is_valid_BS, is_word_BL, is_blank_BL], dim=1)
        read = slice(num_context + num_words, None)
        return self.read(self._transform(torch.cat(streams, dim=1), is_valid_BS, mask, "input", read))

    def embed_context(self, tokens: Mapping[str, Tokens], *, num_items: int | None = None) -> tuple[Tensor, Tensor]:
        """Embed SPE and tokens: (B, 1 + T, D), and which of them belong to the item: (B, 1 + T) bool."""
        unknown = [name for name in tokens if name not in self.adapters]
        if unknown:
            known = ", ".join(self.adapters) or "none"
            raise DataError(f"expected tokens of the modalities {known}, got {unknown[0]}")
        if not tokens and num_items is None:
            raise DataError("expected tokens or words, got neither")
        count = num_items if num_items is not None else len(next(iter(tokens.values())).values_BTD)
        task_D = self.task_token + self.prompts["task"] if "task" in self.prompts else self.task_token
        hidden = [task_D.expand(count, 1, -1)]
        is_valid = [torch.ones(count, 1, dtype=torch.bool, device=task_D.device)]
        for name in self.adapters:
            if name in tokens:
                values_BTD, lengths_B = tokens[name]
                embedded_BTD = self._adapter(name)(values_BTD)
                positions_TD = positions_of(self.axes[name], values_BTD.shape[1], self.width, device=task_D.device)
                hidden.append(self.embedding_norm(embedded_BTD + positions_TD))
                num_tokens = values_BTD.shape[1]
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
        """Return the keys and values of a layer's prompts for one item; None if there are none."""
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
        """Apply all layers to what is valid; the last one only to the positions that are read."""
        packing = Packing.of(is_valid_BS)
        hidden = packing.pack(hidden_BSD)
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, SharedLayer)
            key_values = layer.key_values(hidden, packing)
            if number == len(self.layers) - 1:
                hidden, packing = packing.unpack(hidden)[:, read], Packing.of(is_valid_BS[:, read])
                hidden = packing.pack(hidden)
                mask = mask[:, :, read] if mask is not None and mask.shape[2] > 1 else mask
            prompts = self.prompt_keys(number, side)
            hidden = layer(hidden, key_values, mask, prompts=prompts, packing=packing)
        return packing.unpack(hidden)

    def _adapter(self, name: str) -> "Adapter":
        adapter = self.adapters[name]
        assert isinstance(adapter, Adapter)
        return adapter


class Adapter(StandardizedInput):
    """Standardized channels, a linear layer, and the embedding of the type of a modality: D -> P."""

    def __init__(self, input_width: int, width: int) -> None:
        super().__init__(input_width)
        self.linear = nn.Linear(input_width, width)
        self.type_embedding = nn.Parameter(torch.randn(width) * 0.02)

    def forward(self, values: Tensor) -> Tensor:
        """Map vectors to the width of the transformer: (…, D) -> (…, P)."""
        return torch.as_tensor(self.linear((values.float() - self.mean) * self.scale) + self.type_embedding)


class WordAdapter(Adapter):
    """The adapter of words, given their numbers: vectors of a table, and learned ones of `BLANK`, `END`, `UNKNOWN`.

    Each distinct word of a batch passes the linear layer once.
    """

    def __init__(self, num_words: int, input_width: int, width: int) -> None:
        super().__init__(input_width, width)
        self.table: Tensor
        self.register_buffer("table", torch.zeros(num_words, input_width, dtype=torch.float16))
        self.special = nn.Parameter(torch.randn(NUM_SPECIAL, width) * 0.5)  # as large as mapped words

    def set_table(self, vectors_VD: Tensor) -> None:
        """Take the vectors of the words, and standardize by them."""
        if vectors_VD.shape != self.table.shape:
            raise DataError(
                f"word table: expected {len(self.table):,} words of width {self.table.shape[1]}, got vectors of shape "
                f"{tuple(vectors_VD.shape)}; extract the words that the network was built for"
            )
        self.table = vectors_VD.to(torch.float16)
        self.standardize(self.table)

    def forward(self, numbers: Tensor) -> Tensor:
        """Embed words: (…) int64 -> (…, P)."""
        distinct, positions = torch.unique(numbers, return_inverse=True)
        rows = (distinct - NUM_SPECIAL).clamp(min=0)
        if not len(self.table):
            return embedding(numbers, self.special) + self.type_embedding
        mapped_ND = super().forward(self.table[rows])
        special_ND = embedding(distinct.clamp(max=NUM_SPECIAL - 1), self.special) + self.type_embedding
        return embedding(positions, torch.where((distinct < NUM_SPECIAL)[:, None], special_ND, mapped_ND))


class SharedLayer(nn.Module):
    """Attention and a feed-forward block, each with a LayerNorm before it."""

    def __init__(self, width: int, sizes: LayerSizes) -> None:
        super().__init__()
        self.num_heads, self.dropout = sizes.num_heads, sizes.dropout
        self.attention_norm, self.hidden_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, width)
        self.hidden = nn.Sequential(
            nn.Linear(width, sizes.feed_forward),
            nn.GELU(),
            nn.Dropout(sizes.dropout),
            nn.Linear(sizes.feed_forward, width),
        )
        self.drop = nn.Dropout(sizes.dropout)

    def key_values(self, hidden: Tensor, packing: "Packing | None" = None) -> KeysValues:
        """Compute the keys and values of positions, (B, S, D) or packed."""
        both = self.key_value(self.attention_norm(hidden))
        keys, values = (both if packing is None else packing.unpack(both)).chunk(2, dim=-1)
        return self._heads(keys), self._heads(values)

    def forward(
        self,
        hidden: Tensor,
        key_values: KeysValues,
        mask: Tensor | None = None,
        *,
        prompts: KeysValues | None = None,
        packing: "Packing | None" = None,
    ) -> Tensor:
        """Compute the next hidden states of some positions: (B, S, D), or packed.

        Args:
            hidden: (B, S, D), or packed.
            key_values: keys and values of all positions that they may see.
            mask: bool, broadcast to (B, 1, S, number of keys), True where a position sees a key; None: everywhere.
            prompts: keys and values of one item that all positions of all items see besides.
            packing: how `hidden` is packed; None: it is not.
        """
        keys, values = key_values
        packing = packing or Packing()
        if prompts is not None:
            keys, values = (
                torch.cat([prompt.expand(len(keys), -1, -1, -1), others], dim=2)
                for prompt, others in zip(prompts, (keys, values), strict=True)
            )
            if mask is not None:
                mask = torch.cat([mask.new_ones(*mask.shape[:3], prompts[0].shape[2]), mask], dim=3)
        attended = scaled_dot_product_attention(
            self._heads(packing.unpack(self.query(self.attention_norm(hidden)))),
            keys,
            values,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
        )
        hidden = hidden + self.drop(self.output(packing.pack(attended.transpose(1, 2).flatten(2))))
        return torch.as_tensor(hidden + self.drop(self.hidden(self.hidden_norm(hidden))))

    def _heads(self, values_BSD: Tensor) -> Tensor:
        shape_BSHK = (*values_BSD.shape[:2], self.num_heads, values_BSD.shape[2] // self.num_heads)
        return values_BSD.view(shape_BSHK).transpose(1, 2)


class Packing(NamedTuple):
    """The valid positions of a padded batch, one after another: all layers but attention skip the padding.

    Args:
        rows_M: (M,) int64, numbers of the valid positions; None: all are, and nothing is moved.
        shape: B and S.
    """

    rows_M: Tensor | None = None
    shape: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, is_valid_BS: Tensor) -> "Packing":
        """Return the packing of a batch with these valid positions."""
        if bool(is_valid_BS.all()):
            return cls()
        return cls(torch.nonzero(is_valid_BS.flatten())[:, 0], (is_valid_BS.shape[0], is_valid_BS.shape[1]))

    def pack(self, values_BSD: Tensor) -> Tensor:
        """Return the values of valid positions: (M, D), or (B, S, D) if all are."""
        if self.rows_M is None:
            return values_BSD
        packed_MD: Tensor = _Pack.apply(values_BSD.flatten(0, 1), self.rows_M)  # type: ignore[no-untyped-call]
        return packed_MD

    def unpack(self, values: Tensor) -> Tensor:
        """Return packed values at their places, and zeros elsewhere: (B, S, D)."""
        if self.rows_M is None:
            return values
        num_rows = self.shape[0] * self.shape[1]
        unpacked_ND: Tensor = _Unpack.apply(values, self.rows_M, num_rows)  # type: ignore[no-untyped-call]
        return unpacked_ND.view(*self.shape, -1)


class _Pack(torch.autograd.Function):
    # The backward pass of indexing adds up, in any order with several threads; here each row is there once.
    @staticmethod
    def forward(ctx: Any, values_ND: Tensor, rows_M: Tensor) -> Tensor:
        ctx.save_for_backward(rows_M)
        ctx.num_rows = len(values_ND)
        return values_ND[rows_M]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.new_zeros(ctx.num_rows, gradient.shape[1]).index_copy_(0, ctx.saved_tensors[0], gradient), None


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values_MD: Tensor, rows_M: Tensor, num_rows: int) -> Tensor:
        ctx.save_for_backward(rows_M)
        return values_MD.new_zeros(num_rows, values_MD.shape[1]).index_copy_(0, rows_M, values_MD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient[ctx.saved_tensors[0]], None, None


class LabelHead(nn.Module):
    """What prompt tuning adds to the logits of a closed set of candidates: w · logit + W · representation + b.

    It starts from w = 1, W = 0 and b = 0, where it changes nothing.
    """

    def __init__(self, width: int, num_candidates: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.linear = nn.Linear(width, num_candidates)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def extend(self, scaled_BP: Tensor, vectors_CP: Tensor, queries_BP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, candidates and bias whose dot products are the new logits, given those of a `Likelihood`."""
        queries = torch.cat([self.weight * scaled_BP, queries_BP], dim=1)
        return queries, torch.cat([vectors_CP, self.linear.weight], dim=1), self.linear.bias


def two_streams(num_context: int, num_words: int, *, device: torch.device | None = None) -> Tensor:
    """Return which position sees which in `SharedNetwork.predict_words`: (S, S) bool, S = context + words + blanks."""
    order_L = torch.arange(num_words + 1, device=device)
    words_L = order_L[:num_words]
    sees = torch.zeros(num_context + 2 * num_words + 1, num_context + 2 * num_words + 1, dtype=torch.bool)
    sees = sees.to(device)
    words, blanks = slice(num_context, num_context + num_words), slice(num_context + num_words, None)
    sees[:, :num_context] = True
    sees[words, words] = words_L[:, None] >= words_L
    sees[blanks, words] = order_L[:, None] > words_L
    sees[blanks, blanks] = torch.eye(num_words + 1, dtype=torch.bool, device=device)
    return sees


def positions_of(axis: Axis | None, num_tokens: int, width: int, *, device: torch.device | None = None) -> Tensor:
    """Compute the positions of tokens by their axis: (T, D) float32.

    Cells of a grid have sinusoids of their row and of their column side by side, by where their centers are in the
    image, so that grids of several sizes or boxes agree. Frames have sinusoids of their time. Others are counted.

    Raises:
        DataError: a grid of another number of tokens.
    """
    if axis is not None and axis.rows is not None and axis.columns is not None:
        if axis.rows * axis.columns != num_tokens:
            raise DataError(
                f"expected {axis.rows} x {axis.columns} tokens of a grid, got {num_tokens}; read the feature that the "
                "network was built for"
            )
        x0, y0, x1, y1 = axis.box or (0.0, 0.0, 1.0, 1.0)
        ys = _IMAGE_SIDE * (y0 + (y1 - y0) * (torch.arange(axis.rows, device=device) + 0.5) / axis.rows)
        xs = _IMAGE_SIDE * (x0 + (x1 - x0) * (torch.arange(axis.columns, device=device) + 0.5) / axis.columns)
        of_rows, of_columns = sinusoids_at(ys, width // 2), sinusoids_at(xs, width // 2)
        shape = (axis.rows, axis.columns, width // 2)
        both = [of_rows[:, None].expand(shape), of_columns[None].expand(shape)]
        return torch.cat(both, dim=-1).flatten(0, 1)
    if axis is not None and axis.rate_hz is not None:
        seconds = (axis.start_s or 0.0) + torch.arange(num_tokens, device=device) / axis.rate_hz
        return sinusoids_at(_RATE_HZ * seconds, width)
    return sinusoids(num_tokens, width, device=device)


def _read_axis(record: Mapping[str, Any] | None) -> Axis | None:
    return None if record is None else Axis.from_json(record)


def _prompts(num_prompts: int, num_layers: int, width: int) -> dict[str, nn.Parameter]:
    """Return prompts per layer for inputs and for candidates, and the bias of SPE, which starts at zero."""
    if not num_prompts:
        return {}
    sides = {side: nn.Parameter(torch.randn(num_layers, num_prompts, width) * 0.02) for side in ("input", "target")}
    return {**sides, "task": nn.Parameter(torch.zeros(width))}
