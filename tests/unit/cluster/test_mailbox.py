from opdctl.cluster.mailbox import Event, Mailbox


def test_events_are_taken_once_and_in_order():
    mailbox = Mailbox()
    assert not mailbox.exchange([Event("rollout-0", "items", 3)])
    assert not mailbox.exchange([Event("rollout-1", "print", "text"), Event("rollout-1", "items", 1)])
    assert mailbox.take() == [("rollout-0", "items", 3), ("rollout-1", "print", "text"), ("rollout-1", "items", 1)]
    assert mailbox.take() == []


def test_a_request_to_stop_reaches_every_later_exchange():
    mailbox = Mailbox()
    mailbox.take(stop=True)
    assert mailbox.exchange([])
    mailbox.take()
    assert mailbox.exchange([Event("score-0", "items", 1)])
