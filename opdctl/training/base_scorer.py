"""The student without its adapters as a scorer: a reference that is the initial student needs no second copy."""

import itertools
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from opdctl import distributed
from opdctl.artifacts.records import Ids, Logprobs, TokenScores
from opdctl.engines.base import SCORED_AT_ONCE, ScoreRequest
from opdctl.models.batching import SequenceBatch, pack_batch, pad_batch
from opdctl.recipe.schema import Score
from opdctl.training.division import Division, divide


@dataclass(frozen=True)
class BaseScorer:
    """Scores with the student in training, its adapters disabled, on all ranks together.

    Rank 0 calls `stream_scores`, and `close` at the end. The others call `follow` meanwhile.

    base_logp_N: batch → log-probs of its response tokens, [N], in nats. token_budget: tokens of a batch.
    """

    base_logp_N: Callable[[SequenceBatch], Tensor]
    logprob_metadata: dict[str, str]
    division: Division
    token_budget: int
    device: str
    batches_across_parts = True

    def stream_scores(self, requests: Iterable[ScoreRequest], settings: Score) -> Generator[tuple[int, TokenScores]]:
        """Compute the log-probs of every response's tokens, in nats. A reference gives nothing else."""
        remaining, numbers = iter(requests), itertools.count()
        while taken := list(itertools.islice(remaining, SCORED_AT_ONCE * self.division.world_size)):
            pairs = [(request.prompt_ids, request.response_ids) for request in taken]
            for logp_T in self._score(distributed.broadcast_object(pairs)):
                yield next(numbers), TokenScores(logprobs=logp_T)

    def follow(self) -> None:
        """Compute this rank's share of what rank 0 scores, until its `close`."""
        pairs: list[tuple[Ids, Ids]] | None
        while (pairs := distributed.broadcast_object(None)) is not None:
            self._score(pairs)

    def close(self) -> None:
        """End `follow` on the other ranks."""
        distributed.broadcast_object(None)

    def _score(self, pairs: Sequence[tuple[Ids, Ids]]) -> list[Logprobs]:
        """Return the log-probs of each response, [T]. pairs: (prompt ids, response ids), the same on all ranks."""
        lengths = [len(prompt) + len(response) for prompt, response in pairs]
        join = pack_batch if self.division.packs else pad_batch
        own: dict[int, Logprobs] = {}
        for share in divide([range(len(pairs))], lengths, self.token_budget, self.division)[distributed.rank()]:
            batch = join([pairs[i] for i in share.indices], self.device)
            logp_N = self.base_logp_N(batch)
            own |= {i: logp_T.numpy() for i, logp_T in zip(share.indices, batch.split(logp_N), strict=True)}
        scored = {i: logp_T for of_rank in distributed.gather_objects(own) for i, logp_T in of_rank.items()}
        return [scored[i] for i in range(len(pairs))]
