"""What the ranks of a step agree on: here nothing, each plans and retries for itself; `parallel.sharding` has more."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pyqemb.training.grad_cache.memory import CaughtError, catch_oom
from pyqemb.training.grad_cache.plan import Plan, Sizes


class StepRanks:
    """The ranks whose passes through the model must match, from the view of one of them; here this one alone.

    The gradient cache calls the methods in the same order on every rank.
    """

    is_sharded = False

    def sizes(self, reshard: bool, vectors: int, overhead: int) -> Sizes:
        """The bytes of a sharded model that a plan stands on."""
        raise NotImplementedError

    def choose(self, budget: int, plan_of: Callable[[bool], Plan]) -> Plan:
        """The plan to take, given that for each value of Plan.reshard."""
        return plan_of(False)

    @property
    def first_choice(self) -> bool:
        """The value of Plan.reshard where nothing is planned."""
        return False

    def agree(self, plan: Plan) -> Plan:
        """The plan that every rank can keep to."""
        return plan

    def most(self, count: int) -> int:
        """The largest count of all ranks."""
        return count

    def missing(self, count: int) -> int:
        """By how much a count of this rank is below the largest."""
        return self.most(count) - count

    def begin(self, plan: Plan) -> None:
        """Before the passes of a step, and before a repeated attempt."""

    def end(self) -> None:
        """After the last pass of a step."""

    @contextmanager
    def attempt(self, passes: int, backward: bool) -> Iterator[CaughtError]:
        """Passes that may run out of memory; where one rank does, every rank has the error.

        Args:
            passes: the number of chunks.
            backward: whether each pass ends with a backward pass.
        """
        with catch_oom() as caught:
            yield caught

    @contextmanager
    def one_pass(self, last: bool) -> Iterator[None]:
        """The pass of one chunk: forward, backward or both."""
        yield
