"""The digest of the weights that a process holds in memory, computed where they are."""

from collections.abc import Mapping

import torch
from torch import Tensor

from opdctl.artifacts.files import digest_of

BLOCK_WORDS = 2**20  # a block and its products take 16 MB beside the weights
BLOCK_FACTOR = 0x9E3779B97F4A7C15 - 2**64  # odd, as the factor of every word; as a signed number


def digest_held_weights(tensors: Mapping[str, Tensor]) -> str:
    """Return a digest of tensors by name: of the type, the shape and every bit of each.

    It is computed on the device of each tensor, where it takes less time than a copy on the CPU and its SHA-256. It
    shows that weights differ, but does not resist somebody who wants two models to have one digest.
    """
    return digest_of({name: [str(each.dtype), *each.shape, _checksum(each)] for name, each in tensors.items()})


def _checksum(tensor: Tensor) -> int:
    """Return the sum modulo 2⁶⁴ of the tensor's 32-bit words, each multiplied by an odd number of its position.

    A change of one word always changes it. The words are of 32 bits, because the product of a sum's highest bit with
    any odd number is this bit: the signs of two words of 64 bits could change without a trace.
    """
    bytes_N = tensor.detach().contiguous().flatten().view(torch.uint8)
    if len(bytes_N) % 4 or bytes_N.storage_offset() % 4:
        bytes_N = torch.cat([bytes_N, bytes_N.new_zeros(-len(bytes_N) % 4)])
    words_N = bytes_N.view(torch.int32)
    position_N = torch.arange(min(len(words_N), BLOCK_WORDS), device=tensor.device)
    factor_N = position_N * position_N + position_N + 1
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for block_N in words_N.split(BLOCK_WORDS):
        total = total * BLOCK_FACTOR + (block_N * factor_N[: len(block_N)]).sum()
    return int(total)
