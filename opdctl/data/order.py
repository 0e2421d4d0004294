"""The order of the prompts in each epoch. Imports no torch."""

from collections.abc import Sequence
from functools import lru_cache
from operator import itemgetter

import numpy as np

from opdctl.artifacts.manifests import PromptOrder

UINT32_RANGE = 2**32


def step_order(rule: PromptOrder, sources: Sequence[tuple[int, int]], seed: int, step: int) -> list[int]:
    """Return the indices of the prompts of a step.

    sources: for each source its prompts and those that it gives to every step. An epoch of a source is as many complete
    steps as its prompts allow. Prompts of several sources alternate, so that each part of a step has all of them.
    """
    first, ranked = 0, []
    for num_prompts, per_step in sources:
        epoch, index = divmod(step, num_prompts // per_step)
        order = epoch_order(rule, num_prompts, seed, epoch)[index * per_step : (index + 1) * per_step]
        ranked += [((rank + 0.5) / per_step, first + i) for rank, i in enumerate(order)]
        first += num_prompts
    return [i for _, i in sorted(ranked, key=itemgetter(0))]


@lru_cache(maxsize=16)
def epoch_order(rule: PromptOrder, num_prompts: int, seed: int, epoch: int) -> tuple[int, ...]:
    """Return the indices of the prompts in the order of an epoch.

    `random_sampler` is the order of `torch.utils.data.RandomSampler` with one generator for all epochs, as in G-OPD's
    fork of verl, on which the code of arXiv 2606.22600 is built. The sampler draws a second permutation at the end of
    an epoch and uses none of it, so epoch e has permutation 2e. (Later versions of verl take the sampler of torchdata:
    epoch e has permutation 2e + 1 with worker processes, else e.)
    `numpy` is the order of runs that opdctl 0.2.0 started: their file is in the order of epoch 0.
    """
    if rule == "random_sampler":
        return _torch_permutation(num_prompts, seed, index=2 * epoch)
    if epoch == 0:
        return tuple(range(num_prompts))
    return tuple(np.random.default_rng([seed, epoch]).permutation(num_prompts).tolist())


def _torch_permutation(size: int, seed: int, index: int) -> tuple[int, ...]:
    """Return permutation `index` of those that `torch.randperm(size, generator=…)` returns with one CPU generator.

    It is a Fisher-Yates shuffle from the front: element i is exchanged with element i + r mod (size - i), where r is
    the next 32 bits of MT19937 (`randperm_cpu` in ATen/native/TensorFactories.cpp, for size < 2^32 / 20). The generator
    uses the low 32 bits of the seed. numpy's RandomState has the same seeding, and the same bits in the full range of
    uint32.
    """
    generator = np.random.RandomState(seed % UINT32_RANGE)
    draws = max(size - 1, 0)
    for _ in range(index):
        generator.randint(UINT32_RANGE, size=draws, dtype=np.uint32)
    offsets = generator.randint(UINT32_RANGE, size=draws, dtype=np.uint32) % np.arange(size, 1, -1)
    order = list(range(size))
    for i, offset in enumerate(offsets.tolist()):
        order[i], order[i + offset] = order[i + offset], order[i]
    return tuple(order)
