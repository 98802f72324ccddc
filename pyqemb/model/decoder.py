"""The packed decoder: embedding, blocks of attention and MLP around a residual stream, final norm.

The parts here are those of Qwen3; `families/` defines the parts of each model type. Parameter names are those of
Hugging Face's Qwen3Model.

Legend: T packed tokens, B sequences, S queries (T, or the last token of each sequence), U distinct ids, N query heads,
K key heads, D head dim, E hidden, I intermediate.
Source: Qwen3 technical report, arXiv 2505.09388, section 2.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pyqemb import ops
from pyqemb.data.batch import PackedBatch
from pyqemb.model.config import DecoderConfig
from pyqemb.model.distinct_tokens import DistinctTokens, distinct
from pyqemb.model.linear import Linear
from pyqemb.model.packed_tokens import PackedTokens
from pyqemb.model.query_subset import QuerySubset
from pyqemb.model.residual_stream import Boundaries, ResidualStream
from pyqemb.model.rope import Rotary


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed at least in float32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    @property
    def scale(self) -> torch.Tensor:
        """The factor of each feature."""
        return self.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x / rms(x) * scale, of the shape and dtype of x."""
        return ops.rms_norm(x, self.scale.to(x.dtype), self.eps)  # the dtypes differ under autocast

    def add_and_norm(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of the sum, and the sum."""
        x = x.to(residual.dtype)  # as above
        return ops.rms_norm(x, self.scale.to(x.dtype), self.eps, residual=residual)


class HeadNorm(RMSNorm):
    """RMSNorm of each head of q or k, then the rotary embedding."""

    def forward(self, x_TND: torch.Tensor, rotary: Rotary) -> torch.Tensor:  # type: ignore[override]
        """Normalize and rotate each head: [T, N, D] -> [T, N, D]."""
        return ops.qk_norm_rope(x_TND, self.scale.to(x_TND.dtype), rotary.cos, rotary.sin, self.eps)


class Rotation(nn.Module):
    """The rotary embedding alone."""

    def forward(self, x_TND: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        """Rotate each head: [T, N, D] -> [T, N, D]."""
        return ops.rope(x_TND, rotary.cos, rotary.sin)


class Attention(nn.Module):
    """Grouped-query attention inside each sequence, causal or bidirectional."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.head_dim, self.causal, self.rope = config.head_dim, config.is_causal, config.rope
        self.q_proj = Linear(config.hidden_size, queries, bias=config.qkv_bias)
        self.k_proj = Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.v_proj = Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.o_proj = Linear(queries, config.hidden_size, bias=config.output_bias)
        self.q_norm, self.k_norm = (
            HeadNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else Rotation() for _ in range(2)
        )

    def forward(self, x_TE: torch.Tensor, tokens: PackedTokens) -> torch.Tensor:
        """The input of o_proj, [S, N D]."""
        q_SND = self._heads(tokens.project_queries(self.q_proj, x_TE))
        k_TKD = self._heads(tokens.project(self.k_proj, x_TE))
        v_TKD = self._heads(tokens.project(self.v_proj, x_TE))
        q_SND, k_TKD = self.rotate(q_SND, k_TKD, tokens)
        return self.attend(q_SND, k_TKD, v_TKD, tokens.plan).flatten(1)

    def rotate(
        self, q_SND: torch.Tensor, k_TKD: torch.Tensor, tokens: PackedTokens
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The heads of q and k, normalized and rotated as the family does."""
        return (
            self.q_norm(q_SND, tokens.query_rotary(self.rope, self.head_dim)),
            self.k_norm(k_TKD, tokens.rotary(self.rope, self.head_dim)),
        )

    def attend(
        self, q_SND: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor, plan: ops.AttentionPlan
    ) -> torch.Tensor:
        """softmax(q k^T / sqrt(D)) v, [S, N, D]."""
        return ops.varlen_attention(q_SND, k_TKD, v_TKD, None, causal=self.causal, plan=plan)

    def _heads(self, x_TF: torch.Tensor) -> torch.Tensor:
        return x_TF.view(len(x_TF), x_TF.shape[1] // self.head_dim, self.head_dim)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x_SE: torch.Tensor) -> torch.Tensor:
        """The input of down_proj, [S, I]."""
        return ops.swiglu(self.gate_proj(x_SE), self.up_proj(x_SE))


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_TE: torch.Tensor, tokens: PackedTokens, stream: ResidualStream) -> torch.Tensor:
        """The residual stream of the queries after this layer, [S, E]."""
        attention, mlp = self.self_attn, self.mlp
        attended = attention(self.input_layernorm(x_TE), tokens)
        x_SE = tokens.queries(x_TE)
        normed_SE, x_SE = stream.add_and_norm(x_SE, attention.o_proj, attended, self.post_attention_layernorm)
        return stream.add(x_SE, mlp.down_proj, mlp(normed_SE))


class TokenEmbedding(nn.Embedding):
    """One row for each token id, independent of the position."""

    def __init__(self, config: DecoderConfig):
        super().__init__(config.vocab_size, config.hidden_size)

    def forward(self, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor | None]:  # type: ignore[override]
        """Rows of the distinct ids [U, E] and the row index of each token; or rows of all tokens [T, E] and None."""
        ids_U, inverse_T = distinct(batch.input_ids_T)
        return super().forward(ids_U), inverse_T


def final_norm(config: DecoderConfig) -> RMSNorm:
    """The norm after the last layer."""
    return RMSNorm(config.hidden_size, config.rms_norm_eps)


def without_prefix(name: str) -> str | None:
    """The name of a tensor of a checkpoint without the prefix of a language model.

    None: no hidden state depends on the tensor, and it is not read.
    """
    return name.removeprefix("model.")


@dataclass(frozen=True)
class Family:
    """The parts of the decoder or encoder of one model type.

    Attributes:
        config: reads and writes its config.json.
        block: makes a layer from the configuration and the layer's number.
        embedding: see `TokenEmbedding`.
        norm: see `final_norm`.
        weight_names: parts of our parameter names, and their names in a checkpoint.
        read_name: see `without_prefix`.
    """

    config: type[DecoderConfig]
    block: Callable[[DecoderConfig, int], nn.Module] = Block
    embedding: Callable[[DecoderConfig], TokenEmbedding] = TokenEmbedding
    norm: Callable[[DecoderConfig], nn.Module] = final_norm
    weight_names: Mapping[str, str] = field(default_factory=dict)
    read_name: Callable[[str], str | None] = without_prefix

    def stored_name(self, name: str) -> str:
        """The name of a parameter in a checkpoint."""
        for ours, stored in self.weight_names.items():
            name = name.replace(ours, stored)
        return name


class Decoder(nn.Module):
    """The decoder body: embeddings, blocks, final norm; no language-model head.

    `checkpointing` = True recomputes each block in the backward pass instead of keeping its activations.
    """

    def __init__(self, config: DecoderConfig, family: Family):
        super().__init__()
        self.config, self.family = config, family
        self.checkpointing = False
        self.embed_tokens = family.embedding(config)
        self.layers = nn.ModuleList(family.block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = family.norm(config)

    def forward(
        self,
        batch: PackedBatch,
        *,
        only: Literal["first", "last"] | None = None,
        boundaries: Boundaries | None = None,
    ) -> torch.Tensor:
        """Hidden states [T, E] after the final norm.

        With `only` = "last": the last token of every non-empty sequence, [B', E], BEFORE the final norm, equal to these
        rows of the full pass. `batch.last_tokens()` gives the layout of the rows. With "first", which needs
        bidirectional attention: the first tokens. `boundaries` is filled, or read if it was filled by a pass over this
        batch with the same arguments.
        """
        x_TE, inverse_T = self.embed_tokens(batch)
        tokens = [PackedTokens.of(batch, x_TE.device, x_TE.dtype)] * len(self.layers)
        if inverse_T is not None:
            tokens[0] = DistinctTokens(tokens[0], inverse_T)
        if only is not None:
            tokens[-1] = QuerySubset(tokens[-1], batch, only)
        streams = [ResidualStream()] * len(tokens) if boundaries is None else boundaries.streams(len(tokens))
        for layer in zip(self.layers, tokens, streams, strict=True):
            x_TE = self._run(*layer, x_TE)
        return self.norm(x_TE) if only is None else x_TE

    def _run(self, block: nn.Module, tokens: PackedTokens, stream: ResidualStream, x_TE: torch.Tensor) -> torch.Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x_TE, tokens, stream, use_reentrant=False)
        return block(x_TE, tokens, stream)
