"""The kill matrix covers what it says and can tell a fair end from another; `make test-all` runs it."""

import signal

from tests.kill_matrix import METHODS, MOMENTS, SIGNALS, Disturbance, _is_fair_end, cases


def test_every_method_rank_signal_and_moment_comes_about():
    made = cases(100, ranks=[1, 2], seed=0)
    assert {(method, ranks) for method, ranks, _ in made} == {(m, r) for m in METHODS for r in (1, 2)}
    first = {(d[0].number, d[0].moment) for _, _, d in made}
    assert first == {(number, moment) for number in SIGNALS for moment in MOMENTS}
    assert {len(disturbances) for *_, disturbances in made} == {1, 2, 3}
    assert {d.rank for _, ranks, all_ in made for d in all_ if ranks == 2} == {0, 1}
    assert made == cases(100, ranks=[1, 2], seed=0) != cases(100, ranks=[1, 2], seed=1)


def test_a_round_begins_with_every_moment_of_every_method_and_number_of_ranks():
    first = [(method, ranks, d[0]) for method, ranks, d in cases(20, ranks=[1, 2], seed=0)]
    assert {(method, d.moment) for method, _, d in first} == {(m, n) for m in METHODS for n in MOMENTS}
    assert {(ranks, d.moment) for _, ranks, d in first} == {(r, n) for r in (1, 2) for n in MOMENTS}
    assert {(ranks, d.number) for _, ranks, d in first} == {(r, n) for r in (1, 2) for n in SIGNALS}


def test_an_unfair_end_is_seen():
    term = Disturbance(signal.SIGTERM, "stepping", 0.5, rank=1)
    assert _is_fair_end([75, 75], term, done=False)
    assert not _is_fair_end([75, -signal.SIGTERM], term, done=False)
    assert not _is_fair_end([0, 1], term, done=True)
    kill = Disturbance(signal.SIGKILL, "saving", 0.5, rank=0)
    assert _is_fair_end([-signal.SIGKILL, 1], kill, done=False)
    assert not _is_fair_end([1, 1], kill, done=False)
    assert not _is_fair_end([75], None, done=False)
