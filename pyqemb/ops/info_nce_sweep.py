"""One sweep of the InfoNCE kernels: losses, log sums and gradients of some rows against all columns."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyqemb import _C
from pyqemb.ops.common import arithmetic, empty_like
from pyqemb.ops.groups import Options


class Batch(NamedTuple):
    """The tensors of a sweep, as InfoNce in csrc/ops/info_nce.h names them; the native code derives what is None."""

    queries: Tensor
    documents: Tensor
    positive: Tensor
    query_text: Tensor | None
    document_text: Tensor | None
    role: Tensor | None
    owner: Tensor | None


def sweep(
    batch: Batch,
    options: Options,
    *,
    first_row: int,
    num_rows: int,
    differs: bool,
    learns: bool,
    first_column: int = 0,
    dims: Sequence[int] = (),
    dim_weights: Sequence[float] = (),
    log_negatives: Tensor | None = None,
    log_negatives_given: bool = False,
    adds_positive: bool = True,
) -> tuple[Tensor, ...]:
    """Return the losses of the rows, the totals, and the gradients of queries, documents and temperature.

    Gradients that are not requested have no elements. The other arguments are fields of InfoNce in csrc/ops/info_nce.h.
    """
    queries, documents, owner = batch.queries, batch.documents, batch.owner
    losses = queries.new_empty(num_rows, dtype=torch.float64)
    totals = queries.new_empty(5, dtype=torch.float64)
    d_tau = queries.new_empty(1 if learns else 0, dtype=torch.float64)
    dtype = arithmetic(queries.dtype)
    d_queries = empty_like(queries, dtype) if differs else queries.new_empty(0, dtype=dtype)
    d_documents = empty_like(documents, dtype) if differs else documents.new_empty(0, dtype=dtype)
    own_starts = own_documents = None
    if owner is not None:
        owners, own_documents = torch.sort(owner, stable=True)
        own_starts = torch.searchsorted(owners, torch.arange(len(queries) + 1, device=owner.device))
    _C.info_nce(
        options.native(),
        **batch._asdict(),
        own_starts=own_starts,
        own_documents=own_documents,
        first_row=first_row,
        num_rows=num_rows,
        first_column=first_column,
        dims=dims,
        dim_weights=dim_weights,
        loss=losses,
        stats=totals,
        d_queries=d_queries if differs else None,
        d_documents=d_documents if differs else None,
        d_temperature=d_tau if learns else None,
        log_negatives=log_negatives,
        log_negatives_given=log_negatives_given,
        adds_positive=adds_positive,
    )
    return losses, totals, d_queries, d_documents, d_tau
