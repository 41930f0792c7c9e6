"""Ranks for a notebook: what they return and print; what is said when they fail or wait."""

import linecache
import os
import signal
import sys
import threading
import time

import psutil
import pytest
import torch
import torch.distributed as dist

from dsv3.book.team import Team
from dsv3.errors import DSV3Error

pytestmark = pytest.mark.slow

CELL = """
def ring(group, start):
    right, left = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    x = torch.tensor([start + group.rank])
    if WRONG:
        dist.recv(x, left)
        dist.send(x, right)
    return double(group.all_reduce(x.float()).item())

def double(x):
    return 2 * x
"""


def cell(wrong: bool):
    """A function as a notebook has it: of no module, with names of its own around it."""
    space = {"torch": torch, "dist": dist, "WRONG": wrong, "__name__": "__main__"}
    file = f"cell-{wrong}"
    linecache.cache[file] = (len(CELL), None, CELL.splitlines(keepends=True), file)
    exec(compile(CELL, file, "exec"), space)
    return space["ring"]


@pytest.fixture(scope="module")
def team():
    team = Team(2, limit=30)
    yield team
    pids = [worker.pid for worker in team._workers]
    team.close()
    assert not any(psutil.pid_exists(pid) for pid in pids)


def talk(group):
    print(f"I am {group.rank}\nof {group.size}")
    return os.getpid()


def fail(group):
    if group.rank == 1:
        raise ValueError("no such thing\nand more")
    dist.barrier()


def end(group):
    if group.rank == 0:
        os._exit(3)
    dist.barrier()


def test_a_function_of_a_cell_runs_on_every_rank_with_the_names_it_uses(team):
    assert team.run(cell(wrong=False), 10) == [42.0, 42.0]
    assert team.run(cell(wrong=False), 0) == [2.0, 2.0], "the same processes serve again"


def test_what_ranks_print_comes_in_order_with_their_numbers(team, capsys):
    first, second = team.run(talk)
    assert first != second
    wanted = ["rank 0: I am 0", "rank 0: of 2", "rank 1: I am 1", "rank 1: of 2"]
    assert capsys.readouterr().out.splitlines() == wanted


def test_a_rank_that_fails_is_named_with_its_line(team):
    with pytest.raises(DSV3Error, match="rank 1 of 2 in fail: raise ValueError") as error:
        team.run(fail)
    assert str(error.value).endswith("(found ValueError: no such thing)")
    assert team.run(cell(wrong=False), 10) == [42.0, 42.0], "others have been started"


def test_a_rank_that_ends_is_named(team):
    with pytest.raises(DSV3Error, match="rank 0 of 2: a rank failed .found its process has ended"):
        team.run(end)


def test_ranks_that_wait_for_each_other_say_in_which_line(team):
    team.limit, before = 6, team.limit  # a busy machine takes seconds to get there
    try:
        team.run(talk)
        with pytest.raises(DSV3Error, match="did not end within 6 s") as error:
            team.run(cell(wrong=True), 0)
    finally:
        team.limit = before
    for rank in range(2):
        assert f"rank {rank} waits in ring: dist.recv(x, left)" in str(error.value)


def sleep(group):
    time.sleep(60)


def stop(group):
    if group.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    dist.barrier()


def test_nothing_is_left_of_a_run_that_is_interrupted(team):
    team.run(talk)
    pids = [worker.pid for worker in team._workers]
    timer = threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        team.run(sleep)
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert team.run(cell(wrong=False), 10) == [42.0, 42.0], "no late answer is taken for another"


def test_a_stopped_rank_is_ended_as_well(team):
    team.run(talk)
    pids, before = [worker.pid for worker in team._workers], team.limit
    team.limit = 2
    try:
        with pytest.raises(DSV3Error, match="rank 0 waits in stop: .*; rank 1 does not answer"):
            team.run(stop)
    finally:
        team.limit = before
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_ranks_end_with_their_parent(tmp_path):
    """A notebook's kernel may be killed: its ranks see the pipe close."""
    program = (
        "import time\nfrom test_team import talk\nfrom dsv3.book.team import Team\n"
        "print(*Team(2).run(talk), flush=True); time.sleep(60)"
    )
    parent = psutil.Popen(
        [sys.executable, "-c", program], stdout=-1, text=True, cwd=os.path.dirname(__file__)
    )
    try:
        for line in parent.stdout:
            if "rank" not in line:
                pids = [int(word) for word in line.split()]
                break
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
    over = time.monotonic() + 20
    while any(psutil.pid_exists(pid) for pid in pids):
        assert time.monotonic() < over, "a rank lives on"
        time.sleep(0.1)
