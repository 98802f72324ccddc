"""The registry of objectives, and the choice of the objective of a dataset."""

from typing import TYPE_CHECKING, TypeVar

from pydantic import ValidationError

from pyqemb.data.settings import explain
from pyqemb.errors import ConfigError
from pyqemb.training.objectives.base import Objective

if TYPE_CHECKING:
    from pyqemb.training.config import LossSection

ObjectiveT = TypeVar("ObjectiveT", bound=type[Objective])
_BY_NAME: dict[str, type[Objective]] = {}
_DEFAULTS = {"embedding": "info_nce", "rerank": "rerank"}  # by kind of model, for examples without a task


def register_objective(objective: ObjectiveT) -> ObjectiveT:
    """Register an objective under its `name`, for use in `[loss.tasks]`, and for the tasks that it lists.

    Use as a decorator of the class.

    Register in the script that calls `pyqemb.train`; under torchrun every rank runs that script. A class with the same
    qualified name replaces the earlier one, for example when a notebook cell runs again.

    Raises:
        TypeError: not a subclass of Objective with a `name` and a `loss`.
        ValueError: another class has its name or one of its tasks.
    """
    if not (isinstance(objective, type) and issubclass(objective, Objective)):
        raise TypeError(f"[register_objective] objective must be a subclass of Objective, got {objective!r:.100}")
    name = getattr(objective, "name", None)
    if not isinstance(name, str) or not name or objective.loss is Objective.loss:
        raise TypeError(f"[register_objective] objective: {objective.__name__} needs a `name` and a method `loss`")
    for other in _BY_NAME.values():
        if other.__qualname__ == objective.__qualname__ and not other.__module__.startswith("pyqemb."):
            continue
        if other.name == name:
            raise ValueError(f"[register_objective] objective: {other.__qualname__} is called {name!r} already")
        if shared := set(other.tasks) & set(objective.tasks):
            raise ValueError(
                f"[register_objective] objective: task {min(shared)!r} belongs to {other.name!r}; use [loss.tasks]"
            )
    _BY_NAME[name] = objective
    return objective


def objective_class(name: str) -> type[Objective]:
    """The objective of a name. ConfigError if none is registered."""
    if name not in _BY_NAME:
        raise ConfigError(f"no objective is called {name!r}; expected one of {', '.join(_BY_NAME)}")
    return _BY_NAME[name]


def check_name(name: str) -> str:
    """Check a name in `[loss.tasks]`: it must be that of an objective that trains embeddings."""
    known = [each.name for each in _BY_NAME.values() if each.model == "embedding"]
    if name not in known:
        raise ValueError(f"expected one of {', '.join(known)}, or a name given to pyqemb.training.register_objective")
    return name


def check_settings(name: str, settings: object) -> None:
    """Check `[loss.objectives.NAME]`. ValueError if the objective or one of its settings is unknown."""
    objective = _BY_NAME.get(name)
    if objective is None:
        raise ValueError(f"{name}: no objective is called that; see pyqemb.training.register_objective")
    if objective.__module__.startswith("pyqemb."):
        raise ValueError(f"{name}: its settings are those of [loss]")
    try:
        objective.Settings.model_validate(settings)
    except ValidationError as error:
        raise ValueError("; ".join(f"{name}.{explain(item)}" for item in error.errors())) from error


def objective_of(task: str | None, loss: "LossSection", model: str = "embedding") -> type[Objective]:
    """The objective of the examples of a task.

    It is the first of: that of `[loss.tasks]`, the objective that lists the task, `loss.objective`, and the default of
    the kind of model.
    """
    listed = {each: objective.name for objective in _BY_NAME.values() for each in objective.tasks}
    name = {**listed, **loss.tasks}.get(task or "", loss.objective or _DEFAULTS[model])
    if objective_class(name).model != model:
        name = _DEFAULTS[model]
    return objective_class(objective_class(name).chosen(loss))


def with_in_batch_negatives(dataset: str, objective: type[Objective], wanted: bool | None) -> type[Objective]:
    """The objective of a dataset, given its setting of in-batch negatives.

    ConfigError if the objective does not use negatives.
    """
    if wanted is None:
        return objective
    if wanted not in objective.with_in_batch_negatives:
        raise ConfigError(
            f"data: in_batch_negatives: dataset {dataset!r} is trained by {objective.name}, which uses no negatives"
        )
    return objective_class(objective.with_in_batch_negatives[wanted])
