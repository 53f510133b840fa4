"""Training with drawn τ: bitwise ConAdv where τ is constant, and a literal rendering where it is not."""

import copy
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from conadv_lab.config import Config, resolved
from conadv_lab.data.loader import Stream
from conadv_lab.methods.attack import PGDAttack, SignAttack
from conadv_lab.methods.families.conadv import ConAdv
from conadv_lab.models.norm import branch_of, mixture_batch_norm, one_update
from conadv_lab.recipes import digits
from conadv_lab.staleness.draws import Draw
from conadv_lab.staleness.dynamics import command
from conadv_lab.staleness.dynamics import figures as dynamics_figures
from conadv_lab.staleness.dynamics.frame import COLUMNS, print_table
from conadv_lab.staleness.dynamics.options import QuadraticOptions
from conadv_lab.staleness.dynamics.probes import probe
from conadv_lab.staleness.dynamics.snapshots import SnapshotConAdv
from conadv_lab.staleness.dynamics.stale_training import measured, train
from conadv_lab.staleness.dynamics.study import study
from conadv_lab.training import loop
from conadv_lab.training.build import build
from tests.conftest import image_set, small_cnn

CRITERION = nn.CrossEntropyLoss(label_smoothing=0.1)
STEPS, EPSILON = 14, 0.1
"""More steps than the ten after which an attack trusts the running statistics."""


def config(**fields) -> Config:
    short = {"train_images": 150, "global_batch": 48, "steps": STEPS, "warmup_epochs": 0.0, "warmup_steps": 4}
    return digits.conadv().replace(**short | fields)


@pytest.mark.parametrize("micro_batch", [None, 16])
@pytest.mark.parametrize("random_start", [True, False])
@pytest.mark.parametrize("tau", [0, 1, 3])
def test_a_constant_tau_is_bitwise_the_products_conadv(tau, random_start, micro_batch, tmp_path):
    """Weights, statistics of both branches and their counters, from the product's own loop and checkpoint."""
    asked = config(staleness=tau, random_start=random_start, micro_batch=micro_batch, bias_lr_factor=4.0)
    folder = loop.train(asked, tmp_path / "run", progress="none")
    expected = folder.load_checkpoint()[1]["model"]
    parts = build(resolved(asked.replace(probe_every=5)))  # probing must leave no trace either
    found = train(parts, np.full((STEPS, 1), tau))
    assert len(found.rows) == 3 * 3
    state = parts.model.state_dict()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(value, state[name]), name


def test_figures_of_a_run_are_the_products(tmp_path):
    asked = config(staleness=1, ema=0.7, precision="bfloat16")
    result = loop.train(asked, tmp_path / "run", progress="none").result()
    parts = build(resolved(asked))
    found = measured(parts, train(parts, np.ones((STEPS, 1))).model, 0)
    assert found == {name: result[name] for name in ("test_accuracy", "train_test_gap", "train_loss")}


def stream(micro_batch: int) -> Stream:
    return Stream(image_set(50), seed=5, batch=16, steps=STEPS, micro_batch=micro_batch)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=1e-3)


def literal(taus: np.ndarray, micro_batch: int, attack) -> nn.Module:
    """A copy of the whole model for every step, put away; the attack is the product's, tested by itself."""
    steps, model = stream(micro_batch), mixture_batch_norm(small_cnn())
    optimizer, copies = optimizer_of(model), []
    for t in range(STEPS):
        copies.append(copy.deepcopy(model))
        batches = list(steps.step(t).batches())
        with one_update(model):
            for group, batch in enumerate(batches):
                old = copy.deepcopy(copies[max(0, t - taus[t, group % taus.shape[1]])])
                images = attack.apply(batch, attack.perturb(old, batch, CRITERION))
                (CRITERION(model(batch.images), batch.labels) * (0.5 * batch.share)).backward()
                with branch_of(model, "adversarial"):
                    (CRITERION(model(images), batch.labels) * (0.5 * batch.share)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def stale(taus: np.ndarray, micro_batch: int, attack) -> nn.Module:
    steps, model = stream(micro_batch), mixture_batch_norm(small_cnn())
    optimizer, method = optimizer_of(model), SnapshotConAdv(attack, taus, (0.5, 0.5))
    for number in range(STEPS):
        method.backward(model, steps.step(number), CRITERION)
        assert len(method._states) <= method.kept + 1
        optimizer.step()
        optimizer.zero_grad()
    return model


DRAWS = [
    (Draw("geometric", 2.0, workers=4), 4),
    (Draw("poisson", 3.0, workers=2), 4),
    (Draw("per-worker", of_workers=(0, 1, 5)), 4),
    (Draw("trace", trace=np.arange(STEPS) % 4), 16),
    (Draw("trace", trace=np.full((STEPS, 2), 1000)), 8),
]


@pytest.mark.parametrize(("draw", "micro_batch"), DRAWS, ids=lambda value: getattr(value, "kind", None))
@pytest.mark.parametrize("attack", [SignAttack(EPSILON), PGDAttack(EPSILON, EPSILON / 2, steps=2)])
def test_drawn_tau_equals_its_literal_rendering(draw, micro_batch, attack):
    taus = draw.array(STEPS, seed=0)
    expected, found = literal(taus, micro_batch, attack), stale(taus, micro_batch, attack)
    for name, value in expected.state_dict().items():
        assert torch.equal(value, found.state_dict()[name]), name


def test_whose_tau_it_is_makes_a_difference():
    """The oracle test could not fail if it did not matter which group has which τ."""
    one, other = (stale(np.tile(taus, (STEPS, 1)), 4, SignAttack(EPSILON)) for taus in ([0, 3], [3, 0]))
    assert not torch.equal(one[0].weight, other[0].weight)


def probed(method, attack, each_step):
    """Train by ``method``; ``each_step`` sees every step before it is taken."""
    steps, model = stream(8), mixture_batch_norm(small_cnn())
    optimizer = optimizer_of(model)
    for number in range(STEPS):
        step = steps.step(number, method.lookahead)
        each_step(model, step)
        method.backward(model, step, CRITERION)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("tau", [1, 4])
def test_sign_agreement_is_what_the_products_probe_says(tau):
    attack = SignAttack(EPSILON, random_start=False)
    product, ours = ConAdv(attack, tau), SnapshotConAdv(attack, np.full((STEPS, 1), tau))
    wanted, found = [], []
    probed(product, attack, lambda m, step: wanted.append(product.sign_agreement(m, step, CRITERION)))
    probed(ours, attack, lambda m, step: found.append(probe(ours, m, step, CRITERION, [0.2] * step.number)))
    assert [rows[0]["sign_agreement"] for rows in found[tau:]] == pytest.approx(wanted[tau:])
    assert min(wanted[tau:]) < 0.95


def test_distance_and_gain_against_stored_copies():
    attack = SignAttack(EPSILON)
    ours = SnapshotConAdv(attack, np.tile([0, 2], (STEPS, 1)))
    copies: list[nn.Module] = []
    gained: list[bool] = []

    def compare(model, step):
        copies.append(copy.deepcopy(model).eval())
        lrs = [0.1 * (number + 1) for number in range(step.number)]
        fresh, two_old = probe(ours, model, step, CRITERION, lrs)
        assert (fresh["sign_agreement"], fresh["distance"]) == (1, 0)
        assert fresh["gain_ratio"] in (1, pytest.approx(math.nan, nan_ok=True))
        lag = min(2, step.number)
        now, then = copies[-1], copies[-1 - lag]
        assert two_old["effective_tau"] == lag
        assert two_old["tau_lr"] == pytest.approx(sum(lrs[len(lrs) - lag :]))
        weights = [nn.utils.parameters_to_vector(m.parameters()) for m in (now, then)]
        assert two_old["distance"] == pytest.approx((weights[0] - weights[1]).norm().item(), rel=1e-4)
        batch = list(step.batches())[1]
        with branch_of(now, "adversarial", "batch" if step.number < 10 else "running"):
            clean, moved, straight = (
                CRITERION(now(images), batch.labels).item()
                for images in (
                    batch.images,
                    *(attack.apply(batch, attack.perturb(m, batch, CRITERION)) for m in (then, now)),
                )
            )
        ratio = (moved - clean) / (straight - clean) if straight > clean else math.nan
        assert two_old["gain_ratio"] == pytest.approx(ratio, rel=1e-4, nan_ok=True)
        gained.append(straight > clean)

    probed(ours, attack, compare)
    assert sum(gained) > STEPS / 2


def test_a_study_is_a_tidy_frame_with_phases_and_both_axes():
    asked = config(probe_every=1, global_batch=16, micro_batch=8, lr=0.1)
    frame = study(asked, [Draw("constant", 2, workers=2), Draw("per-worker", of_workers=(0, 3))],
                           seeds=2, curvature_images=16, problem="digits")  # fmt: skip
    assert frame.groupby(["draw", "seed"]).ngroups == 4
    probes = frame[frame["phase"] != "whole"]
    assert (
        probes.groupby(["draw", "seed", "step", "worker", "measure"]).ngroups == len(probes) == 4 * STEPS * 6
    )
    phases = probes.groupby("phase")["step"].agg(["min", "max"])
    assert phases.loc[["warm-up", "early", "late"]].to_numpy().tolist() == [[0, 3], [4, 8], [9, 13]]
    at_3 = probes[(probes["draw"] == "constant") & (probes["step"] == 3) & (probes["measure"] == "distance")]
    assert (at_3["effective_tau"] == 2).all()
    assert at_3["tau_lr"].tolist() == pytest.approx([0.1 * (2 + 3) / 4] * 4)
    whole = frame[frame["phase"] == "whole"].set_index(["draw", "seed", "measure"])
    assert whole.loc["constant", 0]["effective_tau"].unique() == pytest.approx([(0 + 1 + 2 * 12) / STEPS])
    lrs = asked_lrs(asked)
    spans = [sum(lrs[max(0, t - 2) : t]) for t in range(STEPS)]
    assert whole.loc["constant", 0]["tau_lr"].unique() == pytest.approx([sum(spans) / STEPS])
    for seed in (0, 1):
        value = whole.loc["constant", seed]["value"]
        assert set(value.index) == {
            "test_accuracy", "train_test_gap", "train_loss", "top_eigenvalue", "lr_times_eigenvalue",
        }  # fmt: skip
        assert value["lr_times_eigenvalue"] == pytest.approx(0.1 * value["top_eigenvalue"])


def asked_lrs(asked: Config) -> list[float]:
    schedule = build(resolved(asked)).schedule
    return [schedule(number) for number in range(STEPS)]


def test_a_run_that_diverges_is_a_row():
    frame = study(config(lr=1e30, warmup_steps=0), [Draw("constant", 1)])
    assert frame["measure"].tolist() == ["diverged_at"]
    assert 1 <= frame["value"].item() < STEPS
    print_table(frame)


def quadratic(solver: str) -> pd.DataFrame:
    from conadv_lab.staleness.dynamics.on_quadratic import study

    asked = QuadraticOptions(taus=(0, 4, 16), steps=400, replicas=32, seeds=2, solver=solver)
    return study(asked.draws(), asked)


def test_on_the_quadratic_problem_an_attack_loses_worth_with_staleness():
    frame = quadratic("exact")
    late = frame[frame["phase"] == "late"].pivot_table("value", "tau", "measure")
    assert late.loc[0].tolist() == [0, 1, 1]  # distance, gain ratio, sign agreement
    for measure, sense in (("distance", 1), ("gain_ratio", -1), ("sign_agreement", -1)):
        assert (sense * np.diff(late[measure]) > 0).all()
    whole = frame[frame["phase"] == "whole"].pivot_table("value", "tau", "measure")
    assert (whole["top_eigenvalue"] <= 1.2 + 1e-9).all()  # L_F of the problem


def test_on_the_quadratic_problem_sign_steps_miss_the_maximum():
    """Near the optimum a step to the rim of the box overshoots: it lowers the loss that it should raise."""
    frame = quadratic("sign")
    gains = frame[(frame["phase"] == "late") & (frame["measure"] == "gain_ratio")]
    assert gains["value"].isna().all()
    whole = frame[frame["phase"] == "whole"].pivot_table("value", "tau", "measure")
    assert whole.loc[16, "squared_gradient"] > 20 * whole.loc[0, "squared_gradient"]


SHORT = ["digits-conadv", "--train-images", "100", "--global-batch", "32", "--steps", "6"]
SHORT += ["--warmup-epochs", "0", "--curvature-images", "0"]


def test_the_command_prints_writes_and_draws(tmp_path, capsys):
    np.save(tmp_path / "trace.npy", np.array([[0, 1]] * 8))
    out = {kind: tmp_path / f"out.{kind}" for kind in ("json", "csv", "png")}
    files = ["--json", str(out["json"]), "--csv", str(out["csv"]), "--figure", str(out["png"])]
    words = [
        *SHORT,
        "--trace",
        str(tmp_path / "trace.npy"),
        "--probe-every",
        "2",
        "--seeds",
        "2",
        "--seed",
        "7",
    ]
    assert command.main([*words, *files]) == 0
    printed = capsys.readouterr().out
    assert "test_accuracy" in printed
    assert "sign_agreement" in printed
    found = json.loads(out["json"].read_text())["rows"]
    assert tuple(found[0]) == COLUMNS
    assert {row["seed"] for row in found} == {7, 8}
    assert {row["worker"] for row in found} == {0, 1, None}
    assert {row["draw"] for row in found} == {"trace"}
    assert len(pd.read_csv(out["csv"])) == len(found)
    assert out["png"].stat().st_size > 10_000


def test_the_command_studies_the_quadratic_problem(tmp_path, capsys):
    words = ["quadratic", "--draw", "geometric", "--taus", "0", "4", "--steps", "60", "--replicas", "4"]
    assert command.main([*words, "--figure", str(tmp_path / "q.svg"), "--stale-workers", "2"]) == 0
    assert "squared_gradient" in capsys.readouterr().out
    assert (tmp_path / "q.svg").exists()


def test_figures_draw_the_means():
    from matplotlib.figure import Figure

    rows = [
        {"draw": "constant", "tau": tau, "seed": seed, "phase": "whole", "effective_tau": tau,
         "tau_lr": tau / 10, "measure": "test_accuracy", "value": 90.0 + tau + seed}
        for tau in (0, 4) for seed in (0, 2)
    ]  # fmt: skip
    rows += [
        row | {"phase": phase, "measure": "sign_agreement", "value": 0.5 + row["seed"] / 10}
        for row in rows for phase in ("early", "late")
    ]  # fmt: skip
    frame = pd.DataFrame(rows)
    axes = dynamics_figures.figure_of_runs(frame, "test_accuracy", "tau_lr", ax=Figure().add_subplot())
    assert axes.lines[0].get_xdata().tolist() == [0, 0.4]
    assert axes.lines[0].get_ydata().tolist() == [91, 95]
    axes = dynamics_figures.figure_of_probes(frame, "sign_agreement", ax=Figure().add_subplot())
    assert axes.lines[0].get_ydata() == pytest.approx([60, 60])
    axes = dynamics_figures.figure_of_probes(frame, "sign_agreement", "tau_lr", ax=Figure().add_subplot())
    assert axes.lines[0].get_xdata().tolist() == [0.4, 0.4]  # what has no effect is left out
    with pytest.raises(ValueError, match=r"unknown measure 'sign_agrement'.*Did you mean 'sign_agreement'"):
        dynamics_figures.figure_of_probes(frame, "sign_agrement")
    with pytest.raises(ValueError, match="unknown axis 'taus'"):
        dynamics_figures.figure_of_runs(frame, "test_accuracy", "taus")


MISTAKES = {
    "unknown recipe": (["digits-conav"], "unknown recipe 'digits-conav'"),
    "another method": ([*SHORT, "--method", "vanilla"], "method is 'vanilla'; allowed: conadv"),
    "clean start": ([*SHORT, "--first", "clean"], "first is 'clean'; allowed: 'initial'"),
    "compiled": ([*SHORT, "--compile"], "compile is True; allowed: False"),
    "negative": ([*SHORT, "--taus", "-1"], "tau is -1.0; allowed: a whole number of at least 0"),
    "a recipe's staleness": ([*SHORT, "--staleness", "0,1"], "unknown option --staleness of dynamics; use --taus"),
    "half a step": ([*SHORT, "--draw", "per-worker", "--taus", "0", "0.5"], "the workers' taus is (0.0, 0.5)"),
    "seeds": ([*SHORT, "--seeds", "0"], "seeds is 0"),
    "workers": ([*SHORT, "--stale-workers", "0"], "workers is 0"),
    "more workers than groups": (
        [*SHORT, "--micro-batch", "16", "--stale-workers", "3"], "workers is 3; allowed: 1 to 2, the micro-b"
    ),
    "workers of a trace": ([*SHORT, "--trace", "short.csv", "--stale-workers", "2"], "stale-workers is 2; allowed: 1"),
    "workers of their own": (
        [*SHORT, "--draw", "per-worker", "--taus", "0", "1", "--stale-workers", "3"], "stale-workers is 3; allowed: 2"
    ),
    "no such trace": ([*SHORT, "--trace", "nowhere.csv"], "nowhere.csv is not a file"),
    "gaps": ([*SHORT, "--trace", "gaps.csv"], "gaps.csv: the trace has no number at step 1, worker 0"),
    "below 0": ([*SHORT, "--trace", "below.csv"], "below.csv: the trace has a negative number at step 1, worker 0"),
    "too short": ([*SHORT, "--trace", "short.csv"], "number of steps is 2; allowed: at least 6, the steps of the run"),
    "too short for the quadratic": (["quadratic", "--trace", "short.csv"], "number of steps is 2; allowed: at least"),
    "curvature": ([*SHORT, "--curvature-images", "-1"], "curvature_images is -1"),
    "a field of the config": ([*SHORT, "--epsilon", "8"], "epsilon is 8.0; allowed: 0 to 1"),
    "lr of the quadratic": (["quadratic", "--lr", "0"], "lr is 0.0; allowed: a number above 0"),
    "steps of the quadratic": (["quadratic", "--steps", "0"], "steps is 0"),
    "noise of the quadratic": (["quadratic", "--noise", "-1"], "noise is -1.0"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_exits_2_with_a_sentence_and_writes_nothing(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    traces = {"gaps.csv": "0\n\n1\n", "below.csv": "0\n-2\n", "short.csv": "0\n1\n"}
    for file, text in traces.items():
        (tmp_path / file).write_text(text)
    words, message = MISTAKES[name]
    assert command.main([*words, "--json", "out.json"]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == set(traces)


def test_an_unknown_option_exits_2(capsys):
    assert command.main(["digits-conadv", "--tauz", "1"]) == 2
    assert (
        "unknown option --tauz; allowed: options listed by --help. Did you mean --taus?"
        in capsys.readouterr().err
    )


def test_a_step_with_fewer_groups_than_workers_is_told():
    with pytest.raises(ValueError, match="workers is 3; allowed: 1 to 2, the groups of a step"):
        stale(np.zeros((STEPS, 3)), 8, SignAttack(EPSILON))
    with pytest.raises(ValueError, match="number of steps is 5; allowed: above 5"):
        stale(np.zeros((5, 1)), 8, SignAttack(EPSILON))
