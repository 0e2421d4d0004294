import os
import random
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers.stages import fill, stage

from opdctl.artifacts import claims, files, leases, stage_dir


@pytest.fixture(autouse=True)
def no_flushes(monkeypatch):
    for module in (files, stage_dir):
        monkeypatch.setattr(module, "fsync_path", lambda path: None)


@pytest.fixture
def idle_workers_leave(monkeypatch):
    """A worker without a part never pauses, and takes the owner of any lease for alive."""
    monkeypatch.setattr(claims.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(leases.Lease, "owner_is_alive", lambda lease: True)


def make_in_turn(folder, parts, workers, seed):
    """Return the parts that each of several workers makes. In random order they write one part and claim the next."""
    rng, made = random.Random(seed), [list[int]() for _ in range(workers)]
    stages = [stage(folder, parts) for _ in range(workers)]
    stages[0].start({})

    def work(number):
        with stages[number].claim_available_parts() as claimed:
            for index in claimed or ():
                yield
                if index is not None:
                    stages[number].write(index, lambda path: path.write_text("content"), rows=1, tokens=1)
                    made[number].append(index)

    turns = {number: work(number) for number in range(workers)}
    while turns:
        number = rng.choice([*turns])
        if next(turns[number], "end") == "end":
            del turns[number]
    return made


def leave_stale_leases(folder, indices):
    """Leave the leases of a dead process of this host on parts of the stage `s`."""
    command = f"""
import os, pathlib
from opdctl.artifacts import leases
held = [leases.Lease(pathlib.Path({str(folder)!r}), f"s-part-{{index:05d}}") for index in {indices}]
print(all(lease.acquire() for lease in held), flush=True)
os._exit(0)
"""
    assert subprocess.run([sys.executable, "-c", command], stdout=subprocess.PIPE, text=True).stdout == "True\n"


# ── Each part once ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("idle_workers_leave")
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("parts", "workers"), [(1, 3), (7, 4), (40, 3), (40, 15)])
def test_workers_make_each_part_once(tmp_path, parts, workers, seed):
    made = make_in_turn(tmp_path / "s", parts, workers, seed)
    assert sorted(index for each in made for index in each) == [*range(parts)]
    assert stage(tmp_path / "s", parts).is_finished()
    assert not list(tmp_path.glob(".*.lock"))


def test_threads_make_each_part_once(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "HEARTBEAT_SECONDS", 0.1)
    stage(tmp_path / "s", 50).start({})

    def work(number):
        mine, made = stage(tmp_path / "s", 50), []
        with mine.claim_parts(wait=True) as indices:
            for index in indices or ():
                made.append(index)
                assert mine.write(index, lambda path: path.write_text("content"), rows=1, tokens=1)
        return made

    with ThreadPoolExecutor(6) as threads:
        made = [index for each in threads.map(work, range(6)) for index in each]
    assert sorted(made) == [*range(50)]
    assert stage(tmp_path / "s", 50).corrupted_parts() == {}
    assert stage(tmp_path / "s", 50).is_finished()


# ── Order ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stale", [[], [0], [*range(5)]])
def test_single_worker_makes_parts_in_ascending_order(tmp_path, stale):
    if stale:
        leave_stale_leases(tmp_path, stale)
    assert make_in_turn(tmp_path / "s", 30, 1, 0) == [[*range(30)]]


def test_worker_leaves_the_places_of_another_one(tmp_path, monkeypatch):
    """It starts with the first part that is free, and goes elsewhere as soon as another worker is ahead of it."""
    monkeypatch.setattr(claims.secrets, "randbelow", lambda count: count // 2)
    one, two = stage(tmp_path / "s", 20), stage(tmp_path / "s", 20)
    with one.claim_parts() as mine, two.claim_parts() as theirs:
        assert (next(mine), next(theirs)) == (0, 1)
        assert [next(mine) for _ in range(3)] == [11, 12, 13]  # 1 is leased; 2 to 19 are left
        assert [next(theirs) for _ in range(3)] == [2, 3, 4]


# ── Stale leases ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_stale_leases_of_any_number_are_acquired(tmp_path, monkeypatch):
    """More than a worker watches at a time."""
    monkeypatch.setattr(claims.time, "sleep", lambda seconds: None)
    count = 2 * claims.MAX_WATCHED + 3
    leave_stale_leases(tmp_path, [*range(count)])
    [made] = make_in_turn(tmp_path / "s", count + 2, 1, 0)
    assert sorted(made) == [*range(count + 2)]
    assert stage(tmp_path / "s", count + 2).is_finished()
    assert not list(tmp_path.glob(".*.lock"))


def test_part_that_differs_from_its_receipt_is_made_again_after_the_others(tmp_path):
    made = stage(tmp_path / "s")
    fill(made, 0, 1)
    (made.path / made.names[0]).write_text("part 9")
    with stage(tmp_path / "s").claim_parts() as indices:
        worker = stage(tmp_path / "s")
        done = [index for index in indices if fill(worker, index) is None]
    assert done == [2, 0]
    assert worker.is_finished()
    assert worker.verify(0).read_text() == "part 0"


# ── Operations ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def operations(monkeypatch):
    """The number of calls of functions that ask the file system for a path, and of tries of leases, by name."""
    counts: Counter[str] = Counter()

    def count(owner, name):
        function = getattr(owner, name)

        def counted(*arguments, **options):
            counts[name] += 1
            return function(*arguments, **options)

        monkeypatch.setattr(owner, name, counted)

    for name in ("stat", "lstat", "open", "listdir", "scandir", "unlink", "replace", "mkdir"):
        count(os, name)
    count(leases.Lease, "acquire")
    return counts


@pytest.mark.usefixtures("idle_workers_leave")
@pytest.mark.parametrize("workers", [1, 8])
def test_operations_on_a_part_do_not_grow_with_the_number_of_workers(tmp_path, operations, workers):
    make_in_turn(tmp_path / "s", 100, workers, 0)
    tries = operations.pop("acquire")
    assert tries < 1.5 * 100 + 2 * claims.MAX_WATCHED * workers
    assert sum(operations.values()) < 100 * 70 + 20 * (tries - 100) + 100 * workers


@pytest.mark.parametrize("parts", [10, 50])
def test_state_of_a_stage_takes_one_listing(tmp_path, operations, parts):
    made = stage(tmp_path / "s", parts)
    operations.clear()
    assert made.missing() == [*range(parts)]
    assert not made.is_finished()
    assert sum(operations.values()) < 10
    fill(made, *range(parts))
    made.finalize()
    operations.clear()
    assert made.is_finished()
    assert made.missing() == []
    assert made.finished_but_missing() == []
    assert made.count_made() == parts
    assert made.finalize()
    assert sum(operations.values()) < 50
