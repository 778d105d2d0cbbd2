"""Pictures: what stands at the axes."""

import io
import math

import pytest

from sam_jax.experiments import figures


def _labels(axis, minor=False):
    return [tick.get_text() for tick in axis.get_ticklabels(minor=minor) if tick.get_text()]


@pytest.mark.parametrize(
    'epochs', [[1], [0.25, 0.5, 0.75, 1], [1, 2], [0.5, 2], [2.5], list(range(1, 61)), [900, 1800]]
)
def test_epochs_are_whole_numbers(epochs):
    curve = figures.Curve('a', epochs, [1.0] * len(epochs), [math.nan] * len(epochs))
    figure = figures.panels([figures.Panel('', 'epoch', 'error', [curve])])
    figures.save(figure, io.BytesIO())
    (ax,) = figure.axes
    shown = [place for place in ax.get_xticks() if 0 <= place <= ax.get_xlim()[1]]
    assert len(shown) > 1 and all(place == int(place) for place in shown)
    assert all(label.isdigit() for label in _labels(ax.xaxis))


@pytest.mark.parametrize('values,label', [([1.0, 0.5], '0.6'), ([3.0, 1e-3], '0.01')])
def test_losses_are_plain_numbers(values, label):
    curve = figures.Curve('a', [1, 2], values, [math.nan] * 2)
    figure = figures.panels([figures.Panel('', 'epoch', 'loss', [curve], log_y=True)])
    figures.save(figure, io.BytesIO())
    yaxis = figure.axes[0].yaxis
    assert label in _labels(yaxis) + _labels(yaxis, minor=True)


def test_a_curve_of_one_place_is_to_be_seen():
    curves = [figures.Curve(str(n), list(range(n)), [1.0] * n, [math.nan] * n) for n in (1, 2)]
    (ax,) = figures.panels([figures.Panel('', 'epoch', 'error', curves)]).axes
    assert [line.get_marker() for line in ax.get_lines()] == ['o', '']


@pytest.mark.parametrize('number', [2, 6, 20, 50, 300])
def test_many_names_stand_beside_the_curves(number):
    curves = [
        figures.Curve(f'sam, learning rate {i}', [1, 2], [i, i], [math.nan] * 2)
        for i in range(number)
    ]
    figure = figures.panels([figures.Panel('', 'epoch', 'error', curves)])
    figures.save(figure, io.BytesIO())
    (ax,) = figure.axes
    legend, axes = ax.get_legend().get_window_extent(), ax.get_window_extent()
    assert (legend.x0 >= axes.x1) == (number > 6)
    assert legend.x1 <= figure.bbox.x1 and legend.y0 >= 0 and axes.width > 200
