"""Whether m-sharpness tells how well networks generalise: the paper's Figure 3, right.

A network is a finished run that `sam-jax-analyze --what=sharpness` has measured. Its generalisation
gap is its test error less its training error.
"""

import collections
import itertools
import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from scipy import stats

from sam_jax.errors import UserError
from sam_jax.experiments import figures, flatness, results

_ERROR = 'error_rate'
# Of fewer networks no correlation is told.
LEAST = 3


class Network(NamedTuple):
    """A finished run that was measured.

    Attributes:
      task: of which the networks are compared: the name of the data, or of its folder if it is
        one's own.
      settings: of `results.settings_of`.
      gap: test error less training error, in points of percent.
      sharpness: {m: rise of the loss}.
      rho: radius of the ball.
    """

    task: str
    settings: dict
    gap: float
    sharpness: dict[int, float]
    rho: float


class Association(NamedTuple):
    """How closely the sharpness and the gap of networks go together, for one m.

    Attributes:
      count: of networks.
      pearson: correlation of the logarithm of the sharpness with the gap; NaN where a sharpness is
        not positive.
      kendall: Kendall's tau-b.
      information: `mutual_information` without conditions.
      conditional: the least one, given up to two of the settings that differ.
    """

    count: int
    pearson: float
    kendall: float
    information: float
    conditional: float


def networks(groups: Sequence[results.Group]) -> list[Network]:
    """Returns the Networks among the finished runs; those without m-sharpness are passed over.

    The training error is that of the whole training set where the run evaluates on it
    (`eval.train_set`), else that of the examples of the analysis.

    Raises:
      UserError: the balls of two networks differ in their radius.
    """
    found = []
    for group in groups:
        for record in group.finished:
            said = _at_its_end(record)
            if said is None:
                continue
            # Where a run keeps a moving average, that was measured.
            average = 'ema_' if f'test/ema_{_ERROR}' in record.result else ''
            train = record.result.get(f'train_set/{average}{_ERROR}', said['runs'][0][_ERROR])
            found.append(
                Network(
                    group.settings.get('data.dir') or group.settings['data.name'],
                    group.settings,
                    100 * (record.result[f'test/{average}{_ERROR}'] - train),
                    m_sharpness(said),
                    said['settings']['rho'],
                )
            )
    radii = sorted({network.rho for network in found})
    if len(radii) > 1:
        raise UserError(
            f'The sharpness of these runs was measured with rho {", ".join(map(str, radii))}; '
            'measure all with one --rho.'
        )
    return found


def _at_its_end(record):
    """Returns what was measured on the training split; before the end it tells nothing of it."""
    for _, said in flatness.analyses(record):
        run = said['runs'][0]
        at_end = run['split'] == 'train' and run['step'] == record.result['step']
        if at_end and m_sharpness(said):
            return said
    return None


def m_sharpness(said: dict) -> dict[int, float]:
    """Returns {m: rise of the loss} of what analysis.json says of its first run."""
    return {
        int(name.removeprefix('m = ')): float(rise['sharpness'])
        for name, rise in said['runs'][0].get('sharpness', {}).items()
        if name.startswith('m = ')
    }


def mutual_information(
    measure: Sequence[float], gap: Sequence[float], conditions: Sequence[Hashable] | None = None
) -> float:
    """Returns I(sign of difference in measure; sign of difference in gap | U) / H(the latter | U).

    Over all ordered pairs of networks, as Jiang et al. (arXiv 1912.02178) and the PGDL competition
    count it: 1 if the measure orders every pair, or each the wrong way round, and 0 if it tells
    nothing. U are the conditions of both networks of the pair. Pairs with equal measures or equal
    gaps are left out.

    Args:
      measure, gap: a number for each network.
      conditions: what is known of each network; None for nothing.

    Returns:
      NaN where no order of gaps is open (H = 0).
    """
    known = conditions if conditions is not None else [None] * len(gap)
    cells = collections.defaultdict(collections.Counter)
    for i, j in itertools.permutations(range(len(gap)), 2):
        if measure[i] != measure[j] and gap[i] != gap[j]:
            cells[known[i], known[j]][measure[i] > measure[j], gap[i] > gap[j]] += 1
    # I = H(measure) + H(gap) - H(both), each weighed by the pairs of the cell.
    information = entropy = 0.0
    for cell in cells.values():
        of_gap = _entropy([sum(n for (_, g), n in cell.items() if g is up) for up in (True, False)])
        of_measure = _entropy(
            [sum(n for (m, _), n in cell.items() if m is up) for up in (True, False)]
        )
        information += cell.total() * (of_measure + of_gap - _entropy(cell.values()))
        entropy += cell.total() * of_gap
    return information / entropy if entropy else math.nan


def _entropy(counts):
    """Of counts, in bits."""
    total = sum(counts)
    return -sum(n / total * math.log2(n / total) for n in counts if n)


def association(known: Sequence[Network], m: int) -> Association:
    """Returns the Association of networks that all have m-sharpness of this m."""
    rise, gap = [n.sharpness[m] for n in known], [n.gap for n in known]
    differ = [
        key
        for key in dict.fromkeys(key for n in known for key in n.settings)
        if len({str(n.settings.get(key)) for n in known}) > 1
    ]
    # Given all of that which differs nothing would be left to tell; the competition takes two.
    conditional = [
        mutual_information(
            rise, gap, [tuple(str(n.settings.get(key)) for key in keys) for n in known]
        )
        for count in (0, 1, 2)
        for keys in itertools.combinations(differ, count)
    ]
    logarithms = [math.log(x) for x in rise] if min(rise) > 0 else []
    one_value = len(set(gap)) == 1 or len(set(rise)) == 1
    return Association(
        len(known),
        float(stats.pearsonr(logarithms, gap)[0]) if logarithms and not one_value else math.nan,
        math.nan if one_value else float(stats.kendalltau(rise, gap)[0]),
        conditional[0],
        min((x for x in conditional if not math.isnan(x)), default=math.nan),
    )


def associations(known: Sequence[Network]) -> dict[str, dict[int, Association]]:
    """Returns {task: {m: Association}} of the tasks and the m with at least LEAST networks."""
    found = {}
    for task in dict.fromkeys(n.task for n in known):
        of_task = [n for n in known if n.task == task]
        for m in sorted({m for n in of_task for m in n.sharpness}):
            with_m = [n for n in of_task if m in n.sharpness]
            if len(with_m) >= LEAST:
                found.setdefault(task, {})[m] = association(with_m, m)
    return found


def rows(found: dict[str, dict[int, Association]]) -> list[dict[str, str]]:
    """Returns a row of the table for each task and m of `associations`."""
    return [
        {
            'data': task,
            'm': str(m),
            'networks': str(a.count),
            "Kendall's tau": _shown(a.kendall),
            'Pearson, of the logarithm': _shown(a.pearson),
            'mutual information': _shown(a.information),
            'conditional': _shown(a.conditional),
        }
        for task, of_m in found.items()
        for m, a in of_m.items()
    ]


def _shown(value):
    return '' if math.isnan(value) else f'{value:.3f}'


def panels(
    known: Sequence[Network], found: dict[str, dict[int, Association]]
) -> list[figures.Panel]:
    """Returns a Panel of each task, its networks as dots, and one of the mutual information."""
    described = []
    for task, of_m in found.items():
        dots = []
        for i, (m, a) in enumerate(of_m.items()):
            of_task = [n for n in known if n.task == task and m in n.sharpness]
            # What is not positive has no place on a logarithmic axis.
            shown = [(n.sharpness[m], n.gap) for n in of_task if n.sharpness[m] > 0]
            if shown:
                color = figures.shade(i / max(1, len(of_m) - 1))
                label = f'm = {m}: tau {_shown(a.kendall) or "undefined"}'
                none = [math.nan] * len(shown)
                dots.append(figures.Curve(label, *map(list, zip(*shown)), none, color))
        if dots:
            described.append(
                figures.Panel(task, 'm-sharpness', 'generalisation gap (%)', dots, dots=True)
            )
    curves = []
    for task, of_m in found.items():
        told = {m: a.information for m, a in of_m.items() if not math.isnan(a.information)}
        if told:
            curves.append(
                figures.Curve(task, list(told), list(told.values()), [math.nan] * len(told))
            )
    if curves:
        described.append(figures.Panel('', 'm', 'mutual information', curves, log_x=True))
    return described
