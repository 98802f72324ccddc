"""The optimizer on float32 weights, also for a model in bfloat16; the average of the weights; schedule; clipping."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyqemb.errors import CheckpointError
from pyqemb.model.shard_files import rows_of, shape_of, sharded_like
from pyqemb.model.shards import is_sharded, local, own_rows
from pyqemb.training.config import TrainSection
from pyqemb.training.groups import Group, lion, parameter_groups

AVERAGE = "ema"  # the kind of the averages among the state tensors
_MOMENTS = {"adamw": ("step", "exp_avg", "exp_avg_sq"), "muon": ("momentum_buffer",), "lion": ("exp_avg",)}


def learning_rate(step: int, steps: int, config: TrainSection) -> float:
    """Return the learning rate of a step (from 0) of `steps`.

    A linear warm-up comes first, then cosine or linear decay to `final_share`, or a constant rate.
    """
    warmup = warmup_steps(steps, config)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.schedule == "constant":
        return config.learning_rate
    progress = min((step - warmup) / max(steps - warmup - 1, 1), 1.0)
    left = 1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.learning_rate * (config.final_share + (1 - config.final_share) * left)


def warmup_steps(steps: int, config: TrainSection) -> int:
    """The number of warm-up steps; `warmup` below 1 is a share of all steps."""
    return min(math.ceil(config.warmup * steps) if config.warmup < 1 else int(config.warmup), steps)


def average_decay(step: int, decay: float) -> float:
    """The decay of the average after `step` steps, at least 1: min(decay, (1 + step) / (10 + step))."""
    return min(decay, (1 + step) / (10 + step))


class Optimizer:
    """AdamW without weight decay for norms and other vectors, or the optimizer of `train.optimizer`.

    It takes a float32 model. With a narrower `dtype` it keeps the float32 weights, and the model computes with rounded
    copies, which are renewed after each step: bfloat16 is too coarse for small updates and for sums of the gradients of
    many chunks. A hook then moves each new gradient from the parameter's .grad to the float32 weight.

    `extra_parameters` are parameters outside of the model, e.g. of the loss; they keep their dtype and do not decay.
    `average` is the exponential moving average of the weights with `train.ema_decay`, otherwise empty.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainSection,
        dtype: torch.dtype = torch.float32,
        extra_parameters: dict[str, nn.Parameter] | None = None,
    ):
        self.config = config
        self.model = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.weights: dict[str, torch.Tensor] = dict(self.model)
        self.extra_parameters = extra_parameters or {}
        kind = "lion" if config.optimizer == "lion" else "adamw"
        groups = [*parameter_groups(model, config), Group(kind, 1.0, 0.0, [*self.extra_parameters])]
        if dtype != torch.float32:
            self.weights = {name: p.detach() for name, p in self.model.items()}
            model.to(dtype)
            for name, parameter in self.model.items():
                parameter.register_post_accumulate_grad_hook(_add_to(self.weights[name]))
        self.average: dict[str, torch.Tensor] = {}
        if config.ema_decay is not None:
            self.average = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.kinds = {name: group.optimizer for group in groups for name in group.names}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}  # by the name of each parameter
        for kind, make in (("adamw", self._adamw), ("muon", self._muon), ("lion", self._lion)):
            own = [group for group in groups if group.optimizer == kind and group.names]
            if own:
                optimizer = make([self._of(group) for group in own])
                self.optimizers |= {name: optimizer for group in own for name in group.names}

    def _of(self, group: Group) -> dict[str, Any]:
        """A parameter group of torch; `scale` is the factor of the learning rate."""
        tensors = self.weights | self.extra_parameters
        params = [tensors[name] for name in group.names]
        return {"params": params, "weight_decay": group.weight_decay, "scale": group.scale}

    def _adamw(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        config = self.config
        return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.epsilon, fused=True)

    def _muon(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.Muon(
            groups, lr=self.config.learning_rate, momentum=self.config.muon_momentum,
            adjust_lr_fn="match_rms_adamw",  # updates as large as those of AdamW: Liu et al. 2025, arXiv 2502.16982
        )  # fmt: skip

    def _lion(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        found: torch.optim.Optimizer = lion()(groups, lr=self.config.learning_rate, betas=self.config.betas)
        return found

    @property
    def has_state(self) -> bool:
        """Whether the moments exist; the first step allocates them."""
        return any(optimizer.state for optimizer in self.optimizers.values())

    @property
    def grad_tensors(self) -> list[torch.Tensor]:
        """The tensors whose .grad holds the gradients."""
        return [*self.weights.values(), *self.extra_parameters.values()]

    def zero_grad(self) -> None:
        """Set all gradients to None."""
        for tensor in self.grad_tensors:
            tensor.grad = None

    def clip(self) -> float:
        """Scale the gradients down to max_grad_norm; returns their norm before that."""
        gradients = [tensor.grad for tensor in self.grad_tensors if tensor.grad is not None]
        norm = global_norm(gradients)
        limit = self.config.max_grad_norm
        if limit is not None and math.isfinite(norm) and norm > limit:
            torch._foreach_mul_([local(gradient) for gradient in gradients], limit / (norm + 1e-6))
        return norm

    def step(self, rate: float) -> None:
        """Update the weights with this learning rate, scaled for each group of parameters."""
        for optimizer in dict.fromkeys(self.optimizers.values()):
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"]
            optimizer.step()
        self._round()

    @torch.no_grad()
    def update_average(self, step: int) -> None:
        """Move the average towards the weights, after `step` steps of the run."""
        if self.average:
            assert self.config.ema_decay is not None
            averages, weights = ([local(x[name]) for name in self.average] for x in (self.average, self.weights))
            torch._foreach_lerp_(averages, weights, 1 - average_decay(step, self.config.ema_decay))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Context in which the model computes with the average; afterwards it has its weights again, bit by bit."""
        self._exchange(self.average)
        try:
            yield
        finally:
            self._exchange(self.weights)

    @torch.no_grad()
    def _exchange(self, source: Mapping[str, torch.Tensor]) -> None:
        """Give the model the values of `source`.

        If the model's parameters are the weights themselves, the values of weights and average are exchanged.
        """
        for name, parameter in self.model.items():
            if parameter is self.weights[name]:
                weight, average = local(parameter), local(self.average[name])
                held = weight.clone()
                weight.copy_(average)
                average.copy_(held)
            else:
                parameter.copy_(source[name])

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """Return the moments and step counts by parameter name and kind, e.g. `norm.weight/exp_avg`.

        The averages have the kind `ema`, the values of the extra parameters the kind `value`.
        """
        moments = {
            f"{name}/{kind}": value
            for name, weight in (self.weights | self.extra_parameters).items()
            for kind, value in self.optimizers[name].state.get(weight, {}).items()
        }
        averages = {f"{name}/{AVERAGE}": average for name, average in self.average.items()}
        values = {f"{name}/value": parameter.detach() for name, parameter in self.extra_parameters.items()}
        return moments | averages | values

    @torch.no_grad()
    def load(self, weights: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], where: str | Path) -> None:
        """Restore `weights` and `state_tensors`; of sharded weights only the rows of this rank are read.

        Raises:
            CheckpointError: the state, which is that of `where`, does not belong to these weights.
        """
        self._check(state, where)
        for name, weight in self.weights.items():
            local(weight).copy_(rows_of(weights, name, own_rows(weight)))
        self._round()
        tensors = self.weights | self.extra_parameters
        for key in state:
            name, _, kind = key.rpartition("/")
            weight = tensors[name]
            whole = kind == "step"  # a number
            rows = state[key] if whole else rows_of(state, key, own_rows(weight))
            if rows.dtype != (torch.float32 if whole else weight.dtype):
                raise CheckpointError(f"{where}: damaged: the optimizer's {key!r} is stored as {rows.dtype}")
            if kind == "value":
                weight.copy_(rows)
            elif kind == AVERAGE:
                local(self.average[name]).copy_(rows)
            else:
                rows = rows.to(weight.device, copy=True)  # the step too, as `fused` expects
                self.optimizers[name].state[weight][kind] = rows if whole else sharded_like(weight, rows)

    def _check(self, state: Mapping[str, torch.Tensor], where: str | Path) -> None:
        """CheckpointError unless the state has what `state_tensors` may have, with the shapes of the weights."""
        expected = {f"{name}/value": parameter.shape for name, parameter in self.extra_parameters.items()}
        expected |= {f"{name}/{AVERAGE}": average.shape for name, average in self.average.items()}
        for name, weight in (self.weights | self.extra_parameters).items():
            moments = [f"{name}/{kind}" for kind in _MOMENTS[self.kinds[name]]]
            if not state.keys().isdisjoint(moments):  # a weight that had no gradient yet has none
                expected |= {key: weight.shape if not key.endswith("/step") else torch.Size() for key in moments}
        for key in sorted(expected.keys() | state.keys()):
            wanted = str(tuple(expected[key])) if key in expected else "none"
            found = str(shape_of(state, key)) if key in state else "none"
            if wanted != found:
                raise CheckpointError(
                    f"{where}: damaged: the optimizer's {key!r:.200} should have the shape {wanted}, found {found:.200}"
                )

    @torch.no_grad()
    def _round(self) -> None:
        """Update the model's copies of the weights, if it computes with copies."""
        pairs = [(p, self.weights[name]) for name, p in self.model.items() if p is not self.weights[name]]
        if pairs:
            torch._foreach_copy_([p for p, _ in pairs], [weight for _, weight in pairs])


def _add_to(weight: torch.Tensor) -> Callable[[torch.Tensor], None]:
    """A hook that adds a parameter's new gradient to that of its float32 weight."""

    def move(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        weight.grad = parameter.grad.float() if weight.grad is None else weight.grad.add_(parameter.grad)
        parameter.grad = None

    return move


def global_norm(tensors: Iterable[torch.Tensor]) -> float:
    """The Euclidean norm of all tensors together; not finite if a tensor is not.

    With sharded tensors this is a collective of all ranks of a replica.
    """
    tensors = list(tensors)
    if not tensors:
        return 0.0
    norms = torch.stack([norm.float() for norm in torch._foreach_norm([local(tensor) for tensor in tensors])])
    sharded = [place for place, tensor in enumerate(tensors) if is_sharded(tensor)]
    if not sharded:
        return float(torch.linalg.vector_norm(norms))
    squares = norms.double().square()
    total = squares[sharded].sum()
    torch.distributed.all_reduce(total, group=tensors[sharded[0]].device_mesh.get_group())  # type: ignore[attr-defined]
    return math.sqrt(total + squares.sum() - squares[sharded].sum())
