"""opdctl: on-policy distillation of language models in separate, resumable stages."""
