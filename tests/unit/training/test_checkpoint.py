"""Checkpoints are exact to the bit."""

import pytest
import torch
from helpers.commands import small_recipe

from opdctl.training import checkpoint, policy


def test_restored_state_is_identical(tmp_path, scored_run):
    def fresh(*overrides):
        model = policy.load_policy(scored_run.student, small_recipe(*overrides), "cpu")
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    model, optimizer = fresh()
    for _ in range(2):
        sum(parameter.square().sum() for parameter in model.parameters()).backward()
        optimizer.step()
    sizes = checkpoint.save(tmp_path, checkpoint.state_tensors(model, optimizer))
    restored, restored_optimizer = fresh()
    checkpoint.restore(tmp_path, restored, restored_optimizer)
    for expected, parameter in zip(model.parameters(), restored.parameters(), strict=True):
        assert torch.equal(expected, parameter)
        for key, value in optimizer.state[expected].items():
            assert torch.equal(value, restored_optimizer.state[parameter][key]), key
    (file,) = tmp_path.iterdir()
    assert sizes == {file.name: file.stat().st_size}
    with pytest.raises(ValueError, match="lora_A"):
        checkpoint.restore(tmp_path, *fresh("lora.rank=4"))
