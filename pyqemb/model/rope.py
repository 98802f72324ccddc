"""The rotary embedding: its frequencies, scaled as config.json says, and the angles of tokens.

Legend: T tokens, H = head_dim / 2.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from pyqemb.errors import ConfigError


@dataclass(frozen=True)
class Rope:
    """A rotary embedding.

    `kind` is the rope type of transformers ("default", "linear", "llama3" or "yarn"), `settings` holds its parameters.

    Raises ConfigError: an unknown kind, a number that is missing or not positive.
    """

    theta: float = 1_000_000.0
    kind: str = "default"
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in _KINDS:
            raise ConfigError(f"rope type must be one of {', '.join(_KINDS)}, got {self.kind!r}")
        if not _positive(self.theta):
            raise ConfigError(f"rope_theta must be a positive number, got {self.theta!r}")
        _, needed, optional = _KINDS[self.kind]
        unknown = sorted(self.settings.keys() - {*needed, *optional})
        if unknown:
            raise ConfigError(
                f"{unknown[0]} is not a known setting of rope type {self.kind!r}, got {self.settings[unknown[0]]!r}"
            )
        if not isinstance(self.settings.get("truncate", True), bool):
            raise ConfigError(
                f"truncate of rope type {self.kind!r} must be true or false, got {self.settings['truncate']!r}"
            )
        for name in needed + tuple(name for name in optional if name in self.settings and name != "truncate"):
            if not _positive(self.settings.get(name)):
                raise ConfigError(
                    f"{name} of rope type {self.kind!r} must be a positive number, got {self.settings.get(name)!r}"
                )

    def __hash__(self) -> int:
        return hash((self.theta, self.kind, *sorted(self.settings.items())))

    def frequencies(self, head_dim: int, device: torch.device | None = None) -> torch.Tensor:
        """float32 [H]: the rotation of each pair of features from one position to the next, in radians."""
        exponents_H = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
        return _KINDS[self.kind][0](self, 1.0 / self.theta**exponents_H, head_dim)

    @property
    def scale(self) -> float:
        """Factor of cos and sin (YaRN's temperature of the attention)."""
        if self.kind != "yarn":
            return 1.0
        factor, given = self.settings["factor"], self.settings.get("attention_factor")
        if given is not None:
            return float(given)
        mscale, all_dims = self.settings.get("mscale"), self.settings.get("mscale_all_dim")
        return _mscale(factor, mscale) / _mscale(factor, all_dims) if mscale and all_dims else _mscale(factor, 1.0)

    @classmethod
    def from_config(cls, values: Mapping[str, Any]) -> "Rope":
        """Read a config.json: the base at the top level or in rope_parameters, the scaling there or in rope_scaling."""
        bases = [] if values.get("rope_theta") is None else [values["rope_theta"]]
        inner: dict[str, Any] = {}
        for name in ("rope_scaling", "rope_parameters"):
            given = values.get(name) or {}
            if not isinstance(given, Mapping):
                raise ConfigError(f"{name} must be an object, got {given!r}")
            bases += [given["rope_theta"]] if "rope_theta" in given else []
            inner |= given
        if not bases:
            raise ConfigError("missing rope_theta (at the top level or in rope_parameters)")
        if not all(map(_positive, bases)):
            raise ConfigError(
                f"rope_theta must be a positive number, got {next(b for b in bases if not _positive(b))!r}"
            )
        if any(base != bases[0] for base in bases):
            raise ConfigError(f"rope_theta is given twice with different values: {bases}")
        kind = inner.get("rope_type", inner.get("type", "default"))
        if inner.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0)) not in (None, 1, 1.0):
            raise ConfigError("partial_rotary_factor is not supported")
        about = ("rope_theta", "rope_type", "type", "partial_rotary_factor")
        settings = {k: v for k, v in inner.items() if k not in about and v is not None}
        if kind == "yarn":
            settings.setdefault("original_max_position_embeddings", values.get("max_position_embeddings"))
        return cls(bases[0], kind, settings)

    def to_dict(self) -> dict[str, Any]:
        """rope_parameters of config.json."""
        return {"rope_type": self.kind, "rope_theta": self.theta, **self.settings}


@dataclass(frozen=True)
class Rotary:
    """cos and sin of every token's position, [T, H]."""

    cos: torch.Tensor
    sin: torch.Tensor

    def at(self, tokens: torch.Tensor) -> "Rotary":
        """The angles of the selected tokens."""
        return Rotary(self.cos[tokens], self.sin[tokens])


class RotaryTables:
    """The angles of the tokens of a batch, computed once for all layers with the same frequencies."""

    def __init__(self, positions_T: torch.Tensor, dtype: torch.dtype):
        self._positions_T = positions_T
        # bf16 and fp16 heads are rotated in float32; float64 heads use float32 angles too, as in transformers.
        self._dtype = torch.promote_types(dtype, torch.float32)
        self._made: dict[tuple[Rope, int], Rotary] = {}

    def __call__(self, rope: Rope, head_dim: int) -> Rotary:
        """The angles for heads of that size."""
        key = rope, head_dim
        if key not in self._made:
            angles_TH = self._positions_T.float()[:, None] * rope.frequencies(head_dim, self._positions_T.device)
            self._made[key] = Rotary(*((x * rope.scale).to(self._dtype) for x in (angles_TH.cos(), angles_TH.sin())))
        return self._made[key]


def has_base(values: Mapping[str, Any]) -> bool:
    """Whether a config.json names rope_theta inside rope_parameters or rope_scaling."""
    inner = [values.get(name) for name in ("rope_scaling", "rope_parameters")]
    return any(isinstance(given, Mapping) and "rope_theta" in given for given in inner)


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _plain(rope: Rope, frequencies_H: torch.Tensor, head_dim: int) -> torch.Tensor:
    return frequencies_H


def _linear(rope: Rope, frequencies_H: torch.Tensor, head_dim: int) -> torch.Tensor:
    return frequencies_H / rope.settings["factor"]


def _llama3(rope: Rope, frequencies_H: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Divide low frequencies by the factor, keep high ones, and interpolate in between (Llama 3.1)."""
    low, high = rope.settings["low_freq_factor"], rope.settings["high_freq_factor"]
    turns_H = rope.settings["original_max_position_embeddings"] * frequencies_H / (2 * math.pi)  # in the trained window
    fast_H = ((turns_H - low) / (high - low)).clamp(0, 1)
    return fast_H * frequencies_H + (1 - fast_H) * frequencies_H / rope.settings["factor"]


def _yarn(rope: Rope, frequencies_H: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Peng et al. 2023, arXiv 2309.00071, section 3.2."""
    window, settings = rope.settings["original_max_position_embeddings"], rope.settings

    def feature_that_turns(times: float) -> float:
        return head_dim * math.log(window / (times * 2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = (
        feature_that_turns(settings.get("beta_fast") or 32),
        feature_that_turns(settings.get("beta_slow") or 1),
    )
    if settings.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    places_H = torch.arange(len(frequencies_H), device=frequencies_H.device, dtype=torch.float32)
    slow_H = ((places_H - first) / max(last - first, 0.001)).clamp(0, 1)
    return slow_H * frequencies_H / settings["factor"] + (1 - slow_H) * frequencies_H


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


# rope type: (its frequencies, required numbers, optional numbers)
_KINDS: dict[str, tuple[Callable[[Rope, torch.Tensor, int], torch.Tensor], tuple[str, ...], tuple[str, ...]]] = {
    "default": (_plain, (), ("original_max_position_embeddings",)),
    "linear": (_linear, ("factor",), ("original_max_position_embeddings",)),
    "llama3": (_llama3, ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        _yarn,
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
}
