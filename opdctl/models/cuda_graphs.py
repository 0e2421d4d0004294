"""A model's pass for one more token as a CUDA graph: the GPU gets all of its kernels at once.

Of a small batch the kernels take less time than the CPU needs to start them. A graph reads and writes tensors of fixed
places and sizes, so each belongs to one number of sequences and one room of the cache (`StaticInputs`).

Shape suffixes: see Notation in CONTRIBUTING.md.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from opdctl import console
from opdctl.errors import summarize_exception
from opdctl.models.tracing import DecodeInputs, Pass, StaticInputs, run_recorded


class CapturedPass:
    """The pass of a batch whose cache has room for further tokens.

    recorded: the pass, without Python code that reads values of tensors. inputs: of a token that the cache may have
    already; the graph keeps their places.
    """

    def __init__(self, recorded: Pass, inputs: StaticInputs):
        self._inputs = inputs
        self._replay = capture(recorded, inputs.tensors())

    def fits(self, rooms: Sequence[Tensor]) -> bool:
        """Whether the cache still has these rooms: not after it has grown, or lost sequences."""
        return all(room is own for room, own in zip(rooms, self._inputs.rooms, strict=True))

    def run(self, inputs: DecodeInputs) -> Tensor:
        """Return the last hidden states, [B, D], and write the new tokens into the cache."""
        self._inputs.set_token(inputs)
        return self._replay().clone()


def are_available(device: torch.device | str) -> bool:
    return torch.device(device).type == "cuda"


def capture_pass(recorded: Pass, inputs: StaticInputs) -> CapturedPass | None:
    """Return the captured pass, or None if an operation cannot be captured."""
    try:
        return CapturedPass(recorded, inputs)
    except Exception as error:  # of any class: of CUDA, or of a library that a kernel belongs to
        console.debug(f"the pass for one more token is not captured as a CUDA graph: {summarize_exception(error)}")
        return None


def capture(function: Pass, tensors: Sequence[Tensor]) -> Callable[[], Tensor]:
    """Return what repeats the kernels of a function of these tensors; the result has the same place each time."""
    current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        run_recorded(function, tensors)  # libraries allocate at the first call, which a capture must not
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads may use the GPU meanwhile: one writes the trainer's state.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = run_recorded(function, tensors)

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay
