"""Scoring of pairs, with the methods and arguments of CrossEncoder."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from pyqemb.data.arguments import Count, checked
from pyqemb.errors import ConfigError
from pyqemb.model.device import pick_device
from pyqemb.model.neighbors import ModelCardData, also_called, check_batch_size
from pyqemb.model.packed_model import PackedModel
from pyqemb.model.pool import Pool, Pooled
from pyqemb.model.progress import progress_bar


class Scoring(Pooled, PackedModel):
    """The methods, as a base class; subclasses have these attributes."""

    num_labels = 1
    margins: Callable[..., np.ndarray]

    @cached_property
    def model_card_data(self) -> ModelCardData:
        """Where the evaluators of sentence-transformers store their results."""
        return ModelCardData()

    @also_called("pairs", "sentences", "inputs")
    @checked
    def predict(
        self,
        pairs: Sequence[Sequence[str]] | Sequence[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: Count | None = None,
        show_progress_bar: bool | None = None,
        activation_fn: Callable[[torch.Tensor], torch.Tensor] | None = None,
        apply_softmax: bool | None = False,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: str | torch.device | Sequence[str] | None = None,
        pool: Pool | None = None,
        chunk_size: Count | None = None,
    ) -> np.ndarray | np.floating | torch.Tensor | list[torch.Tensor]:
        """Score (query, document) pairs: [len(pairs)], or one score for a single pair.

        The arguments are those of CrossEncoder.predict, in its order.

        Args:
            pairs: a list of pairs or one pair; `sentences` and `inputs` are other names of this argument.
            prompt_name: must be None; a reranker has no named prompts.
            prompt: the instruction (default: `default_instruction`).
            batch_size: checked and otherwise unused; forward passes are bounded by their tokens.
            show_progress_bar: True shows a bar on stderr.
            activation_fn: applied to the difference of the logits of yes and no; None: the sigmoid.
            apply_softmax: no effect, since there is one label.
            convert_to_numpy: False gives a list of tensors.
            convert_to_tensor: True gives one tensor.
            device: move the model there first. A list of devices scores in one process for each.
            pool: the worker processes of `start_multi_process_pool` (default: score in this process).
            chunk_size: the number of pairs that a worker process gets at a time.

        Returns:
            A float32 numpy array [len(pairs)] unless an argument says otherwise; one score for a single pair.

        Raises:
            TypeError: not pairs of two texts. ConfigError (a ValueError): an invalid value of an argument.
        """
        check_batch_size(batch_size)
        if prompt_name is not None:
            raise ConfigError(f"prompt_name: a reranker has no named prompts, got {prompt_name!r}; use prompt")
        items: list[Any] = pairs.tolist() if isinstance(pairs, np.ndarray) else list(pairs)
        single = len(items) > 0 and isinstance(items[0], str)
        items = [items] if single else items
        if device is not None and isinstance(device, (str, torch.device)):
            self.to(pick_device(device, self.config))
            device = None
        with progress_bar("Pairs", len(items), show_progress_bar) as advance:
            if pool is not None or device is not None:
                parts = self.in_processes("margins", items, {"instruction": prompt}, device, pool, chunk_size, advance)
                margins = np.concatenate(parts) if parts else np.empty(0, dtype=np.float32)
            else:
                margins = self.margins(items, instruction=prompt, on_progress=advance)
        scores = torch.from_numpy(margins).to(self.device)
        if len(scores):
            scores = (activation_fn or torch.sigmoid)(scores[:, None])
            scores = scores.squeeze(-1) if scores.ndim > 1 else scores
        if convert_to_tensor:
            return scores[0] if single else scores
        if not convert_to_numpy:
            return scores[0] if single else list(scores)
        # Without pairs sentence-transformers returns float64.
        array = scores.float().cpu().numpy() if len(scores) else np.array([])
        return array[0] if single else array

    @checked
    def rank(
        self,
        query: str,
        documents: Sequence[str],
        top_k: Count | None = None,
        return_documents: bool = False,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: Count | None = None,
        show_progress_bar: bool | None = None,
        activation_fn: Callable[[torch.Tensor], torch.Tensor] | None = None,
        device: str | torch.device | Sequence[str] | None = None,
        pool: Pool | None = None,
        chunk_size: Count | None = None,
    ) -> list[dict[str, Any]]:
        """Sort documents by their score for a query, with the arguments of CrossEncoder.rank, in its order.

        Args:
            query: the query.
            documents: the documents.
            top_k: the number of documents to return (default: all).
            return_documents: add the "text" of each document.
            prompt_name: as in `predict`, like all arguments below.
            prompt: the instruction (default: `default_instruction`).
            batch_size: checked and otherwise unused.
            show_progress_bar: True shows a bar on stderr.
            activation_fn: applied to the difference of the logits of yes and no (default: the sigmoid).
            device: move the model there first. A list of devices scores in one process for each.
            pool: the processes of `start_multi_process_pool` (default: this process).
            chunk_size: how many pairs a process of the pool gets at a time.

        Returns:
            {"corpus_id", "score"} for each document, best first.
        """
        scores = self.predict(
            [(query, document) for document in documents], prompt_name, prompt, batch_size, show_progress_bar,
            activation_fn, convert_to_tensor=True, device=device, pool=pool, chunk_size=chunk_size,
        ).tolist()  # fmt: skip
        results = [
            {"corpus_id": index, "score": score} | ({"text": documents[index]} if return_documents else {})
            for index, score in enumerate(scores)
        ]
        return sorted(results, key=lambda result: result["score"], reverse=True)[:top_k]
