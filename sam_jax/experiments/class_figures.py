"""Pictures of a classifier's predictions: reliability diagrams and confusion matrices."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib import colors, rc_context
from matplotlib import figure as mpl_figure

from sam_jax.experiments.figures import STYLE

# Up to so many classes have their names and numbers written.
_NAMED = 25


class Diagram(NamedTuple):
    """The predictions of a network by their confidence, in bins of equal width.

    Attributes:
      title: as it stands there.
      error: the expected calibration error.
      count, confidence, accuracy: of each bin; NaN where it is empty.
    """

    title: str
    error: float
    count: Sequence[int]
    confidence: Sequence[float]
    accuracy: Sequence[float]


def reliability(described: Sequence[Diagram]) -> mpl_figure.Figure:
    """Draws Diagrams side by side: accuracy by confidence above, the share of each bin below."""
    with rc_context(STYLE):
        figure = mpl_figure.Figure(figsize=(3.6 * len(described), 4.6))
        axes = figure.subplots(
            2, len(described), squeeze=False, sharex=True, gridspec_kw={'height_ratios': (3, 1)}
        )
        for column, diagram in enumerate(described):
            edges = np.linspace(0, 1, len(diagram.count) + 1)
            width, left = edges[1], edges[:-1]
            above, below = axes[:, column]
            accuracy = np.nan_to_num(np.asarray(diagram.accuracy, float))
            above.bar(left, accuracy, width, align='edge', edgecolor='white', label='accuracy')
            above.plot(diagram.confidence, diagram.confidence, 'k_', label='mean confidence')
            above.plot((0, 1), (0, 1), ':', color='0.4')
            above.set(title=f'{diagram.title}\nECE {100 * diagram.error:.2f} %', ylim=(0, 1.02))
            below.bar(left, np.divide(diagram.count, sum(diagram.count)), width, align='edge')
            below.set(xlabel='confidence', xlim=(0, 1), ylim=(0, 1))
        axes[0, 0].set_ylabel('accuracy')
        axes[1, 0].set_ylabel('share')
        axes[0, 0].legend(loc='upper left')
        return figure


def confusion(
    title: str, cells: Sequence[Sequence[int]], classes: Sequence[str]
) -> mpl_figure.Figure:
    """Draws how many images of each class, a row, are taken for each class, a column.

    Args:
      title: as it stands there.
      cells: counts, (classes, classes).
      classes: their names.
    """
    counts = np.asarray(cells)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    named = len(counts) <= _NAMED
    side = 2.0 + 0.34 * min(len(counts), _NAMED)
    with rc_context(STYLE):
        figure = mpl_figure.Figure(figsize=(side + 1, side))
        ax = figure.subplots()
        # By the root: the few mistakes are to be seen.
        image = ax.imshow(shares, cmap='Blues', norm=colors.PowerNorm(0.5, 0, 1))
        figure.colorbar(image, label='share of the class', shrink=0.8)
        ax.set(title=title, xlabel='taken for', ylabel='true class')
        ax.grid(False)
        if named:
            ax.set_xticks(range(len(counts)), classes, rotation=90)
            ax.set_yticks(range(len(counts)), classes)
            for (row, column), count in np.ndenumerate(counts):
                if count:
                    color = 'white' if shares[row, column] > 0.4 else 'black'
                    ax.text(
                        column, row, str(count), ha='center', va='center', fontsize=6, color=color
                    )
        return figure
