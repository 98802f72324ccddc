# The native module: every function checks its arguments and writes into tensors that Python allocated.
from torch import Tensor

def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    /,
) -> None: ...
def attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    scale: float,
    causal: bool,
    /,
) -> None: ...
def pool_forward(
    hidden: Tensor, cu_seqlens: Tensor, norm_weight: Tensor | None, out: Tensor, eps: float, normalize: bool, /
) -> None: ...
def pool_backward(
    hidden: Tensor,
    cu_seqlens: Tensor,
    norm_weight: Tensor | None,
    dout: Tensor,
    dhidden: Tensor,
    dnorm_weight: Tensor | None,
    eps: float,
    normalize: bool,
    /,
) -> None: ...
def info_nce(
    queries: Tensor,
    documents: Tensor,
    positive: Tensor,
    owner: Tensor | None,
    document_ids: Tensor | None,
    loss: Tensor,
    d_queries: Tensor | None,
    d_documents: Tensor | None,
    hard: bool,
    in_batch: bool,
    query_query: bool,
    doc_doc: bool,
    margin: float,
    doc_mask: int,
    temperature: float,
    /,
) -> list[float]: ...
def top_k(
    queries: Tensor,
    documents: Tensor,
    exclude: Tensor | None,
    ceiling: Tensor | None,
    scores: Tensor,
    indices: Tensor,
    /,
) -> None: ...
def rms_norm_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    sum: Tensor | None,
    y: Tensor,
    rstd: Tensor,
    eps: float,
    /,
) -> None: ...
def rms_norm_backward(
    s: Tensor,
    weight: Tensor,
    rstd: Tensor,
    dy: Tensor,
    dsum: Tensor | None,
    dx: Tensor,
    dweight: Tensor | None,
    /,
) -> None: ...
def qk_norm_rope_forward(
    x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, y: Tensor, rstd: Tensor, eps: float, /
) -> None: ...
def qk_norm_rope_backward(
    x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, rstd: Tensor, dy: Tensor, dx: Tensor, dweight: Tensor | None, /
) -> None: ...
def swiglu_forward(gate: Tensor, up: Tensor, y: Tensor, /) -> None: ...
def swiglu_backward(gate: Tensor, up: Tensor, dy: Tensor, dgate: Tensor, dup: Tensor, /) -> None: ...
def available_isas() -> list[str]: ...
def current_isa() -> str: ...
def set_isa(name: str, /) -> None: ...
def num_threads() -> int: ...
def kept_bytes() -> int: ...
def release_kept() -> None: ...

class Block:
    def __init__(self, bytes: int) -> None: ...
