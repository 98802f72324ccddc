"""The agreement between the ranks of a step; here there is none, `parallel.sharding` has that of sharded weights."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pyqemb.training.grad_cache.memory import CaughtError, catch_oom
from pyqemb.training.grad_cache.plan import Plan, Sizes


class StepRanks:
    """The ranks whose passes through the model must match; here only this rank, which plans and retries alone.

    The gradient cache calls the methods in the same order on every rank.
    """

    is_sharded = False

    def sizes(self, reshard: bool, vectors: int, overhead: int) -> Sizes:
        """The bytes of a sharded model that a plan needs."""
        raise NotImplementedError

    def choose(self, budget: int, plan_of: Callable[[bool], Plan]) -> Plan:
        """Choose a plan, given a function that returns the plan for each value of Plan.reshard."""
        return plan_of(False)

    @property
    def first_choice(self) -> bool:
        """The value of Plan.reshard without planning."""
        return False

    def agree(self, plan: Plan) -> Plan:
        """A plan that fits on every rank."""
        return plan

    def most(self, count: int) -> int:
        """The largest count of all ranks."""
        return count

    def missing(self, count: int) -> int:
        """The difference between the largest count of all ranks and that of this rank."""
        return self.most(count) - count

    def begin(self, plan: Plan) -> None:
        """Before the passes of a step, and before a repeated attempt."""

    def end(self) -> None:
        """After the last pass of a step."""

    @contextmanager
    def attempt(self, passes: int, backward: bool) -> Iterator[CaughtError]:
        """Context of passes that may run out of memory; if one rank does, every rank gets the error.

        Args:
            passes: the number of chunks.
            backward: whether each pass ends with a backward pass.
        """
        with catch_oom() as caught:
            yield caught

    @contextmanager
    def one_pass(self, last: bool) -> Iterator[None]:
        """Context of the pass of one chunk: forward, backward or both."""
        yield
