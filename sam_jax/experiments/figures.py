"""Pictures, in one style: curves with intervals, and reductions of the error."""

import math
from typing import IO, NamedTuple

import numpy as np
from matplotlib import colormaps, colors, rc_context, ticker
from matplotlib import figure as mpl_figure

STYLE = {
    'font.size': 9,
    'axes.grid': True,
    'grid.alpha': 0.3,
    'axes.axisbelow': True,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'legend.framealpha': 0.7,
    'legend.fontsize': 8,
    'lines.markersize': 4,
    'figure.dpi': 120,
    'axes.formatter.useoffset': False,
    'svg.fonttype': 'none',
    'svg.hashsalt': 'sam_jax',
    'figure.constrained_layout.use': True,
}


# Names of a legend within the axes; of one beside them in a column, and in all.
_IN_LEGEND, _IN_COLUMN, _BESIDE = 6, 18, 54

# Numbers that have room below an axis; more of them stand upright.
_SIDE_BY_SIDE = 8


class Curve(NamedTuple):
    """A line of a panel.

    Attributes:
      label: for the legend.
      x: where.
      mean: values there.
      half: half widths of their intervals; NaN where there is none.
      color: of matplotlib; None for the next one of the cycle.
      dashed: whether the line is.
    """

    label: str
    x: list
    mean: list
    half: list
    color: str | None = None
    dashed: bool = False


class Panel(NamedTuple):
    """A pair of axes with its curves.

    Attributes:
      title, xlabel, ylabel: as they stand there.
      curves: Curves.
      level: (label, mean, half) of a horizontal line, or None.
      log_x: x is a radius, 0 or more, on a logarithmic axis; intervals are bars and not bands.
      log_y: whether y is logarithmic.
      dots: each place is a thing of its own, on a logarithmic x; no line goes through them.
    """

    title: str
    xlabel: str
    ylabel: str
    curves: list
    level: tuple | None = None
    log_x: bool = False
    log_y: bool = False
    dots: bool = False


def shade(position: float) -> tuple[float, float, float, float]:
    """Returns a color for a place between 0 and 1 in an ordered family of curves."""
    return colormaps['viridis'](0.9 * position)


class _Plain(ticker.LogFormatter):
    """0.5 and not 5 x 10^-1; at the places that its parent names."""

    def __call__(self, x, pos=None):
        return super().__call__(x, pos) and f'{x:g}'


def _axes(rows, columns, width=4.2, height=3.0):
    figure = mpl_figure.Figure(figsize=(width * columns, height * rows))
    return figure, [ax for row in figure.subplots(rows, columns, squeeze=False) for ax in row]


def panels(described: list[Panel], columns: int = 2, width: float = 4.2) -> mpl_figure.Figure:
    """Draws Panels side by side, each so many inches wide and a legend of many names beside it."""
    with rc_context(STYLE):
        columns = min(columns, len(described))
        width += max(map(_room_for_legend, described))
        figure, axes = _axes(math.ceil(len(described) / columns), columns, width)
        for ax, panel in zip(axes, described):
            _draw(ax, panel)
        for ax in axes[len(described) :]:
            ax.set_visible(False)
        return figure


def _room_for_legend(panel):
    """Returns the inches that the legend takes beside the axes."""
    named = len(panel.curves) + bool(panel.level)
    if named <= _IN_LEGEND:
        return 0.0
    longest = max(len(curve.label) for curve in panel.curves)
    return math.ceil(min(named, _BESIDE) / _IN_COLUMN) * (0.5 + 0.06 * longest)


def save(figure: mpl_figure.Figure, file: str | IO, **options) -> None:
    """Writes a figure to a file; the style is in force then as well as when it is drawn."""
    with rc_context(STYLE):
        figure.savefig(file, **options)


def _draw(ax, panel):
    for curve in panel.curves:
        style = {'color': curve.color, 'linestyle': '--' if curve.dashed else '-'}
        half = [0.0 if math.isnan(h) else h for h in curve.half]
        if panel.dots:
            ax.plot(curve.x, curve.mean, 'o', label=curve.label, color=curve.color)
        elif panel.log_x:
            ax.errorbar(
                curve.x, curve.mean, half, marker='o', capsize=3, label=curve.label, **style
            )
        else:
            # One place makes no line.
            marker = 'o' if len(curve.x) == 1 else ''
            (line,) = ax.plot(curve.x, curve.mean, marker=marker, label=curve.label, **style)
            ax.fill_between(
                curve.x,
                [m - h for m, h in zip(curve.mean, half)],
                [m + h for m, h in zip(curve.mean, half)],
                alpha=0.2,
                color=line.get_color(),
                linewidth=0,
            )
    if panel.level:
        label, mean, half = panel.level
        ax.axhline(mean, color='0.4', linestyle=':', label=label)
        if not math.isnan(half):
            ax.axhspan(mean - half, mean + half, color='0.4', alpha=0.12, linewidth=0)
    if panel.log_x:
        places = sorted({x for curve in panel.curves for x in curve.x})
        # Zero has a place of its own, left of the smallest radius.
        ax.set_xscale('symlog', linthresh=min(filter(None, places)), linscale=0.5)
        rotation = 90 if len(places) > _SIDE_BY_SIDE else 0
        ax.set_xticks(places, [f'{x:g}' for x in places], rotation=rotation)
        ax.xaxis.set_minor_locator(ticker.NullLocator())
    if panel.dots:
        ax.set_xscale('log')
    if panel.xlabel == 'epoch':
        # From the start of the run: its first ticks are 0 and a whole number of epochs.
        ax.set_xlim(left=0)
        ax.xaxis.set_major_locator(
            ticker.MaxNLocator(8, integer=True, min_n_ticks=1, steps=[1, 2, 2.5, 5, 10])
        )
    if panel.log_y:
        ax.set_yscale('log')
        ax.yaxis.set_major_formatter(_Plain())
        ax.yaxis.set_minor_formatter(_Plain())
    elif not panel.dots:
        ax.set_ylim(bottom=max(0.0, ax.get_ylim()[0]))
    ax.set(title=panel.title, xlabel=panel.xlabel, ylabel=panel.ylabel)
    named = len(panel.curves) + bool(panel.level)
    if named > _IN_LEGEND:
        # Beside the axes, where it hides no curve; of more than have room there, some.
        step = math.ceil(named / _BESIDE)
        handles, labels = (x[::step] for x in ax.get_legend_handles_labels())
        ax.legend(
            handles,
            labels,
            loc='upper left',
            bbox_to_anchor=(1.0, 1.05),
            fontsize=7,
            ncols=math.ceil(len(labels) / _IN_COLUMN),
            labelspacing=0.3,
        )
    elif named > 1:
        ax.legend()


def reductions(rows: dict[str, list[tuple[float, float | None]]]) -> mpl_figure.Figure:
    """Draws the paper's Figure 1, left: a dot for each switch to SAM, a row for each kind of data.

    Args:
      rows: {name of the row: [(reduction in percent, reduction in the paper or None), ...]}.
    """
    with rc_context(STYLE):
        figure, (ax,) = _axes(1, 1, width=6.0, height=1.2 + 0.4 * len(rows))
        for height, dots in enumerate(rows.values()):
            ours = [x for x, _ in dots]
            papers = [x for _, x in dots if x is not None]
            ax.scatter(ours, [height] * len(ours), color='C0', label='here', zorder=3)
            ax.scatter(
                papers,
                [height] * len(papers),
                facecolors='none',
                edgecolors='C3',
                s=60,
                label='paper',
            )
        ax.axvline(0, color='0.4', linewidth=1)
        ax.set_yticks(range(len(rows)), list(rows))
        ax.set_ylim(len(rows) - 0.5, -0.5)
        ax.set_xlabel('error reduction by switching to SAM (%)')
        if any(x is not None for dots in rows.values() for _, x in dots):
            handles, labels = ax.get_legend_handles_labels()
            ax.legend(handles[:2], labels[:2])
        return figure


class Surface(NamedTuple):
    """The loss on a plane through a run.

    Attributes:
      title: as it stands there.
      ticks: places along both axes.
      loss: (places, places), the first axis along the first direction.
    """

    title: str
    ticks: list
    loss: list


def surfaces(
    described: list[Surface], xlabel: str = 'direction 1', ylabel: str = 'direction 2'
) -> mpl_figure.Figure:
    """Draws Surfaces side by side: contours above, the same as hills below (paper, Figure 1).

    All share one logarithmic scale of the loss, so that colors and heights compare.
    """
    values = [np.maximum(np.asarray(s.loss, float), 1e-6) for s in described]
    known = np.concatenate([v[np.isfinite(v)] for v in values])
    low, high = (known.min(), known.max()) if known.size else (1.0, 1.0)
    # A loss that is not finite is as high as the picture goes.
    values = [np.where(np.isfinite(v), v, high) for v in values]
    levels = np.geomspace(low, max(high, 1.01 * low), 25)
    norm = colors.LogNorm(levels[0], levels[-1])
    with rc_context(STYLE):
        figure = mpl_figure.Figure(figsize=(4.2 * len(described), 7.0))
        flats = [figure.add_subplot(2, len(described), 1 + i) for i in range(len(described))]
        for i, (surface, loss) in enumerate(zip(described, values)):
            ax = flats[i]
            drawn = ax.contourf(
                surface.ticks,
                surface.ticks,
                loss.T,
                levels,
                norm=norm,
                cmap='viridis',
                extend='both',
            )
            ax.contour(
                surface.ticks,
                surface.ticks,
                loss.T,
                levels[::4],
                colors='k',
                linewidths=0.4,
                alpha=0.6,
            )
            ax.plot(0, 0, 'r+', markersize=8)
            ax.set(title=surface.title, xlabel=xlabel, ylabel=ylabel, aspect='equal')
            ax.grid(False)
            hill = figure.add_subplot(2, len(described), 1 + len(described) + i, projection='3d')
            x, y = np.meshgrid(surface.ticks, surface.ticks, indexing='ij')
            hill.plot_surface(
                x,
                y,
                np.log10(loss),
                cmap='viridis',
                vmin=np.log10(levels[0]),
                vmax=np.log10(levels[-1]),
                linewidth=0,
                rcount=80,
                ccount=80,
            )
            hill.set(
                xlabel=xlabel,
                ylabel=ylabel,
                zlabel='log10 loss',
                zlim=(np.log10(levels[0]), np.log10(levels[-1])),
            )
            hill.tick_params(labelsize=7)
            hill.locator_params(axis='x', nbins=5)
            hill.locator_params(axis='y', nbins=5)
        bar = figure.colorbar(drawn, ax=flats, label='loss', shrink=0.8)
        ticks = [t for t in 10.0 ** np.arange(-6, 7) if levels[0] <= t <= levels[-1]]
        if len(ticks) < 2:
            ticks = levels[::6]
        bar.set_ticks(ticks, labels=[f'{t:.3g}' for t in ticks])
        bar.ax.minorticks_off()
        return figure


class Spectrum(NamedTuple):
    """A run's spectral density.

    Attributes:
      title: as it stands there.
      grid, density: eigenvalues and their density.
      top: the largest eigenvalues themselves.
    """

    title: str
    grid: list
    density: list
    top: list


def spectra(described: list[Spectrum]) -> mpl_figure.Figure:
    """Draws Spectra one below the other on the same axes (paper, Figure 3)."""
    with rc_context(STYLE):
        figure, axes = _axes(len(described), 1, width=6.0, height=2.2)
        low = min(min(s.grid) for s in described)
        high = max(max(s.grid) for s in described)
        peak = max(max(s.density) for s in described)
        for i, (ax, spectrum) in enumerate(zip(axes, described)):
            ax.fill_between(spectrum.grid, spectrum.density, 1e-12, color=f'C{i}', alpha=0.4)
            ax.plot(spectrum.grid, spectrum.density, color=f'C{i}')
            ax.plot(
                spectrum.top,
                [3e-6 * peak] * len(spectrum.top),
                '|',
                color='k',
                markersize=10,
                label='largest eigenvalues',
            )
            ax.set_yscale('log')
            ax.set(
                title=spectrum.title,
                ylabel='density',
                xlim=(low, high),
                ylim=(1e-6 * peak, 2 * peak),
            )
            ax.legend()
        axes[-1].set_xlabel('eigenvalue')
        return figure
