"""An evaluation is shared by the ranks that train, gives each the figures of one rank, and runs in their precision."""

import json
import sys

import pytest
import torch

from conadv_lab.training import build as building
from conadv_lab.training import evaluate as evaluating
from conadv_lab.training.build import build
from conadv_lab.training.distributed import ALONE
from conadv_lab.training.evaluate import calibrated_copy, evaluate
from tests.training import two_ranks, world


@pytest.fixture(scope="module")
def judged(tmp_path_factory) -> list[dict]:
    """What each of two ranks found, and one alone."""
    folder = tmp_path_factory.mktemp("judged")
    ranks = world.World(world.processes([sys.executable, "-m", "tests.training.two_ranks", str(folder)], 2))
    before = building.EVALUATION_BATCH
    try:
        alone = json.loads(json.dumps(two_ranks.judged(ALONE)))
    finally:
        building.EVALUATION_BATCH = evaluating.EVALUATION_BATCH = before
    assert ranks.wait() == [0, 0]
    return [json.loads((folder / f"judged-{rank}.json").read_text()) for rank in (0, 1)] + [alone]


@pytest.mark.slow
def test_over_ranks_figures_and_statistics_are_those_of_one_rank_bit_for_bit(judged):
    for one in judged[:2]:
        assert one["statistics"] == judged[2]["statistics"]
        assert one["figures"] == judged[2]["figures"]
    assert len(judged[2]["figures"]) == 7


@pytest.mark.slow
def test_each_rank_takes_its_share_of_the_images(judged):
    """Of 9 groups one rank has 5 and the other 4, and nobody looks at an image that another one has."""
    (first, *_), (second, *_), (alone, *_) = (one["images"] for one in judged)
    assert first + second == alone == 898
    assert abs(first - second) <= two_ranks.GROUP
    first, second, alone = (one["images"][1] for one in judged)
    assert first + second == alone
    assert first < 0.6 * alone


def test_an_evaluation_runs_in_the_precision_of_the_run():
    parts = build(two_ranks.config().replace(precision="bfloat16", bn_recalibrate=100, pgd_images=4))
    seen = []
    parts.model[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    judged = calibrated_copy(parts, parts.model)
    assert set(seen) == {torch.bfloat16}
    half = evaluate(parts, judged)
    assert set(seen) == {torch.bfloat16}
    parts.config = two_ranks.config()
    whole = evaluate(parts, judged)
    assert seen[-1] == torch.float32
    assert abs(half["test_loss"] - whole["test_loss"]) < 0.01
