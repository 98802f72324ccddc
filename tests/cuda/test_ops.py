"""The ops on CUDA tensors: against float64 and the CPU backend, the same bits every time, packed or alone, in a CUDA
graph.
"""

import pytest
import torch
from torch.library import opcheck

from pyqemb import _C, ops
from pyqemb.ops.groups import PRESETS
from pyqemb.testing import reference
from pyqemb.testing.cases import cu_seqlens, heavy_tailed
from pyqemb.testing.compare import assert_close_as
from pyqemb.testing.device_bench import newest_kernels

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
    pytest.mark.skipif(not _C.cuda_is_built(), reason="pyqemb was built without CUDA"),
]
HALVES = [torch.bfloat16, torch.float16]
FLOATS = [*HALVES, torch.float32]
# Around the tile of 128 rows and its slots of 16, empty, long, and many to a tile; then fewer queries than keys and
# more.
LENGTHS = {
    "one": (1,),
    "slots": (15, 16, 17, 1, 31, 48),
    "tiles": (127, 128, 129),
    "empty": (0, 5, 0, 0, 9, 0),
    "long": (300, 1, 257),
    "tiny": (1, 2, 3, 1, 7) * 20,
    "many blocks": (65, 513, 128, 1000, 64, 192),
}
KEY_LENGTHS = {"one query each": ((1, 1, 0, 1), (9, 300, 4, 1)), "unequal": ((3, 50, 7, 20, 3), (10, 140, 7, 4, 0))}


@pytest.fixture(params=[90, 80], ids=["newest", "sm_80"], autouse=True)
def kernels(request):
    """Every test with Hopper's own kernels, where there is one, and with those that run everywhere."""
    if request.param == 90 and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the GPU is no Hopper: it has one set of kernels")
    with newest_kernels(request.param):
        yield


def run(function, tensors, dout, dtype, device="cpu"):
    """out and the gradients, on the CPU."""
    leaves = [x.detach().to(dtype).to(device).requires_grad_() for x in tensors]
    out = function(*leaves)
    return [x.detach().cpu() for x in (out, *torch.autograd.grad(out, leaves, dout.to(dtype).to(device)))]


def held_to_float64(ours, naive, tensors, dtype):
    tensors = [x.to(dtype) for x in tensors]
    dout = torch.randn(naive(*tensors).shape).to(dtype)
    actual = run(ours, tensors, dout, dtype, "cuda")
    low, truth = run(naive, tensors, dout, dtype), run(naive, tensors, dout, torch.float64)
    for number, (a, b, c) in enumerate(zip(actual, low, truth, strict=True)):
        assert_close_as(a, b, c, f"result {number}")


def attention_tensors(lengths, keys, heads=4, kv_heads=2, head_dim=64):
    shapes = [(sum(lengths), heads, head_dim)] + 2 * [(sum(keys), kv_heads, head_dim)]
    return [torch.randn(shape) for shape in shapes]


def attention_is_held_to_float64(name, causal, where, head_dim, dtype):
    lengths, keys = KEY_LENGTHS.get(name) or (LENGTHS[name],) * 2
    cu, cu_k = cu_seqlens(lengths), cu_seqlens(keys)
    given = (cu, cu_k) if where == "host" else (cu.to("cuda"), cu_k.to("cuda"))
    held_to_float64(
        lambda q, k, v: ops.varlen_attention(q, k, v, given[0], cu_seqlens_k=given[1], causal=causal),
        lambda q, k, v: reference.attention(q, k, v, cu, cu_k, causal=causal),
        attention_tensors(lengths, keys, head_dim=head_dim),
        dtype,
    )


@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", [*LENGTHS, *KEY_LENGTHS])
def test_attention(name, causal, where):
    attention_is_held_to_float64(name, causal, where, 64, torch.bfloat16)


@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["empty", "long", *KEY_LENGTHS])
def test_attention_in_float32(name, causal, where):
    attention_is_held_to_float64(name, causal, where, 32, torch.float32)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(2, 2, 128), (8, 1, 64), (4, 1, 128), (3, 1, 64)])
def test_attention_of_other_heads(heads, kv_heads, head_dim, dtype):
    lengths = (40, 1, 130)
    cu = cu_seqlens(lengths)
    held_to_float64(
        lambda q, k, v: ops.varlen_attention(q, k, v, cu, causal=True),
        lambda q, k, v: reference.attention(q, k, v, cu, causal=True),
        attention_tensors(lengths, lengths, heads, kv_heads, head_dim),
        dtype,
    )


@pytest.mark.parametrize("causal", [False, True])
def test_attention_of_a_sequence_has_the_same_bits_alone(causal):
    lengths = (3, 70, 1, 140, 31, 16)
    tensors, dout = attention_tensors(lengths, lengths), torch.randn(sum(lengths), 4, 64)
    cu = cu_seqlens(lengths)
    plan = ops.attention_plan(cu, device="cuda")

    def attend(*x):
        return ops.varlen_attention(*x, None, causal=causal, plan=plan)

    packed = run(attend, tensors, dout, torch.bfloat16, "cuda")
    for start, end in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        own = cu_seqlens((end - start,))
        alone = run(
            lambda *x, own=own: ops.varlen_attention(*x, own, causal=causal),
            [x[start:end] for x in tensors], dout[start:end], torch.bfloat16, "cuda",
        )  # fmt: skip
        for together, single in zip(packed, alone, strict=True):
            assert torch.equal(together[start:end], single)


def test_nan_in_one_sequence_stays_there():
    lengths = (20, 30, 150, 9)
    tensors = attention_tensors(lengths, lengths)
    for x in tensors:
        x[20:50] = torch.nan
    dout = torch.ones_like(tensors[0])
    dout[20:50] = 0
    results = run(lambda *x: ops.varlen_attention(*x, cu_seqlens(lengths)), tensors, dout, torch.bfloat16, "cuda")
    for x in results:
        assert torch.isfinite(x[:20]).all()
        assert torch.isfinite(x[50:]).all()


def angles(tokens, head_dim):
    turn = torch.arange(tokens)[:, None] * 0.7 ** torch.arange(head_dim // 2)
    return turn.cos(), turn.sin()


def small_op(op, rows, width):
    """(ours, plain torch, inputs)"""
    weight = torch.rand(width) + 0.5
    if op == "rms_norm":
        return ops.rms_norm, reference.rms_norm, [torch.randn(rows, width), weight]
    if op == "rms_norm after adding":

        def naive(x, weight, residual):
            return torch.stack((reference.rms_norm(x + residual, weight), x + residual))

        tensors = [torch.randn(rows, width), weight, torch.randn(rows, width)]
        return lambda x, w, r: torch.stack(ops.rms_norm(x, w, residual=r)), naive, tensors
    if op == "swiglu":
        return ops.swiglu, reference.swiglu, [torch.randn(rows, width) * 4, torch.randn(rows, width)]
    if op == "pool":
        cu = cu_seqlens((1, 0, rows - 1))
        return (
            lambda x, w: ops.last_token_pool(x, cu, norm_weight=w, dim=width - 1),
            lambda x, w: reference.pool(x, cu, w, dim=width - 1),
            [torch.randn(rows, width), weight],
        )
    width = min(width, 256)  # of a head
    weight = weight[:width]
    cos, sin = angles(rows, width)
    there = cos.to("cuda"), sin.to("cuda")
    if op == "rope":
        return lambda x: ops.rope(x, *there), lambda x: reference.rope(x, cos, sin), [torch.randn(rows, 3, width)]
    return (
        lambda x, w: ops.qk_norm_rope(x, w, *there),
        lambda x, w: reference.qk_norm_rope(x, w, cos, sin),
        [torch.randn(rows, 3, width), weight],
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", [(70, 128), (33, 64), (3, 1024), (5, 46), (1, 8)], ids=str)
@pytest.mark.parametrize("op", ["rms_norm", "rms_norm after adding", "swiglu", "qk_norm_rope", "rope", "pool"])
def test_small_ops(op, size, dtype):
    held_to_float64(*small_op(op, *size), dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("softmax", ["joint", "split"])
def test_info_nce(preset, softmax, dtype):
    queries, documents = (torch.nn.functional.normalize(torch.randn(n, 40), dim=-1) for n in (37, 150))
    positive, owner = torch.arange(37), torch.arange(150) % 40 - 3
    owner[:37] = torch.arange(37)
    ids = torch.arange(150) % 120
    there = [x.to("cuda") for x in (positive, owner, ids)]
    held_to_float64(
        lambda q, d: ops.info_nce(
            q, d, there[0], owner=there[1], document_ids=there[2], preset=preset, temperature=0.05, softmax=softmax
        ),
        lambda q, d: reference.info_nce(
            q, d, positive, owner, ids, 0.05, groups=PRESETS[preset], split=softmax == "split"
        ),
        [queries, documents],
        dtype,
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dims", [[8, 40], [1, 2, 3, 5, 8, 13, 21, 34, 40]], ids=["one sweep", "nine"])
def test_info_nce_with_prefixes_and_a_learned_temperature(dims, dtype):
    queries, documents = (torch.nn.functional.normalize(torch.randn(n, 40), dim=-1) for n in (37, 150))
    positive, there = torch.arange(37), torch.arange(37).to("cuda")
    tau = torch.tensor(0.1, device="cuda", requires_grad=True)
    exact = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    normalize = torch.nn.functional.normalize
    held_to_float64(
        lambda q, d: ops.info_nce(q, d, there, temperature=tau.detach(), matryoshka=dims),
        lambda q, d: (
            sum(
                reference.info_nce(normalize(q[:, :n], dim=1), normalize(d[:, :n], dim=1), positive, temperature=0.1)
                for n in dims
            )
            / len(dims)
        ),
        [queries, documents],
        dtype,
    )
    low = [x.to(dtype).to("cuda") for x in (queries, documents)]
    ops.info_nce(*low, there, temperature=tau).backward()
    reference.info_nce(*(x.double().cpu() for x in low), positive, temperature=exact).backward()
    torch.testing.assert_close(tau.grad.double().cpu(), exact.grad, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("queries", "documents", "dim", "k"), [(1, 1, 3, 1), (40, 130, 48, 7), (3, 700, 33, 20)])
def test_top_k(queries, documents, dim, k, dtype):
    q, d = torch.randn(queries, dim).to(dtype), torch.randn(documents, dim).to(dtype)
    scores, indices = (x.cpu() for x in ops.top_k(q.to("cuda"), d.to("cuda"), k))
    truth, _ = reference.top_k(q.double(), d.double(), k)
    torch.testing.assert_close(scores.double(), truth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close((q.double() @ d.double().T).gather(1, indices), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("repeats", [50])
def test_the_same_bits_every_time(repeats):
    lengths = tuple(heavy_tailed(40, 30, cap=300))
    cu = cu_seqlens(lengths)
    qkv = [x.to(torch.bfloat16).to("cuda").requires_grad_() for x in attention_tensors(lengths, lengths)]
    rows = qkv[0].detach().flatten(1).requires_grad_()
    weight = torch.ones(256, dtype=torch.bfloat16).to("cuda").requires_grad_()
    positive = torch.arange(40).to("cuda")
    first = None
    for _ in range(repeats):
        vectors = ops.last_token_pool(ops.rms_norm(rows, weight), cu, norm_weight=weight)
        loss = ops.info_nce(vectors, vectors.detach(), positive)
        out = ops.varlen_attention(*qkv, cu, causal=True)
        results = [
            out,
            loss,
            *torch.autograd.grad(out.float().square().sum(), qkv),
            *torch.autograd.grad(loss, [rows, weight]),
        ]
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(first, results, strict=True))


def test_runs_in_a_cuda_graph_on_its_stream():
    lengths = (40, 7, 150)
    tensors = [x.to(torch.bfloat16).to("cuda") for x in attention_tensors(lengths, lengths)]
    cu = cu_seqlens(lengths)
    plan, on_device = ops.attention_plan(cu, device="cuda"), cu.to("cuda")

    def work():
        out = ops.varlen_attention(*tensors, None, plan=plan)
        return out, ops.last_token_pool(ops.rms_norm(out.flatten(1), torch.ones_like(out[0].flatten())), on_device)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    for x in tensors:
        x.copy_(torch.randn_like(x))
    graph.replay()
    for again, expected in zip(captured, work(), strict=True):
        assert torch.equal(again, expected)


@pytest.mark.parametrize("options", [{}, {"matryoshka": [16, 40]}, {"preset": "qwen3_stage2"}], ids=str)
def test_info_nce_runs_in_a_cuda_graph(options):
    """Captured forward and backward, and replayed with other vectors, positives, owners and ids."""
    queries, documents = (torch.randn(n, 40, device="cuda", dtype=torch.bfloat16) for n in (37, 150))
    leaves = [queries.requires_grad_(), documents.requires_grad_()]
    positive, owner, ids = (torch.arange(n, device="cuda") for n in (37, 150, 150))
    owner = owner % 40 - 3

    def work():
        loss, stats = ops.info_nce(
            *leaves, positive, owner=owner, document_ids=ids, return_stats=True, temperature=0.05, **options
        )
        return loss.detach(), stats.totals, *torch.autograd.grad(loss, leaves)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    with torch.no_grad():
        for x in leaves:
            x.copy_(torch.nn.functional.normalize(torch.randn_like(x), dim=1))
        positive.copy_(torch.randperm(150)[:37])
        owner.copy_(torch.randint(-1, 37, (150,)))
        ids.copy_(torch.randint(0, 100, (150,)))
    graph.replay()
    for again, expected in zip(captured, work(), strict=True):
        assert torch.equal(again, expected)


def test_opcheck():
    q, k, v = (x.to(torch.bfloat16).to("cuda").requires_grad_() for x in attention_tensors((3, 10), (3, 10)))
    cu = cu_seqlens((3, 10)).to("cuda")
    opcheck(torch.ops.pyqemb.varlen_attention.default, (q, k, v, cu, cu, None, (0, 0, 0, 0), 0.1, True))
    opcheck(torch.ops.pyqemb.swiglu.default, (q.detach(), q.detach()))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: ops.swiglu(x.double(), x.double()), TypeError, "gate must be float32, bfloat16 or float16 on CUDA"),
        (lambda x: ops.attention_plan(cu_seqlens((4,)).to("cuda")), ValueError, "tokens must be given"),
        (
            lambda x: ops.varlen_attention(*(x.view(4, 2, 32),) * 3, cu_seqlens((4,))),
            ValueError,
            "head_dim must be 64 or 128 on CUDA, got 32",
        ),
        (
            lambda x: ops.varlen_attention(*(x.float().view(4, 1, 64),) * 3, cu_seqlens((4,))),
            ValueError,
            "q must be bfloat16 or float16 on CUDA, got torch.float32",
        ),
        (
            lambda x: ops.varlen_attention(*(x.view(4, 1, 64),) * 3, cu_seqlens((5,))),
            ValueError,
            "cu_seqlens must end at the number of tokens of q, 4, got 5",
        ),
        (lambda x: ops.last_token_pool(x, cu_seqlens((3,))), ValueError, "must end at the number of tokens of hidden"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.zeros(4, 64).to(torch.bfloat16).to("cuda"))


def test_two_devices_in_one_call_are_named():
    with pytest.raises(ValueError, match="up must be on the device of gate, cuda:0, got cpu"):
        ops.swiglu(torch.zeros(4).to("cuda"), cu_seqlens((1, 1, 1)).float())
