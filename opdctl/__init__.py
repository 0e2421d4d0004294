"""opdctl: on-policy distillation of language models in separate, resumable stages."""

SCHEMA_VERSION = 4
"""Of the artifacts and of what `--json` prints."""
