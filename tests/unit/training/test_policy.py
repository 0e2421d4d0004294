"""The student in training: LoRA settings that a model does not support."""

import pytest
from helpers.commands import small_recipe

from opdctl.errors import ExitCode, OpdctlError
from opdctl.training import policy


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ('lora.target_modules=["no_such_layer"]', "no_such_layer"),
        ('lora.target_modules=["q_proj", "lm_head"]', "lora.target_modules, lora.modules_to_save"),
        ('lora.modules_to_save=["embed_tokens"]', "lora.target_modules, lora.modules_to_save"),
    ],
)
def test_unsupported_adapters_are_refused(override, named, scored_run):
    with pytest.raises(OpdctlError) as error:
        policy.load_policy(scored_run.student, small_recipe("lora.rank=4", override), "cpu")
    assert (error.value.kind, error.value.code) == ("unsupported_setting", ExitCode.USAGE)
    assert named in error.value.message
    assert error.value.hint
