"""Figures: what is drawn is what was measured, legible and apart."""

import io

import matplotlib.image
import numpy as np
import pytest

from lcm.report import plots, runs

from .workdirs import make


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return runs.read_all(
        [
            make(folder / "rope", climb=3.0, steps=200),
            make(folder / "$alibi_", encoding="alibi", steps=200),
        ]
    )


def test_loss_by_position_draws_the_curve_and_its_band(both):
    (ax,) = plots.loss_by_position(both, "nats per byte").axes
    curve = both[0].evaluation["lengths"][-1]["curve"]
    x, y = ax.lines[0].get_data()
    assert y.tolist() == curve["value"][-len(y) :]
    assert x[-1] < 512 and x[0] < 9
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert min(curve["low"][-len(y) :]) == pytest.approx(band.min())
    assert [line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == "--"] == [64]
    assert ax.get_ylabel() == "loss (nats per byte)"
    assert "position" in ax.get_xlabel()


def test_length_curve_has_error_bars_on_a_log2_axis(both):
    (ax,) = plots.length_curve(both, "nats per byte").axes
    assert ax.get_xscale() == "log" and ax.xaxis.get_transform().base == 2
    assert [t.get_text() for t in ax.get_xticklabels()] == [
        "64\n1×",
        "128\n2×",
        "256\n4×",
        "512\n8×",
    ]
    bars = ax.containers[0]
    points = [point["loss"] for point in both[0].evaluation["lengths"]]
    np.testing.assert_allclose(bars[0].get_ydata(), [p["value"] for p in points])
    ends = np.array(bars[2][0].get_segments())[:, :, 1]
    np.testing.assert_allclose(ends, [(p["low"], p["high"]) for p in points])


def test_curves_without_intervals_are_drawn(both, tmp_path):
    from .workdirs import held_out

    (alone,) = runs.read_all([make(tmp_path / "one", steps=2, documents=held_out(1))])
    for draw in (plots.loss_by_position, plots.length_curve, plots.context_curve):
        assert len(plots.png(draw([alone], "nats per token"))) > 5000


def test_context_curve_and_training_positions(both):
    (ax,) = plots.context_curve(both, "nats per byte").axes
    points = both[1].evaluation["context"]["points"]
    np.testing.assert_allclose(
        ax.containers[1][0].get_ydata(), [point["loss"]["value"] for point in points]
    )
    assert len(plots.training_positions(both).axes[0].patches) == 2


@pytest.mark.parametrize(
    "draw",
    [
        lambda both: plots.loss_by_position(both, "nats per byte"),
        lambda both: plots.length_curve(both, "nats per byte"),
        plots.training_curves,
    ],
)
def test_legends_are_outside_the_axes_and_names_literal(both, draw):
    figure = draw(both)
    plots.png(figure)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["rope", r"\$alibi_"]
    box = legend.get_window_extent()
    assert all(box.y0 >= ax.get_window_extent().y1 - 1 for ax in figure.axes)


def test_hidden_names_are_shown():
    assert plots.label("_x") == " _x"


def test_seven_colours_then_dashes():
    styles = [tuple(plots.style(index).values()) for index in range(28)]
    assert len(set(styles)) == 28


def test_png_is_an_image_with_something_on_it(both):
    image = matplotlib.image.imread(io.BytesIO(plots.png(plots.training_curves(both))))
    assert image.shape[1] > 1000 and image[..., :3].std() > 0.05


def test_no_state_is_left_in_pyplot(both):
    import matplotlib.pyplot as pyplot

    before = pyplot.get_fignums()
    plots.png(plots.length_curve(both, "nats per byte"))
    assert pyplot.get_fignums() == before


def test_moving_average():
    values = np.array([1.0, 2, np.nan, 4, 5])
    assert plots.moving_average(values, 1).tolist() == [1.0, 1.5, 3.0, 4.5, 4.5]
    assert plots.moving_average(np.array([np.nan]), 3).tolist() != [0.0]
    assert plots.moving_average(np.arange(100.0), 7)[:90].tolist() == pytest.approx(range(90))
