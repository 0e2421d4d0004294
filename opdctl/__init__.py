"""opdctl: on-policy distillation of language models in separate, resumable stages."""

import os

# With this variable torch counts GPUs by NVML. Otherwise `torch.cuda.is_available` initializes CUDA, and a process that
# is forked later cannot use a GPU.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
