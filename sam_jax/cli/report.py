"""Puts finished runs together: a table, the best rho, the paper's numbers beside ours, pictures.

    sam-jax-report runs/rho [runs/more ...] [--out=runs/rho/report]

Takes every run in the folders and below. Writes report.md with its pictures, report.csv (a line for
each setting), runs.csv (a line for each run) and report.html, one file with all of it. Means are
over seeds, with 95 % t-intervals. What counts as the same setting, and how the best rho is chosen
(on the validation split, --config.data.validation=true), stands in sam_jax/experiments/results.py.
"""

import os

from absl import flags

from sam_jax.cli import commands
from sam_jax.errors import UserError
from sam_jax.experiments import report

_OUT = flags.DEFINE_string('out', '', 'Folder of the report; default: report/ in the first folder.')


def main(folders: list[str]) -> None:
    """Reports on the folders."""
    if not folders:
        raise UserError('No folder is given: sam-jax-report DIR [DIR ...].')
    out = _OUT.value or os.path.join(folders[0], 'report')
    text = report.write(folders, out)
    print(text.partition('\n## ')[0].rstrip())
    print(f'\nWritten to {os.path.join(out, "report.html")} and beside it.')


def run() -> None:
    """Console command `sam-jax-report`."""
    commands.run(main, positional=True)


if __name__ == '__main__':
    run()
