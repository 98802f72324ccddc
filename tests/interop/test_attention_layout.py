"""What masks hold is found exactly: each is computed as the dense mask says, or refused."""

import pytest
import torch
from torch.nn import functional as F

from pyqemb.interop.attention import _attend
from pyqemb.interop.attention_layout import _cumulative, full_rows, layout_of_mask, packed_rows

masking = pytest.importorskip("transformers.masking_utils")
if not hasattr(masking, "bidirectional_mask_function"):
    pytest.skip("transformers 5 gives q_length and q_offset", allow_module_level=True)

CAUSAL, FULL = masking.causal_mask_function, masking.bidirectional_mask_function
REAL = torch.tensor([[1] * 10, [1] * 4 + [0] * 6, [0] * 7 + [1] * 3, [1, 0, 1, 1, 0, 0, 1, 1, 0, 1]]).bool()
CHUNKS = torch.tensor([[0] * 4 + [1] * 4 + [2] * 2, [0] * 10, [0] + [1] * 9, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]])
IMAGE = torch.tensor([[-1, 0, 0, 0, -1, -1, 1, 1, -1, -1]] * 4)
WITHIN = masking.packed_sequence_mask_function(CHUNKS)


class Layer(torch.nn.Module):
    is_causal = False


def same_function(mask):
    """It under another name, so that what is known about the common ones is not used."""
    return lambda *places: mask(*places)


def check(mask, queries=10, keys=10, q_offset=0, kv_offset=0, padding=None):
    """Against softmax with the dense mask, forward and backward, at queries that see a key and are no padding."""
    torch.manual_seed(0)
    places = dict(
        batch_size=4, q_length=queries, kv_length=keys, q_offset=q_offset, kv_offset=kv_offset, mask_function=mask,
        attention_mask=padding
    )  # fmt: skip
    layout = layout_of_mask(**places)
    dense = masking.sdpa_mask(**places, allow_is_causal_skip=False)
    q = torch.randn(4, 4, queries, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(4, 2, keys, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    kept = dense.any(-1)[:, 0]
    if padding is not None and layout.causal:
        at = torch.arange(queries) + q_offset
        kept &= padding[:, at]
    weights = torch.randn(4, queries, 4, 8, dtype=torch.float64) * kept[:, :, None, None]
    found = _attend(Layer(), q, k, v, layout, scaling=0.3)[0]
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=dense, scale=0.3, enable_gqa=True).transpose(1, 2)
    assert ((found - wanted) * kept[:, :, None, None]).nan_to_num(9).abs().max() < 1e-12
    grads = [torch.autograd.grad((out.nan_to_num() * weights).sum(), (q, k, v)) for out in (found, wanted)]
    assert all((a - b.nan_to_num()).abs().max() < 1e-12 for a, b in zip(*grads, strict=True))
    return layout


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("padding", [None, REAL])
@pytest.mark.parametrize("mask", [CAUSAL, FULL])
def test_common_masks(mask, padding, known):
    mask = mask if known else same_function(mask)
    for places in (
        {},
        dict(queries=1, q_offset=9),
        dict(queries=3, q_offset=7),
        dict(keys=10, queries=4),  # a static cache that is filled from its start
        dict(queries=2, keys=4, q_offset=8, kv_offset=6),  # a cache that holds the last keys alone
    ):
        check(mask, **places, padding=padding)


def test_keys_of_another_sequence():
    """Queries as many as the keys of an encoder, whose padding is not theirs."""
    layout = check(FULL, padding=REAL)
    assert layout.queries_T is None
    assert not layout.causal


@pytest.mark.parametrize("padding", [None, REAL])
@pytest.mark.parametrize("base", [CAUSAL, FULL])
def test_packed_rows(base, padding):
    check(masking.and_masks(base, WITHIN), padding=padding)


def test_chunked_masks_are_sequences():
    check(masking.chunked_causal_mask_function(4, torch.tensor([0, 0, 7, 0])), padding=REAL)


@pytest.mark.parametrize("padding", [None, REAL])
@pytest.mark.parametrize("window", [10, 20])
def test_windows_that_hide_nothing(window, padding):
    check(masking.sliding_window_causal_mask_function(window), padding=padding)
    check(masking.sliding_window_bidirectional_mask_function(window), padding=padding)


def one_key_hidden(row, head, query, key):
    return (key <= query) & ~((query == 7) & (key == 3))


def one_key_ahead(row, head, query, key):
    return (key <= query) | ((query == 4) & (key == 8))


def every_second(row, head, query, key):
    return (key <= query) & ((query - key) % 2 == 0)


@pytest.mark.parametrize(
    "mask",
    [
        masking.sliding_window_causal_mask_function(3),
        masking.sliding_window_causal_mask_function(9),
        masking.sliding_window_bidirectional_mask_function(3),
        masking.sliding_window_bidirectional_mask_function(8),
        masking.or_masks(CAUSAL, masking.blockwise_overlay(IMAGE)),
        masking.or_masks(CAUSAL, lambda row, head, query, key: key < 4),  # a prefix that sees itself
        one_key_hidden,
        one_key_ahead,
        every_second,
    ],
)
def test_other_masks_are_refused(mask):
    with pytest.raises(
        ValueError, match=r"^\[pyqemb\] expected causal or full attention inside sequences, got another"
    ):
        check(mask)


def test_large_masks_are_read_in_blocks(monkeypatch):
    monkeypatch.setattr("pyqemb.interop.attention_layout.BLOCK", 100)
    check(masking.and_masks(CAUSAL, WITHIN), padding=REAL)
    with pytest.raises(ValueError, match="got another mask"):
        check(one_key_ahead)


def test_custom_functions_that_cannot_be_broadcast():
    """Those that users hand over are evaluated place by place, as transformers does."""

    def causal(row, head, query, key):
        return torch.where(key <= query, torch.ones((), dtype=torch.bool), torch.zeros((), dtype=torch.bool)).all()

    places = dict(batch_size=2, q_length=5, kv_length=5, mask_function=causal, attention_mask=None)
    assert layout_of_mask(**places, use_vmap=True).causal


def test_a_model_that_computes_with_its_mask_is_told():
    layout = layout_of_mask(1, 4, 4, mask_function=CAUSAL)
    for compute in (
        lambda: layout[:, None],
        lambda: layout == 0,
        lambda: 1.0 - layout,
        lambda: torch.zeros(1) + layout,
        lambda: torch.cat([torch.zeros(1), layout]),
        lambda: layout.shape,
        lambda: layout.to(torch.float32),
    ):
        with pytest.raises(ValueError, match=r"^\[pyqemb\] the model computes with its attention mask \("):
            compute()
    assert not hasattr(layout, "to")


@pytest.mark.promise("R20", "lengths of transformers beyond int32 do not wrap")
def test_lengths_beyond_int32_are_refused():
    """2^32 + 6 is 6 in int32, the number of tokens that there are."""
    cpu, good = torch.device("cpu"), torch.tensor([0, 6])
    packed_rows(good, good, (1, 6, 6), False, cpu)
    for bad in (torch.tensor([0, 2**32 + 6]), torch.tensor([0, 2**31, 2**32 + 6]), torch.tensor([0, -(2**32) + 6])):
        lengths = torch.linspace(0, 6, len(bad)).long()
        with pytest.raises(ValueError, match=r"tokens must be the last value of cu_seqlens, (2147483647|-1), got 6"):
            packed_rows(bad, lengths, (1, 6, 6), False, cpu)
        with pytest.raises(ValueError, match="cu_seqlens_k"):
            packed_rows(lengths, bad, (1, 6, 6), False, cpu)
    with pytest.raises(ValueError, match="tokens must be at most 2147483647"):
        full_rows((1 << 16, 1 << 16, 1 << 16), cpu)
    assert _cumulative(torch.tensor([3, 2**31 - 1])).tolist() == [0, 3, 2**31 - 1]
    with pytest.raises(ValueError, match=f"at most 2147483647 tokens without padding, got {2**32 + 6}"):
        _cumulative(torch.tensor([3, 2**32 + 6]))
