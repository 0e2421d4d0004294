"""From hidden states to token log-probs and entropies, without the logits in memory.

Shapes: B responses, T positions, N response tokens of the batch, C tokens of a chunk, D hidden size, V vocabulary.
The product with the output matrix and the softmax run in float32 whatever the weights' type: rounding to bfloat16 alone
costs 0.03 to 0.04 nats RMS, and IW-OPD adds up |A|. Each chunk's logits are recomputed in the backward pass.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

CHUNK_LOGITS = 2**26  # float32 logits that a chunk may hold: 256 MiB


def response_logprobs(
    model: PreTrainedModel, input_ids_BT: Tensor, rows_N: Tensor, positions_N: Tensor, *, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """Return the log-prob of each response token and the entropy of its distribution (no gradient), in nats, [N].

    Token n is input_ids_BT[rows_N[n], positions_N[n]]; it is predicted from the position before. Rows are padded on
    the right, where a causal model's real tokens cannot see, so there is no attention mask. Vocabulary rows from
    `vocab_size` on are padding and get no probability.
    """
    hidden_BTD = model.base_model(input_ids=input_ids_BT, use_cache=False).last_hidden_state
    flat_N = rows_N * input_ids_BT.shape[1] + positions_N
    hidden_ND = hidden_BTD.flatten(0, 1).index_select(0, flat_N - 1)
    targets_N = input_ids_BT.flatten().index_select(0, flat_N)
    return token_logprobs(hidden_ND, model.get_output_embeddings().weight[:vocab_size], targets_N)


@torch.no_grad()
def check_head(model: PreTrainedModel) -> float:
    """Return how far, in nats, this file's log-probs are from those of the model's own logits, on a few tokens.

    They differ when the model does more to its logits than multiply by the output matrix: a bias, a scale, a cap.
    """
    ids_1T = torch.arange(8, device=model.device)[None]
    head_VD = model.get_output_embeddings().weight
    positions_N = torch.arange(1, 8, device=model.device)
    ours_N, _ = response_logprobs(
        model, ids_1T, torch.zeros_like(positions_N), positions_N, vocab_size=head_VD.shape[0]
    )
    theirs_TV = model(input_ids=ids_1T, use_cache=False).logits[0].float().log_softmax(-1)
    return float((theirs_TV[:-1].gather(-1, ids_1T[0, 1:, None]).squeeze(-1) - ours_N).abs().max())


def token_logprobs(hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return log softmax(hidden · headᵀ) at the targets, and the entropy without gradient, in nats, both [N]."""
    size = max(1, CHUNK_LOGITS // head_VD.shape[0])
    with torch.autocast(hidden_ND.device.type, enabled=False):
        head_VD = head_VD.float()
        pairs = [
            checkpoint(_chunk, hidden_CD.float(), head_VD, targets_C, use_reentrant=False, preserve_rng_state=False)
            for hidden_CD, targets_C in zip(hidden_ND.split(size), targets_N.split(size), strict=True)
        ]
    return torch.cat([logp_C for logp_C, _ in pairs]), torch.cat([entropy_C for _, entropy_C in pairs])


def _chunk(hidden_CD: Tensor, head_VD: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    logits_CV = hidden_CD @ head_VD.T
    logz_C = logits_CV.logsumexp(-1)
    logp_C = logits_CV.gather(-1, targets_C[:, None]).squeeze(-1) - logz_C
    with torch.no_grad():
        entropy_C = logz_C - ((logits_CV - logz_C[:, None]).exp() * logits_CV).sum(-1)
    return logp_C, entropy_C
