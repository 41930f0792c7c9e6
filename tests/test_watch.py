"""What follows from who was heard of when: the rules of the heartbeat, without clock or network."""

from dataclasses import replace

import pytest

from dsv3.errors import DSV3Error
from dsv3.parallel import environment
from dsv3.parallel.roll import DONE, Entry, Roll

# Ranks 0 and 1 on node0, 2 and 3 on node1.
ALL = tuple(Entry(f"node{rank // 2}", f"node{rank // 2} 7", 100 + rank) for rank in range(4))


def heard(roll: Roll, until: float, *, silent=(), seen=(), gone=(), **changes: Entry) -> None:
    """Entries of each second up to ``until``: the counters of all but ``silent`` go up.

    seen: (who, whom) it sees run; changes: r2=... the entry of rank 2.
    """
    for second in range(int(until) + 1):
        entries = [
            replace(
                changes.get(f"r{rank}", entry),
                beat=0 if rank in silent else second,
                runs=tuple(whom for who, whom in seen if who == rank),
            )
            for rank, entry in enumerate(ALL)
        ]
        roll.take(entries, gone, float(second))


@pytest.fixture
def roll() -> Roll:
    return Roll(0, 4)


def test_all_is_well_before_all_have_come_and_while_all_are_heard(roll):
    assert roll.verdict(1e9, 20, True) is None
    heard(roll, 60)
    assert roll.verdict(79, 20, False) is None


def test_silence_is_named_with_host_and_only_after_its_time(roll):
    heard(roll, 60, silent=(2, 3))
    assert roll.verdict(20, 20, False) is None
    line = "ranks 2, 3 of 4 (host node1) have not been heard of for 20 s"
    assert roll.verdict(60, 20, False) == line
    assert roll.silent(60, 20) == [2, 3]


def test_ranks_of_a_machine_are_lost_together_though_their_last_beats_were_apart(roll):
    for second, (two, three) in enumerate([(1, 1), (1, 2)]):
        entries = [replace(ALL[0], beat=second), replace(ALL[1], beat=second)]
        roll.take([*entries, replace(ALL[2], beat=two), replace(ALL[3], beat=three)], (), second)
    heard_of = "have not been heard of for 20 s"
    roll.heard.update({0: 20.0, 1: 20.0})
    assert roll.verdict(20.5, 20, False) == f"ranks 2, 3 of 4 (host node1) {heard_of}"


def test_who_is_seen_running_is_not_silent(roll):
    """A rank whose threads are held up, for however long."""
    heard(roll, 300, silent=(2,), seen=((3, 2),))
    assert roll.verdict(300, 20, False) is None


def test_who_slept_itself_counts_from_anew(roll):
    heard(roll, 5)
    roll.forgive(500)
    assert roll.verdict(515, 20, False) is None
    assert "ranks 1, 2, 3" in roll.verdict(521, 20, False)


def test_who_is_done_is_missed_by_nobody(roll):
    heard(roll, 60, silent=(1,), gone=(1,), r1=replace(ALL[1], left=DONE))
    assert roll.verdict(60, 20, True) is None


def test_a_process_that_ended_without_a_word_is_lost_at_once(roll):
    heard(roll, 1, gone=(1,))
    assert (
        roll.verdict(1, 20, False) == "rank 1 of 4 (host node0) has ended without a word (killed?)"
    )


def test_why_a_rank_left_is_told_when_it_is_missed(roll):
    heard(roll, 3, r3=replace(ALL[3], left="no room on the disk"))
    assert roll.verdict(3, 20, False) is None, "all ranks may be about to say the same"
    assert roll.verdict(3, 20, True) == "rank 3 of 4 (host node1) has ended: no room on the disk"
    heard(roll, 9, r3=replace(ALL[3], left="no room on the disk"))
    assert "no room" in roll.verdict(9, 20, False)


def test_one_name_goes_round(roll):
    """Rank 1 has found out about rank 3, and has itself become silent since."""
    heard(roll, 60, silent=(1, 3), r1=replace(ALL[1], lost="rank 3 is lost"))
    assert roll.verdict(60, 20, False) == "rank 3 is lost"


@pytest.mark.parametrize(
    "rank, line",
    [
        (2, r"ranks 0, 1 of 4 (host node0), where the ranks meet (h:1), have gone"),
        (1, r"the store of the ranks (h:1), on this machine, has gone"),
    ],
)
def test_a_silent_store_stands_for_the_machine_of_rank_0(rank, line):
    roll = Roll(rank, 4)
    assert (
        roll.verdict_on_store("has gone", "h:1") == "the place where the ranks meet (h:1) has gone"
    )
    heard(roll, 3)
    assert roll.verdict_on_store("has gone", "h:1") == line


def test_names_of_hosts_are_shown_harmless(roll):
    heard(roll, 60, silent=(3,), r3=replace(ALL[3], host="a\x1b[2Jb"))
    assert "\x1b" not in roll.verdict(60, 20, False)


def test_the_limit_of_silence_is_a_number_or_refused(monkeypatch):
    monkeypatch.delenv("DSV3_SILENCE_SECONDS", raising=False)
    assert environment.silence() == 20
    monkeypatch.setenv("DSV3_SILENCE_SECONDS", "60")
    assert environment.silence() == 60
    monkeypatch.setenv("DSV3_SILENCE_SECONDS", "1")
    with pytest.raises(DSV3Error, match="DSV3_SILENCE_SECONDS: not such a number .found '1'"):
        environment.silence()
