"""Attributes and checks that sentence-transformers and LangChain expect of a model."""

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

from pyqemb.errors import ConfigError


class ModelCardData:
    """Where the evaluators of sentence-transformers store their results; `metrics` holds all of them."""

    base_model: str | None = None

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}

    def set_evaluation_metrics(
        self, evaluator: Any, metrics: Mapping[str, float], epoch: int = 0, step: int = 0
    ) -> None:
        """Store the metrics of an evaluator; later values replace earlier ones of the same name."""
        self.metrics.update(metrics)


def also_called(name: str, *others: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Accept any of the other names for the first parameter, `name`."""

    def decorate(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(self: Any, *args: Any, **options: Any) -> Any:
            for other in others:
                if other in options:
                    if args or name in options:
                        raise TypeError(f"{method.__name__}() got multiple values for argument {name!r} ({other!r})")
                    options[name] = options.pop(other)
            return method(self, *args, **options)

        return call

    return decorate


def check_batch_size(batch_size: int | None) -> None:
    """Raise a ConfigError if `batch_size` is neither None nor a positive integer."""
    if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
        raise ConfigError(f"batch_size must be a positive number, got {batch_size!r}")


def register_with_langchain(cls: type) -> None:
    """Make the class a virtual subclass of LangChain's Embeddings if LangChain is imported."""
    langchain = sys.modules.get("langchain_core.embeddings")
    if langchain is not None:
        langchain.Embeddings.register(cls)
