"""Line plots: well-formed, only of what can be drawn, the same every time."""

import math
from xml.etree import ElementTree

import pytest

from qjax.plots import line_plot, save_plot

WORDS = {"title": "Error", "x_label": "iteration", "y_label": "relative"}
POINTS = ([0, 1, 2, 3, math.inf], [1.0, math.nan, 0.0, 4.0, 2.0])


def texts(document):
    return {"".join(node.itertext()).strip() for node in ElementTree.fromstring(document).iter()}


def test_a_plot_says_what_it_shows_whatever_the_names():
    names = ("a < b & c", '"quoted"')
    found = texts(line_plot({name: ([0, 1], [1.0, 2.0]) for name in names}, **WORDS))
    assert set(names) | {"Error", "iteration", "relative"} <= found
    assert "only" not in texts(line_plot({"only": ([0, 1], [1.0, 2.0])}, **WORDS))


@pytest.mark.parametrize(
    ("axes", "kept"),
    [
        ({}, ([0, 2, 3], [1.0, 0.0, 4.0])),
        ({"log_y": True}, ([0, 3], [1.0, 4.0])),
        ({"log_x": True, "log_y": True}, ([3], [4.0])),
    ],
)
def test_points_that_cannot_be_drawn_are_left_out(axes, kept):
    assert line_plot({"a": POINTS}, **WORDS, **axes) == line_plot({"a": kept}, **WORDS, **axes)


def test_nothing_to_draw_is_refused():
    with pytest.raises(ValueError, match="at least one point that can be drawn; 'Error' has none"):
        line_plot({"a": ([0], [math.nan]), "b": ([], [])}, **WORDS)


def test_a_plot_is_saved_as_it_is(tmp_path):
    document = line_plot({"a": POINTS}, **WORDS)
    save_plot(tmp_path / "a.svg", document)
    assert (tmp_path / "a.svg").read_text() == document
