"""Peak memory and time of loss and gradient through the output matrix: `python tests/bench/logprobs.py`.

Against the plain formula, which holds the logits of all tokens, in the same run; the plain one without, opdctl's with
the entropies that training logs. Each measurement has a process of its own. Memory is the peak above what the hidden
states and the matrix take before.
"""

import argparse
import json
import multiprocessing
import resource
import time
from pathlib import Path

import torch
from torch import Tensor

from opdctl.losses.objectives import PolicyGradient, TokenBatch
from opdctl.models.logprobs import Chunk, Head, map_vocab_chunks


def plain(hidden_ND: Tensor, head_VD: Tensor, ids_N: Tensor, target_N: Tensor) -> Tensor:
    logp_N = (hidden_ND @ head_VD.T).log_softmax(-1).gather(-1, ids_N[:, None]).squeeze(-1)
    old_N = logp_N.detach()
    return PolicyGradient()(TokenBatch(logp_N, old_N, old_N, target_N))[0].sum()


def chunked(hidden_ND: Tensor, head_VD: Tensor, ids_N: Tensor, target_N: Tensor) -> Tensor:
    def use(chunk: Chunk) -> Tensor:
        logp_C = chunk.selected_logp_CK[:, 0]
        old_C = logp_C.detach()
        chunk.entropy_C()
        return PolicyGradient()(TokenBatch(logp_C, old_C, old_C, target_N[chunk.rows]))[0].sum()

    return map_vocab_chunks(Head(head_VD, len(head_VD)), hidden_ND, ids_N[:, None], use)


def measure(name: str, tokens: int, args: argparse.Namespace) -> dict[str, float]:
    """Return seconds, peak bytes above the inputs, and the gradient's norms, of one forward and backward."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    hidden_ND = torch.randn(tokens, args.hidden, device=args.device).requires_grad_()
    head_VD = (torch.randn(args.vocab, args.hidden, device=args.device) * 0.02).requires_grad_()
    ids_N, target_N = torch.randint(0, args.vocab, (tokens,), device=args.device), torch.randn(tokens) - 12
    inputs = (hidden_ND, head_VD, ids_N, target_N.to(args.device))
    before = _bytes(args.device)
    start = time.perf_counter()
    {"plain": plain, "chunked": chunked}[name](*inputs).backward()
    peak = _bytes(args.device, peak=True) - before  # waits for the device
    grads = (hidden_ND.grad, head_VD.grad)
    return {
        "seconds": time.perf_counter() - start,
        "bytes": peak,
        "norms": [float(grad.norm()) for grad in grads if grad is not None],
    }


def _bytes(device: str, *, peak: bool = False) -> int:
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    if peak:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _worker(name: str, tokens: int, args: argparse.Namespace, results: "multiprocessing.Queue[str]") -> None:
    results.put(json.dumps(measure(name, tokens, args)))


def in_a_process(name: str, tokens: int, args: argparse.Namespace) -> dict[str, float] | None:
    """Measure in a fresh process; None where the plain formula would not fit into the memory that is free."""
    if name == "plain" and 3.2 * 4 * tokens * args.vocab > _free(args.device):
        return None
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[str] = context.Queue()
    process = context.Process(target=_worker, args=(name, tokens, args, results))
    process.start()
    found = json.loads(results.get())
    process.join()
    return found


def _free(device: str) -> int:
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
        old, new = (in_a_process(name, tokens, args) for name in ("plain", "chunked"))
        assert new is not None
        cells = ["does not fit", f"{new['seconds']:.2f} s", "", "", f"{new['bytes'] / 2**30:.2f} GiB", ""]
        if old is not None:
            for a, b in zip(old["norms"], new["norms"], strict=True):
                assert abs(a - b) < 1e-4 * a, "the two gradients differ"
            cells[0], cells[2] = f"{old['seconds']:.2f} s", f"{new['seconds'] / old['seconds']:.2f}"
            cells[3] = f"{old['bytes'] / 2**30:.2f} GiB"
            cells[5] = f"1/{old['bytes'] / new['bytes']:.1f}"
        print(f"| {tokens} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
