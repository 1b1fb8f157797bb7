"""Layers of the shared transformer: adapters with positions, attention to keys and prompts, and no work on padding."""

from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding, scaled_dot_product_attention

from embedcache.errors import DataError
from embedcache.store.layout import Axis
from pipelines.sequence import LayerSizes, StandardizedInput, sinusoids, sinusoids_at
from pipelines.uniperceiver.words import NUM_SPECIAL

KeysValues: TypeAlias = tuple[Tensor, Tensor]
"""Keys and values of S positions: two (B, heads, S, D / heads)."""

_IMAGE_SIDE = 16.0  # positions per side of an image
_RATE_HZ = 25.0  # positions per second


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
    """The adapter of words by their numbers: vectors of a table, and learned ones for `BLANK`, `END` and `UNKNOWN`.

    Each distinct word of a batch passes the linear layer once.
    """

    def __init__(self, num_words: int, input_width: int, width: int) -> None:
        super().__init__(input_width, width)
        self.table: Tensor
        self.register_buffer("table", torch.zeros(num_words, input_width, dtype=torch.float16))
        self.special = nn.Parameter(torch.randn(NUM_SPECIAL, width) * 0.5)  # as large as mapped words

    def set_table(self, vectors_VD: Tensor) -> None:
        """Set the vectors of the words, (V, D), and standardize their channels."""
        self.table = vectors_VD.to(torch.float16)
        self.standardize(self.table)

    def forward(self, numbers: Tensor) -> Tensor:
        """Embed words: (…) int64 -> (…, P)."""
        distinct, positions = torch.unique(numbers, return_inverse=True)
        rows = (distinct - NUM_SPECIAL).clamp(min=0)

        mapped_ND = super().forward(self.table[rows])
        special_ND = embedding(distinct.clamp(max=NUM_SPECIAL - 1), self.special) + self.type_embedding
        return embedding(positions, torch.where((distinct < NUM_SPECIAL)[:, None], special_ND, mapped_ND))


def positions_of(axis: Axis | None, num_tokens: int, width: int, *, device: torch.device | None = None) -> Tensor:
    """Compute the position embeddings of tokens from their axis: (T, D) float32.

    A cell of a grid has the sinusoids of its row and its column. They depend on the place of its center in the image,
    so that grids of different sizes or boxes agree. A frame has the sinusoids of its time. Other tokens are numbered.

    Raises:
        DataError: a grid has another number of tokens.
    """
    if axis is not None and axis.rows is not None and axis.columns is not None:
        if axis.rows * axis.columns != num_tokens:
            raise DataError(
                f"expected {axis.rows} x {axis.columns} tokens of a grid, got {num_tokens}; read that feature"
            )

        x0, y0, x1, y1 = axis.box or (0.0, 0.0, 1.0, 1.0)

        # Positions of the centers of cells, in sixteenths of the image.
        ys = _IMAGE_SIDE * (y0 + (y1 - y0) * (torch.arange(axis.rows, device=device) + 0.5) / axis.rows)
        xs = _IMAGE_SIDE * (x0 + (x1 - x0) * (torch.arange(axis.columns, device=device) + 0.5) / axis.columns)

        shape = (axis.rows, axis.columns, width // 2)
        rows_RCD = sinusoids_at(ys, width // 2)[:, None].expand(shape)
        columns_RCD = sinusoids_at(xs, width // 2)[None].expand(shape)
        return torch.cat([rows_RCD, columns_RCD], dim=-1).flatten(0, 1)

    if axis is not None and axis.rate_hz is not None:
        seconds = (axis.start_s or 0.0) + torch.arange(num_tokens, device=device) / axis.rate_hz
        return sinusoids_at(_RATE_HZ * seconds, width)
    return sinusoids(num_tokens, width, device=device)


class SharedLayer(nn.Module):
    """Attention and a feed-forward block, each with a LayerNorm before it."""

    def __init__(self, width: int, sizes: LayerSizes) -> None:
        super().__init__()
        self.num_heads = sizes.num_heads
        self.dropout = sizes.dropout

        self.attention_norm = nn.LayerNorm(width)
        self.hidden_norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
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
        key_values = self.key_value(self.attention_norm(hidden))
        keys, values = (key_values if packing is None else packing.unpack(key_values)).chunk(2, dim=-1)
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
            key_values: keys and values of all positions.
            mask: bool, broadcast to (B, 1, S, number of keys), True if a position sees a key. If None, it sees all.
            prompts: keys and values that all positions of all items see in addition.
            packing: packing of `hidden`, or None if it is not packed.
        """
        keys, values = key_values
        packing = packing or Packing()
        if prompts is not None:
            prompt_keys, prompt_values = prompts
            keys = torch.cat([prompt_keys.expand(len(keys), -1, -1, -1), keys], dim=2)
            values = torch.cat([prompt_values.expand(len(values), -1, -1, -1), values], dim=2)
            if mask is not None:
                mask = torch.cat([mask.new_ones(*mask.shape[:3], prompt_keys.shape[2]), mask], dim=3)

        attended = scaled_dot_product_attention(
            # Attention needs the padded form; everything else works on the packed positions.
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
    """The valid positions of a padded batch, one after another, so that all layers but attention skip the padding.

    Args:
        rows_M: (M,) int64, numbers of the valid positions; None if all are valid, and nothing is moved.
        shape: B and S.
    """

    rows_M: Tensor | None = None
    shape: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, is_valid_BS: Tensor) -> "Packing":
        """Return the packing of a batch from its valid positions."""
        if bool(is_valid_BS.all()):
            return cls()
        return cls(torch.nonzero(is_valid_BS.flatten())[:, 0], (is_valid_BS.shape[0], is_valid_BS.shape[1]))

    def pack(self, values_BSD: Tensor) -> Tensor:
        """Return the values of valid positions: (M, D), or (B, S, D) if all are valid."""
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
    # The backward pass of indexing adds rows in any order with several threads. Here each row occurs once.
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
