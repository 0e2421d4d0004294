"""Peak memory and time of loss and gradient through the output matrix: `python tests/bench/logprobs.py`.

The plain formula has the logits of all tokens in memory; opdctl processes them in chunks, and in addition computes the
entropies that training logs. Each measurement runs in a separate process. Memory is the peak minus that of the hidden
states and the matrix.

Shapes: N tokens, C tokens of a chunk, K selected tokens, V vocabulary, D hidden size.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from processes import peak_bytes, resident_bytes, run_in_new_process
from torch import Tensor

from opdctl.losses.objectives import PolicyGradient, TokenBatch
from opdctl.models import CHUNK_LOGITS
from opdctl.models.logprobs import Chunk, Head, map_vocab_chunks


@dataclass(frozen=True)
class Measurement:
    """One forward and backward pass. bytes: peak above the inputs. gradient_norms: of hidden states and matrix."""

    seconds: float
    bytes: int
    gradient_norms: list[float]


def plain_loss(hidden_ND: Tensor, head_VD: Tensor, ids_N: Tensor, target_N: Tensor) -> Tensor:
    logp_N = (hidden_ND @ head_VD.T).log_softmax(-1).gather(-1, ids_N[:, None]).squeeze(-1)
    old_N = logp_N.detach()
    return PolicyGradient()(TokenBatch(logp_N, old_N, old_N, target_N))[0].sum()


def chunked_loss(hidden_ND: Tensor, head_VD: Tensor, ids_N: Tensor, target_N: Tensor) -> Tensor:
    def loss_of_chunk(chunk: Chunk) -> Tensor:
        logp_C = chunk.selected_logp_CK[:, 0]
        old_C = logp_C.detach()
        return PolicyGradient()(TokenBatch(logp_C, old_C, old_C, target_N[chunk.rows]))[0].sum()

    return map_vocab_chunks(Head(head_VD, len(head_VD)), hidden_ND, ids_N[:, None], loss_of_chunk, entropy=True)


def measure(name: str, tokens: int, args: argparse.Namespace) -> Measurement:
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    hidden_ND = torch.randn(tokens, args.hidden, device=args.device).requires_grad_()
    head_VD = (torch.randn(args.vocab, args.hidden, device=args.device) * 0.02).requires_grad_()
    ids_N, target_N = torch.randint(0, args.vocab, (tokens,), device=args.device), torch.randn(tokens) - 12
    inputs = (hidden_ND, head_VD, ids_N, target_N.to(args.device))
    before = memory_bytes(args.device)
    start = time.perf_counter()
    {"plain": plain_loss, "chunked": chunked_loss}[name](*inputs).backward()
    peak = memory_bytes(args.device, peak=True) - before  # waits for the device
    seconds = time.perf_counter() - start
    gradients = (hidden_ND.grad, head_VD.grad)
    return Measurement(seconds, peak, [float(gradient.norm()) for gradient in gradients if gradient is not None])


def measure_products(tokens: int, args: argparse.Namespace) -> float:
    """Return the seconds of the three products of the head's forward and backward pass alone."""
    torch.set_num_threads(args.threads)
    hidden_ND, head_VD = torch.randn(tokens, args.hidden), torch.randn(args.vocab, args.hidden)
    rows = max(1, CHUNK_LOGITS // args.vocab)
    logits_CV, grad_ND, grad_VD = torch.empty(rows, args.vocab), torch.empty_like(hidden_ND), torch.zeros_like(head_VD)
    start = time.perf_counter()
    for chunk in range(0, tokens, rows):
        hidden_CD = hidden_ND[chunk : chunk + rows]
        out = logits_CV[: len(hidden_CD)]
        torch.mm(hidden_CD, head_VD.T, out=out)
        torch.mm(out, head_VD, out=grad_ND[chunk : chunk + rows])
        torch.addmm(grad_VD, out.T, hidden_CD, out=grad_VD)
    return time.perf_counter() - start


def memory_bytes(device: str, *, peak: bool = False) -> int:
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    return peak_bytes() if peak else resident_bytes()


def plain_fits(tokens: int, args: argparse.Namespace) -> bool:
    """Whether the logits of the plain formula, their softmax and its gradient fit into the free memory."""
    return 3.2 * 4 * tokens * args.vocab <= free_bytes(args.device)


def free_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16_384])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    print("| tokens | plain | opdctl | time ratio | plain memory | opdctl memory | memory ratio |\n|" + "---|" * 7)
    for tokens in args.tokens:
        chunked = run_in_new_process(measure, "chunked", tokens, args)
        cells = ["out of memory", f"{chunked.seconds:.2f} s", "", "", f"{chunked.bytes / 2**30:.2f} GiB", ""]
        if plain_fits(tokens, args):
            plain = run_in_new_process(measure, "plain", tokens, args)
            for a, b in zip(plain.gradient_norms, chunked.gradient_norms, strict=True):
                assert abs(a - b) < 1e-4 * a, "the two gradients differ"
            cells[0], cells[2] = f"{plain.seconds:.2f} s", f"{chunked.seconds / plain.seconds:.2f}"
            cells[3] = f"{plain.bytes / 2**30:.2f} GiB"
            cells[5] = f"1/{plain.bytes / chunked.bytes:.1f}"
        print(f"| {tokens} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
