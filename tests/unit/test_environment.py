"""The device of a run."""

import pytest
import torch

from opdctl.environment import resolve_device
from opdctl.errors import OpdctlError


def test_missing_device_is_rejected():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert resolve_device("auto") == "cpu"
    with pytest.raises(OpdctlError) as error:
        resolve_device("cuda")
    assert error.value.kind == "missing_device"
