"""A T5's layers on real tokens alone, for a CPU: pads cost no operations there.

transformers computes [B, T] tokens, pads included; on short lines they are a third. Here the tokens
of a batch stand in one row, [N, C], and only attention sees them by sequence again. The modules are
transformers' own, called one by one, so weights, hooks and results are theirs.

Products of bf16 are made by code that oneDNN writes for each shape, in milliseconds. So that it can
be used again, rows of zeros are put behind the tokens: R rows of few different numbers.

Shapes: B sequences, T tokens, N tokens that are no pads, R >= N rows, H heads, Q width of a head,
I = H Q, S tokens attended to, M memory length, C model width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a batch lie.

    Attributes:
        real_BT: bool [B, T], what is no pad.
        places: int64 [N], where each token lies in the flattened batch; one at least.
    """

    real_BT: Tensor
    places: Tensor

    @classmethod
    def of(cls, real_BT: Tensor) -> "Layout":
        """The layout of what is real, which is looked for."""
        return cls._with(real_BT, places_of(real_BT))

    @classmethod
    def at(cls, places_N: Tensor, shape: Sequence[int]) -> "Layout":
        """The layout of tokens at these places of [B, T]."""
        real_P = torch.zeros(math.prod(shape), dtype=torch.bool, device=places_N.device)
        return cls._with(real_P.index_fill(0, places_N, True).view(*shape), places_N)

    @classmethod
    def _with(cls, real_BT: Tensor, places_N: Tensor) -> "Layout":
        return cls(real_BT, places_N if len(places_N) else places_N.new_zeros(1))

    @cached_property
    def tokens(self) -> Tensor:
        """int64 [B, T], the token of each place; pads have others, which no token may see."""
        return (self.real_BT.flatten().cumsum(0) - 1).clamp_(min=0).view(self.real_BT.shape)

    def pack(self, x_BT: Tensor) -> Tensor:
        """[B, T, ...] to [N, ...]."""
        return x_BT.flatten(0, 1)[self.places]

    def unpack(self, x_NC: Tensor) -> Tensor:
        """[N, C] to [B, T, C], zeros in place of pads."""
        rows, width = self.real_BT.shape
        x_PC = x_NC.new_zeros(rows * width, x_NC.shape[1])
        return x_PC.index_copy(0, self.places, x_NC).unflatten(0, (rows, width))

    def by_head(self, heads: int) -> tuple[Tensor, Tensor]:
        """The same for the heads of tokens: rows of [N H, Q] in [B H T, Q], and those in it."""
        width = self.real_BT.shape[1]
        head_H = torch.arange(heads, device=self.places.device)
        head_BHT = self.tokens[:, None] * heads + head_H[:, None]
        row_N, column_N = self.places // width, self.places % width
        place_NH = (row_N[:, None] * heads + head_H) * width + column_N[:, None]
        return head_BHT.flatten(), place_NH.flatten()


def places_of(real_BT: Tensor) -> Tensor:
    """int64 [N], where what is real lies in the flattened batch; the host waits for its number."""
    return real_BT.flatten().nonzero()[:, 0]


def rounded(tokens: int) -> int:
    """A number of rows that is no more than a thirty-second larger, or than 7."""
    step = 2 ** max(3, tokens.bit_length() - 6)
    return -(-tokens // step) * step


def _select(flat: Tensor, place: Tensor, rows: int) -> Tensor:
    """Rows at places, [rows, Q], and zeros behind them."""
    found = flat.new_empty(rows, flat.shape[1])
    torch.index_select(flat, 0, place, out=found[: len(place)])
    found[len(place) :] = 0
    return found


class _ToSequences(torch.autograd.Function):
    """[R, I] to [B H, T, Q]; whatever lies at pads reaches no token, so no gradient leaves them."""

    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, by_head: tuple[Tensor, Tensor], shape: Any) -> Tensor:
        ctx.place, ctx.shape = by_head[1], x_RI.shape
        return x_RI.reshape(-1, shape[-1]).index_select(0, by_head[0]).view(shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        flat = gradients[0].reshape(-1, gradients[0].shape[-1])
        rows = math.prod(ctx.shape) // flat.shape[1]
        return _select(flat, ctx.place, rows).view(ctx.shape), None, None


class _ToTokens(torch.autograd.Function):
    """[B H, T, Q] to [R, I]; pads have no gradient."""

    @staticmethod
    def forward(ctx: Any, x_GTQ: Tensor, by_head: tuple[Tensor, Tensor], shape: Any) -> Tensor:
        ctx.place, ctx.shape = by_head[1], x_GTQ.shape
        flat = x_GTQ.reshape(-1, x_GTQ.shape[-1])
        return _select(flat, by_head[1], math.prod(shape) // flat.shape[1]).view(shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        flat = gradients[0].reshape(-1, ctx.shape[-1])
        x_GTQ = flat.new_zeros(ctx.shape)
        own = flat[: len(ctx.place)]
        x_GTQ.view(-1, ctx.shape[-1]).index_copy_(0, ctx.place, own)
        return x_GTQ, None, None


def encode(stack: nn.Module, ids_N: Tensor, layout: Layout) -> Tensor:
    """The states of an encoder, [N, C].

    Args:
        stack: of a transformers T5, mT5 or UMT5.
        ids_N: int64, the tokens of `layout`.
    """
    return _run(stack, ids_N, layout, None)[: len(ids_N)]


def decode(stack: nn.Module, ids_N: Tensor, layout: Layout, memory_BMC: Tensor) -> Tensor:
    """The states of a decoder, [R, C]; each token sees those before it, and all of the memory."""
    return _run(stack, ids_N, layout, memory_BMC)


def _run(stack: Any, ids_N: Tensor, layout: Layout, memory_BMC: Tensor | None) -> Tensor:
    by_head = layout.by_head(stack.config.num_heads)
    x_RC = stack.dropout(stack.embed_tokens(ids_N))
    if x_RC.dtype == torch.bfloat16:
        x_RC = nn.functional.pad(x_RC, (0, 0, 0, rounded(len(ids_N)) - len(ids_N)))
    bias_GTT = None
    for block in stack.block:
        own = block.layer[0]
        if own.SelfAttention.has_relative_attention_bias:
            bias_GTT = _bias(own.SelfAttention, layout, causal=memory_BMC is not None)
        x_RC = x_RC + own.dropout(
            _attend(own.SelfAttention, own.layer_norm(x_RC), layout, by_head, bias_GTT)
        )
        if memory_BMC is not None:
            cross = block.layer[1]
            x_RC = x_RC + cross.dropout(
                _attend(
                    cross.EncDecAttention,
                    cross.layer_norm(x_RC),
                    layout,
                    by_head,
                    memory_BMC=memory_BMC,
                )
            )
        x_RC = block.layer[-1](x_RC)
    return stack.dropout(stack.final_layer_norm(x_RC))


def _bias(attention: Any, layout: Layout, *, causal: bool) -> Tensor:
    """What is added to the scores, [B H, T, T]: by relative position, and what hides tokens."""
    rows, width = layout.real_BT.shape
    bias_1HTT = attention.compute_bias(width, width, device=layout.real_BT.device)
    if causal:  # pads come last
        seen = layout.real_BT.new_ones(width, width).tril()
    else:
        seen = layout.real_BT[:, None, None, :]
    bias_BHTT = bias_1HTT.masked_fill(~seen, torch.finfo(bias_1HTT.dtype).min)
    return bias_BHTT.expand(rows, -1, -1, -1).reshape(-1, width, width)


def _attend(
    attention: Any,
    x_RC: Tensor,
    layout: Layout,
    by_head: tuple[Tensor, Tensor],
    bias_GTS: Tensor | None = None,
    memory_BMC: Tensor | None = None,
) -> Tensor:
    """T5's attention, whose scores are not scaled: of tokens to their own sequence's, or to its
    memory's."""
    heads, width = attention.n_heads, attention.key_value_proj_dim
    rows, length = layout.real_BT.shape
    shape = (rows * heads, length, width)
    query_GTQ = _ToSequences.apply(attention.q(x_RC), by_head, shape)
    if memory_BMC is None:
        key_GSQ = _ToSequences.apply(attention.k(x_RC), by_head, shape)
        value_GSQ = _ToSequences.apply(attention.v(x_RC), by_head, shape)
    else:
        key_GSQ, value_GSQ = (
            projected(memory_BMC).unflatten(2, (heads, width)).transpose(1, 2).flatten(0, 1)
            for projected in (attention.k, attention.v)
        )
    if bias_GTS is None:
        score_GTS = torch.bmm(query_GTQ, key_GSQ.mT)
    else:
        score_GTS = torch.baddbmm(bias_GTS, query_GTQ, key_GSQ.mT)
    share_GTS = nn.functional.dropout(score_GTS.softmax(-1), attention.dropout, attention.training)
    wide = (len(x_RC), heads * width)
    return attention.o(_ToTokens.apply(torch.bmm(share_GTS, value_GSQ), by_head, wide))
