import threading
import time

from opdctl.cluster import ranks
from opdctl.cluster.mailbox import Event


def test_stop_waits_for_ray_train_after_the_ranks_have_ended(monkeypatch):
    """Ray Train asks for its result then. Without a connection Ray ends the process."""
    events, driver = [Event("rank 0", "started", 1)], ranks._Driver(None)

    def end_training():
        time.sleep(0.3)
        driver.ended.set()

    def take_events(mailbox, *, stop):
        taken = [*events]
        events.clear()
        if stop and not driver.failures:
            events.append(Event("rank 0", "ended", 75))
            threading.Thread(target=end_training, daemon=True).start()
        return taken

    monkeypatch.setattr(ranks, "take_events", take_events)
    driver.stop()
    assert driver.ended.is_set()
    assert driver.failures == {"rank 0": 75}


def test_stop_does_not_wait_for_ranks_that_have_not_started(monkeypatch):
    monkeypatch.setattr(ranks, "take_events", lambda mailbox, *, stop: [])
    driver, begin = ranks._Driver(None), time.monotonic()
    driver.stop()
    assert time.monotonic() - begin < ranks.STOP_SECONDS / 2
