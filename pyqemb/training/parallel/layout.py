"""The memory of a rank for a sharded model, in bytes by kind, computed from the sizes of the parameters.

A model is divided into units that FSDP gathers and reduces as a whole: each decoder block, the token embeddings, and
the rest (the final norm, a head). The parameters may be on the meta device.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import nn

from pyqemb.model.packed_model import PackedModel
from pyqemb.training.grad_cache.plan import Plan, Sizes

_WIDE = torch.float32.itemsize  # bytes of a weight, a gradient or a moment in the optimizer
Unit = Sequence[nn.Parameter]


class RankMemory(NamedTuple):
    """Bytes of one rank.

    `weights`, `moments` and `average` are held all the time, the others during a step. Activations and vectors depend
    on the batch; `grad_cache.plan.choose` plans them, given `sizes`.
    """

    weights: int  # float32 weights, or this rank's shards of them; without shards also the compute copies
    gathered: int  # whole weights in the compute dtype; 0 without shards
    gathering: int  # the largest buffer of an all-gather if all weights are gathered before the first pass
    gradients: int  # float32, of the trained parameters or of this rank's shards of them
    reduction: int  # the gradients of the largest unit before their reduce-scatter, and its buffer; 0 without shards
    moments: int  # of the optimizer
    average: int  # of the trained weights, with train.ema_decay
    largest: int  # the largest gradient; 0 with shards
    trained: float  # share of the parameters that are trained

    @property
    def standing(self) -> int:
        """The memory that is held between two steps."""
        return self.weights + self.moments + self.average

    def sizes(self, vectors: int, loss: int = 0, overhead: int = 0) -> Sizes:
        """The inputs of the plan of a step, given the bytes of this rank's vectors and of the loss."""
        return Sizes(
            vectors=vectors,
            gradients=self.gradients,
            largest=self.largest,
            overhead=overhead,
            gathered=self.gathered,
            gathering=self.gathering,
            reduction=self.reduction,
            loss=loss,
            trained=self.trained,
        )


def units_of(model: PackedModel) -> list[Unit]:
    """The parameters of each unit: the decoder blocks, the token embeddings, the rest.

    Embeddings that a head also uses belong to the rest.
    """
    decoder = model.model
    parts = [*decoder.layers] if model.reads_embedding else [*decoder.layers, decoder.embed_tokens]
    units: list[Unit] = [list(part.parameters()) for part in parts]
    inside = {id(parameter) for unit in units for parameter in unit}
    return [*units, [parameter for parameter in model.parameters() if id(parameter) not in inside]]


def trained_units(units: Sequence[Unit]) -> list[Unit]:
    """The trained parameters of each unit."""
    return [[parameter for parameter in unit if parameter.requires_grad] for unit in units]


def rank_memory(
    units: Sequence[Unit],
    shard: int,
    dtype: torch.dtype,
    reshard: bool = False,
    moments_of: Callable[[nn.Parameter], int] = lambda parameter: 2 * _WIDE,
    average: bool = False,
) -> RankMemory:
    """The bytes of a rank that holds one of `shard` shards.

    Args:
        units: see `units_of`.
        shard: the number of ranks that share one copy of the weights; 1: every rank has all weights.
        dtype: the compute dtype.
        reshard: whether a unit's gathered weights are freed after its forward and after its backward pass. False: all
            stay gathered from the first chunk of a step to the last.
        moments_of: bytes of the optimizer for each element of a trained parameter (default: those of AdamW).
        average: whether an average of the trained weights is kept.
    """
    trained = trained_units(units)
    share = _elements(trained) / _elements(units)
    if shard == 1:
        copies = dtype.itemsize * _elements(units) if dtype.itemsize < _WIDE else _WIDE * _elements(_frozen(units))
        gradients = _WIDE * _elements(trained)
        largest = max((_WIDE * x.numel() for unit in trained for x in unit), default=0)
        moments = sum(moments_of(x) * x.numel() for unit in trained for x in unit)
        return RankMemory(
            weights=gradients + copies, gathered=0, gathering=0, gradients=gradients, reduction=0, moments=moments,
            average=gradients if average else 0, largest=largest, trained=share,
        )  # fmt: skip
    gathered = [dtype.itemsize * _elements([unit]) for unit in units]
    most = sum(sorted(gathered)[-2:]) if reshard else sum(gathered)  # the next unit is gathered while one computes
    gradients = _WIDE * _shard_elements(trained, shard)
    reduction = (dtype.itemsize + _WIDE) * max(_elements([unit]) for unit in trained)
    weights, gathering = _WIDE * _shard_elements(units, shard), 0 if reshard else max(gathered)
    moments = sum(moments_of(x) * _shard_elements([[x]], shard) for unit in trained for x in unit)
    return RankMemory(
        weights=weights, gathered=most, gathering=gathering, gradients=gradients, reduction=reduction, moments=moments,
        average=gradients if average else 0, largest=0, trained=share,
    )  # fmt: skip


def _frozen(units: Sequence[Unit]) -> list[Unit]:
    return [[parameter for parameter in unit if not parameter.requires_grad] for unit in units]


def _elements(units: Sequence[Unit]) -> int:
    return sum(parameter.numel() for unit in units for parameter in unit)


def _shard_elements(units: Sequence[Unit], shard: int) -> int:
    """Elements of the largest shard: FSDP cuts each parameter along its first dimension, rounded up to whole rows."""
    return sum(-(-len(x) // shard) * (x.numel() // len(x)) for unit in units for x in unit)


def loss_bytes(vectors: int, all_vectors: int, ranks: int, ring: bool) -> int:
    """The peak memory of the loss of a step, given the bytes of the vectors of this rank and of all ranks.

    Gathered vectors are held as received, in order, and as queries and documents, with the gradients of the last two.
    Blocks of a ring are sent and received with their gradients, and copied out of the blocks.
    """
    if ranks == 1:
        return 6 * vectors
    return 12 * vectors if ring else 6 * all_vectors


def choose_reshard(
    budget: int, plan_of: Callable[[bool], Plan], setting: Literal["auto", "always", "never"] = "auto"
) -> tuple[bool, Plan]:
    """Whether the weights are resharded after each pass through a unit, and the plan of the step.

    "auto": the choice with the lower cost of recomputation and communication, or with less memory if neither fits.

    Args:
        budget: bytes that the step may take over its start.
        plan_of: the plan with its peak and its cost, given whether weights are resharded.
        setting: the value of `parallel.reshard_after_forward`.
    """
    schedules = {"auto": (False, True), "always": (True,), "never": (False,)}[setting]
    plans = [(reshard, plan_of(reshard)) for reshard in schedules]
    return min(plans, key=lambda choice: (max((choice[1].peak_bytes or 0) - budget, 0), choice[1].cost))
