"""Weights in safetensors: read tensor by tensor from one file or several, loaded into a model, written one by one."""

import errno
import hashlib
import json
import math
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from pyqemb.data.files import atomic_file
from pyqemb.data.folder import member, read_json
from pyqemb.data.machine import is_out_of_memory, raise_if_machine, reading, reason, writing
from pyqemb.errors import CheckpointError, MachineError
from pyqemb.model.config import DecoderConfig
from pyqemb.model.decoder import Decoder, Family, without_prefix
from pyqemb.model.shards import local, own_rows

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
LM_HEAD = "lm_head.weight"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_PICKLED = "*.bin", "*.pt", "*.pth", "*.ckpt"
# Written by transformers before 4.32: the frequencies of the rotary embedding, which follow from config.json.
_BUFFERS = re.compile(r"(layers\.\d+\.self_attn\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)")
_SHOWN = 5  # names in an error before "and n more"


class Tensors(Mapping[str, torch.Tensor]):
    """The tensors of a folder by name; each is read from the disk on access.

    Names are those of `Family.read_name` (None: no `model.` prefix); buffers of old versions and `heads` are left out,
    see `head`. `file`: the weight file (None: those of the model, one file or shards). CheckpointError names the file
    that is missing, damaged or outside the folder.
    """

    def __init__(
        self,
        folder: str | Path,
        heads: Collection[str] = (LM_HEAD,),
        file: str | None = None,
        family: Family | None = None,
    ):
        read_name = without_prefix if family is None else family.read_name
        self.folder = Path(folder)
        self._heads: dict[str, Path] = {}
        self._home: dict[str, tuple[Path, str]] = {}
        self._open: dict[Path, Any] = {}
        for path, promised in _weight_files(self.folder) if file is None else [(_there(self.folder, file), None)]:
            stored = set(self._handle(path).keys())
            if promised is not None and stored != promised:
                raise CheckpointError(
                    f"{path}: does not match {INDEX}: missing {_some(promised - stored)}, "
                    f"surplus {_some(stored - promised)}"
                )
            self._heads |= dict.fromkeys(stored & {*heads}, path)
            for name in sorted(stored - {*heads}):
                ours = read_name(name)
                if ours is None or _BUFFERS.fullmatch(ours):
                    continue
                if ours in self._home:
                    raise CheckpointError(f"{path}: {ours} appears twice")
                self._home[ours] = path, name

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._read(*self._home[name])

    def rows(self, name: str, rows: slice) -> torch.Tensor:
        """Some rows of a tensor; the others are not read."""
        return self._read(*self._home[name], rows)

    def head(self, name: str) -> torch.Tensor | None:
        """The head of that name, None if the folder does not have it."""
        return self._read(self._heads[name], name) if name in self._heads else None

    def __contains__(self, name: object) -> bool:  # a Mapping would read the tensor
        return name in self._home

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def __len__(self) -> int:
        return len(self._home)

    @property
    def files(self) -> list[Path]:
        """The weight files, in the order of the index."""
        return list(self._open)

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._home[name][0]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header; the tensor is not read."""
        path, stored = self._home[name]
        return tuple(self._handle(path).get_slice(stored).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor, from the header; CheckpointError unless float64, float32, bfloat16 or float16."""
        path, stored = self._home[name]
        dtype = self._handle(path).get_slice(stored).get_dtype()
        if dtype not in DTYPES:
            raise CheckpointError(f"{path}: {name} is stored as {dtype}; expected one of {', '.join(DTYPES)}")
        return DTYPES[dtype]

    def _read(self, path: Path, stored: str, rows: slice | None = None) -> torch.Tensor:
        return read_tensor(self._handle(path), path, stored, rows)

    def _handle(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = open_safetensors(path)
        return self._open[path]


def read_tensor(file: Any, path: Path, name: str, rows: slice | None = None) -> torch.Tensor:
    """A tensor, or some of its rows, of a file that `open_safetensors` has opened; CheckpointError if it is damaged."""
    try:
        found: torch.Tensor = file.get_tensor(name) if rows is None else file.get_slice(name)[rows]
        return found
    except (SafetensorError, OSError) as error:
        raise_if_machine(path, error)
        raise CheckpointError(f"{path}: {name} cannot be read: {reason(error)}") from error
    except (TypeError, ValueError, RuntimeError) as error:  # torch refuses the shape, and adds its stack trace
        if is_out_of_memory(error):
            raise
        first = " ".join(str(error).splitlines()[:1])
        raise CheckpointError(f"{path}: {name} cannot be read: {first}") from error


def open_safetensors(path: Path) -> Any:
    """Open a file without reading its tensors. CheckpointError if it is damaged."""
    with reading(path):
        try:
            return safe_open(path, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise_if_machine(path, error)
            if isinstance(error, FileNotFoundError):
                _check_missing(path)
            raise CheckpointError(f"{path}: damaged, cut short or not safetensors: {reason(error)}") from error


def _check_missing(path: Path) -> None:
    """MachineError if the file exists: safetensors says of every file that it cannot open that it does not exist."""
    try:
        path.open("rb").close()
    except OSError as error:
        raise_if_machine(path, error)
        return
    raise MachineError(f"{path}: cannot be read: {os.strerror(errno.EIO)}", errno.EIO, str(path))


def read_tensors(folder: str | Path, family: Family | None = None) -> Tensors:
    """The tensors of a model folder as a lazy mapping from name to tensor."""
    return Tensors(folder, family=family)


def check_sizes(config: DecoderConfig, family: Family, tensors: Tensors) -> None:
    """Compare config.json with the headers of the weights, before anything is allocated.

    Raises:
        CheckpointError: the number of layers, or the sizes of the first layer and the embeddings, differ.
    """
    prefix = family.stored_name("layers.")
    layers = {name.removeprefix(prefix).partition(".")[0] for name in tensors if name.startswith(prefix)}
    if len(layers) != config.num_hidden_layers:
        raise CheckpointError(
            f"{tensors.folder / 'config.json'}: num_hidden_layers is {config.num_hidden_layers}, the weights hold "
            f"{len(layers)} layers"
        )
    hidden, heads, keys = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    shapes = {
        "embed_tokens.weight": (config.vocab_size, hidden),
        "layers.0.self_attn.q_proj.weight": (heads * config.head_dim, hidden),
        "layers.0.self_attn.k_proj.weight": (keys * config.head_dim, hidden),
        "layers.0.mlp.gate_proj.weight": (config.intermediate_size, hidden),
        "layers.0.mlp.up_proj.weight": (config.intermediate_size, hidden),
    }
    for name, shape in shapes.items():
        stored = family.stored_name(name)
        if stored in tensors:
            _check_shape(tensors, stored, shape)


def check_weights(module: Decoder, tensors: Tensors) -> dict[str, str]:
    """Compare names, shapes and dtypes of the tensors of a folder with the parameters of a decoder, from the headers.

    Adapters are ignored.

    Returns:
        The stored name of each parameter.

    Raises:
        CheckpointError: names are missing or surplus, or a shape or dtype differs.
    """
    parameters = {name: x for name, x in module.named_parameters() if ".lora." not in name}
    stored = {name: module.family.stored_name(name) for name in parameters}
    missing, surplus = set(stored.values()) - tensors.keys(), tensors.keys() - set(stored.values())
    if missing or surplus:
        raise CheckpointError(
            f"{tensors.folder}: the weights are not those of config.json: "
            f"missing {_some(missing)}, surplus {_some(surplus)}"
        )
    for name, parameter in parameters.items():
        tensors.dtype(stored[name])
        _check_shape(tensors, stored[name], tuple(parameter.shape))
    return stored


def load_weights(module: Decoder, source: str | Path | Tensors, dtype: torch.dtype | None = None) -> None:
    """Load the weights of a folder into a decoder, which may be on the meta device; dtype None: the stored dtype.

    CheckpointError, which names the tensor, for missing and surplus names, wrong shapes or dtypes, NaN and infinity.
    """
    tensors = source if isinstance(source, Tensors) else read_tensors(source, module.family)
    names = check_weights(module, tensors)
    dtype = widest_dtype(tensors) if dtype is None else dtype
    # Copies, because the mapped file may be replaced or changed while the model is in use.
    copies = {name: _finite(tensors, stored).to(dtype, copy=True) for name, stored in names.items()}
    module.load_state_dict(copies, assign=True)
    module.requires_grad_(True)


@torch.no_grad()
def load_rows(module: Decoder, tensors: Tensors) -> None:
    """Load weights into the parameters of a decoder in place; of sharded parameters, only this rank's rows are read.

    CheckpointError as in `load_weights`.
    """
    names = check_weights(module, tensors)
    for name, parameter in module.named_parameters():
        if name in names:
            rows = own_rows(parameter)
            local(parameter).copy_(_finite(tensors, names[name], rows))


def widest_dtype(tensors: Tensors) -> torch.dtype:
    """The stored dtype, or the narrowest dtype that represents all stored dtypes."""
    widest = torch.bfloat16 if not len(tensors) else tensors.dtype(next(iter(tensors)))
    for name in tensors:
        widest = torch.promote_types(widest, tensors.dtype(name))
    return widest


class Stored(NamedTuple):
    """The entry of a tensor in the header of a file."""

    dtype: torch.dtype
    shape: Sequence[int]


def file_order(stored: Mapping[str, Stored]) -> list[str]:
    """The names in the order of the tensors in a file: wide dtypes first, then by name."""
    return sorted(stored, key=lambda name: (-stored[name].dtype.itemsize, name))


def write_safetensors(
    path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> str:
    """Write tensors to a temporary file, sync it, and rename it; an existing file stays intact until then.

    Returns the sha256 of the file.
    """
    stored = {name: Stored(tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    with atomic_file(path) as temporary:
        return stream_safetensors(temporary, stored, (tensors[name] for name in file_order(stored)), metadata)


def stream_safetensors(
    path: Path, stored: Mapping[str, Stored], tensors: Iterable[torch.Tensor], metadata: Mapping[str, str] | None = None
) -> str:
    """Write tensors one at a time, so that only one is in memory.

    Args:
        path: the file, written in place.
        stored: the header, which is written before the tensors are computed.
        tensors: the tensors of the header, in `file_order`, on any device.
        metadata: strings by name, for the header.

    Returns:
        The sha256 of the file.
    """
    names = file_order(stored)
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name in names:
        dtype, shape = stored[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    digest = hashlib.sha256(head)
    with writing(path), path.open("wb") as file:
        file.write(head)
        for name, tensor in zip(names, tensors, strict=True):
            assert (tensor.dtype, tensor.shape) == (stored[name].dtype, torch.Size(stored[name].shape)), name
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            file.write(data)
            digest.update(data)
    return digest.hexdigest()


def sha256(path: str | Path) -> str:
    """The hex digest of a file. MachineError if the machine fails to read it."""
    with reading(path), open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _check_shape(tensors: Tensors, name: str, wanted: tuple[int, ...]) -> None:
    if tensors.shape(name) != wanted:
        raise CheckpointError(
            f"{tensors.file(name)}: {name} has shape {list(tensors.shape(name))}, config.json asks for {list(wanted)}"
        )


def _there(folder: Path, file: str) -> Path:
    path = member(folder, file)
    if not path.is_file():
        raise CheckpointError(f"{folder}: has no {file}")
    return path


def _finite(tensors: Tensors, name: str, rows: slice | None = None) -> torch.Tensor:
    tensor = tensors[name] if rows is None else tensors.rows(name, rows)
    if not torch.isfinite(tensor).all():
        raise CheckpointError(f"{tensors.file(name)}: {name} holds NaN or infinity")
    return tensor


def _weight_files(folder: Path) -> list[tuple[Path, set[str] | None]]:
    """The safetensors files of a folder, each with the tensor names of the index (None without an index)."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    if member(folder, WEIGHTS).is_file():
        return [(folder / WEIGHTS, None)]
    index = folder / INDEX
    if not index.is_file():
        pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
        hint = f"; {pickled[0]} is a pickle, which can run code: convert it to safetensors" if pickled else ""
        raise CheckpointError(f"{folder}: has neither {WEIGHTS} nor {INDEX}{hint}")
    try:
        weight_map = read_json(folder, INDEX)["weight_map"]
        promised: dict[str, set[str]] = {}
        for name, file in weight_map.items():
            promised.setdefault(file, set()).add(name)
    except (CheckpointError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: expected a weight_map of tensor name to file: {error!r}") from error
    return [(_inside(folder, index, file), names) for file, names in promised.items()]


def _inside(folder: Path, index: Path, file: Any) -> Path:
    """The path of a shard; an untrusted index must not name files outside of the folder."""
    if not isinstance(file, str) or not file.endswith(".safetensors") or len(PurePosixPath(file).parts) != 1:
        raise CheckpointError(f"{index}: weight_map may name .safetensors files of its own folder only, got {file!r}")
    path = member(folder, file)
    if not path.is_file():
        raise CheckpointError(f"{path}: missing, though {INDEX} names it")
    return path


def _some(names: Any) -> str:
    shown = sorted(names)
    more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return (", ".join(shown[:_SHOWN]) or "none") + more
