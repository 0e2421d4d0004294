"""The seed of Python's string hashes, which orders sets, changes no bit of a model's numbers."""

import os
import subprocess
import sys

from helpers.models import make, save

PROGRAM = """
import hashlib, sys
from pathlib import Path
import numpy as np, torch
from opdctl.engines.base import Request, ScoreRequest
from opdctl.engines.transformers import TransformersEngine
from opdctl.models.directory import ModelDir
from opdctl.models.loading import load_head
from opdctl.recipe.schema import Sampling, Score

torch.set_num_threads(1)
model, digest = ModelDir(Path(sys.argv[1]), "float32"), hashlib.sha256()
engine = TransformersEngine(model, "cpu")
prompts = [np.arange(6, 6 + n, dtype=np.int32) for n in (3, 9, 5)]
drawn = engine.generate([Request(p, n) for n, p in enumerate(prompts)], Sampling(max_tokens=20), 8, lambda n: None)
requests = [ScoreRequest(p, c.response_ids) for p, c in zip(prompts, drawn)]
for scores in engine.score(requests, Score(), lambda n: None):
    digest.update(scores.logprobs.tobytes())
for completion in drawn:
    digest.update(completion.response_ids.tobytes() + completion.logprobs.tobytes())
digest.update(load_head(model, device="cpu").weight_VD.numpy().tobytes())
print(digest.hexdigest(), model.digest(), model.eos_ids)
"""


def test_hash_seed_changes_no_bit(tmp_path):
    """A tied model in several files: the names of a tied matrix are a set."""
    save(make("qwen3-tied"), tmp_path, max_shard_size="10KB")
    paths = {"PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tmp_path)],
            env={**os.environ, **paths, "PYTHONHASHSEED": str(seed)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in range(6)
    ]
    outputs = [process.communicate()[0] for process in processes]
    assert len(outputs[0].split()[0]) == 64
    assert outputs == outputs[:1] * 6
