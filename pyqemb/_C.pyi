# The native module: every function checks its arguments and writes into tensors that Python allocated. All tensors of a
# call are on one device; on CUDA the work goes to torch's current stream.
from collections.abc import Sequence

from torch import Tensor

_Sizes = Sequence[int]  # of an attention plan: tiles, blocks, key blocks, 1 where no sequence has more than one query

def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor,
    *,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    plan: Tensor | None,
    sizes: _Sizes,
) -> None: ...
def attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor,
    *,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    scale: float,
    causal: bool,
    plan: Tensor | None,
    sizes: _Sizes,
) -> None: ...
def size_plan(cu_seqlens: Tensor, cu_seqlens_k: Tensor, device: int, /) -> list[int]: ...
def fill_plan(cu_seqlens: Tensor, cu_seqlens_k: Tensor, device: int, sizes: _Sizes, data: Tensor, /) -> None: ...
def largest_plan(num_seqs: int, tokens: int, tokens_k: int, device: int, /) -> list[int]: ...
def fill_plan_on_device(
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor,
    tokens: int,
    tokens_k: int,
    sizes: _Sizes,
    data: Tensor,
    checked: Tensor,
    checked_k: Tensor,
    /,
) -> None: ...
def check_cu_seqlens(op: str, name: str, cu_seqlens: Tensor, total: int, of: str, /) -> None: ...
def last_token_pool_forward(
    hidden: Tensor, cu_seqlens: Tensor, norm_weight: Tensor | None, out: Tensor, eps: float, normalize: bool, /
) -> None: ...
def last_token_pool_backward(
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

INFO_NCE_GROUPS: tuple[str, ...]  # their names
MAX_PREFIXES: int  # of a sweep of info_nce on CUDA
MAX_SOFTMAXES: int

def check_info_nce(
    queries: Tensor, documents: Tensor, positive: Tensor, owner: Tensor | None, document_ids: Tensor | None, /
) -> None: ...

class InfoNceOptions:
    def __init__(self, *, temperature: float, split: bool, focal: float, scale: float) -> None: ...
    def turn_on(self, group: str, *, mask: str, margin: float, relative: bool, hardness: float) -> None: ...

def info_nce(
    options: InfoNceOptions,
    *,
    queries: Tensor,
    documents: Tensor,
    positive: Tensor,
    query_text: Tensor | None,
    document_text: Tensor | None,
    role: Tensor | None,
    owner: Tensor | None,
    own_starts: Tensor | None,
    own_documents: Tensor | None,
    first_row: int,
    num_rows: int,
    first_column: int,
    dims: Sequence[int],
    dim_weights: Sequence[float],
    loss: Tensor,
    stats: Tensor,
    d_queries: Tensor | None,
    d_documents: Tensor | None,
    d_temperature: Tensor | None,
    log_negatives: Tensor | None,
    log_negatives_given: bool,
    adds_positive: bool,
) -> None: ...
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
    x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, y: Tensor, rstd: Tensor, eps: float, /
) -> None: ...
def qk_norm_rope_backward(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    rstd: Tensor,
    dy: Tensor,
    dx: Tensor,
    dweight: Tensor | None,
    /,
) -> None: ...
def swiglu_forward(gate: Tensor, up: Tensor, y: Tensor, /) -> None: ...
def swiglu_backward(gate: Tensor, up: Tensor, dy: Tensor, dgate: Tensor, dup: Tensor, /) -> None: ...
def shingles(text: Tensor, offsets: Tensor, hashes: Tensor, counts: Tensor, n: int, /) -> None: ...
def min_hash(text: Tensor, offsets: Tensor, signatures: Tensor, n: int, /) -> None: ...
def cuda_is_built() -> bool: ...
def hopper_is_built() -> bool: ...  # its own kernels
def cuda_device_count() -> int: ...
def set_newest_kernels(capability: int, /) -> int: ...  # of an architecture that CUDA may use; -> the one before
def available_isas() -> list[str]: ...
def current_isa() -> str: ...
def set_isa(name: str, /) -> None: ...
def num_threads() -> int: ...
def kept_bytes() -> int: ...
def release_kept() -> None: ...

class Block:
    def __init__(self, bytes: int) -> None: ...
