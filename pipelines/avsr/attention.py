"""A transformer decoder over symbols that attends to encoded frames; decoding steps keep keys and values."""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from pipelines.avsr.layers import FrameReadout
from pipelines.sequence import LayerSizes, sinusoids


class AttentionDecoder(nn.Module):
    """Embedded symbols with positions, decoder layers, and a readout of the next symbol.

    Args:
        width: width of the frames and of the decoder.
        num_symbols: number of symbols, with the one that starts and ends a transcript.
    """

    def __init__(self, width: int, num_symbols: int, num_layers: int, sizes: LayerSizes) -> None:
        super().__init__()
        self.width = width
        self.embedding = nn.Embedding(num_symbols, width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self.layers = nn.ModuleList(DecoderLayer(width, sizes) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        self.readout = FrameReadout(width, num_symbols)

    def forward(self, symbols_BL: Tensor, frames_BTP: Tensor, is_valid_BT: Tensor) -> Tensor:
        """Compute the logits of the symbol after each prefix: (B, L, C), given the symbols before it.

        Args:
            symbols_BL: (B, L) int64, the start symbol first.
            frames_BTP: encoded frames.
            is_valid_BT: (B, T) bool.
        """
        hidden_BLP = self.embed(symbols_BL, 0)
        mask_B11T = is_valid_BT[:, None, None]

        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            keys, values = layer.own_keys(hidden_BLP)
            memory = layer.frame_keys(frames_BTP)
            hidden_BLP = layer(hidden_BLP, (keys, values), memory, mask_B11T, is_causal=True)
        return self.logits(hidden_BLP)

    def embed(self, symbols_BL: Tensor, first: int) -> Tensor:
        """Embed symbols whose positions start at `first`."""
        positions_LP = sinusoids(first + symbols_BL.shape[1], self.width, device=symbols_BL.device)[first:]
        return torch.as_tensor(self.embedding(symbols_BL) * self.width**0.5 + positions_LP)

    def logits(self, hidden_BLP: Tensor) -> Tensor:
        """Read out the next symbol."""
        logits_BLC: Tensor = self.readout(self.norm(hidden_BLP))
        return logits_BLC

    def steps(self, frames_BTP: Tensor, is_valid_BT: Tensor) -> "DecodingSteps":
        """Return a function that scores the hypotheses of B items step by step, see `pipelines.beam.StepDecoder`."""
        return DecodingSteps(self, frames_BTP, is_valid_BT)


class DecoderLayer(nn.Module):
    """Attention to earlier symbols, attention to frames, and a feed-forward block, each after a normalization."""

    def __init__(self, width: int, sizes: LayerSizes) -> None:
        super().__init__()
        self.num_heads = sizes.num_heads
        self.dropout = sizes.dropout

        self.own_norm = nn.LayerNorm(width)
        self.frame_norm = nn.LayerNorm(width)
        self.hidden_norm = nn.LayerNorm(width)

        self.own_query = nn.Linear(width, width)
        self.own_key_value = nn.Linear(width, 2 * width)
        self.own_output = nn.Linear(width, width)

        # Attention to frames has its own projections, as its keys come from the encoder.
        self.frame_query = nn.Linear(width, width)
        self.frame_key_value = nn.Linear(width, 2 * width)
        self.frame_output = nn.Linear(width, width)

        self.hidden = nn.Sequential(
            nn.Linear(width, sizes.feed_forward),
            nn.ReLU(),
            nn.Dropout(sizes.dropout),
            nn.Linear(sizes.feed_forward, width),
        )
        self.drop = nn.Dropout(sizes.dropout)

    def own_keys(self, hidden_BLP: Tensor) -> tuple[Tensor, Tensor]:
        """Compute keys and values of symbols: two (B, heads, L, P / heads)."""
        return self._key_values(self.own_key_value(self.own_norm(hidden_BLP)))

    def frame_keys(self, frames_BTP: Tensor) -> tuple[Tensor, Tensor]:
        """Compute keys and values of frames: two (B, heads, T, P / heads)."""
        return self._key_values(self.frame_key_value(frames_BTP))

    def forward(
        self,
        hidden_BLP: Tensor,
        own: tuple[Tensor, Tensor],
        frames: tuple[Tensor, Tensor],
        mask_B11T: Tensor,
        *,
        is_causal: bool,
    ) -> Tensor:
        """Compute the next hidden states of symbols, given keys and values.

        Args:
            own: keys and values of these symbols and of all earlier ones.
            frames: keys and values of the frames.
            is_causal: `own` belongs to these symbols only, so a symbol must not see later ones.
        """
        hidden_BLP = self.attend_symbols(hidden_BLP, own, is_causal=is_causal)
        return self.transform(self.attend_frames(hidden_BLP, frames, mask_B11T))

    def attend_symbols(self, hidden_BLP: Tensor, own: tuple[Tensor, Tensor], *, is_causal: bool) -> Tensor:
        """Attend to symbols: the first part of the layer."""
        queries = self._heads(self.own_query(self.own_norm(hidden_BLP)))
        return hidden_BLP + self._attend(queries, own, None, self.own_output, is_causal=is_causal)

    def attend_frames(self, hidden_BLP: Tensor, frames: tuple[Tensor, Tensor], mask_B11T: Tensor) -> Tensor:
        """Attend to frames: the second part of the layer. The positions do not see each other."""
        queries = self._heads(self.frame_query(self.frame_norm(hidden_BLP)))
        return hidden_BLP + self._attend(queries, frames, mask_B11T, self.frame_output)

    def transform(self, hidden_BLP: Tensor) -> Tensor:
        """Apply the feed-forward block: the last part of the layer."""
        return torch.as_tensor(hidden_BLP + self.drop(self.hidden(self.hidden_norm(hidden_BLP))))

    def _attend(
        self,
        queries: Tensor,
        key_values: tuple[Tensor, Tensor],
        mask: Tensor | None,
        output: nn.Module,
        *,
        is_causal: bool = False,
    ) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        attended = scaled_dot_product_attention(
            queries, *key_values, attn_mask=mask, dropout_p=dropout, is_causal=is_causal
        )
        joined_BLP = attended.transpose(1, 2).flatten(2)
        return torch.as_tensor(self.drop(output(joined_BLP)))

    def _heads(self, values_BLP: Tensor) -> Tensor:
        return values_BLP.view(*values_BLP.shape[:2], self.num_heads, -1).transpose(1, 2)

    def _key_values(self, both: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = both.chunk(2, dim=-1)
        return self._heads(keys), self._heads(values)


class DecodingSteps:
    """The hypotheses of B items, with the keys and values of their symbols.

    All hypotheses of an item attend to its frames together, so frames are not copied per hypothesis.
    Frames of items without hypotheses are dropped. Memory: two (B, heads, T, P / heads) per layer for the frames, and
    the keys and values of the symbols.
    """

    def __init__(self, decoder: AttentionDecoder, frames_BTP: Tensor, is_valid_BT: Tensor) -> None:
        self._decoder = decoder

        # The keys and values of the frames are the same in every step, so they are computed once.
        self._layers = [layer for layer in decoder.layers if isinstance(layer, DecoderLayer)]
        self._frames = [layer.frame_keys(frames_BTP) for layer in self._layers]
        self._mask_B11T = is_valid_BT[:, None, None]
        self._items_N = torch.arange(len(frames_BTP), device=frames_BTP.device)
        self._symbol_keys: list[tuple[Tensor, Tensor]] = []
        self._num_symbols = 0

    @torch.no_grad()
    def __call__(self, symbols_N: Tensor, parents_N: Tensor) -> Tensor:
        """Append a symbol to N hypotheses and return the log-probabilities of the next one, (N, C) float32.

        Args:
            symbols_N: (N,) int64.
            parents_N: (N,) int64, the hypothesis of the previous call that each one extends; at first, its item.
        """
        self._keep_items(self._items_N[parents_N])

        ranks_N = _ranks(self._items_N)
        grid_shape = (len(self._mask_B11T), int(ranks_N.max()) + 1, self._decoder.width)
        hidden_N1P = self._decoder.embed(symbols_N[:, None], self._num_symbols)

        symbol_keys = []
        for number, layer in enumerate(self._layers):
            keys, values = layer.own_keys(hidden_N1P)
            if self._symbol_keys:
                earlier_keys, earlier_values = self._symbol_keys[number]
                keys = torch.cat([earlier_keys[parents_N], keys], dim=2)
                values = torch.cat([earlier_values[parents_N], values], dim=2)
            symbol_keys.append((keys, values))
            hidden_N1P = layer.attend_symbols(hidden_N1P, symbol_keys[-1], is_causal=False)

            # The hypotheses of an item are queries of one attention, so that its frames are not copied for each.
            hidden_BKP = hidden_N1P.new_zeros(grid_shape)
            hidden_BKP[self._items_N, ranks_N] = hidden_N1P[:, 0]
            hidden_BKP = layer.attend_frames(hidden_BKP, self._frames[number], self._mask_B11T)
            hidden_N1P = layer.transform(hidden_BKP[self._items_N, ranks_N][:, None])

        self._symbol_keys = symbol_keys
        self._num_symbols += 1
        log_probs_NC: Tensor = self._decoder.logits(hidden_N1P)[:, 0].float().log_softmax(dim=-1)
        return log_probs_NC

    def _keep_items(self, items_N: Tensor) -> None:
        """Drop the frames of items without hypotheses, and renumber the other items."""
        used_B, self._items_N = torch.unique(items_N, return_inverse=True)
        if len(used_B) < len(self._mask_B11T):
            self._frames = [(keys[used_B], values[used_B]) for keys, values in self._frames]
            self._mask_B11T = self._mask_B11T[used_B]


def _ranks(items_N: Tensor) -> Tensor:
    """Return the number of each hypothesis among the hypotheses of its item, from 0: (N,)."""
    order_N = torch.argsort(items_N, stable=True)
    counts_B = torch.bincount(items_N)
    starts_B = counts_B.cumsum(0) - counts_B
    ranks_N = torch.empty_like(items_N)
    ranks_N[order_N] = torch.arange(len(items_N), device=items_N.device) - starts_B[items_N[order_N]]
    return ranks_N
