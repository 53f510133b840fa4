"""Figures: every method can be told from every other, on a screen, by the colour-blind and in print."""

from itertools import combinations

import pandas as pd
from matplotlib.colors import to_rgb, to_rgba
from matplotlib.figure import Figure

from conadv_lab.methods import METHODS
from conadv_lab.plots import curves, figure_against_batch, look_of, points


def brightness(colour: str) -> float:
    red, green, blue = to_rgb(colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_no_two_methods_look_alike():
    looks = {name: look_of(name) for name in METHODS}
    for (one, a), (other, b) in combinations(looks.items(), 2):
        marks = a["marker"] != b["marker"] or a["fillstyle"] != b["fillstyle"]
        assert marks or abs(brightness(a["color"]) - brightness(b["color"])) > 0.15, (one, other)


def frame(kinds: list[str]) -> pd.DataFrame:
    rows = [(kind, batch, seed, batch + seed) for kind in kinds for batch in (8, 64) for seed in (0, 1)]
    return pd.DataFrame(rows, columns=["method", "global_batch", "seed", "loss"])


def test_methods_keep_their_colours_in_every_kind_of_figure():
    rows = frame(["conadv", "vanilla", "recycled-equal"])
    for draw in (curves, points):
        axes = Figure().add_subplot()
        draw(rows, "global_batch", "loss", "batch (images)", "loss", hue="method", ax=axes)
        shown = {line.get_label(): to_rgba(line.get_color()) for line in axes.get_legend().get_lines()}
        labels = [text.get_text() for text in axes.get_legend().get_texts()]
        assert labels == ["conadv", "vanilla", "recycled-equal"]
        assert set(shown.values()) == {to_rgba(look_of(name)["color"]) for name in labels}


def test_more_kinds_than_markers_are_drawn():
    axes = Figure().add_subplot()
    curves(
        frame([f"run {n}" for n in range(12)]), "global_batch", "loss", "batch", "loss", hue="method", ax=axes
    )
    assert len(axes.get_legend().get_texts()) == 12


def test_a_label_is_not_wider_than_its_axis():
    rows = (
        frame(["conadv"])
        .groupby(["method", "global_batch"], as_index=False)
        .agg(loss_mean=("loss", "mean"), loss_std=("loss", "std"), seeds=("seed", "nunique"))
    )
    figure = Figure(figsize=(4.6, 3.3), layout="constrained")
    axes = figure_against_batch(rows, "loss", "test accuracy (%)", ax=figure.add_subplot())
    figure.canvas.draw()
    label = axes.xaxis.label.get_window_extent()
    assert label.x0 >= 0
    assert label.x1 <= figure.bbox.x1
