"""Models: their directories, loading, batching, and log-probs from hidden states."""

CHUNK_LOGITS = 2**25
"""float32 logits of one vocabulary chunk on a CPU: 128 MiB. Here because the cost model must not import torch."""
GPU_CHUNK_LOGITS = 2**27
"""The same on a GPU, whose matrix products need many rows: 883 of Qwen3's vocabulary, in 512 MiB."""
BLOCK_LOGITS = 2**18
"""float32 logits of a block of a chunk on a CPU: three matrices of 1 MiB fit the caches of its cores."""
GPU_BLOCK_LOGITS = 2**25
"""The same on a GPU, which needs large operations: 128 MiB."""
