"""What processes on other nodes report to the terminal of a command, and its request to stop.

An actor of Ray holds both. A process exchanges them several times a second, so that neither side waits for the other.
"""

import contextlib
import secrets
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

EXCHANGE_SECONDS = 0.25


class Event(NamedTuple):
    """What a process reports. sender: its name. kind: what `value` is, such as "print" or "items"."""

    sender: str
    kind: str
    value: Any


class Mailbox:
    """The actor. If it dies, the events in it are lost; the driver repeats a request to stop."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._is_stopping = False

    def exchange(self, events: list[Event]) -> bool:
        """Add events, and return whether their sender has to stop."""
        self._events += events
        return self._is_stopping

    def take(self, *, stop: bool = False) -> list[Event]:
        """Return the events since the last call. stop: request that all processes stop, from now on."""
        self._is_stopping = self._is_stopping or stop
        events, self._events = self._events, []
        return events


class Reporter:
    """Reports the events of this process from a thread. mailbox: its name. on_stop: called in the thread, once, at a
    request to stop."""

    def __init__(self, mailbox: str, sender: str, on_stop: Callable[[], None]):
        import ray

        self._mailbox, self._sender, self._on_stop = ray.get_actor(mailbox), sender, on_stop
        self._lock, self._sending = threading.Lock(), threading.Lock()
        self._events: list[Event] = []
        self._items = 0
        self.is_stopping = False
        threading.Thread(target=self._run, daemon=True).start()

    def send(self, kind: str, value: Any = None) -> None:
        with self._lock:
            self._events.append(Event(self._sender, kind, value))

    def count_items(self, count: int) -> None:
        """Add to the number of items that were processed since the last exchange."""
        with self._lock:
            self._items += count

    def flush(self) -> None:
        """Send everything now. A mailbox that is dead or unreachable loses it."""
        import ray

        with self._sending:
            with self._lock:
                events, items = self._events, self._items
                self._events, self._items = [], 0
            if items:
                events.append(Event(self._sender, "items", items))
            with contextlib.suppress(ray.exceptions.RayError):
                stop = ray.get(self._mailbox.exchange.remote(events))
                if stop and not self.is_stopping:
                    self.is_stopping = True
                    self._on_stop()

    def _run(self) -> None:
        pause = threading.Event()
        while not pause.wait(EXCHANGE_SECONDS):
            self.flush()


def start_mailbox() -> tuple[str, Any]:
    """Start the actor on the node of this process, and return its name and its handle."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    name = f"opdctl-mailbox-{secrets.token_hex(4)}"
    options = {"num_cpus": 0, "max_restarts": -1, "scheduling_strategy": here, "name": name}
    return name, ray.remote(Mailbox).options(**options).remote()


def take_events(mailbox: Any, *, stop: bool) -> list[Event]:
    """Return the events since the last call, none while the actor is being restarted. stop: as of `Mailbox.take`."""
    import ray

    with contextlib.suppress(ray.exceptions.RayError):
        events: list[Event] = ray.get(mailbox.take.remote(stop=stop))
        return events
    return []
