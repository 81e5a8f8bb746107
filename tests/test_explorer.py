"Views: a picture first, sliders where there are widgets."

import base64
import sys

import matplotlib.pyplot as plt
import pytest

from cpsample.workshop.views import as_bundle, as_png, start_values

CONTROLS = dict(a=(0.0, 1.0, 0.1, 0.5), n=(1, 9, 2, 3), kind=["x", "y"])


@pytest.fixture(autouse=True)
def no_figures():
    plt.close("all")


def recorder():
    drawn = []

    def draw(**values):
        drawn.append(values)
        fig, ax = plt.subplots(figsize=(1, 1))
        ax.plot([0, values["a"]])
        return fig

    return drawn, draw


def test_without_widgets_there_is_the_picture_at_the_start_values(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    drawn, draw = recorder()
    bundle = as_bundle(draw, CONTROLS)
    assert set(bundle) == {"image/png", "text/plain"} and base64.b64decode(
        bundle["image/png"]
    ).startswith(b"\x89PNG")
    assert drawn == [{"a": 0.5, "n": 3, "kind": "x"}] and plt.get_fignums() == []


def test_with_widgets_a_moved_slider_draws_a_new_picture(monkeypatch):
    w = pytest.importorskip("ipywidgets")
    made = []
    for name in ("IntSlider", "FloatSlider", "SelectionSlider", "Image"):
        kind = getattr(w, name)
        monkeypatch.setattr(
            w, name, lambda *args, kind=kind, **kw: made.append(kind(*args, **kw)) or made[-1]
        )
    drawn, draw = recorder()
    bundle = as_bundle(draw, CONTROLS)
    assert {"image/png", "application/vnd.jupyter.widget-view+json"} <= set(bundle)
    assert [type(m).__name__ for m in made] == [
        "FloatSlider",
        "IntSlider",
        "SelectionSlider",
        "Image",
    ]
    before = made[-1].value
    made[0].value = 1.0
    assert (
        drawn[-1] == {"a": 1.0, "n": 3, "kind": "x"}
        and made[-1].value != before
        and plt.get_fignums() == []
    )


@pytest.mark.parametrize("control", [(0, 1, 2), (0, 1, 1, 5), [], "abc", 3])
def test_a_control_must_be_a_range_with_a_start_or_a_list(control):
    with pytest.raises(ValueError, match="control s must be"):
        start_values({"s": control})


def test_as_png_closes_the_figure():
    assert as_png(plt.figure(figsize=(1, 1))).startswith(b"\x89PNG") and plt.get_fignums() == []
