"""What was measured of trained networks on a split, as Markdown and as pictures."""

import os
from typing import Any

import numpy as np

from sam_jax import run_log, tables
from sam_jax.experiments import class_figures, figures
from sam_jax.trained import quality

# Pairs of classes that are named.
_MISTAKES = 10


def write(said: dict[str, Any], out: str) -> str:
    """Writes evaluation.json, report.md and its pictures into a folder; returns the report.

    Args:
      said: {'dataset', 'split', 'classes', 'what', 'networks': [{'name', ...of `measure`}]}.
      out: the folder, made if it is not there.

    Raises:
      OSError: it cannot be written.
    """
    os.makedirs(out, exist_ok=True)
    run_log.write_json(os.path.join(out, 'evaluation.json'), said)
    networks = said['networks']
    drawn = [class_figures.Diagram(n['name'], n['ece'], **n['reliability']) for n in networks]
    figures.save(class_figures.reliability(drawn), os.path.join(out, 'reliability.png'))
    for i, network in enumerate(networks):
        figure = class_figures.confusion(network['name'], network['confusion'], said['classes'])
        figures.save(figure, os.path.join(out, f'confusion_{i + 1}.png'))
    text = markdown(said)
    with open(os.path.join(out, 'report.md'), 'w') as file:
        file.write(text)
    return text


def markdown(said: dict[str, Any]) -> str:
    """Returns the Markdown report of what evaluation.json says: a column for each network."""
    networks = said['networks']
    head = ['', *(n['name'] for n in networks)]
    parts = [
        '# Calibration and errors',
        f'{networks[0]["examples"]} images of {said["dataset"]}, split {said["split"]}.',
        tables.markdown(
            head,
            [
                ['error rate (%)', *(f'{100 * n["error_rate"]:.2f}' for n in networks)],
                ['mean confidence (%)', *(f'{100 * n["confidence"]:.2f}' for n in networks)],
                [
                    f'expected calibration error, {quality.BINS} bins (%)',
                    *(f'{100 * n["ece"]:.2f}' for n in networks),
                ],
                ['negative log-likelihood', *(f'{n["nll"]:.4f}' for n in networks)],
            ],
        ),
        '![reliability](reliability.png)',
    ]
    if 'corruptions' in said['what']:
        parts += ['## Error on corrupted images (%)', _corruptions(head, networks)]
    parts += ['## Error by class (%)', _classes(said)]
    for i, network in enumerate(networks):
        parts += [
            f'## Mistakes of {network["name"]}',
            _mistakes(np.array(network['confusion']), said['classes']),
            f'![confusion](confusion_{i + 1}.png)',
        ]
    return '\n\n'.join(parts) + '\n'


def corruption_errors(networks: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """Returns (mean corruption error, that relative to the first network) of each, in percent.

    The first is the mean of the error rate over corruptions and severities. The second is the
    paper's mCE with the first network in the place of AlexNet: the mean over corruptions of
    sum_s error_s / sum_s error_s of the first one. It is NaN where the first one errs nowhere.
    """
    first = np.array([*networks[0]['corruptions'].values()]).sum(1)
    found = []
    for network in networks:
        rates = np.array([*network['corruptions'].values()])
        relative = np.mean(rates.sum(1) / first) if first.all() else np.nan
        found.append((100 * float(rates.mean()), 100 * float(relative)))
    return found


def _corruptions(head, networks):
    rows = [
        [name, *(f'{100 * np.mean(n["corruptions"][name]):.1f}' for n in networks)]
        for name in networks[0]['corruptions']
    ]
    means = corruption_errors(networks)
    rows.append(['mean corruption error', *(f'{mean:.1f}' for mean, _ in means)])
    if len(networks) > 1:
        rows.append([f'mCE, {head[1]} being 100', *(f'{relative:.1f}' for _, relative in means)])
    return tables.markdown(head, rows)


def _classes(said):
    rows = []
    for i, name in enumerate(said['classes']):
        counts = [np.array(n['confusion'])[i] for n in said['networks']]
        known = [f'{100 * (1 - c[i] / c.sum()):.2f}' if c.sum() else '' for c in counts]
        rows.append([name, int(counts[0].sum()), *known])
    return tables.markdown(['class', 'images', *(n['name'] for n in said['networks'])], rows)


def _mistakes(cells, classes):
    off = cells * (1 - np.eye(len(cells), dtype=int))
    order = np.argsort(-off, axis=None, kind='stable')[:_MISTAKES]
    rows = [
        [classes[true], classes[taken], off[true, taken]]
        for true, taken in (divmod(int(i), len(cells)) for i in order)
        if off[true, taken]
    ]
    return tables.markdown(['true class', 'taken for', 'images'], rows) if rows else 'None.'
