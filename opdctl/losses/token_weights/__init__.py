"""Token weights: the factor of each token's loss, computed from log-probs in float64. No model, no torch.

Importing the package registers the built-in weights.
"""

from opdctl.losses.token_weights.base import (
    COLUMN_SETTINGS,
    MIN_TAIL_PROB,
    Floats,
    Product,
    ResponseTokens,
    Settings,
    Weight,
    build_weight,
    merge_requirements,
    top_k_overlap,
    weigh,
)
from opdctl.losses.token_weights.drift import IwOpd, PrefixRatio, Prune, TeacherConfidence, Uniform
from opdctl.losses.token_weights.position import (
    LinearDecay,
    PositionSigmoid,
    PrefixBoost,
    PrefixCurriculum,
    PrefixOnly,
    SuffixOnly,
)
from opdctl.losses.token_weights.step import Fire, Tip

__all__ = [
    "COLUMN_SETTINGS",
    "MIN_TAIL_PROB",
    "Fire",
    "Floats",
    "IwOpd",
    "LinearDecay",
    "PositionSigmoid",
    "PrefixBoost",
    "PrefixCurriculum",
    "PrefixOnly",
    "PrefixRatio",
    "Product",
    "Prune",
    "ResponseTokens",
    "Settings",
    "SuffixOnly",
    "TeacherConfidence",
    "Tip",
    "Uniform",
    "Weight",
    "build_weight",
    "merge_requirements",
    "top_k_overlap",
    "weigh",
]
