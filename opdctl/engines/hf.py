"""The transformers engine: batched sampling with a key-value cache, and chunked scoring.

Sampling is a loop of its own over transformers' cache rather than `generate`, for two things that `generate` does not
do: each response has a random stream of its own, so the same seed gives the same response in any batch, and finished
responses leave the batch.

Shapes: B responses still in work, T positions, V vocabulary.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from opdctl.batches import by_token_budget, pad
from opdctl.config import Sampling
from opdctl.engines import Completion, Request
from opdctl.logprobs import response_logprobs
from opdctl.model import ModelDir, load
from opdctl.records import Ids, Logprobs

SHRINK = 0.75  # drop finished rows once fewer than this share are in work: each drop copies the cache


class TransformersEngine:
    """Generates and scores with a transformers model in this process."""

    def __init__(self, model: ModelDir, device: str):
        self._device = device
        self.load_weights(model)
        self.meaning = {"engine": "transformers", "dtype": model.dtype, "logprobs": "processed, float32, nats"}

    def load_weights(self, model: ModelDir) -> None:
        """Take over another directory's weights, by loading it anew.

        A mixture of experts is stored in another shape than it is held in, so tensors cannot simply be copied over.
        """
        self.close()
        self._model = load(model, device=self._device)
        self._vocab_size = model.vocab_size
        self._eos = torch.tensor(model.eos_ids, device=self._device)

    def close(self) -> None:
        self._model = None
        if self._device == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def score(
        self, sequences: Sequence[tuple[Ids, Ids]], tokens_per_batch: int, advance: Callable[[int], None]
    ) -> list[Logprobs]:
        scores: dict[int, Logprobs] = {}
        for batch in by_token_budget([len(p) + len(r) for p, r in sequences], tokens_per_batch):
            padded = pad([sequences[i] for i in batch], self._device)
            logp_N, _ = response_logprobs(
                self._model, padded.input_ids_BT, padded.rows_N, padded.positions_N, vocab_size=self._vocab_size
            )
            scores |= {i: logp_T.cpu().numpy() for i, logp_T in zip(batch, padded.split(logp_N), strict=True)}
            advance(len(batch))
        return [scores[i] for i in range(len(sequences))]

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, batch_size: int, advance: Callable[[int], None]
    ) -> list[Completion]:
        completions: list[Completion] = []
        for start in range(0, len(requests), batch_size):
            completions += self._generate_batch(requests[start : start + batch_size], sampling, advance)
        return completions

    @torch.inference_mode()
    def _generate_batch(
        self, requests: Sequence[Request], sampling: Sampling, advance: Callable[[int], None]
    ) -> list[Completion]:
        count, longest = len(requests), sampling.max_tokens
        uniform_BT = torch.from_numpy(np.stack([_uniforms(request.seed, longest) for request in requests]))
        ids_BT = torch.zeros(count, longest, dtype=torch.int64, device=self._device)
        logp_BT = torch.zeros(count, longest, device=self._device)
        length_B = torch.full((count,), longest, device=self._device)
        stopped_B = torch.zeros(count, dtype=torch.bool, device=self._device)

        batch = _Batch(self._model, self._vocab_size, [request.prompt_ids for request in requests], self._device)
        uniform_BT = uniform_BT.to(self._device)
        rows_B = torch.arange(count, device=self._device)
        for t in range(longest):
            token_B, logp_B = draw(batch.logits(), uniform_BT[rows_B, t], sampling.temperature, sampling.top_p)
            ids_BT[rows_B, t], logp_BT[rows_B, t] = token_B, logp_B
            ended_B = torch.isin(token_B, self._eos) & ~stopped_B[rows_B]
            length_B[rows_B[ended_B]] = t + 1
            stopped_B[rows_B[ended_B]] = True
            advance(int(ended_B.sum()))
            working_B = ~stopped_B[rows_B]
            if not (working := int(working_B.sum())):
                break
            if working < SHRINK * len(rows_B):
                batch.keep(working_B.nonzero().squeeze(-1))
                rows_B, token_B = rows_B[working_B], token_B[working_B]
            if t + 1 < longest:
                batch.feed(token_B)
        advance(int((~stopped_B).sum()))
        return _completions(ids_BT, logp_BT, length_B, stopped_B)


def _completions(ids_BT: Tensor, logp_BT: Tensor, length_B: Tensor, stopped_B: Tensor) -> list[Completion]:
    ids, logps = ids_BT.to(torch.int32).cpu().numpy(), logp_BT.cpu().numpy()
    ends = zip(length_B.tolist(), stopped_B.tolist(), strict=True)
    return [
        Completion(ids[row, :length].copy(), logps[row, :length].copy(), "stop" if stopped else "length")
        for row, (length, stopped) in enumerate(ends)
    ]


class _Batch:
    """Responses in work: the cache, the mask of real positions, and the last hidden state.

    Prompts of different lengths are padded on the left, with position ids from the mask; where none needs padding there
    is no mask, which is faster.
    """

    def __init__(self, model: PreTrainedModel, vocab_size: int, prompts: Sequence[Ids], device: str):
        self._model, self._cache = model, DynamicCache(config=model.config)
        # In float32, as for scoring: logits in bfloat16 are an eighth of a nat apart where they matter.
        self._head_VD = model.get_output_embeddings().weight[:vocab_size].float()
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
        return self._hidden_BD.float() @ self._head_VD.T

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


def draw(logits_BV: Tensor, uniform_B: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Sample one token a row by inverting the distribution at `uniform_B`; return ids and their log-probs, [B].

    The log-probs are those of the distribution that was sampled, after temperature and top-p.
    """
    logp_BV = (logits_BV / temperature).log_softmax(-1)
    if top_p < 1:
        sorted_BV, order_BV = logp_BV.sort(stable=True, dim=-1, descending=True)
        before_BV = sorted_BV.exp().cumsum(-1) - sorted_BV.exp()
        sorted_BV = sorted_BV.masked_fill(before_BV >= top_p, -torch.inf)
        logp_BV = torch.full_like(logp_BV, -torch.inf).scatter(-1, order_BV, sorted_BV).log_softmax(-1)
    cumulative_BV = logp_BV.exp().cumsum(-1, dtype=torch.float64)
    # Scaled by the sum, so that rounding can neither draw past the end nor draw a token of probability zero.
    threshold_B1 = uniform_B[:, None].double() * cumulative_BV[:, -1:]
    token_B = torch.searchsorted(cumulative_BV, threshold_B1, right=True).squeeze(-1)
    token_B = token_B.clamp(max=logp_BV.shape[-1] - 1)
    return token_B, logp_BV.gather(-1, token_B[:, None]).squeeze(-1)
