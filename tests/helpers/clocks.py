"""A clock that only planted delays advance."""

from typing import Any

import pytest

from opdctl.models import startup


class PlantedClock:
    """The clock of the times of stages and of start-up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self._now, self._patch = 0.0, monkeypatch
        monkeypatch.setattr(startup, "time", self)

    def monotonic(self) -> float:
        return self._now

    def delay(self, owner: type, name: str, seconds: float) -> None:
        """Let each call of a method take this time."""
        method = getattr(owner, name)

        def delayed(*arguments: Any, **options: Any) -> Any:
            self._now += seconds
            return method(*arguments, **options)

        self._patch.setattr(owner, name, delayed)
