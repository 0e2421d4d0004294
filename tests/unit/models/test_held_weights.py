"""The digest of weights in memory: every bit counts, and where the tensors lie does not."""

import itertools

import pytest
import torch

from opdctl.models import held_weights
from opdctl.models.held_weights import BLOCK_FACTOR, digest_held_weights

DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.uint8, torch.bool]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks per tensor, of which the last is cut."""
    monkeypatch.setattr(held_weights, "BLOCK_WORDS", 4)


def digest(tensor: torch.Tensor, name: str = "weight") -> str:
    return digest_held_weights({name: tensor})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 7), (5, 16)], ids=str)
def test_every_bit_counts(dtype, shape):
    tensor = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    bytes_N = tensor.clone().flatten().view(torch.uint8)
    digests = [digest(tensor)]
    for index, bit in itertools.product(range(len(bytes_N)), (0, 7)):
        changed_N = bytes_N.clone()
        changed_N[index] ^= 1 << bit
        digests.append(digest(changed_N.view(dtype).reshape(shape)))
    assert len(set(digests)) == 1 + 2 * len(bytes_N)


def test_checksum_is_the_formula():
    words = torch.randint(-(2**31), 2**31 - 1, (10,), generator=torch.Generator().manual_seed(0)).int()
    total = 0
    for start in range(0, 10, 4):
        block = words[start : start + 4].tolist()
        total = total * BLOCK_FACTOR + sum(word * (k * k + k + 1) for k, word in enumerate(block))
    assert held_weights._checksum(words) % 2**64 == total % 2**64
    assert held_weights._checksum(words.view(torch.bfloat16)) % 2**64 == total % 2**64


def test_order_counts_within_and_across_blocks():
    experts = torch.arange(6 * 16, dtype=torch.bfloat16).reshape(6, 16)
    orders = [[0, 1, 2, 3, 4, 5], [1, 0, 2, 3, 4, 5], [5, 1, 2, 3, 4, 0], [0, 1, 2, 4, 3, 5]]
    assert len({digest(experts[order]) for order in orders}) == len(orders)


def test_changes_of_two_words_do_not_cancel():
    tensor = torch.ones(20)
    digests = {digest(tensor)}
    for a, b in itertools.combinations(range(20), 2):
        changed = tensor.clone()
        changed[[a, b]] *= -1
        digests.add(digest(changed))
    assert len(digests) == 1 + 20 * 19 // 2


def test_name_type_and_shape_count():
    ones = torch.ones(4, 4)
    others = [digest(ones, "other"), digest(ones.reshape(2, 8)), digest(ones.view(torch.int32)), digest(ones)]
    assert len(set(others)) == 4


def test_layout_in_memory_does_not_count():
    tensor = torch.arange(15, dtype=torch.bfloat16).reshape(3, 5)
    odd_offset = torch.cat([torch.zeros(1, dtype=torch.bfloat16), tensor.flatten()])[1:].reshape(3, 5)
    assert digest(tensor) == digest(tensor.T.contiguous().T) == digest(odd_offset)
    aligned = torch.arange(17, dtype=torch.bfloat16)[1:]
    assert digest(aligned) == digest(aligned.clone())
