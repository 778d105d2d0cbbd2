"""A figure or a table of the paper, made of finished runs of any dataset.

    sam-jax-figure                                # which there are, and the commands of their runs
    sam-jax-figure 3-right runs/many [runs/more ...] [--out=figure.svg]
    sam-jax-figure table-1 runs/cifar

Takes every finished run in the folders and below. A picture (.svg, .png or .pdf) has its numbers
beside it, in Markdown; a table is Markdown. The paper's numbers stand beside, where there are some.
"""

import os

from absl import flags

from sam_jax.cli import commands
from sam_jax.errors import UserError
from sam_jax.experiments import paper

_OUT = flags.DEFINE_string(
    'out', '', 'File of it; default figure-NAME.svg or table-N.md in the first folder.'
)


def main(arguments: list[str]) -> None:
    """Makes what the arguments name."""
    if not arguments:
        for name, whole in paper.WHOLE.items():
            print('\n    '.join([f'{name}: {whole.shows}', *whole.commands]))
        return
    name, *folders = arguments
    if not folders:
        raise UserError(f'No folder is given: sam-jax-figure {name} DIR [DIR ...].')
    file = f'{name}.md' if name.startswith('table-') else f'figure-{name}.svg'
    out = _OUT.value or os.path.join(folders[0], file)
    print(paper.write(name, folders, out))
    print(f'Written to {out}.')


def run() -> None:
    """Console command `sam-jax-figure`."""
    commands.run(main, positional=True)


if __name__ == '__main__':
    run()
