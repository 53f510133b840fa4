"""The table of what the sharpness tool measures says what it does, and what it calls exact is exact."""

import re

import pytest
import torch

from docs import models
from tests.conftest import rest_slow
from tests.sharpness.oracle import difference_hessian


def test_the_table_is_in_step_with_what_is_done():
    assert models.main(["--check"]) == 0


def test_a_stale_table_is_found_and_written_anew(tmp_path, monkeypatch):
    page = tmp_path / "faq.md"
    monkeypatch.setattr(models, "PAGE", page)
    monkeypatch.setattr(models, "KINDS", {"Tied weights": models.KINDS["Tied weights"]})
    page.write_text("before\n\n<!-- models -->\n\nold\n\n<!-- end of models -->\n\nafter\n")
    assert models.main(["--check"]) == 1
    assert models.main([]) == 0
    assert models.main(["--check"]) == 0
    assert re.search(r"before.*\| Tied weights \| estimated \|.*after", page.read_text(), re.DOTALL)


@pytest.mark.parametrize(
    "name", rest_slow(models.KINDS, *(kind for kind in models.KINDS if "compile" not in kind))
)
def test_a_number_is_that_of_differences_and_a_refusal_one_sentence(name):
    make, criterion, batches, options = models.KINDS[name]
    found = models.measured(name)
    if isinstance(found, str):
        assert "\n" not in found
        return
    if options.get("bn") == "train":
        return  # the differences are in evaluation mode; dense Hessians in train mode are compared elsewhere
    pairs = [batches] if isinstance(batches, tuple) else batches
    x, y = (torch.cat(part) for part in zip(*pairs, strict=True))
    torch.manual_seed(0)
    truth = float(difference_hessian(make(), criterion, x, y).trace())
    assert abs(found.value - truth) <= 2 * found.error + 1e-7 * abs(truth)
    assert found.error <= (1e-9 if models.row(name)[1] == "exact" else 0.02) * abs(truth)
