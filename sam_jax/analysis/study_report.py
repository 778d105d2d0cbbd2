"""What an analysis has measured, as a Markdown report with a column for each run."""

from typing import Any

from sam_jax import tables


def markdown(said: dict[str, Any]) -> str:
    """Returns the Markdown report of what analysis.json says: a column for each run."""
    runs, what = said['runs'], said['settings']['what']
    head = ['', *(f'{r["name"]} (step {r["step"]})' for r in runs)]
    lines = [
        '# How flat it is',
        '',
        f'Loss of {runs[0]["examples"]} examples of {runs[0]["dataset"]}, split '
        f'{runs[0]["split"]}, BatchNorm in evaluation mode.',
        '',
        tables.markdown(head, _rows(runs, what)),
    ]
    if 'sharpness' in what:
        lines += ['', f'The balls have radius {said["settings"]["rho"]:g}, unless named otherwise.']
        lines += [
            f'There are too few examples for m = {m}.'
            for m in said['settings']['m']
            if m > runs[0]['examples']
        ]
    if 'spectrum' in what:
        lines += ['', '![spectrum](spectrum.png)']
    if 'landscape' in what:
        lines += ['', '![landscape](landscape.png)']
        if said['path']:
            lines += ['', '![path](path.png)']
        elif len(runs) == 2:
            lines += ['', 'The params of the runs differ in shape: there is no line between them.']
    return '\n'.join(lines) + '\n'


def _rows(runs, what):
    """Returns the rows of the report's table: what is measured, and the value of each run."""
    rows = [
        [
            'weight decay of the L2 penalty',
            *(f'{r["weight_decay"]:g}' if r['weight_decay'] else 'without penalty' for r in runs),
        ],
        ['label smoothing', *(f'{r["label_smoothing"]:g}' for r in runs)],
        ['loss', *(f'{r["loss"]:.4g}' for r in runs)],
        ['error rate (%)', *(f'{100 * r["error_rate"]:.2f}' for r in runs)],
    ]
    if 'spectrum' in what:
        spectra = [r['spectrum'] for r in runs]
        rows += [
            ['lambda_max', *(f'{s["lambda_max"]:.4g}' for s in spectra)],
            ['lambda_max / lambda_5', *(f'{s["lambda_ratio"]:.3g}' for s in spectra)],
            ['least eigenvalue at most', *(f'{s["lowest"]:.3g}' for s in spectra)],
            [
                'trace (standard error)',
                *(f'{s["trace"]:.4g} ({s["trace_standard_error"]:.2g})' for s in spectra),
            ],
        ]
    if 'sharpness' in what:
        for name in runs[0]['sharpness']:
            rises = [r['sharpness'][name] for r in runs]
            rows += [
                [f'rise of the loss: {name}', *(f'{x["sharpness"]:.4g}' for x in rises)],
                [
                    f'rise of the error rate: {name} (points of %)',
                    *(f'{100 * x["error_rise"]:z.2f}' for x in rises),
                ],
            ]
    if 'order' in what:
        rows.append(
            ['cosine of the first-order and the whole gradient of SAM']
            + [f'{r["order_cosine"]:.4f}' for r in runs]
        )
    return rows
