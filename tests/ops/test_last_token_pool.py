import pytest
import torch

from pyqemb import ops
from pyqemb.testing import reference
from pyqemb.testing.cases import cu_seqlens
from pyqemb.testing.compare import assert_close_as

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LENGTHS = (3, 1, 0, 40, 7)


def run(function, hidden, weight, dout, dtype):
    leaves = [hidden.detach().to(dtype).requires_grad_()]
    if weight is not None:
        leaves.append(weight.detach().to(dtype).requires_grad_())
    out = function(leaves[0], leaves[1] if weight is not None else None)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(dtype))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("with_norm", [True, False])
@pytest.mark.parametrize(("embed", "dim"), [(64, None), (64, 16), (100, 33), (7, 1)])
def test_equals_float64_as_well_as_torch_does(dtype, normalize, with_norm, embed, dim):
    cu = cu_seqlens(LENGTHS)
    hidden = (torch.randn(sum(LENGTHS), embed) * 3).to(dtype)
    weight = (torch.rand(embed) + 0.5).to(dtype) if with_norm else None
    dout = torch.randn(len(LENGTHS), dim or embed).to(dtype)
    ours = run(
        lambda h, w: ops.last_token_pool(h, cu, norm_weight=w, dim=dim, normalize=normalize),
        hidden,
        weight,
        dout,
        dtype,
    )

    def naive(h, w):
        return reference.pool(h, cu, w, dim=dim, normalize=normalize)

    low, truth = run(naive, hidden, weight, dout, dtype), run(naive, hidden, weight, dout, torch.float64)
    for name, actual, expected, exact in zip(("out", "dhidden", "dweight"), ours, low, truth, strict=False):
        assert_close_as(actual, expected, exact, name)


def test_gradcheck():
    hidden = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(5, dtype=torch.float64, requires_grad=True)
    for dim in (None, 3):
        torch.autograd.gradcheck(
            lambda h, w, dim=dim: ops.last_token_pool(h, cu_seqlens((2, 0, 4)), norm_weight=w, dim=dim),
            (hidden, weight),
        )


def test_takes_the_last_token_whatever_the_others_hold():
    hidden = torch.full((5, 4), torch.nan)
    hidden[2], hidden[4] = torch.tensor([3.0, 0, 4, 0]), torch.tensor([0.0, 2, 0, 0])
    out = ops.last_token_pool(hidden, cu_seqlens((3, 2)))
    torch.testing.assert_close(out, torch.tensor([[0.6, 0, 0.8, 0], [0, 1, 0, 0]]))


def test_zero_row_has_a_finite_gradient():
    hidden = torch.zeros(1, 4, requires_grad=True)
    ops.last_token_pool(hidden, cu_seqlens((1,))).sum().backward()
    assert torch.isfinite(hidden.grad).all()


def test_empty_batch():
    assert ops.last_token_pool(torch.zeros(0, 8), torch.zeros(1, dtype=torch.int32), dim=4).shape == (0, 4)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden": torch.zeros(5)}, ValueError, "hidden must have shape"),
        ({"hidden": torch.zeros(5, 8).int()}, TypeError, "hidden must be float32"),
        ({"hidden": None}, TypeError, "must be a torch.Tensor|must be a positive integer"),
        ({"dim": 0}, ValueError, "dim must be"),
        ({"dim": 9}, ValueError, "dim must be from 1 to 8, got 9"),
        ({"dim": 2.5}, ValueError, "dim must be a positive integer"),
        ({"norm_weight": torch.ones(7)}, ValueError, "norm_weight must have shape"),
        ({"norm_weight": torch.ones(8).double()}, TypeError, "norm_weight must have the dtype of hidden"),
        ({"cu": torch.tensor([0, 6], dtype=torch.int32)}, ValueError, "must end at the number of tokens of hidden"),
        ({"eps": -1.0}, ValueError, "eps must not be negative"),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    arguments = {"hidden": torch.zeros(5, 8), "cu": cu_seqlens((5,))} | changes
    with pytest.raises(error, match=message):
        ops.last_token_pool(arguments.pop("hidden"), arguments.pop("cu"), **arguments)
