"Views: a picture first, sliders where there are widgets."

import base64
import sys

import matplotlib.pyplot as plt
import pytest

from cpsample.workshop.views import as_bundle, as_png, start_values

CONTROLS = {"a": (0.0, 1.0, 0.1, 0.5), "n": (1, 9, 2, 3), "kind": ["x", "y"]}
WIDGETS = ("IntSlider", "FloatSlider", "SelectionSlider", "Image")


@pytest.fixture(autouse=True)
def no_figures():
    plt.close("all")


class Recorder:
    "A `draw` that notes what it was asked for."

    def __init__(self):
        self.asked = []

    def __call__(self, **values):
        self.asked.append(values)
        fig, ax = plt.subplots(figsize=(1, 1))
        ax.plot([0, values["a"]])
        return fig


@pytest.fixture
def made_widgets(monkeypatch):
    "The widgets that are made, in order."
    ipywidgets = pytest.importorskip("ipywidgets")
    widgets = []

    def noted(kind):
        def make(*args, **options):
            widgets.append(kind(*args, **options))
            return widgets[-1]

        return make

    for name in WIDGETS:
        monkeypatch.setattr(ipywidgets, name, noted(getattr(ipywidgets, name)))
    return widgets


def test_without_widgets_there_is_the_picture_at_the_start_values(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    draw = Recorder()
    bundle = as_bundle(draw, CONTROLS)
    assert set(bundle) == {"image/png", "text/plain"}
    assert base64.b64decode(bundle["image/png"]).startswith(b"\x89PNG")
    assert draw.asked == [{"a": 0.5, "n": 3, "kind": "x"}]
    assert plt.get_fignums() == []


def test_with_widgets_a_moved_slider_draws_a_new_picture(made_widgets):
    draw = Recorder()
    bundle = as_bundle(draw, CONTROLS)
    assert {"image/png", "application/vnd.jupyter.widget-view+json"} <= set(bundle)
    kinds = [type(widget).__name__ for widget in made_widgets]
    assert kinds == ["FloatSlider", "IntSlider", "SelectionSlider", "Image"]

    slider, picture = made_widgets[0], made_widgets[-1]
    before = picture.value
    slider.value = 1.0
    assert draw.asked[-1] == {"a": 1.0, "n": 3, "kind": "x"}
    assert picture.value != before
    assert plt.get_fignums() == []


@pytest.mark.parametrize("control", [(0, 1, 2), (0, 1, 1, 5), [], "abc", 3])
def test_a_control_must_be_a_range_with_a_start_or_a_list(control):
    with pytest.raises(ValueError, match="control s must be"):
        start_values({"s": control})


def test_as_png_closes_the_figure():
    assert as_png(plt.figure(figsize=(1, 1))).startswith(b"\x89PNG")
    assert plt.get_fignums() == []
