"""The named groups of InfoNCE candidates, the presets, and the options as the kernels take them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from pyqemb import _C
from pyqemb.ops import checks

_OP = "info_nce"


@dataclass(frozen=True)
class Group:
    """How a group of candidates is masked and weighted in the softmax.

    Attributes:
        mask: which score is compared with the row's limit: "own", the candidate's; "query_document", for the
            document-document groups, the score of (q_i, d_j), which is the literal reading of equation 1 of the Qwen3
            Embedding report; None: nothing is masked.
        margin: the limit is s_i + margin, s_i the positive's score (default: the margin of the call).
        relative: the limit is s_i + margin * |s_i| instead.
        hardness: this times the score is added to the logit as a constant, without a gradient (Lan et al., arXiv
            2503.04812, section 3).

    Example:
        >>> pyqemb.ops.Group(margin=0.05, hardness=5.0)
        Group(mask='own', margin=0.05, relative=False, hardness=5.0)
    """

    mask: Literal["own", "query_document"] | None = "own"
    margin: float | None = None
    relative: bool = False
    hardness: float = 0.0

    def __post_init__(self) -> None:
        if not (self.mask is None or isinstance(self.mask, str)) or self.mask not in (None, "own", "query_document"):
            raise ValueError(f"[info_nce] mask must be 'own', 'query_document' or None, got {self.mask!r}")
        if self.margin is not None:
            checks.finite(_OP, "margin of a group", self.margin)
        checks.flag(_OP, "relative of a group", self.relative)
        checks.finite(_OP, "hardness of a group", self.hardness)


NATIVE_GROUPS: tuple[str, ...] = _C.INFO_NCE_GROUPS  # the table is csrc/ops/info_nce_rules.h
DOC_QUERY = "doc_query"  # a second sweep computes it (pyqemb/ops/info_nce_composed.py)
GROUPS = (*NATIVE_GROUPS, DOC_QUERY)
WITHOUT_DOCUMENT = ("query_query", DOC_QUERY)  # groups whose candidates are queries
_DOC_GROUPS = tuple(name for name in NATIVE_GROUPS if name.startswith("doc_"))


def _preset(masked: Sequence[str] = (), by_query: Sequence[str] = (), plain: Sequence[str] = ()) -> Mapping[str, Group]:
    kinds = ((masked, Group()), (by_query, Group(mask="query_document")), (plain, Group(mask=None)))
    return MappingProxyType({name: group for names, group in kinds for name in names})


_QUERY_DOCUMENT = ("own_hard", "batch_positive", "batch_hard")
PRESETS: Mapping[str, Mapping[str, Group]] = MappingProxyType(
    {
        # Qwen3 Embedding (arXiv 2506.05176), equation 1: all groups, one mask
        "qwen3": _preset(masked=(*_QUERY_DOCUMENT, "query_query"), by_query=("doc_positive", "doc_hard")),
        # Qwen3-VL-Embedding (arXiv 2601.04720), section 5.1, stage 2: query-document scores only
        "qwen3_stage2": _preset(masked=_QUERY_DOCUMENT),
        # Multiple negatives ranking loss (Henderson et al., arXiv 1705.00652)
        "mnrl": _preset(plain=_QUERY_DOCUMENT),
        # As ms-swift implements equation 1: the document-document groups, with own hard negatives, are never masked
        "ms_swift": _preset(masked=(*_QUERY_DOCUMENT, "query_query"), plain=("doc_own", "doc_positive", "doc_hard")),
        # As memeff implements it: without hard negatives of other queries, each score masked by itself
        "memeff": _preset(masked=("own_hard", "batch_positive", "query_query", "doc_positive")),
        # GTE's improved contrastive loss (arXiv 2308.03281, section 3.2): all four directions, nothing masked
        "gte": _preset(plain=(*_QUERY_DOCUMENT, "query_query", "doc_positive", "doc_hard", DOC_QUERY)),
        # Own wrong labels only (Qwen3-VL-Embedding, section 5.1)
        "classification": _preset(plain=("own_hard",)),
    }
)


class Options(NamedTuple):
    """The arguments of the kernels other than tensors, in types that a torch op accepts.

    The lists have an entry for each enabled group.
    """

    groups: Sequence[str]
    masks: Sequence[str]
    margins: Sequence[float]
    relative: Sequence[bool]
    hardness: Sequence[float]
    split: bool
    focal: float
    temperature: float
    scale: float  # of the loss and its gradients
    tau_plus: float = 0.0

    @classmethod
    def of(
        cls, preset: str, groups: Mapping[str, Group | bool | None] | None, margin: float | None, doc_mask: str | None,
        softmax: str, focal: float, temperature: float, scale: float, tau_plus: float = 0.0,
    ) -> "Options":  # fmt: skip
        """Check and return the options of a call.

        The arguments are those of `info_nce`; `scale` multiplies the loss and its gradients.
        """
        given = preset, groups, margin, doc_mask, softmax, focal, temperature, scale, tau_plus
        if groups is None and not checks.has_no_values():
            try:
                return _known_options(*given)
            except TypeError:  # refused, perhaps because it has no hash
                pass
        return _options(*given)

    @property
    def is_composed(self) -> bool:
        """Whether one sweep of the kernels is not enough (pyqemb/ops/info_nce_composed.py)."""
        return self.tau_plus > 0 or DOC_QUERY in self.groups

    def native(self) -> _C.InfoNceOptions:
        """The options object of the native module, without doc_query and tau_plus; equal options share one."""
        try:
            return _native(*self)
        except TypeError:  # the lists of a torch op have no hash
            return _native(*(tuple(value) if isinstance(value, list) else value for value in self))


def _options(
    preset: str, groups: Mapping[str, Group | bool | None] | None, margin: float | None, doc_mask: str | None,
    softmax: str, focal: float, temperature: float, scale: float, tau_plus: float = 0.0,
) -> Options:  # fmt: skip
    checks.choice(_OP, "softmax", softmax, ("joint", "split"))
    tau_plus = checks.number(_OP, "tau_plus", tau_plus)
    if not 0 <= tau_plus < 1:
        raise ValueError(f"[info_nce] tau_plus must be at least 0 and below 1, got {tau_plus}")
    focal = checks.number(_OP, "focal", focal)
    if not (math.isfinite(focal) and focal >= 0):
        raise ValueError(f"[info_nce] focal must be finite and at least 0, got {focal}")
    if margin is not None and math.isnan(checks.number(_OP, "margin", margin)):
        raise ValueError("[info_nce] margin must be a number, got nan")
    if groups is not None and not isinstance(groups, Mapping):
        raise TypeError(f"[info_nce] groups must be a mapping from group to Group, got {type(groups).__name__}")
    chosen = _chosen(preset, groups or {}, doc_mask)
    for name, group in chosen.items():
        if temperature > 0 and group.hardness <= -1 / temperature:
            raise ValueError(
                f"[info_nce] hardness of {name} must be above -1 / temperature, or logits would fall as scores "
                "rise, "
                f"got {group.hardness}"
            )
    limits = [margin if group.margin is None else group.margin for group in chosen.values()]
    return Options(
        groups=tuple(chosen),
        masks=tuple(
            "none" if limit is None else group.mask or "none"
            for group, limit in zip(chosen.values(), limits, strict=True)
        ),
        margins=tuple(0.0 if limit is None else float(limit) for limit in limits),
        relative=tuple(group.relative for group in chosen.values()),
        hardness=tuple(group.hardness for group in chosen.values()),
        split=softmax == "split",
        focal=focal,
        temperature=temperature,
        scale=scale,
        tau_plus=tau_plus,
    )


_known_options = lru_cache(maxsize=64, typed=True)(_options)  # half of the time of a small call


@lru_cache(maxsize=64)  # saves a tenth of the time of a small call
def _native(*values: Any) -> _C.InfoNceOptions:
    given = Options(*values)
    options = _C.InfoNceOptions(temperature=given.temperature, split=given.split, focal=given.focal, scale=given.scale)
    for group, mask, margin, relative, hardness in zip(
        given.groups, given.masks, given.margins, given.relative, given.hardness, strict=True
    ):
        if group in NATIVE_GROUPS:
            options.turn_on(group, mask=mask, margin=margin, relative=relative, hardness=hardness)
    return options


def _chosen(preset: str, changes: Mapping[str, Group | bool | None], doc_mask: str | None) -> dict[str, Group]:
    """The enabled groups."""
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ValueError(f"[info_nce] preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    chosen = dict(PRESETS[preset])
    if doc_mask is not None:
        if not isinstance(doc_mask, str) or doc_mask not in ("query_document", "own", "none"):
            raise ValueError(f"[info_nce] doc_mask must be one of query_document, own, none, got {doc_mask!r}")
        mask: Any = None if doc_mask == "none" else doc_mask
        chosen.update({name: replace(chosen[name], mask=mask) for name in _DOC_GROUPS if name in chosen})
    for name, group in changes.items():
        if name not in GROUPS:
            raise ValueError(f"[info_nce] groups: a group is one of {', '.join(GROUPS)}, got {name!r}")
        if isinstance(group, Group):
            chosen[name] = group
        elif group is True:
            chosen[name] = Group()
        elif group is None or group is False:
            chosen.pop(name, None)
        else:
            raise TypeError(
                f"[info_nce] groups: {name} must be a Group, True, False or None, got {type(group).__name__}"
            )
    for name in WITHOUT_DOCUMENT:
        if name in chosen and chosen[name].mask == "query_document":
            raise ValueError(
                f"[info_nce] groups: {name} has no query-document score to mask by, got mask 'query_document'"
            )
    return chosen
