"""The public API for plugins. Names from other modules may change without notice.

A plugin registers components with the decorators of the registries:

    from opdctl.plugins import WEIGHTS, ResponseTokens, Weight

    @WEIGHTS.register("mine", "a source")
    @dataclass(frozen=True)
    class Mine(Weight): ...
"""

from opdctl.data.columns import Columns
from opdctl.evaluation.benchmarks import Benchmark, Hub, Table
from opdctl.evaluation.graders import Text
from opdctl.losses.objectives import Divergence, Objective, PolicyGradient, TokenBatch
from opdctl.losses.token_weights import Floats, ResponseTokens, Weight
from opdctl.registry import BENCHMARKS, ENGINES, OBJECTIVES, WEIGHTS

__all__ = [
    "BENCHMARKS",
    "ENGINES",
    "OBJECTIVES",
    "WEIGHTS",
    "Benchmark",
    "Columns",
    "Divergence",
    "Floats",
    "Hub",
    "Objective",
    "PolicyGradient",
    "ResponseTokens",
    "Table",
    "Text",
    "TokenBatch",
    "Weight",
]
