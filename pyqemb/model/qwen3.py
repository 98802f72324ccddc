"""Qwen3 over packed tokens: RMSNorm, grouped heads with per-head q/k norm and rotary embedding, SwiGLU. Its neighbours (Qwen2,
Llama, Mistral) are the same without that norm, with biases where their config.json says so.

Legend: T packed tokens, B sequences, S tokens that ask (T, or the last ones only), U distinct token ids, N query heads,
K key heads, D head dim, E hidden. Parameter names are those of Hugging Face's Qwen3Model.
Source: Qwen3 technical report, arXiv 2505.09388, section 2.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pyqemb import ops
from pyqemb.data.batch import PackedBatch
from pyqemb.model.config import Qwen3Config
from pyqemb.ops.linear import linear_onto_known


class Lora(nn.Module):
    """What a low-rank adapter adds to a product: scale (x A^T) B^T."""

    def __init__(self, a_RI: torch.Tensor, b_OR: torch.Tensor, scale: float, dropout: float = 0.0):
        super().__init__()
        self.A, self.B, self.scale, self.dropout = nn.Parameter(a_RI), nn.Parameter(b_OR), scale, nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.linear(ops.linear(self.dropout(x), self.A), self.B) * self.scale


class Linear(nn.Linear):
    """x W^T (+ b) on the library's op; plus what the adapter adds where it has one."""

    lora: Lora | None

    def __init__(self, inputs: int, outputs: int, bias: bool):
        super().__init__(inputs, outputs, bias)
        self.lora = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = ops.linear(x, self.weight)
        if self.bias is not None:
            product = product + self.bias.to(product.dtype)
        return product if self.lora is None else product + self.lora(x)

    def onto(self, x: torch.Tensor, residual: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        """residual + x W^T (+ b), known to be `total`: without the product, with its gradients."""
        if self.bias is not None:
            residual = residual + self.bias.to(residual.dtype)
        if self.lora is not None:
            residual = residual + self.lora(x)
        return linear_onto_known(x, self.weight.to(x.dtype), residual, total)  # they differ under autocast


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in float32 where the storage is narrower."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.rms_norm(x, self.weight.to(x.dtype), self.eps)  # they differ under autocast

    def after_adding(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The normed sum, and the sum."""
        x = x.to(residual.dtype)  # as above
        return ops.rms_norm(x, self.weight.to(x.dtype), self.eps, residual=residual)


@dataclass(frozen=True)
class Rotary:
    """cos and sin of every token's position, [T, D / 2], made once for all layers."""

    cos: torch.Tensor
    sin: torch.Tensor

    @classmethod
    def of(cls, positions_T: torch.Tensor, config: Qwen3Config, dtype: torch.dtype) -> "Rotary":
        angles = positions_T.float()[:, None] * config.rope.frequencies(config.head_dim, positions_T.device)
        # bf16 and fp16 heads are turned in float32; float64 ones keep the float32 angles that the checkpoints know.
        dtype = torch.promote_types(dtype, torch.float32)
        return cls(*((x * config.rope.scale).to(dtype) for x in (angles.cos(), angles.sin())))

    def at(self, tokens: torch.Tensor) -> "Rotary":
        return Rotary(self.cos[tokens], self.sin[tokens])


class HeadNorm(nn.Module):
    """RMSNorm of each head of q or k, then the rotary embedding."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x_TND: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        return ops.qk_norm_rope(x_TND, self.weight.to(x_TND.dtype), rotary.cos, rotary.sin, self.eps)


class Rotation(nn.Module):
    """The rotary embedding alone."""

    def forward(self, x_TND: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        return ops.rope(x_TND, rotary.cos, rotary.sin)


class Asking(NamedTuple):
    """The tokens whose output is wanted from the last layer: their indices [S], and their attention to all tokens."""

    tokens: torch.Tensor
    plan: ops.AttentionPlan


def _take(x: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """x[rows], or all of x. (The gradient of index_select is added up in order, and fast.)"""
    return x if rows is None else x.index_select(0, rows)


def _rows(x_TE: torch.Tensor, spread_T: torch.Tensor | None, asking: Asking | None) -> torch.Tensor:
    """The rows of the tokens that leave a layer, [S, E]."""
    rows = spread_T
    if asking is not None:
        rows = asking.tokens if spread_T is None else spread_T[asking.tokens]
    return _take(x_TE, rows)


class Sums(NamedTuple):
    """The residual stream [S, E] after a layer's attention and after its MLP."""

    attention: torch.Tensor
    mlp: torch.Tensor


class Boundaries:
    """What a pass leaves for a second pass over the same batch: the residual stream, two tensors a layer.

    Given empty, the pass fills it. Given filled, the pass takes the stream from it and leaves out the products with o_proj and
    down_proj, whose results it would only have added to that: same bits, same gradients.
    """

    def __init__(self) -> None:
        self.layers: list[Sums] = []


class Attention(nn.Module):
    """Grouped-query attention inside each sequence, causal or bidirectional."""

    def __init__(self, config: Qwen3Config):
        super().__init__()
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.head_dim, self.causal = config.head_dim, config.is_causal
        self.q_proj = Linear(config.hidden_size, queries, bias=config.qkv_bias)
        self.k_proj = Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.v_proj = Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.o_proj = Linear(queries, config.hidden_size, bias=config.output_bias)
        self.q_norm, self.k_norm = (
            HeadNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else Rotation() for _ in range(2)
        )

    def forward(
        self,
        x_TE: torch.Tensor,
        rotary: Rotary,
        plan: ops.AttentionPlan,
        asking: Asking | None,
        spread_T: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What o_proj takes, [S, N D].

        With `spread_T` the input is [U, E] and token t its row spread_T[t]: each distinct row is projected once.
        """
        if asking is None:
            q_SND = self._heads(self.q_proj(x_TE), spread_T)
        else:
            q_SND = self._heads(self.q_proj(_rows(x_TE, spread_T, asking)))
        k_TKD, v_TKD = self._heads(self.k_proj(x_TE), spread_T), self._heads(self.v_proj(x_TE), spread_T)
        q_SND = self.q_norm(q_SND, rotary if asking is None else rotary.at(asking.tokens))
        k_TKD = self.k_norm(k_TKD, rotary)
        # Asked for one query a sequence, the last: bottom-right aligned, it sees every key under both masks.
        plan = plan if asking is None else asking.plan
        out_SND = ops.varlen_attention(q_SND, k_TKD, v_TKD, None, causal=self.causal, plan=plan)
        return out_SND.flatten(1)

    def _heads(self, x_TF: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        x_TF = _take(x_TF, rows)
        return x_TF.view(len(x_TF), x_TF.shape[1] // self.head_dim, self.head_dim)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x_SE: torch.Tensor) -> torch.Tensor:
        """What down_proj takes, [S, intermediate]."""
        return ops.swiglu(self.gate_proj(x_SE), self.up_proj(x_SE))


class Block(nn.Module):
    """One decoder layer; with `asking`, only the tokens named there leave it."""

    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x_TE: torch.Tensor,
        rotary: Rotary,
        plan: ops.AttentionPlan,
        asking: Asking | None = None,
        spread_T: torch.Tensor | None = None,
        known: Sums | None = None,
    ) -> Sums:
        """The residual stream after attention and after the MLP, which is the layer's output; `known` where it is."""
        attended = self.self_attn(self.input_layernorm(x_TE), rotary, plan, asking, spread_T)
        x_SE = _rows(x_TE, spread_T, asking)
        if known is not None:
            x_SE = self.self_attn.o_proj.onto(attended, x_SE, known.attention)
            activated = self.mlp(self.post_attention_layernorm(x_SE))
            return Sums(x_SE, self.mlp.down_proj.onto(activated, x_SE, known.mlp))
        normed_SE, x_SE = self.post_attention_layernorm.after_adding(self.self_attn.o_proj(attended), x_SE)
        return Sums(x_SE, x_SE + self.mlp.down_proj(self.mlp(normed_SE)))


class Qwen3Model(nn.Module):
    """The decoder body: embeddings, blocks, final norm; no language-model head.

    `checkpointing` = True recomputes each block in the backward pass instead of keeping its activations.
    """

    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.config = config
        self.checkpointing = False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, batch: PackedBatch, *, last_only: bool = False, boundaries: Boundaries | None = None
    ) -> torch.Tensor:
        """Hidden states [T, E] after the final norm.

        With `last_only`: the last token of every non-empty sequence, [B', E], BEFORE the final norm, equal to those
        rows of the full pass; the last layer then asks for nothing else. `batch.last_tokens()` tells the rows' layout.
        `boundaries` are filled, or used when they are filled already, by a pass over this batch with this `last_only`.
        """
        ids_U, spread_T = _distinct(batch.input_ids_T)
        x_TE = self.embed_tokens(ids_U)  # [U, E] until the first layer has spread it
        rotary = Rotary.of(batch.positions_T, self.config, x_TE.dtype)
        plan = ops.attention_plan(batch.cu_seqlens_cpu, tokens=batch.num_tokens, device=x_TE.device)
        asking = _last(batch) if last_only else None
        known = list(boundaries.layers) if boundaries is not None else []
        for number, block in enumerate(self.layers):
            wanted = asking if number == len(self.layers) - 1 else None
            inputs = x_TE, rotary, plan, wanted, spread_T, known[number] if known else None
            if self.checkpointing and torch.is_grad_enabled():
                sums = checkpoint(block, *inputs, use_reentrant=False)
            else:
                sums = block(*inputs)
            if boundaries is not None and not known:
                boundaries.layers.append(Sums(*(x.detach() for x in sums)))
            x_TE, spread_T = sums.mlp, None
        return x_TE if last_only else self.norm(x_TE)


def _last(batch: PackedBatch) -> Asking:
    tokens, _ = batch.last_tokens()
    cu_last = F.pad((batch.cu_seqlens_cpu.diff() > 0).cumsum(0), (1, 0)).int()
    counts = dict(tokens=len(tokens), tokens_k=batch.num_tokens)
    return Asking(tokens, ops.attention_plan(cu_last, batch.cu_seqlens_cpu, **counts, device=tokens.device))


def _distinct(input_ids_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Distinct ids [U] and where each token finds its own; all ids and None where that would save little.

    Before the first attention a token is its id alone, so the first layer's projections are needed once an id. (On a GPU
    counting them would make the host wait.)
    """
    if input_ids_T.device.type == "cpu" and len(input_ids_T):
        ids_U, spread_T = input_ids_T.unique(return_inverse=True)
        if len(ids_U) < 0.75 * len(input_ids_T):
            return ids_U, spread_T
    return input_ids_T, None
