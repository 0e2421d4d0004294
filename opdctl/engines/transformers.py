"""The transformers engine: batched sampling with a cache, and chunked scoring.

Sampling is a separate loop instead of transformers' `generate`, for two reasons. Each response has its own random
stream, so the same seed gives the same response in any batch. Finished responses leave the batch.

Shape suffixes: see Notation in CONTRIBUTING.md.
"""

import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from opdctl import signals
from opdctl.artifacts.records import Completion, RoutedExperts, TokenScores
from opdctl.engines.base import InOrder, Request, ScoreRequest
from opdctl.engines.sampling import Penalties, sample, uniform_stream
from opdctl.engines.stop_strings import StopSearch
from opdctl.models.architectures import check_rope, rope_limit
from opdctl.models.batching import by_token_budget, pad_batch
from opdctl.models.decoding import BatchRules, DecodeBatch
from opdctl.models.directory import ModelDir
from opdctl.models.held_weights import digest_held_weights
from opdctl.models.loading import load_model, reload_weights
from opdctl.models.logprobs import Chunk, map_vocab_chunks, output_head, response_states
from opdctl.models.routing import Routers, check_has_experts, encode_experts
from opdctl.models.self_check import find_batch_rules
from opdctl.models.tracing import TracedDecoding
from opdctl.recipe.schema import RolloutColumns, Sampling, Score

_T = TypeVar("_T")
COMPACT_BELOW = 0.75  # unfinished fraction that triggers dropping finished rows; each time copies the cache


class TransformersEngine(InOrder):
    """Generates and scores with a transformers model in this process.

    Its batches are of one part each, so that on a CPU the bits of a part do not depend on the others.
    """

    batches_across_parts = False
    _directory: ModelDir
    _model: Any = None
    _head: Any = None
    _routers: Routers | None = None
    _traced: TracedDecoding | None = None
    _rules: BatchRules | None = None  # found by the first `generate`; they depend on the architecture only

    def __init__(self, model: ModelDir, device: str):
        self._device = device
        self.load_weights(model)

    def load_weights(self, model: ModelDir) -> None:
        """Load another directory: into the loaded model, if it is the same architecture."""
        loaded, self._model = self._model, None  # an error leaves no model with weights of both
        if loaded is None or not reload_weights(loaded, self._directory, model):
            loaded = None
            self.close()
            loaded = load_model(model, device=self._device).requires_grad_(False)
            self._traced = TracedDecoding(loaded)
        self._model = loaded
        self._head = output_head(self._model, model.vocab_size)
        self._directory, self._rope_limit = model, rope_limit(self._model.config)
        self.logprob_metadata = {"engine": "transformers", "dtype": model.dtype, "logprobs": "processed, float32, nats"}
        if not model.is_quantized:
            tensors = itertools.chain(self._model.named_parameters(), self._model.named_buffers())  # tied weights once
            self.logprob_metadata["weights"] = digest_held_weights(dict(tensors))

    def close(self) -> None:
        self._model = self._head = self._routers = self._traced = None
        if self._device == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def stream_scores(self, requests: Iterable[ScoreRequest], settings: Score) -> Generator[tuple[int, TokenScores]]:
        requests = list(requests)
        lengths = [len(request.prompt_ids) + len(request.response_ids) for request in requests]
        for batch in by_token_budget(lengths, settings.tokens_per_batch, pad_up_to=self._rope_limit):
            scores = self._score_batch([requests[i] for i in batch], settings)
            self.num_passes += 1
            yield from zip(batch, scores, strict=True)

    def _score_batch(self, batch: list[ScoreRequest], settings: Score) -> list[TokenScores]:
        padded = pad_batch([(request.prompt_ids, request.response_ids) for request in batch], self._device)
        if self._rope_limit:  # a short sequence resets the frequencies, which the batch before may have changed
            self._model.base_model(input_ids=padded.input_ids_BT[:1, :1], use_cache=False)
        hidden_ND, ids_N = response_states(self._model, padded.input_ids_BT, padded.rows_N, padded.positions_N)
        ids_NK = ids_N[:, None]
        if settings.student_top_k:
            top_NK = np.concatenate([request.top_ids for request in batch]).astype(np.int64)
            ids_NK = torch.cat([ids_NK, torch.from_numpy(top_NK).to(self._device)], dim=-1)
        chunks: list[dict[str, Tensor]] = []

        def read(chunk: Chunk) -> None:
            columns = {"logprobs": chunk.selected_logp_CK[:, 0]}
            if settings.student_top_k:
                columns["student_top_logprobs"] = chunk.selected_logp_CK[:, 1:]
            if chunk.entropy_C is not None:
                columns["entropies"] = chunk.entropy_C
            if settings.top_k:
                top_ids_CK, columns["top_logprobs"] = chunk.top(settings.top_k)
                columns["top_ids"] = top_ids_CK.int()
            chunks.append({name: value.cpu() for name, value in columns.items()})

        map_vocab_chunks(self._head, hidden_ND, ids_NK, read, entropy=settings.entropy)
        columns = {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
        if settings.hidden_states:
            columns["hidden_states"] = hidden_ND.float().cpu()
        return _split_by_response(columns, padded.lengths)

    def stream_completions(
        self,
        requests: Iterable[Request | None],
        sampling: Sampling,
        batch_size: int,
        columns: RolloutColumns = RolloutColumns(),  # noqa: B008 - immutable
    ) -> Generator[tuple[int, Completion]]:
        taken = [request for request in requests if request is not None]
        lengths = ((len(request.prompt_ids), request.limit(sampling)) for request in taken)
        check_rope(self._model.config, self._directory.path, *max(lengths, key=sum, default=(0, 0)))
        self._rules = self._rules or find_batch_rules(self._model, self._directory.path)
        if columns.routed_experts:
            self._routers = self._routers or Routers(self._model)
            check_has_experts(self._routers)
        for batch in _batch_prompts(taken, batch_size, self._rules):
            buffer = _SampleBuffer([taken[i].limit(sampling) for i in batch], self._device, columns)
            if columns.routed_experts and self._routers:
                buffer.routing = _RoutingBuffer(self._routers, [len(taken[i].prompt_ids) for i in batch], sampling)
            for row in self._generate_batch([taken[i] for i in batch], sampling, self._rules, buffer):
                yield batch[row], buffer.completion(row)

    @torch.inference_mode()
    def _generate_batch(
        self, requests: Sequence[Request], sampling: Sampling, rules: BatchRules, buffer: "_SampleBuffer"
    ) -> Iterator[int]:
        """Yield the row of each response as soon as it is finished."""
        max_tokens = buffer.max_tokens
        uniform_BT = torch.from_numpy(np.stack([uniform_stream(request.seed, max_tokens) for request in requests]))
        uniform_TB = uniform_BT.T.contiguous().to(self._device)
        rows, rows_B = list(range(len(requests))), torch.arange(len(requests), device=self._device)
        record = buffer.routing.record if buffer.routing else _call
        prompts = [request.prompt_ids for request in requests]
        penalties = Penalties(prompts, self._head.vocab_size, sampling, self._device)
        ends = _ResponseEnds(self._directory, requests, sampling, self._device)
        traced = None if buffer.routing else self._traced  # the choices of experts are recorded by hooks
        batch = record(rows_B, lambda: DecodeBatch(self._model, prompts, rules, self._device, traced))
        was_finished = [False] * len(rows)
        for t in range(max_tokens):
            signals.check()
            logits_BV = self._head.logits(batch.hidden_BD)
            penalized_BV = penalties.apply(rows_B, logits_BV)
            token_B, logp_B = sample(penalized_BV, uniform_TB[t, rows_B], sampling)
            penalties.add(rows_B, token_B)
            buffer.add(rows_B, t, token_B, logp_B, logits_BV, ends.find(rows_B, token_B))
            finished = buffer.finished_B[rows_B].tolist()  # waits for the device
            yield from (
                row for row, now, before in zip(rows, finished, was_finished, strict=True) if now and not before
            )
            self.num_passes += 1
            if not (unfinished := finished.count(False)):
                return
            if rules.drop_rows and unfinished < COMPACT_BELOW * len(rows):
                kept_B = torch.tensor([i for i, is_finished in enumerate(finished) if not is_finished]).to(self._device)
                batch.select(kept_B)
                rows_B, token_B = rows_B[kept_B], token_B[kept_B]
                rows, finished = rows_B.tolist(), [False] * len(kept_B)
            was_finished = finished
            record(rows_B, partial(batch.feed, token_B))


def _batch_prompts(requests: Sequence[Request], batch_size: int, rules: BatchRules) -> list[list[int]]:
    """Return batches of indices: in order, or of prompts of one length each if the model is wrong with padding."""
    groups: dict[int, list[int]] = {}
    for index, request in enumerate(requests):
        groups.setdefault(0 if rules.left_padding else len(request.prompt_ids), []).append(index)
    return [group[i : i + batch_size] for group in groups.values() for i in range(0, len(group), batch_size)]


def _split_by_response(columns: dict[str, Tensor], lengths: list[int]) -> list[TokenScores]:
    """Split columns of all tokens into one record per response."""
    split = {name: [value.numpy() for value in column.split(lengths)] for name, column in columns.items()}
    scores = []
    for row in range(len(lengths)):
        values = {name: pieces[row] for name, pieces in split.items()}
        hidden_TD = values.pop("hidden_states", None)
        scores.append(
            TokenScores(**values, hidden_states=None if hidden_TD is None else partial(np.asarray, hidden_TD))
        )
    return scores


def _call(rows_B: Tensor, function: Callable[[], _T]) -> _T:
    return function()


class _RoutingBuffer:
    """The experts of each token of a batch that the model has read, [B, T, L, K], with prompts padded on the left."""

    def __init__(self, routers: Routers, prompt_lengths: list[int], sampling: Sampling):
        self._routers, self._lengths = routers, prompt_lengths
        self._width, self._read = max(prompt_lengths) + sampling.max_tokens - 1, 0
        self._ids_BTLK: Tensor | None = None

    def record(self, rows_B: Tensor, function: Callable[[], _T]) -> _T:
        """Call a function that lets the model read the prompts, or one token, of the responses in `rows_B`."""
        result, ids_NLK = self._routers.record(function)
        ids_BTLK = ids_NLK.unflatten(0, (len(rows_B), -1)).short()
        if self._ids_BTLK is None:
            self._ids_BTLK = ids_BTLK.new_zeros(len(rows_B), self._width, *ids_NLK.shape[1:])
            start = 0
        else:  # a model without a cache reads the entire sequences again
            ids_BTLK, start = ids_BTLK[:, -1:], self._read
        self._read = start + ids_BTLK.shape[1]
        self._ids_BTLK[rows_B, start : self._read] = ids_BTLK
        return result

    def experts(self, row: int, length: int) -> RoutedExperts:
        """Return those of a response of this length: of its prompt and of all of its tokens but the last."""
        assert self._ids_BTLK is not None
        longest = max(self._lengths)
        ids_TLK = self._ids_BTLK[row, longest - self._lengths[row] : longest + length - 1]
        return encode_experts(ids_TLK, self._routers.num_experts)


class _ResponseEnds:
    """What ends the responses of a batch: token ids and stop strings."""

    def __init__(self, model: ModelDir, requests: Sequence[Request], sampling: Sampling, device: str):
        self._ids, self._device = torch.tensor(model.end_ids(sampling.stop_token_ids), device=device), device
        stops = [request.stops(sampling) for request in requests]
        self._searches = [StopSearch(model.tokenizer, stop) if stop else None for stop in stops] if any(stops) else []

    def find(self, rows_B: Tensor, token_B: Tensor) -> Tensor:
        """Return whether the responses in `rows_B` end with these tokens, [B]."""
        ended_B = (token_B[:, None] == self._ids).any(-1)
        if self._searches:
            tokens = zip(rows_B.tolist(), token_B.tolist(), strict=True)
            found = [bool(search and search.add(token)) for row, token in tokens for search in [self._searches[row]]]
            ended_B |= torch.tensor(found, device=self._device)
        return ended_B


class _SampleBuffer:
    """The sampled tokens of a batch of responses, with what is stored beside them. limits: their maximum lengths."""

    routing: _RoutingBuffer | None = None

    def __init__(self, limits: Sequence[int], device: str, columns: RolloutColumns):
        count, max_tokens = len(limits), max(limits)
        self.max_tokens = max_tokens
        self._columns = {
            "response_ids": torch.zeros(count, max_tokens, dtype=torch.int32, device=device),
            "logprobs": torch.zeros(count, max_tokens, device=device),
        }
        if columns.sampling_logprobs:
            self._columns["sampling_logprobs"] = torch.zeros(count, max_tokens, device=device)
        if columns.entropy:
            self._columns["entropies"] = torch.zeros(count, max_tokens, device=device)
        if columns.top_k:
            self._columns["top_ids"] = torch.zeros(count, max_tokens, columns.top_k, dtype=torch.int32, device=device)
            self._columns["top_logprobs"] = torch.zeros(count, max_tokens, columns.top_k, device=device)
        self._top_k = columns.top_k
        self._length_B = torch.tensor(limits, device=device)  # until a token ends the response
        self._stopped_B = torch.zeros(count, dtype=torch.bool, device=device)
        self.finished_B = self._stopped_B.clone()

    def add(self, rows_B: Tensor, t: int, token_B: Tensor, logp_B: Tensor, logits_BV: Tensor, ended_B: Tensor) -> None:
        """Record token t of the responses in `rows_B`; those in `ended_B` end with it, unless they have ended before.

        logp_B: under the sampled distribution. logits_BV: of the model's own.
        """
        values = {"response_ids": token_B.int(), "logprobs": logp_B, "sampling_logprobs": logp_B}
        if self._top_k or self._columns.keys() & {"entropies", "sampling_logprobs"}:
            logp_BV = logits_BV.log_softmax(-1)
            own_logp_B = logp_BV.gather(-1, token_B[:, None]).squeeze(-1)
            values["logprobs"] = own_logp_B if "sampling_logprobs" in self._columns else logp_B
            values["entropies"] = -(logp_BV.exp() * logp_BV).sum(-1).clamp(max=0)
            values["top_logprobs"], top_ids_BK = logp_BV.topk(self._top_k, dim=-1)
            values["top_ids"] = top_ids_BK.int()
        for name, column in self._columns.items():
            column[:, t].index_copy_(0, rows_B, values[name])
        ended_B = ended_B & ~self.finished_B[rows_B]
        length_B = self._length_B[rows_B]
        self._length_B.index_copy_(0, rows_B, length_B.masked_fill(ended_B, t + 1))
        self._stopped_B.index_copy_(0, rows_B, self._stopped_B[rows_B] | ended_B)
        torch.le(self._length_B, t + 1, out=self.finished_B)

    def completion(self, row: int) -> Completion:
        """Return a finished response."""
        length = int(self._length_B[row])
        return Completion(
            **{name: column[row, :length].cpu().numpy().copy() for name, column in self._columns.items()},
            finish_reason="stop" if self._stopped_B[row] else "length",
            routed_experts=self.routing.experts(row, length) if self.routing else None,
        )
