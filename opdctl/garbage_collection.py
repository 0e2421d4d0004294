"""When Python looks for cycles of unused objects.

Imports of torch and transformers create a million objects and keep nearly all of them. At the interpreter's own
threshold, collections take a third of the time of these imports.
"""

import gc

_THRESHOLDS = gc.get_threshold()
IMPORT_THRESHOLD = 100_000
"""New objects, less those that were freed, until a collection."""


def defer_collections() -> None:
    """Let collections be rare: for imports."""
    gc.set_threshold(IMPORT_THRESHOLD, *_THRESHOLDS[1:])


def restore_collections() -> None:
    """Let collections be as frequent as by default: for work, in which a cycle may hold tensors."""
    gc.set_threshold(*_THRESHOLDS)
