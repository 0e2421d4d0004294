"""Whether model-generated code can be run on this system."""

import pytest

from opdctl.errors import OpdctlError
from opdctl.evaluation import code_execution


def sandbox_problem() -> str:
    """Return why there is no sandbox on this system, or ""."""
    try:
        code_execution._check_sandbox()
    except OpdctlError as error:
        return error.message
    return ""


PROBLEM = sandbox_problem()
needs_sandbox = pytest.mark.skipif(bool(PROBLEM), reason=PROBLEM)
