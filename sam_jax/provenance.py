"""What a run says of itself: settings, versions, hardware at its start, a summary at its end."""

import os
import subprocess
from typing import Any

import flax
import jax
import optax

import sam_jax
from sam_jax import settings
from sam_jax.replicas import Layout


def hparams(config: Any) -> dict[str, int | float | str]:
    """Returns the settings as TensorBoard's hparams take them."""
    return {
        k: v if isinstance(v, (int, float, str)) else str(v)
        for k, v in settings.flatten(config).items()
    }


def provenance(config: Any, layout: Layout) -> dict[str, Any]:
    """Content of config.json: settings, versions, revision, hardware."""
    return {
        'config': settings.jsonable(config),
        'versions': {
            'sam_jax': sam_jax.__version__,
            'jax': jax.__version__,
            'flax': flax.__version__,
            'optax': optax.__version__,
        },
        'git_revision': _revision(),
        'device_kind': layout.devices[0].device_kind,
        'device_count': len(layout.devices),
        'process_count': jax.process_count(),
    }


def _revision():
    """The revision of this checkout; 'unknown' of an installed package, or without git."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    # Of a package in somebody else's checkout git would tell theirs.
    if not os.path.exists(os.path.join(root, '.git')):
        return 'unknown'
    try:
        git = subprocess.run(
            ['git', '-C', root, 'describe', '--always', '--dirty', '--abbrev=40'],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return 'unknown'
    return git.stdout.strip() or 'unknown'


def summary(result: dict[str, Any], workdir: str) -> str:
    """The few lines at the end of a run."""
    minutes, seconds = divmod(round(result['wall_time']), 60)
    lines = [f'test error     {100 * result["test/error_rate"]:.2f} %']
    if 'test/ema_error_rate' in result:
        lines.append(f'with EMA       {100 * result["test/ema_error_rate"]:.2f} %')
    if 'validation/error_rate' in result:
        lines.append(f'validation     {100 * result["validation/error_rate"]:.2f} %')
    lines += [
        f'wall time      {minutes} min {seconds} s',
        f'images/s       {result["perf/images_per_second"]:.0f}',
        f'files          {os.path.abspath(workdir)}',
    ]
    return 'Finished.\n  ' + '\n  '.join(lines)
