import pytest
import torch

from pyqemb import _C, ops
from pyqemb.ops.attention import by_sequence
from pyqemb.testing import reference
from pyqemb.testing.cases import ATTENTION_CASES, cu_seqlens
from pyqemb.testing.compare import assert_close_as

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def inputs(case, dtype):
    keys = case.key_lengths or case.lengths
    tensors = (
        torch.randn(sum(case.lengths), case.heads, case.head_dim),
        torch.randn(sum(keys), case.kv_heads, case.head_dim),
        torch.randn(sum(keys), case.kv_heads, case.head_dim),
    )
    return [x.to(dtype).requires_grad_() for x in tensors], cu_seqlens(case.lengths), cu_seqlens(keys)


def run(function, tensors, dout, dtype, **options):
    tensors = [x.detach().to(dtype).requires_grad_() for x in tensors]
    out = function(*tensors, **options)
    return [out.detach(), *torch.autograd.grad(out, tensors, dout.to(dtype))]


@pytest.mark.promise("R11", "attention, forward and backward")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ATTENTION_CASES, ids=lambda case: case.name)
def test_equals_float64_as_well_as_torch_does(case, dtype, causal):
    tensors, cu, cu_k = inputs(case, dtype)
    dout = torch.randn(tensors[0].shape).to(dtype)
    ours = run(
        lambda q, k, v: ops.varlen_attention(q, k, v, cu, cu_seqlens_k=cu_k, causal=causal), tensors, dout, dtype
    )

    def naive(q, k, v):
        return reference.attention(q, k, v, cu, cu_k, causal=causal)

    low, truth = run(naive, tensors, dout, dtype), run(naive, tensors, dout, torch.float64)
    for name, actual, expected, exact in zip(("out", "dq", "dk", "dv"), ours, low, truth, strict=True):
        assert_close_as(actual, expected, exact, name)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("case", [*ATTENTION_CASES[:6], *ATTENTION_CASES[-4:]], ids=lambda case: case.name)
def test_by_sequence(case, causal):
    """What float32 gets on CUDA, here on the CPU."""
    tensors, cu, cu_k = inputs(case, torch.float64)
    dout, scale = torch.randn_like(tensors[0]), 0.3
    plan = ops.attention_plan(cu, cu_k)
    ours = run(lambda *x: by_sequence(*x, plan, causal=causal, scale=scale), tensors, dout, torch.float64)
    truth = run(
        lambda *x: ops.varlen_attention(*x, None, plan=plan, causal=causal, scale=scale), tensors, dout, torch.float64
    )
    for actual, exact in zip(ours, truth, strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-9, atol=1e-9)


@pytest.mark.promise("R10", "attention")
@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck(causal):
    case = ATTENTION_CASES[2]
    tensors, cu, _ = inputs(type(case)("small", (3, 0, 5, 1), 4, 2, 8), torch.float64)
    torch.autograd.gradcheck(
        lambda q, k, v: ops.varlen_attention(q, k, v, cu_seqlens((3, 0, 5, 1)), causal=causal), tensors
    )


@pytest.mark.parametrize("isa", _C.available_isas())
def test_every_instruction_set(isa):
    best = _C.current_isa()
    tensors, cu, _ = inputs(ATTENTION_CASES[4], torch.float32)
    dout = torch.randn(tensors[0].shape)
    truth = run(lambda *x: reference.attention(*x, cu, causal=True), tensors, dout, torch.float64)
    try:
        _C.set_isa(isa)
        ours = run(lambda *x: ops.varlen_attention(*x, cu, causal=True), tensors, dout, torch.float32)
    finally:
        _C.set_isa(best)
    for actual, exact in zip(ours, truth, strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.promise("R15", "attention, bit for bit")
def test_packed_equals_alone_bit_for_bit():
    lengths = (3, 70, 1, 260, 31)
    tensors, cu, _ = inputs(type(ATTENTION_CASES[0])("mix", lengths), torch.float32)
    dout = torch.randn(tensors[0].shape)
    packed = run(lambda *x: ops.varlen_attention(*x, cu, causal=True), tensors, dout, torch.float32)
    for start, end in zip(cu[:-1], cu[1:], strict=True):
        alone_inputs = [x[start:end] for x in tensors]
        alone = run(
            lambda *x, n=int(end - start): ops.varlen_attention(*x, cu_seqlens((n,)), causal=True),
            alone_inputs, dout[start:end], torch.float32,
        )  # fmt: skip
        for together, single in zip(packed, alone, strict=True):
            assert torch.equal(together[start:end], single)


def check_pads(seed, dtype):
    """Sequences alone, packed, in another order, and between pads on either side that hold NaN or 1e30."""
    generator = torch.Generator().manual_seed(seed)

    def whole(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    lengths = [whole(0, 80) for _ in range(whole(1, 6))]
    causal, head_dim, garbage = seed % 2 == 0, 8 * whole(1, 9), (torch.nan, 1e30)[seed // 2 % 2]
    shapes = [(sum(lengths), heads, head_dim) for heads in (4, 2, 2, 4)]
    *tensors, dout = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)

    def results(rows, given):
        """The output and the gradients of these rows, with these lengths."""
        leaves = [x[rows].requires_grad_() for x in tensors]
        out = ops.varlen_attention(*leaves, cu_seqlens(given), causal=causal)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout[rows])]

    packed = results(slice(None), lengths)
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    places = [torch.arange(start, start + length) for start, length in zip(starts, lengths, strict=False)]
    order = torch.randperm(len(lengths), generator=generator).tolist()
    turned = results(torch.cat([places[i] for i in order]), [lengths[i] for i in order])
    turned = [x[torch.cat([places[i] for i in order]).argsort()] for x in turned]
    alone = [torch.cat(parts) for parts in zip(*(results(rows, [len(rows)]) for rows in places), strict=True)]

    pads = [whole(0, 20) for _ in lengths]
    pairs = [(pad, length) if seed % 3 else (length, pad) for pad, length in zip(pads, lengths, strict=True)]
    real = torch.cat([
        torch.full((size,), part == (1 if seed % 3 else 0)) for pair in pairs for part, size in enumerate(pair)
    ])  # fmt: skip
    padded = [torch.full((len(real), *x.shape[1:]), garbage).to(dtype) for x in (*tensors, dout)]
    for wide, x in zip(padded, (*tensors, dout), strict=True):
        wide[real] = x
    leaves = [x.requires_grad_() for x in padded[:3]]
    out = ops.varlen_attention(*leaves, cu_seqlens([size for pair in pairs for size in pair]), causal=causal)
    between = [x[real] for x in (out.detach(), *torch.autograd.grad(out, leaves, padded[3]))]
    for other in (turned, alone, between):
        assert all(torch.equal(a, b) for a, b in zip(packed, other, strict=True)), (seed, lengths)


@pytest.mark.promise("R15", "attention over 15 random batches: alone, in any order, between pads of NaN and 1e30")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_neighbors_and_pads_change_no_bit(dtype):
    for seed in range(15):
        check_pads(seed, dtype)


@pytest.mark.deep
@pytest.mark.promise("R15", "attention over 500 random batches: alone, in any order, between pads of NaN and 1e30")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_neighbors_and_pads_change_no_bit_in_500_batches(dtype):
    for seed in range(500):
        check_pads(seed, dtype)


@pytest.mark.promise("R14", "attention")
def test_same_bits_for_any_thread_count():
    tensors, cu, _ = inputs(ATTENTION_CASES[5], torch.float32)
    dout = torch.randn(tensors[0].shape)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert _C.num_threads() == count
            results.append(run(lambda *x: ops.varlen_attention(*x, cu), tensors, dout, torch.float32))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.promise("R15", "NaN in a neighbor of the batch")
def test_nan_in_one_sequence_stays_there():
    tensors, cu, _ = inputs(ATTENTION_CASES[2], torch.float32)
    with torch.no_grad():
        for x in tensors:
            x[47:95] = torch.nan
    out = ops.varlen_attention(*tensors, cu)
    assert out[47:95].isnan().all()
    grads = torch.autograd.grad(out[:47].sum() + out[95:].sum(), tensors)
    for x in (out, *grads):
        assert torch.isfinite(x[:47]).all()
        assert torch.isfinite(x[95:]).all()


def test_reads_slices_of_one_projection():
    qkv = torch.randn(30, 8, 16)
    q, k, v = qkv[:, :4], qkv[:, 4:6], qkv[:, 6:]
    cu = cu_seqlens((10, 20))
    assert torch.equal(
        ops.varlen_attention(q, k, v, cu), ops.varlen_attention(q.contiguous(), k.contiguous(), v.contiguous(), cu)
    )


def test_inputs_are_left_as_they_were():
    tensors, cu, cu_k = inputs(ATTENTION_CASES[2], torch.float32)
    before = [x.detach().clone() for x in (*tensors, cu)]
    ops.varlen_attention(*tensors, cu, causal=True).sum().backward()
    with pytest.raises(ValueError, match="cu_seqlens must end at"):
        ops.varlen_attention(*tensors, cu[:-1], causal=True)
    assert all(torch.equal(x, y) for x, y in zip((*tensors, cu), before, strict=True))


def test_exponents_over_their_whole_range():
    """One key far below the other: its weight falls through every power of two, to zero and never below."""
    gaps = torch.cat([torch.linspace(0, 104, 1601), torch.tensor([150.0, 1e4, 1e30])])
    keys = torch.zeros(2 * len(gaps), 1, 8)
    keys[1::2, 0, 0] = -gaps
    values = torch.zeros_like(keys)
    values[1::2] = 1.0
    cu_k = cu_seqlens((2,) * len(gaps))
    out = ops.varlen_attention(
        torch.ones(len(gaps), 1, 8), keys, values, cu_seqlens((1,) * len(gaps)), cu_seqlens_k=cu_k, scale=1.0
    )[:, 0, 0]
    truth = torch.sigmoid(-gaps.double())
    # An exponent of size x is rounded by 2^-24 x, and its power with it.
    assert ((out - truth).abs() <= (4e-7 + 1.2e-7 * gaps.double()) * truth + 2e-38).all()
    assert (out[-3:] == 0).all()


def test_large_scores_do_not_overflow():
    q = torch.full((4, 1, 8), 100.0)
    out = ops.varlen_attention(q, q, q, cu_seqlens((4,)), scale=1.0)
    torch.testing.assert_close(out, q)


def test_causal_differs_from_bidirectional():
    tensors, cu, _ = inputs(ATTENTION_CASES[1], torch.float32)
    assert not torch.allclose(ops.varlen_attention(*tensors, cu), ops.varlen_attention(*tensors, cu, causal=True))


def test_empty_batch():
    q = torch.zeros(0, 4, 64, requires_grad=True)
    k = torch.zeros(0, 2, 64)
    out = ops.varlen_attention(q, k, k, torch.zeros(1, dtype=torch.int32))
    assert out.shape == (0, 4, 64)
    out.sum().backward()


def test_double_backward_is_refused():
    tensors, cu, _ = inputs(ATTENTION_CASES[0], torch.float64)
    out = ops.varlen_attention(*tensors, cu)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(out.sum(), tensors[0], create_graph=True)


def bad(**changes):
    good = {
        "q": torch.zeros(5, 4, 16),
        "k": torch.zeros(5, 2, 16),
        "v": torch.zeros(5, 2, 16),
        "cu": cu_seqlens((2, 3)),
    }
    good |= changes
    return (good["q"], good["k"], good["v"], good["cu"]), {
        k: v for k, v in changes.items() if k not in ("q", "k", "v", "cu")
    }


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": torch.zeros(5, 4, 16).int()}, TypeError, "q must be float32"),
        ({"q": "text"}, TypeError, "q must be a torch.Tensor"),
        ({"k": torch.zeros(5, 2, 16).double()}, TypeError, "k must have the dtype of q"),
        ({"q": torch.zeros(5, 64)}, ValueError, r"q must have shape \[tokens, heads, head_dim\], got \[5, 64\]"),
        ({"q": torch.zeros(5, 3, 16)}, ValueError, "multiple of the heads of k, got 3 and 2"),
        ({"k": torch.zeros(5, 2, 24), "v": torch.zeros(5, 2, 24)}, ValueError, "share head_dim, got 16 and 24"),
        ({"v": torch.zeros(4, 2, 16)}, ValueError, "k and v must have the same shape"),
        ({n: torch.zeros(5, 2, 12) for n in "qkv"}, ValueError, "multiple of 8 up to 256, got 12"),
        ({n: torch.zeros(5, 2, 264) for n in "qkv"}, ValueError, "multiple of 8 up to 256, got 264"),
        ({"cu": torch.tensor([1, 5], dtype=torch.int32)}, ValueError, "cu_seqlens must start at 0, got 1"),
        ({"cu": torch.tensor([0, 4, 3, 5], dtype=torch.int32)}, ValueError, "must not decrease, got 4 then 3 at 2"),
        ({"cu": torch.tensor([0, 9], dtype=torch.int32)}, ValueError,
         "must end at the number of tokens of q, 5, got 9"),
        ({"cu": torch.tensor([0, 5])}, TypeError, "cu_seqlens must be int32"),
        ({"cu": torch.zeros(0, dtype=torch.int32)}, ValueError, "at least one entry"),
        ({"cu": [0, 5]}, TypeError, "cu_seqlens must be a torch.Tensor"),
        ({"cu_seqlens_k": cu_seqlens((5,))}, ValueError, "as many entries, got 3 and 2"),
        ({"scale": float("nan")}, ValueError, "scale must be finite"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(changes, error, message):
    arguments, options = bad(**changes)
    with pytest.raises(error, match=message):
        ops.varlen_attention(*arguments, **options)
    arguments, _ = bad()
    assert ops.varlen_attention(*arguments).shape == (5, 4, 16)
