"""A step of curation: a generator over examples that keeps or drops each for a reason that is counted."""

from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict

from pyqemb.curation.ledger import Ledger
from pyqemb.data.example import Example
from pyqemb.data.settings import StrictModel

Side = Literal["query", "positive"]
WINDOW = 4096  # examples looked at together


class Step(StrictModel):
    """Settings, and `run`.

    Where a step has a `model`: a folder or hub name, or an object with encode_query and encode_document.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    kind: str

    def run(self, examples: Iterable[Example], ledger: Ledger) -> Iterator[Example]:
        """Yield what is kept, in order; every example goes through `ledger`."""
        raise NotImplementedError


def encoder(model: Any) -> Any:
    """The model itself, or the one of that name, opened once for all steps."""
    from pyqemb.model.encoder import unit_encoder

    return unit_encoder(_opened(str(model)) if isinstance(model, (str, Path)) else model)


@lru_cache(maxsize=2)
def _opened(name: str) -> Any:
    from pyqemb.model.encoder import open_encoder

    return open_encoder(name)
