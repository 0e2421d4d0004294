"""The transformers engine: batched sampling with a key-value cache, and chunked scoring.

Sampling is a loop of its own over transformers' cache rather than `generate`, for two things that `generate` does not
do: each response has a random stream of its own, so the same seed gives the same response in any batch, and finished
responses leave the batch.

Shapes: B responses still in work, T positions, V vocabulary, N response tokens of a batch, or blocks of b = BLOCK ids;
K most probable tokens, D hidden size.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from opdctl.artifacts.records import Ids, TokenScores
from opdctl.engines.base import Completion, Request, ScoreRequest
from opdctl.models.batching import by_token_budget, pad_batch
from opdctl.models.directory import ModelDir
from opdctl.models.loading import load_model
from opdctl.models.logprobs import Chunk, Head, map_vocab_chunks, output_head, response_states
from opdctl.recipe.schema import Sampling, Score

BLOCK = 512  # probabilities that are cumulated one by one; more than that, block by block first
COMPACT_BELOW = 0.75  # drop finished rows once fewer than this share are in work: each drop copies the cache


class TransformersEngine:
    """Generates and scores with a transformers model in this process."""

    _model: Any = None
    _head: Any = None

    def __init__(self, model: ModelDir, device: str):
        self._device = device
        self.load_weights(model)
        self.logprob_metadata = {"engine": "transformers", "dtype": model.dtype, "logprobs": "processed, float32, nats"}

    def load_weights(self, model: ModelDir) -> None:
        """Take over another directory's weights, by loading it anew.

        A mixture of experts is stored in another shape than it is held in, so tensors cannot simply be copied over.
        """
        self.close()
        self._model = load_model(model, device=self._device)
        # In float32 once: the product of hidden states and output matrix in bfloat16 is too coarse for log-probs.
        self._head = output_head(self._model, model.vocab_size)
        self._eos = torch.tensor(model.eos_ids, device=self._device)

    def close(self) -> None:
        self._model = self._head = None
        if self._device == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def score(
        self, answered: Sequence[ScoreRequest], settings: Score, advance: Callable[[int], None]
    ) -> list[TokenScores]:
        scores: dict[int, TokenScores] = {}
        lengths = [len(each.prompt_ids) + len(each.response_ids) for each in answered]
        for batch in by_token_budget(lengths, settings.tokens_per_batch):
            scores |= zip(batch, self._score_batch([answered[i] for i in batch], settings), strict=True)
            advance(len(batch))
        return [scores[i] for i in range(len(answered))]

    def _score_batch(self, batch: list[ScoreRequest], settings: Score) -> list[TokenScores]:
        padded = pad_batch([(each.prompt_ids, each.response_ids) for each in batch], self._device)
        hidden_ND, ids_N = response_states(self._model, padded.input_ids_BT, padded.rows_N, padded.positions_N)
        ids_NK = ids_N[:, None]
        if settings.student_top_k:
            top_NK = np.concatenate([each.top_ids for each in batch]).astype(np.int64)
            ids_NK = torch.cat([ids_NK, torch.from_numpy(top_NK).to(self._device)], dim=-1)
        found: list[dict[str, Tensor]] = []

        def read(chunk: Chunk) -> None:
            columns = {"logprobs": chunk.selected_logp_CK[:, 0]}
            if settings.student_top_k:
                columns["student_top_logprobs"] = chunk.selected_logp_CK[:, 1:]
            if settings.entropy:
                columns["entropies"] = chunk.entropy_C()
            if settings.top_k:
                top_ids_CK, columns["top_logprobs"] = chunk.top(settings.top_k)
                columns["top_ids"] = top_ids_CK.int()
            found.append({name: value.cpu() for name, value in columns.items()})

        map_vocab_chunks(self._head, hidden_ND, ids_NK, read)
        whole = {name: torch.cat([chunk[name] for chunk in found]) for name in found[0]}
        if settings.hidden_states:
            whole["hidden_states"] = hidden_ND.float().cpu()
        return _cut(whole, padded.lengths)

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        batch_size: int,
        advance: Callable[[int], None],
        *,
        entropy: bool = False,
        top_k: int = 0,
    ) -> list[Completion]:
        completions: list[Completion] = []
        for start in range(0, len(requests), batch_size):
            batch = requests[start : start + batch_size]
            drawn = _SampleBuffer(len(batch), sampling.max_tokens, self._device, entropy, top_k)
            self._generate_batch(batch, sampling, drawn, advance)
            completions += drawn.completions()
        return completions

    @torch.inference_mode()
    def _generate_batch(
        self, requests: Sequence[Request], sampling: Sampling, drawn: "_SampleBuffer", advance: Callable[[int], None]
    ) -> None:
        longest = sampling.max_tokens
        uniform_BT = torch.from_numpy(np.stack([_uniforms(request.seed, longest) for request in requests]))
        uniform_BT = uniform_BT.to(self._device)
        batch = _DecodeBatch(self._model, self._head, [request.prompt_ids for request in requests], self._device)
        rows_B = torch.arange(len(requests), device=self._device)
        for t in range(longest):
            logits_BV = batch.logits()
            token_B, logp_B = sample(logits_BV, uniform_BT[rows_B, t], sampling.temperature, sampling.top_p)
            ended_B = torch.isin(token_B, self._eos) & ~drawn.stopped_B[rows_B]
            drawn.add(rows_B, t, token_B, logp_B, logits_BV, ended_B)
            advance(int(ended_B.sum()))
            working_B = ~drawn.stopped_B[rows_B]
            if not (working := int(working_B.sum())):
                break
            if working < COMPACT_BELOW * len(rows_B):
                batch.keep(working_B.nonzero().squeeze(-1))
                rows_B, token_B = rows_B[working_B], token_B[working_B]
            if t + 1 < longest:
                batch.feed(token_B)
        advance(int((~drawn.stopped_B).sum()))


def _cut(columns: dict[str, Tensor], lengths: list[int]) -> list[TokenScores]:
    """Cut columns of all tokens into one record a response."""
    cut = {name: [value.numpy() for value in column.split(lengths)] for name, column in columns.items()}
    scores = []
    for row in range(len(lengths)):
        values = {name: pieces[row] for name, pieces in cut.items()}
        hidden_TD = values.pop("hidden_states", None)
        scores.append(
            TokenScores(**values, hidden_states=None if hidden_TD is None else partial(np.asarray, hidden_TD))
        )
    return scores


class _SampleBuffer:
    """What is drawn of a batch of responses, token by token."""

    def __init__(self, count: int, longest: int, device: str, entropy: bool, top_k: int):
        self._columns = {
            "response_ids": torch.zeros(count, longest, dtype=torch.int32, device=device),
            "logprobs": torch.zeros(count, longest, device=device),
        }
        if entropy:
            self._columns["entropies"] = torch.zeros(count, longest, device=device)
        if top_k:
            self._columns["top_ids"] = torch.zeros(count, longest, top_k, dtype=torch.int32, device=device)
            self._columns["top_logprobs"] = torch.zeros(count, longest, top_k, device=device)
        self._top_k = top_k
        self._length_B = torch.full((count,), longest, device=device)
        self.stopped_B = torch.zeros(count, dtype=torch.bool, device=device)

    def add(self, rows_B: Tensor, t: int, token_B: Tensor, logp_B: Tensor, logits_BV: Tensor, ended_B: Tensor) -> None:
        """Take down token t of the responses in `rows_B`; `ended_B` of them end with it."""
        found = {"response_ids": token_B.int(), "logprobs": logp_B}
        if self._top_k or "entropies" in self._columns:
            logp_BV = logits_BV.log_softmax(-1)
            found["entropies"] = -(logp_BV.exp() * logp_BV).sum(-1).clamp(max=0)
            found["top_logprobs"], top_ids_BK = logp_BV.topk(self._top_k, dim=-1)
            found["top_ids"] = top_ids_BK.int()
        for name, column in self._columns.items():
            column[rows_B, t] = found[name]
        self._length_B[rows_B[ended_B]] = t + 1
        self.stopped_B[rows_B[ended_B]] = True

    def completions(self) -> list[Completion]:
        columns = {name: column.cpu().numpy() for name, column in self._columns.items()}
        ends = zip(self._length_B.tolist(), self.stopped_B.tolist(), strict=True)
        return [
            Completion(
                **{name: column[row, :length].copy() for name, column in columns.items()},
                finish_reason="stop" if stopped else "length",
            )
            for row, (length, stopped) in enumerate(ends)
        ]


class _DecodeBatch:
    """Responses in work: the cache, the mask of real positions, and the last hidden state.

    Prompts of different lengths are padded on the left, with position ids from the mask; where none needs padding there
    is no mask, which is faster.
    """

    def __init__(self, model: PreTrainedModel, head: Head, prompts: Sequence[Ids], device: str):
        self._model, self._head, self._cache = model, head, DynamicCache(config=model.config)
        longest = max(len(prompt) for prompt in prompts)
        ids_BT = torch.zeros(len(prompts), longest, dtype=torch.int64)
        mask_BT = torch.zeros(len(prompts), longest, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids_BT[row, longest - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
            mask_BT[row, longest - len(prompt) :] = 1
        self._mask_BT = None if bool(mask_BT.all()) else mask_BT.to(device)
        positions_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
        self._next_B1 = positions_BT[:, -1:].to(device) + 1
        self._forward(ids_BT.to(device), positions_BT.to(device))

    def _forward(self, ids_BT: Tensor, positions_BT: Tensor) -> None:
        hidden_BTD = self._model.base_model(
            input_ids=ids_BT,
            position_ids=positions_BT,
            attention_mask=self._mask_BT,
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state
        self._hidden_BD = hidden_BTD[:, -1]

    def logits(self) -> Tensor:
        """Return the next token's logits over the tokenizer's own ids, [B, V], float32."""
        return self._head.logits(self._hidden_BD)

    def feed(self, token_B: Tensor) -> None:
        """Append one token to each response."""
        if self._mask_BT is not None:
            self._mask_BT = torch.cat([self._mask_BT, torch.ones_like(self._next_B1)], dim=-1)
        self._forward(token_B[:, None], self._next_B1)
        self._next_B1 = self._next_B1 + 1

    def keep(self, rows: Tensor) -> None:
        """Let the other rows leave the batch."""
        self._cache.batch_select_indices(rows)
        self._next_B1 = self._next_B1[rows]
        if self._mask_BT is not None:
            self._mask_BT = self._mask_BT[rows]


def _uniforms(seed: int, count: int) -> np.ndarray:
    """Return the response's own stream of uniform numbers in [0, 1)."""
    return np.random.Generator(np.random.Philox(key=seed)).random(count, dtype=np.float32)


def sample(logits_BV: Tensor, uniform_B: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Sample one token a row by inverting the distribution at `uniform_B`; return ids and their log-probs, [B].

    The log-probs are those of the distribution that was sampled, after temperature and top-p; at temperature 0 all of
    it is on the most probable token.
    """
    if temperature == 0:
        return logits_BV.argmax(-1), torch.zeros_like(uniform_B)
    if temperature != 1:
        logits_BV = logits_BV / temperature
    if top_p < 1:
        logits_BV = _top_p_filter(logits_BV, top_p)
    logz_B1 = logits_BV.logsumexp(-1, keepdim=True)
    token_B1 = _inverse_cdf((logits_BV - logz_B1).exp_(), uniform_B[:, None].double())
    return token_B1.squeeze(-1), (logits_BV.gather(-1, token_B1) - logz_B1).squeeze(-1)


def _top_p_filter(logits_BV: Tensor, top_p: float) -> Tensor:
    """Return the logits without the tokens beyond the most probable ones that hold `top_p` of the mass."""
    sorted_BV, order_BV = logits_BV.sort(stable=True, dim=-1, descending=True)
    p_BV = sorted_BV.softmax(-1)
    sorted_BV = sorted_BV.masked_fill(p_BV.cumsum(-1) - p_BV >= top_p, -torch.inf)
    return torch.full_like(logits_BV, -torch.inf).scatter(-1, order_BV, sorted_BV)


def _inverse_cdf(p_BV: Tensor, uniform_B1: Tensor) -> Tensor:
    """Return where the cumulated probabilities, in float64, pass `uniform_B1`, [B, 1].

    First the block, then the token in it: a float64 sum over a whole large vocabulary costs as much as the model.
    """
    blocks_BNb = torch.nn.functional.pad(p_BV, (0, -p_BV.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    ends_BN = blocks_BNb.sum(-1, dtype=torch.float64).cumsum(-1)
    # Scaled by the sum, so that rounding can neither draw past the end nor draw a token of probability zero.
    target_B1 = uniform_B1 * ends_BN[:, -1:]
    block_B1 = torch.searchsorted(ends_BN, target_B1, right=True).clamp(max=ends_BN.shape[-1] - 1)
    block_Bb = blocks_BNb.take_along_dim(block_B1[..., None], dim=1).squeeze(1)
    ends_Bb = block_Bb.cumsum(-1, dtype=torch.float64)
    within_B1 = target_B1 - torch.where(block_B1 > 0, ends_BN.gather(-1, (block_B1 - 1).clamp(min=0)), 0.0)
    token_B1 = torch.searchsorted(ends_Bb, within_B1, right=True)
    last_B1 = BLOCK - 1 - (block_Bb.flip(-1) > 0).int().argmax(-1, keepdim=True)
    return block_B1 * BLOCK + token_B1.minimum(last_B1)
