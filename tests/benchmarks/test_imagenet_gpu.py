"""The GPU benchmark in tiny form on a CPU, and its arithmetic on known times."""

import json
import subprocess
import sys
from argparse import Namespace

import pytest
import torch

from benchmarks import imagenet_gpu
from benchmarks.gpu_report import Measured, images_per_second, rows_of, tables
from benchmarks.harness import Times

SECONDS = {
    "vanilla": [0.01, 0.01],
    "plain a": [0.02, 0.02],
    "plain b": [0.008, 0.005],
    "disadv": [0.03, 0.03],
}
TINY = "--device cpu --model resnet20 --pixels 8 --batches 4 --rounds 2 --repeats 1 --no-compile"
TINY += " --methods disadv conadv"


def test_one_command_in_tiny_form(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(imagenet_gpu, "WARM", 1)
    file = tmp_path / "figures.json"
    imagenet_gpu.main([*TINY.split(), "--json", str(file)])
    rows = {row["name"]: row for row in json.loads(file.read_text())["rows"]}
    assert list(rows) == [
        "rate of vanilla, 4 images", "rate of plain resnet20 of this package, 4 images",
        "vanilla, 4 images", "disadv, 4 images", "conadv, 4 images", "disadv / conadv, 4 images",
        "plain loop, 4 images",
    ]  # fmt: skip
    assert rows["conadv, 4 images"]["peer"] == "vanilla"
    assert "ms a step" in capsys.readouterr().out


def test_a_run_that_is_cut_short_keeps_what_it_has(tmp_path, monkeypatch, capsys):
    original = imagenet_gpu.steps_at

    def cut(batch, *rest):
        if batch == 2:
            raise KeyboardInterrupt
        return original(batch, *rest)

    monkeypatch.setattr(imagenet_gpu, "WARM", 1)
    monkeypatch.setattr(imagenet_gpu, "steps_at", cut)
    file = tmp_path / "figures.json"
    words = [*TINY.split(), "--no-rates", "--batches", "4", "2", "--json", str(file)]
    with pytest.raises(KeyboardInterrupt):
        imagenet_gpu.main(words)
    assert "vanilla, 4 images" in [row["name"] for row in json.loads(file.read_text())["rows"]]
    assert "ms a step" in capsys.readouterr().out


BARE = """
import sys
sys.modules.update(dict.fromkeys({missing}))
from benchmarks import imagenet_gpu
imagenet_gpu.WARM = 1
imagenet_gpu.main({words})
"""


@pytest.mark.slow
def test_torch_and_numpy_are_enough():
    missing = [
        "tqdm",
        "tyro",
        "submitit",
        "pyhessian",
        "safetensors",
        "pandas",
        "scipy",
        "sklearn",
        "PIL",
        "timm",
    ]
    code = BARE.format(missing=missing, words=[*TINY.split(), "--threads", "1", "--no-rates"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_batch_is_begun_after_the_last_minute(monkeypatch, capsys):
    monkeypatch.setattr(imagenet_gpu, "WARM", 1)
    imagenet_gpu.main([*TINY.split(), "--no-rates", "--minutes", "0"])
    assert "4 images: not measured, as 0 minutes would be over" in capsys.readouterr().err


def test_rates_are_compared_with_the_fastest_plain_loop():
    times = Times({name: seconds for name, seconds in SECONDS.items() if name != "disadv"})
    rows = {row.name: row for row in images_per_second(times, 10, own=["vanilla"])}
    assert rows["rate of vanilla, 10 images"].value == pytest.approx(1000)
    assert {row.peer for row in rows.values()} == {"plain b"}
    assert rows["rate of vanilla, 10 images"].ratio == pytest.approx((0.8 + 0.5) / 2)
    assert rows["rate of plain b, 10 images"].ratio == 1


def test_the_share_counts_the_methods_own_arithmetic():
    one = Measured.of("disadv", 256, Times(SECONDS), 1.5, evaluations=8 / 3, gflop=24.5, peak=989.0)
    assert one.share == pytest.approx(100 * 24.5e9 * 256 * 8 / 3 / 0.03 / 989e12)
    assert (one.ms, one.ratio, one.over_disadv) == pytest.approx((30.0, 3.0, 1.0))
    assert [row.unit for row in rows_of([one])] == ["ms", "GiB", "%"]
    unknown = Measured.of(
        "conadv serial", 4, Times(SECONDS | {"conadv serial": [0.02] * 2}), None, 8 / 3, 24.5, None
    )
    assert unknown.share is None
    assert [(row.unit, row.ratio) for row in rows_of([unknown])] == [("ms", 2.0), ("1", None)]
    assert rows_of([unknown])[1].value == pytest.approx(1.5)
    assert tables([one]).count("–") == 0
    assert tables([one, unknown]).splitlines()[0].split() == ["ms", "a", "step", "256", "4"]


def test_a_gpu_has_every_step_captured_too():
    asked = Namespace(methods=["disadv", "conadv"], compile_steps=None)
    plain = ["vanilla", "disadv", "conadv"]
    assert list(imagenet_gpu.kinds(asked, on_gpu=False)) == plain
    assert list(imagenet_gpu.kinds(asked, on_gpu=True)) == [
        *plain, *(f"{name}, captured" for name in plain), "disadv, captured, serial", "conadv, captured, serial",
    ]  # fmt: skip
    asked.compile_steps = "reduce-overhead"  # CUDA graphs of torch's own
    assert list(imagenet_gpu.kinds(asked, on_gpu=True)) == plain


def test_captured_steps_are_compared_with_captured_ones():
    names = ["vanilla", "disadv", "disadv, captured", "conadv, captured", "conadv, captured, serial"]
    times = Times({name: [0.01 * (5 - i)] * 2 for i, name in enumerate(names)})
    over = [Measured.of(name, 4, times, None, 1.0, None, None).over_disadv for name in names[1:]]
    assert over == pytest.approx([1, 1, 1.5, 3])


def test_a_peer_is_normalised_as_ours_is(monkeypatch):
    seen = []
    peer = imagenet_gpu.Peer(torch.nn.Identity())
    seen.append(peer(torch.tensor(imagenet_gpu.IMAGENET_MEAN).view(1, 3, 1, 1)))
    torch.testing.assert_close(seen[0], torch.zeros(1, 3, 1, 1))
    monkeypatch.setattr(imagenet_gpu, "PEERS", {"no_such_package": None})
    assert list(imagenet_gpu.peers("resnet50")) == ["plain resnet50 of this package"]
