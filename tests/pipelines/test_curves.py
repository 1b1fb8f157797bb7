"""Lines with their intervals: the names in the legend, and the ticks."""

from embedcache.metrics.intervals import Estimate
from embedcache.reports.base import svg
from pipelines.curves import Curves, estimate_curves


def test_legend_names_a_line_that_begins_with_an_underscore() -> None:
    curves = Curves(["1"], {"_run": [Estimate(0.5, 0.4, 0.6)]})
    assert "<!--  _run -->" in svg(estimate_curves({"": curves}, x="", y=""))


def test_ticks_of_curves_say_tenths_of_percents_where_they_are_some() -> None:
    lines = {"a": [Estimate(value, value, value) for value in (-0.025, 0.125)]}
    for is_gain, expected in ((True, {"-0.025", "+0.025", "0", "+0.05"}), (False, {"2.5%", "0%", "5%"})):
        figure = estimate_curves({"": Curves(["1", "2"], lines)}, x="", y="", is_gain=is_gain)
        axes = figure.axes[0]
        axes.set_yticks([-0.025, 0.0, 0.025, 0.05])
        figure.canvas.draw()
        assert expected <= {label.get_text() for label in axes.get_yticklabels()}
