"""τ as an array: distributions, traces from files, and what is wrong with a trace."""

import numpy as np
import pytest

from conadv_lab.staleness.draws import Draw, checked, read_trace


def test_constants_and_workers():
    assert (Draw("constant", 3, workers=2).array(4, seed=0) == np.full((4, 2), 3)).all()
    per_worker = Draw("per-worker", of_workers=(0, 2, 5))
    assert (per_worker.columns, per_worker.mean) == (3, 7 / 3)
    assert (per_worker.array(2, seed=1) == [[0, 2, 5], [0, 2, 5]]).all()


@pytest.mark.parametrize("tau", [0.5, 3.0])
def test_distributions_have_the_mean_and_variance_of_their_name(tau):
    for kind, variance in (("geometric", tau * (1 + tau)), ("poisson", tau)):
        drawn = Draw(kind, tau, workers=50).array(4000, seed=0)
        assert drawn.min() == 0
        assert drawn.mean() == pytest.approx(tau, rel=0.02)
        assert drawn.var() == pytest.approx(variance, rel=0.05)


def test_draws_depend_on_the_seed_alone():
    draw = Draw("geometric", 2.0, workers=3)
    assert (draw.array(50, seed=1) == draw.array(50, seed=1)).all()
    assert (draw.array(50, seed=1) != draw.array(50, seed=2)).any()
    assert (Draw("geometric", 0.0).array(50, seed=1) == 0).all()


def test_a_trace_is_read_and_cut(tmp_path):
    trace = np.array([[0, 1], [2, 0], [1, 3]])
    np.save(tmp_path / "trace.npy", trace)
    (tmp_path / "plain.csv").write_text("0,1\n2,0\n1,3\n")
    (tmp_path / "named.csv").write_text("step, worker_0, worker_1\n0,0,1\n1, 2,0\n2,1,3\n")
    for name in ("trace.npy", "plain.csv", "named.csv"):
        found = read_trace(tmp_path / name)
        assert found.dtype == np.int64
        assert (found == trace).all()
        draw = Draw("trace", trace=found)
        assert (draw.array(2, seed=0) == trace[:2]).all()
        assert (draw.columns, draw.mean) == (2, 7 / 6)
    np.save(tmp_path / "one.npy", np.array([4, 5]))
    assert read_trace(tmp_path / "one.npy").tolist() == [[4], [5]]


FILES = {
    "0,1\n2,\n": "no number at step 1, worker 1; allowed: whole numbers of at least 0, without gaps",
    "0,1\n2,nan\n": "no number at step 1, worker 1",
    "0,1\nlate,1\n": "no number at step 1, worker 0",
    "0,1\n2\n": "1 columns at step 1; allowed: 2",
    "0,1\n\n2,0\n": "1 columns at step 1; allowed: 2",
    "0,1\n-1,1\n": "a negative number at step 1, worker 0",
    "0,1.5\n": "a fraction at step 0, worker 1",
    "0,inf\n": "no number at step 0, worker 1",
    "step,worker_0\n0,1\n2,1\n": "lacks step 1; allowed: every step from 0, in order",
    "": r"has shape \(0, 1\)",
    "worker_0,worker_1\n": r"has shape \(0, 1\)",
}


@pytest.mark.parametrize("text", FILES)
def test_a_broken_trace_is_told_with_its_file(text, tmp_path):
    (tmp_path / "trace.csv").write_text(text)
    with pytest.raises(ValueError, match=f"trace.csv: .*{FILES[text]}"):
        read_trace(tmp_path / "trace.csv")


def test_a_trace_is_never_unpickled(tmp_path):
    np.save(tmp_path / "trace.npy", np.array([[object()]]), allow_pickle=True)
    with pytest.raises(ValueError, match=r"trace.npy: .*allow_pickle"):
        read_trace(tmp_path / "trace.npy")


def test_files_that_are_no_traces(tmp_path):
    (tmp_path / "trace.txt").write_text("0\n")
    (tmp_path / "cut.npy").write_bytes(b"\x93NUMPY")
    np.save(tmp_path / "deep.npy", np.zeros((2, 2, 2)))
    for name, message in (
        ("trace.txt", "ends in '.txt'; allowed"), ("nowhere.csv", "is not a file"), ("cut.npy", "cut.npy"),
        ("deep.npy", r"shape \(2, 2, 2\)"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            read_trace(tmp_path / name)


MISTAKES = {
    "Did you mean 'geometric'": {"kind": "geometrical"},
    "tau is -1": {"tau": -1},
    "tau is 1.5; allowed: a whole number": {"tau": 1.5},
    "tau is nan": {"kind": "poisson", "tau": float("nan")},
    "workers is 0": {"workers": 0},
    r"workers' taus is \(\)": {"kind": "per-worker"},
    r"workers' taus is \(0, -2\)": {"kind": "per-worker", "of_workers": (0, -2)},
    "not an array of numbers": {"kind": "trace", "trace": "soon"},
    r"has shape \(\)": {"kind": "trace"},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_told(message):
    with pytest.raises(ValueError, match=message):
        Draw(**MISTAKES[message])


def test_a_trace_must_last_as_long_as_the_run():
    with pytest.raises(ValueError, match="number of steps is 3; allowed: at least 4, the steps of the run"):
        Draw("trace", trace=np.zeros((3, 1))).array(4, seed=0)
    assert checked([0, 2]).shape == (2, 1)
