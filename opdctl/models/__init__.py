"""Models: their directories, loading, batching, and log-probs from hidden states."""

CHUNK_LOGITS = 2**24
"""float32 logits of one vocabulary chunk: 64 MiB. Here because the cost model reads it and must not import torch."""
