"""AdamW over float32 weights, the learning-rate schedule, gradient clipping."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from pyqemb.training.config import TrainSection


def learning_rate(step: int, steps: int, config: TrainSection) -> float:
    """The rate of a step (from 0) of `steps`: linear warm-up, then cosine or linear decay to `final_share`, or constant."""
    warmup = warmup_steps(steps, config)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.schedule == "constant":
        return config.learning_rate
    progress = min((step - warmup) / max(steps - warmup - 1, 1), 1.0)
    left = 1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.learning_rate * (config.final_share + (1 - config.final_share) * left)


def warmup_steps(steps: int, config: TrainSection) -> int:
    """`warmup` below 1 is a share of the steps, from 1 on a number of them."""
    return min(math.ceil(config.warmup * steps) if config.warmup < 1 else int(config.warmup), steps)


class Optimizer:
    """AdamW; norms and other vectors do not decay.

    The weights that it updates are float32. For a bfloat16 model they are copies, from which the model is refreshed after
    each step: bfloat16 itself is too coarse for small updates.
    """

    def __init__(self, model: nn.Module, config: TrainSection):
        self.config = config
        self.model = {name: p for name, p in model.named_parameters() if p.requires_grad}
        narrow = any(p.dtype in (torch.bfloat16, torch.float16) for p in self.model.values())
        self.weights = {n: p.detach().float().clone() for n, p in self.model.items()} if narrow else self.model
        groups = [
            {"params": [p for p in self.weights.values() if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in self.weights.values() if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=config.learning_rate, betas=config.betas, eps=config.epsilon, fused=True,
        )  # fmt: skip

    def zero_grad(self) -> None:
        for parameter in self.model.values():
            parameter.grad = None

    def clip(self) -> float:
        """Scale the gradients down to max_grad_norm; returns their norm before that."""
        gradients = [p.grad for p in self.model.values() if p.grad is not None]
        norm = global_norm(gradients)
        limit = self.config.max_grad_norm
        if limit is not None and math.isfinite(norm) and norm > limit:
            torch._foreach_mul_(gradients, limit / (norm + 1e-6))
        return norm

    def step(self, rate: float) -> None:
        for group in self.adamw.param_groups:
            group["lr"] = rate
        if self.weights is not self.model:
            for name, parameter in self.model.items():
                self.weights[name].grad = None if parameter.grad is None else parameter.grad.float()
        self.adamw.step()
        if self.weights is not self.model:
            with torch.no_grad():
                for name, parameter in self.model.items():
                    parameter.copy_(self.weights[name])
                    self.weights[name].grad = None

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """The moments and step counts by parameter name and kind, e.g. `norm.weight/exp_avg`."""
        return {
            f"{name}/{kind}": value
            for name, weight in self.weights.items()
            for kind, value in self.adamw.state.get(weight, {}).items()
        }

    def load(self, weights: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> None:
        """Put back what `weights` and `state_tensors` held."""
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(weights[name])
                self.model[name].copy_(weight)
        for name, weight in self.weights.items():
            kinds = [key.rpartition("/")[2] for key in state if key.rpartition("/")[0] == name]
            if kinds:
                self.adamw.state[weight] = {kind: state[f"{name}/{kind}"].clone() for kind in kinds}


def global_norm(tensors: Iterable[torch.Tensor]) -> float:
    """The Euclidean norm of all of them together; NaN or infinity where one holds such."""
    tensors = list(tensors)
    if not tensors:
        return 0.0
    return float(torch.linalg.vector_norm(torch.stack([norm.float() for norm in torch._foreach_norm(tensors)])))
