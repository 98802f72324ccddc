"""What an encode job will take, estimated from the first texts of its file; nothing is written."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import torch

from pyqemb.data.arguments import Count, checked
from pyqemb.data.files import check_writable
from pyqemb.data.rows import estimate_rows
from pyqemb.encoding.inputs import read_texts
from pyqemb.encoding.outputs import writer_of
from pyqemb.encoding.workers import Encoder, Settings
from pyqemb.errors import ConfigError, DataError
from pyqemb.jobs.executors import threads_each
from pyqemb.jobs.samples import free_space, peak_memory, spread, timed
from pyqemb.jobs.text import clock_text, size_text
from pyqemb.model.device import pick_device
from pyqemb.model.quantize import Precision

_TEXTS = 512  # texts of the sample
_BATCH = 64  # encoded between two looks at the clock


@dataclass(frozen=True)
class EncodePlan:
    """What an encode job will take.

    Attributes:
        texts: the number of texts.
        is_estimate: whether `texts` is an estimate from the first mebibyte of the file.
        parts: the number of parts.
        sampled: the number of texts that were tokenized and, as far as the time allowed, encoded.
        tokens_per_text: their mean number of tokens, with the prompt and after truncation.
        tokens_per_second: the speed of one process, measured on the sample.
        processes: the number of processes of all tasks together.
        seconds: the time of the job, if all processes are as fast.
        memory: bytes of the memory of one process: its peak so far, and the vectors of a part.
        gpu_memory: bytes on the GPU of one process at their peak so far; 0 on the CPU.
        disk: bytes on the disk at the end of the job, when the parts and the output exist.
        output: bytes of the output.
        free: bytes that are free on the disk of the output.
    """

    texts: int
    is_estimate: bool
    parts: int
    sampled: int
    tokens_per_text: float
    tokens_per_second: float
    processes: int
    seconds: float
    memory: int
    gpu_memory: int
    disk: int
    output: int
    free: int

    def lines(self) -> list[str]:
        """The plan as text."""
        about = "about " if self.is_estimate else ""
        gpu = f", {size_text(self.gpu_memory)} of the GPU" if self.gpu_memory else ""
        few = "" if self.disk <= self.free else "; this is too little"
        plural = "es" if self.processes > 1 else ""
        return [
            f"texts   {about}{self.texts:,}, in {self.parts:,} parts",
            f"tokens  about {self.texts * self.tokens_per_text:,.0f}: {self.tokens_per_text:,.1f} a text, in a sample "
            f"of {self.sampled:,} texts",
            f"speed   {self.tokens_per_second:,.0f} tokens/s, "
            f"{self.tokens_per_second / self.tokens_per_text:,.1f} texts/s in one process",
            f"time    about {clock_text(self.seconds)} with {self.processes:,} process{plural}",
            f"memory  {size_text(self.memory)}{gpu}, each process",
            f"disk    {size_text(self.disk)} at the end, of which {size_text(self.output)} stay; "
            f"{size_text(self.free)} are free{few}",
        ]


@checked
def plan_encode(
    model: str | Path,
    path: str | Path,
    out: str | Path,
    *,
    side: Literal["query", "document", "raw"] = "document",
    instruction: str | None = None,
    field: str = "text",
    dim: Count | None = None,
    precision: Precision = "float32",
    max_length: Count | None = None,
    dtype: str | None = None,
    devices: Sequence[str] = ("auto",),
    rows_per_part: Count = 8192,
    tasks: Count = 1,
    seconds: float = 10.0,
) -> EncodePlan:
    """Estimate what `encode_file` will take with these arguments. Nothing is written.

    A sample of the first part is encoded on the first device. Its texts are spread evenly over the first part of the
    file, so the estimate is poor if later texts have other lengths.

    Args:
        model: as for `encode_file`, like the arguments up to `rows_per_part`.
        path: as for `encode_file`.
        out: as for `encode_file`.
        side: as for `encode_file`.
        instruction: as for `encode_file`.
        field: as for `encode_file`.
        dim: as for `encode_file`.
        precision: as for `encode_file`.
        max_length: as for `encode_file`.
        dtype: as for `encode_file`.
        devices: as for `encode_file`.
        rows_per_part: as for `encode_file`.
        tasks: the number of tasks, each with these devices on a machine of its own (default 1).
        seconds: the time after which no more texts of the sample are encoded (default 10).

    Returns:
        The number of texts and parts, tokens, speed, time, memory and disk.

    Raises:
        ConfigError: an argument is out of range. DataError: the input is invalid or empty.

    Example:
        >>> import json
        >>> from pathlib import Path
        >>> from pyqemb.encoding import plan_encode
        >>> from pyqemb.testing.tiny import write_tiny_folder
        >>> _ = Path("texts.json").write_text(json.dumps([{"text": "one"}, {"text": "two"}]))
        >>> plan = plan_encode(write_tiny_folder("base"), "texts.json", "vectors.npy", rows_per_part=1)
        >>> plan.texts, plan.parts, plan.disk
        (2, 2, 512)
    """
    path, out = Path(path), Path(out)
    writer_of(out)
    if instruction is not None and side != "query":
        raise ConfigError("instruction: is for side 'query'")
    if not devices:
        raise ConfigError("devices must name at least one device")
    if not seconds > 0:
        raise ConfigError(f"seconds must be above 0, got {seconds}")
    check_writable(out)
    first = list(islice(read_texts(path, field), rows_per_part))
    if not first:
        raise DataError(f"{path}: holds no texts")
    known = estimate_rows(path)
    texts, is_exact = known or (sum(1 for _ in read_texts(path, field)), True)
    encoder = Encoder(Settings(str(model), side, instruction, dim, max_length, dtype, rows_per_part), devices[0])
    encoder.model.check_dim(dim)
    for device in devices:
        pick_device(device, encoder.model.config)
    sample = [row.text for row in spread(first, _TEXTS)]
    counts = encoder.model.token_counts(sample, side, instruction)
    with _threads_of(devices):
        width = encoder.vectors(sample[:1]).shape[1]  # the first call prepares memory
        done, spent = timed(encoder.vectors, sample, _BATCH, seconds)
    speed = max(sum(counts[:done]), 1) / spent
    used = encoder.model.device
    mean = sum(counts) / len(counts)
    processes = len(devices) * tasks
    output = texts * {"float32": 4 * width, "int8": width, "uint8": width}.get(precision, -(-width // 8))
    return EncodePlan(
        texts=texts, is_estimate=not is_exact, parts=-(-texts // rows_per_part), sampled=len(sample),
        tokens_per_text=mean, tokens_per_second=speed, processes=processes,
        seconds=texts * mean / (speed * processes),
        memory=peak_memory() + 4 * width * min(rows_per_part, texts),
        gpu_memory=torch.cuda.max_memory_allocated(used) if used.type == "cuda" else 0,
        disk=4 * texts * width + output, output=output, free=free_space(out),
    )  # fmt: skip


@contextmanager
def _threads_of(devices: Sequence[str]) -> Iterator[None]:
    """Context with as many threads as a process of the job has."""
    before = torch.get_num_threads()
    if len(devices) > 1 and devices[0] == "cpu":
        torch.set_num_threads(threads_each(len(devices)))
    try:
        yield
    finally:
        torch.set_num_threads(before)
