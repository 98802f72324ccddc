"""Embedder and Reranker as models of mteb.

Each task has an instruction in Qwen's template; documents have no prompt.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pyqemb import __version__
from pyqemb.data.arguments import Count, checked
from pyqemb.data.tokenizer import TEMPLATE
from pyqemb.errors import ConfigError, DataError
from pyqemb.model.embedder import Embedder
from pyqemb.model.reranker import Reranker

try:
    import mteb
    from mteb.models import ModelMeta
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.model_meta import ScoringFunction
    from mteb.types import PromptType
except ModuleNotFoundError as error:
    raise ConfigError("mteb is not installed: pip install 'pyqemb[eval]'") from error


class MtebEncoder(AbsEncoder):
    """`mteb.evaluate(MtebEncoder(model), tasks)`.

    `instructions` are given by task name, task type or "query"; the default is the task's prompt in mteb. Documents get
    the model's document prompt, and both sides of symmetric tasks the instruction, as in the evaluation of Qwen3
    Embedding.
    """

    @checked
    def __init__(
        self,
        model: Embedder,
        name: str = "pyqemb/model",
        instructions: Mapping[str, str] | None = None,
        dim: Count | None = None,
    ):
        model.check_dim(dim)
        self.model, self.dim, self.prompts_dict = model, dim, dict(instructions or {})
        self.mteb_model_meta = _meta(name, model, dim or model.config.hidden_size)

    def encode(
        self, inputs: Any, *, task_metadata: Any, hf_split: str, hf_subset: str, prompt_type: Any = None, **kwargs: Any
    ) -> np.ndarray:
        """Encode mteb's batches: float32 [texts, dim]."""
        texts = [text for batch in inputs for text in batch["text"]]
        if prompt_type == PromptType.document:
            return self.model.encode_document(texts, dim=self.dim)
        instruction = self.get_instruction(task_metadata, prompt_type)
        if isinstance(instruction, Mapping):
            instruction = next(iter(instruction.values()))
        prompt = TEMPLATE.format(task=instruction, query="") if instruction else None
        return self.model.encode(texts, dim=self.dim, prompt=prompt)


class MtebReranker:
    """`mteb.evaluate(MtebReranker(model), reranking_tasks)`; `instructions` by task name."""

    @checked
    def __init__(self, model: Reranker, name: str = "pyqemb/reranker", instructions: Mapping[str, str] | None = None):
        self.model, self.instructions = model, dict(instructions or {})
        self.mteb_model_meta = _meta(name, model, None)

    def predict(
        self,
        inputs1: Any,
        inputs2: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Score mteb's pairs: float32."""
        sides = [[row for batch in inputs for row in _rows(batch)] for inputs in (inputs1, inputs2)]
        prompt = task_metadata.prompt
        instruction = self.instructions.get(task_metadata.name) or (
            prompt.get("query") if isinstance(prompt, Mapping) else prompt
        )
        pairs = [(query["text"], document["text"]) for query, document in zip(*sides, strict=True)]
        return self.model.score(pairs, instruction=[query.get("instruction") or instruction for query in sides[0]])


@checked
def run_suite(
    model: Embedder | Reranker, suite: str, name: str = "pyqemb/model", tasks: Sequence[Any] | None = None
) -> dict[str, float]:
    """Run an mteb benchmark ("MTEB(eng, v2)") or tasks by name, separated by commas; returns {task: main score}.

    The data are downloaded from mteb's repositories on the hub.

    Raises ConfigError: mteb has no such benchmark or task. DataError: its data cannot be loaded.
    """
    if tasks is None:
        tasks = _tasks(suite)
    wrapped: Any = MtebReranker(model, name) if isinstance(model, Reranker) else MtebEncoder(model, name)
    try:
        results = mteb.evaluate(wrapped, tasks, cache=None, show_progress_bar=False)
    except (OSError, ConnectionError) as error:
        raise DataError(f"{suite}: its data cannot be loaded: {error}") from error
    return {result.task_name: float(result.get_score()) for result in results.task_results}


def _tasks(suite: str) -> Sequence[Any]:
    try:
        return mteb.get_benchmark(suite).tasks
    except KeyError:
        pass
    try:
        return mteb.get_tasks(tasks=[name.strip() for name in suite.split(",")])
    except (KeyError, ValueError) as error:
        raise ConfigError(f"mteb knows no benchmark or tasks {suite!r}: {error}") from error


def _meta(name: str, model: Embedder | Reranker, dim: int | None) -> Any:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    facts = dict(
        name=name, revision=__version__, n_parameters=parameters, embed_dim=dim, max_tokens=model.tokenizer.max_length,
        similarity_fn_name=ScoringFunction.COSINE if dim else None, framework=["PyTorch"], open_weights=True,
        use_instructions=True,
    )  # fmt: skip
    return ModelMeta.create_empty(facts)


def _rows(batch: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Convert a batch of columns to rows."""
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
