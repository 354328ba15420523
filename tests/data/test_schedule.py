"""Who reads what: each unit once, files by one worker where there are enough, shared where there are not."""

import random
from pathlib import Path

import pytest

from megatron_sharedproj.data.schedule import Schedule, Task

UNIT = 1000


def schedule(*sizes: int, suffix: str = ".jsonl") -> Schedule:
    return Schedule([Path(f"{index}{suffix}") for index in range(len(sizes))], sizes, UNIT)


def take(plan: Schedule, last: int | None) -> tuple[int, int] | None:
    task = plan.next(last)
    return None if task is None else (task.file, task.unit)


def test_a_worker_goes_on_with_its_file_and_others_open_the_next() -> None:
    plan = schedule(3 * UNIT, 3 * UNIT, 3 * UNIT)
    assert [take(plan, None), take(plan, None)] == [(0, 0), (1, 0)]
    plan.finished(Task(1, 0), False)
    assert [take(plan, 1), take(plan, 0), take(plan, 1)] == [(1, 1), (0, 1), (1, 2)]
    plan.finished(Task(1, 2), True)
    assert plan.count(1) == 3 and plan.count(0) is None
    assert take(plan, 1) == (2, 0)


def test_a_long_file_is_joined_by_those_who_have_none() -> None:
    plan = schedule(4 * UNIT)
    assert [take(plan, None) for _ in range(5)] == [(0, 0), (0, 1), (0, 2), (0, 3), None]


def test_a_short_file_is_not_joined() -> None:
    plan = schedule(UNIT // 2)
    assert [take(plan, None), take(plan, None)] == [(0, 0), None]
    plan.finished(Task(0, 0), True)
    assert take(plan, 0) is None


@pytest.mark.parametrize(
    ("suffix", "guess"), [(".jsonl", 2), (".jsonl.gz", 6), (".jsonl.zst", 8), (".parquet", 5)]
)
def test_the_guess_knows_how_far_files_are_compressed(suffix: str, guess: int) -> None:
    plan = schedule(2 * UNIT, suffix=suffix)
    assert [take(plan, None) for _ in range(guess + 1)] == [*((0, unit) for unit in range(guess)), None]


def test_a_file_longer_than_the_guess_is_read_to_its_end() -> None:
    plan = schedule(UNIT)
    assert take(plan, None) == (0, 0)
    plan.finished(Task(0, 0), False)
    assert take(plan, 0) == (0, 1)
    plan.finished(Task(0, 1), False)
    # Its reader went elsewhere: nobody may join, but the rest has to be read all the same.
    assert take(plan, None) is None
    assert plan.leftover({0}) is None
    assert plan.leftover(set()) == Task(0, 2)
    plan.finished(Task(0, 2), True)
    assert plan.leftover(set()) is None and take(plan, 0) is None


def test_the_end_of_a_shared_file_is_the_first_that_was_seen() -> None:
    plan = schedule(5 * UNIT)
    assert [take(plan, None) for _ in range(3)] == [(0, 0), (0, 1), (0, 2)]
    plan.finished(Task(0, 2), True)  # nothing was in it
    assert plan.count(0) == 3
    plan.finished(Task(0, 1), True)
    assert plan.count(0) == 2
    plan.finished(Task(0, 0), False)
    assert plan.count(0) == 2 and take(plan, 0) is None


def test_a_retried_task_comes_first_for_anyone() -> None:
    plan = schedule(3 * UNIT, 3 * UNIT)
    assert [take(plan, None), take(plan, None)] == [(0, 0), (1, 0)]
    plan.retry(Task(0, 0))
    assert [take(plan, 1), take(plan, 1)] == [(0, 0), (1, 1)]


def test_dropped_files_give_nothing_more() -> None:
    plan = schedule(3 * UNIT, 3 * UNIT, 3 * UNIT)
    assert take(plan, None) == (0, 0)
    plan.retry(Task(0, 0))
    plan.drop([0, 1])
    assert [take(plan, 0), take(plan, None)] == [(2, 0), (2, 1)]
    assert plan.leftover(set()) == Task(2, 2)
    plan.drop([2])
    assert take(plan, 2) is None and plan.leftover(set()) is None


def test_what_an_earlier_run_did_is_not_done_again() -> None:
    plan = schedule(5 * UNIT, 5 * UNIT)
    plan.drop([0])
    for unit, ended in ((0, False), (1, False), (3, False), (4, True)):
        plan.finished(Task(1, unit), ended)
    assert [take(plan, None), take(plan, None)] == [(1, 2), None]


@pytest.mark.parametrize("seed", range(30))
def test_every_unit_is_done_whatever_happens(seed: int) -> None:
    """Workers of random speed, deaths, and files whose true length has little to do with the guess."""
    numbers = random.Random(seed)
    true = [numbers.randint(1, 9) for _ in range(numbers.randint(1, 6))]
    plan = schedule(*(numbers.randint(0, 5 * UNIT) for _ in true))
    workers = numbers.randint(1, 5)
    last: dict[int, int] = {}
    running: dict[int, Task] = {}
    given: dict[Task, int] = {}
    done: set[Task] = set()
    deaths = 3
    while True:
        for worker in set(range(workers)) - running.keys():
            active = {last[other] for other in running}
            task = plan.next(last.get(worker)) or plan.leftover(active)
            if task is not None:
                running[worker], last[worker] = task, task.file
                given[task] = given.get(task, 0) + 1
        if not running:
            break
        worker = numbers.choice(sorted(running))
        task = running.pop(worker)
        if deaths and numbers.random() < 0.2:
            deaths -= 1
            plan.retry(task)
            given[task] -= 1
        else:
            done.add(task)
            plan.finished(task, task.unit >= true[task.file] - 1)
    wanted = {Task(file, unit) for file, count in enumerate(true) for unit in range(count)}
    assert wanted <= done and set(given.values()) == {1}
    # Behind a file's end at most as many units are tried as workers share it.
    assert len(done - wanted) <= len(true) * (workers - 1)
