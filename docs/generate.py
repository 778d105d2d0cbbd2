"""What the site makes of the code: the methods, the settings, the networks. A hook of MkDocs.

`pages()` and `on_page_markdown` need nothing of MkDocs, so that the tests can ask which pages and
anchors there are.
"""

import functools
import inspect
import io
import pathlib
import re

import docstrings

DOCS = pathlib.Path(__file__).resolve().parent

# The picture of a method: its path over a valley of minima that is sharp at one end.
START, STEPS, RATE = (0.8, 1.9), 150, 0.1
RHO = 0.3
# Where rho is of another unit, or the default of a setting is for networks.
SETTINGS = {
    'unnormalized_sam': {'rho': 0.1},
    'layerwise_sam': {'rho': 0.3},
    'look_layersam': {'rho': 0.3},
    'sparse_sam': {'period': 10},
    'trace_sam': {'rho': 0.2},
    'det_sam': {'rho': 1.0, 'h': 0.4},
    'frob_sam': {'rho': 0.1, 'lam': 0.1},
    'wsam': {'gamma': 0.7},
    'late_phase_sam': {'start': 0.1},
    'ae_sam': {'lambda1': -1.0, 'lambda2': -1.0},
    'ae_looksam': {'lambda1': -1.0, 'lambda2': -1.0},
    'extrapolated': {'rho': 0.1},
    'bsam': {'rho': 0.05, 'prior_precision': 0.0, 'num_examples': 25, 'data_factor': 1.0},
}
MOMENTUM = 0.5  # of the optimizer for the methods that use it


# The pages.


@functools.cache
def measured():
    """Returns (head, {method: row}) of the table of methods/measured.md."""
    lines = [
        line
        for line in (DOCS / 'methods' / 'measured.md').read_text().splitlines()
        if line.startswith('|')
    ]
    start = next(i for i, line in enumerate(lines) if line.startswith('| method |'))
    rows = {}
    for line in lines[start + 2 :]:
        name = re.match(r'\| `(\w+)` \|', line)
        if not name:
            break
        rows[name[1]] = line
    return lines[start : start + 2], rows


@functools.cache
def pages():
    """Returns {path: Markdown} of the pages that are made of the code."""
    from sam_jax import sharpness

    return {
        'settings.md': settings_page(),
        'published.md': published_page(),
        **{f'methods/{name}.md': method_page(name) for name in sharpness.METHODS},
    }


def on_page_markdown(markdown, page, **kwargs):
    """Puts tables in their places, and links where a table names a method."""
    del kwargs
    from sam_jax import sharpness

    if page.file.src_uri.startswith('methods/'):
        markdown = markdown.replace('<!-- sharpness.table() -->', sharpness.table())
    if page.file.src_uri in ('methods/index.md', 'methods/measured.md'):
        markdown = re.sub(r'^\| `(\w+)` \|', r'| [`\1`](\1.md) |', markdown, flags=re.MULTILINE)
    return markdown.replace(' ± ', '\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}')


def settings_page():
    """Returns the page of all keys of a config."""
    from sam_jax import models, sharpness, tables
    from sam_jax.settings import schema

    def rows(prefix, keys):
        return [
            [f'`{prefix}{name}`', _code(key.default), key.kind.__name__, key.allowed, key.meaning]
            for name, key in keys.items()
        ]

    head = ('key', 'default', 'type', 'allowed', 'meaning')
    titles = {
        '': 'The run',
        'model': 'Model',
        'data': 'Data and augmentation',
        'sam': 'The sharpness-aware method',
        'optimizer': 'Optimizer',
        'ema': 'Moving average',
        'eval': 'Evaluation',
        'checkpoint': 'Checkpoints',
        'analysis': 'Flatness during training',
    }
    parts = [
        '# Settings',
        'Every key of a config, with its default. A flag sets it: '
        '`--config.sam.rho=0.1`. An unknown key, a wrong type and a value out of its range '
        'are refused before anything is compiled. The defaults are the settings of the '
        'paper on CIFAR; the configs change some of them. This page is made of '
        '`sam_jax.settings.KEYS`.',
    ]
    for section, title in titles.items():
        keys = {
            name.rpartition('.')[2]: key
            for name, key in schema.KEYS.items()
            if name.rpartition('.')[0] == section
        }
        parts += [f'## {title}', tables.markdown(head, rows(section and f'{section}.', keys))]
    parts += [
        '## Options of the models',
        'The name of the model decides which of these keys '
        'there are. Choose the model with the argument of the config, `model=NAME`.',
    ]
    for family, keys in schema.MODEL_OPTIONS.items():
        if keys:
            # The tiny ones are for tests.
            name = next(n for n in models.FAMILIES[family].names if not n.endswith('tiny'))
            parts += [
                f'### `{name}` and others of its family',
                tables.markdown(head, rows('model.', keys)),
            ]
    parts += [
        '## Options of the methods',
        'The method decides which of these keys there are. '
        'Choose the method with the argument of the config, `method=NAME`. The page of a '
        'method says what they mean.',
    ]
    parts.append(
        tables.markdown(
            ('method', 'keys and their defaults'),
            [
                [
                    f'[`{name}`](methods/{name}.md)',
                    ', '.join(
                        f'`sam.{option}` = {_code(default)}'
                        for option, default in sharpness.options(name).items()
                    ),
                ]
                for name in sharpness.METHODS
                if sharpness.options(name)
            ],
        )
    )
    return '\n\n'.join(parts) + '\n'


def published_page():
    """Returns the page of the networks in `published/`, from their settings and results."""
    import sam_jax
    from sam_jax import tables

    rows = []
    for config in sorted((DOCS.parent / 'published').glob('*/config.json')):
        folder = config.parent
        model = sam_jax.load(folder)
        size = sum(path.stat().st_size for path in folder.iterdir())
        facts = {**model.facts, 'size': f'{size / 1000:.0f} kB'}
        rows.append({'name': f'`{folder.name}`', **facts})
    parts = [
        '# Published networks',
        'Small networks that this code has trained, and the test error that each run reported at '
        'its end. Each is a folder `published/NAME` of the repository: weights, settings, result. '
        'They are not in the wheel. How to use one in two lines, and what the files are: '
        '[Use a trained run](howto/use.md).',
        tables.of_records(sorted(rows, key=lambda row: (row['dataset'], row['name']))),
        'One run each, of one seed: means and intervals over seeds stand in '
        '[It does not help me](howto/no_help.md#the-table-of-noisy-labels). A test loads '
        'each of them, and compares the error on the test set with the stated one where the '
        'dataset is there.',
        '## Add one',
        'From a finished run:',
        '    sam-jax-export RUN --out=published/NAME',
        'The folder must stay below 2 MB; `--dtype=float16` halves it. `config.json` names the '
        'git revision that trained it, so train without local changes. This page is made of what '
        'lies in `published/`.',
    ]
    return '\n\n'.join(parts) + '\n'


def _code(value):
    return f'`{value!r}`' if value != '' else "`''`"


def method_page(name):
    """Returns the page of a method: formula, cost, settings, figures and picture."""
    from sam_jax import sharpness, tables
    from sam_jax.sharpness import registry

    entry = sharpness.METHODS[name]
    doc = inspect.getdoc(entry.make)
    parameters = inspect.signature(entry.make).parameters
    parts = [
        f'# {name}',
        f'What it hands to the optimizer: **{entry.gives}**. Gradients a step: '
        f'**{entry.cost or entry.gradients}**.',
        _command(name),
        '## What it computes',
        docstrings.prose(docstrings.sections(doc)['']),
    ]
    if parameters:
        parts += [
            '## Settings',
            tables.markdown(
                ('setting', 'default', 'meaning'),
                [
                    [
                        _key(option, registry),
                        '' if p.default is p.empty else _code(p.default),
                        docstrings.escaped(_meaning(name, option)),
                    ]
                    for option, p in parameters.items()
                ],
            ),
        ]
    if entry.refuses:
        parts.append(
            f'It {entry.why}. So a run must have '
            + ', '.join(f'`{key}={value}`' for key, value in entry.refuses.items())
            + '.'
        )
    head, rows = measured()
    parts.append('## Measured on the digits')
    if name in rows:
        parts += [
            '\n'.join(
                [
                    *head,
                    rows[name],
                    *([rows['sam']] if name != 'sam' else []),
                    *([rows['sgd']] if name != 'sgd' else []),
                ]
            ),
            'Digits with 40 % label noise, 20 epochs, five seeds: '
            '[how this was measured](measured.md).',
        ]
    else:
        parts.append('Not measured yet. [The others are.](measured.md)')
    parts += ['## Its path', picture_text(name)]
    parts += [
        '## In Python',
        f'Constructor: [`sam_jax.sharpness.{entry.make.__name__}`]'
        '(../reference/sharpness.md#the-methods). How to use it in your own loop: '
        '[SAM in my own loop](../howto/loop.md).',
    ]
    return '\n\n'.join(parts) + '\n'


def _command(name):
    """A run of the method on noisy digits, with the rho or lam that was chosen there."""
    _, rows = measured()
    chosen = re.search(r'(rho|lam): .*\*\*([\d.]+)\*\*', rows.get(name, ''))
    argument, flag = '', ''
    if chosen and name != 'sgd':
        setting, value = chosen.groups()
        argument, flag = (
            (f',rho={value}', '') if setting == 'rho' else ('', f' --config.sam.{setting}={value}')
        )
    return (
        f'    sam-jax-train --config=digits:noise=0.4,method={name}{argument}{flag} '
        f'--workdir=runs/{name}'
    )


def _key(option, registry):
    in_config = option not in registry.GIVEN or option in ('rho', 'p')
    return f'`sam.{option}`' if in_config else f'`{option}`, in Python'


def _meaning(name, option):
    """Returns what a docstring says of an argument, also where it says `as of another`."""
    from sam_jax import sharpness

    known = docstrings.arguments(inspect.getdoc(sharpness.METHODS[name].make))
    text = known.get(option, 'as of `sam`.')
    other = re.match(r'as of `(\w+)`(.*)', text, re.DOTALL)
    if other and other[1] in sharpness.METHODS and other[1] != name:
        return _meaning(other[1], option).rstrip('.') + other[2]
    return text


# The pictures.


def height(x):
    """Curvature of the valley at x: 10 at its sharp end, 1 at its flat one."""
    import jax

    return 1.0 + 9.0 * jax.nn.sigmoid(3.0 * (1.5 - x))


def outputs(params):
    """The `outputs` of which the loss is half the square: it is 0 on the whole line y = 1."""
    import jax.numpy as jnp

    return jnp.sqrt(height(params['dense']['kernel'])) * (params['norm']['scale'] - 1.0)


def loss(params):
    """L(x, y) = h(x) (y - 1)^2 / 2, x a weight and y the scale of a normalisation layer."""
    import jax.numpy as jnp

    return jnp.sum(outputs(params) ** 2) / 2


def settings_of(name):
    """Returns the settings with which a method is drawn."""
    from sam_jax import sharpness

    known = {'rho': RHO, 'total_steps': STEPS, **SETTINGS.get(name, {})}
    return {k: v for k, v in known.items() if k in sharpness.takes(name)}


def uses_momentum(name):
    """Whether a method looks at the optimizer's momentum."""
    return name == 'momentum_sam'


@functools.cache
def path(name, momentum=0.0):
    """Returns the places of a method, float (STEPS + 1, 2).

    Raises:
      TypeError: it does not work as a link of a chain of its own; the sentence says why.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from sam_jax import sharpness

    tx = optax.chain(
        sharpness.create(name, **settings_of(name)), optax.sgd(RATE, momentum=momentum or None)
    )
    params = {'dense': {'kernel': jnp.array([START[0]])}, 'norm': {'scale': jnp.array([START[1]])}}
    network = sharpness.from_network(outputs, lambda z: jnp.sum(z**2) / 2)

    def step(carry, key):
        params, state = carry
        updates, state = tx.update(
            jax.grad(loss)(params),
            state,
            params,
            loss=network,
            key=key,
            gate_key=key,
            momentum=optax.tree.get(state, 'trace', None),
            learning_rate=RATE,
        )
        params = optax.apply_updates(params, updates)
        return (params, state), params

    keys = jax.random.split(jax.random.key(0), STEPS)
    _, places = jax.lax.scan(step, (params, tx.init(params)), keys)
    return np.concatenate(
        [
            np.array([START]),
            np.concatenate([places['dense']['kernel'], places['norm']['scale']], axis=1),
        ]
    )


@functools.cache
def why_not(name):
    """Returns the sentence with which a method refuses to be a plain link, or ''."""
    try:
        path(name, MOMENTUM if uses_momentum(name) else 0.0)
    except TypeError as e:
        return str(e)
    return ''


def picture_text(name):
    """Returns what stands under `Its path`."""
    reason = why_not(name)
    if reason:
        return (
            'This method cannot be drawn, because it does not work as a plain link of an optax '
            f'chain. It says why:\n\n> {docstrings.escaped(reason)}'
        )
    told = ', '.join(
        f'{k} = {v:g}' if isinstance(v, float) else f'{k} = {v}'
        for k, v in settings_of(name).items()
        if k != 'total_steps'
    )
    momentum = f', momentum {MOMENTUM:g} for both' if uses_momentum(name) else ''
    return (
        f'![The path of SGD and of {name}]({name}.svg)\n\n'
        f'The loss is L(x, y) = h(x) (y - 1)² / 2. Every point of the line y = 1 is a minimum. '
        f'The curvature h(x) falls from 10 at the left to 1 at the right: the valley is sharp '
        f'at one end and flat at the other. SGD stops where it meets the valley. A method that '
        f'prefers flat minima moves on to the right. {STEPS} steps from the same start, '
        f'learning rate {RATE:g}{momentum}; settings: {told or "none"}. The gradients are '
        f'exact, so this picture says nothing about noise.'
    )


@functools.cache
def picture(name):
    """Returns the SVG of the paths of SGD and of a method."""
    import jax
    import jax.numpy as jnp
    import matplotlib
    import numpy as np
    from matplotlib import figure

    matplotlib.rcParams['svg.hashsalt'] = 'sam_jax'
    fig = figure.Figure(figsize=(6.4, 3.2), layout='constrained')
    axes = fig.add_subplot()
    x, y = np.meshgrid(np.linspace(0.2, 4.2, 120), np.linspace(-0.1, 2.1, 80))
    values = np.asarray(
        jax.vmap(lambda x, y: loss({'dense': {'kernel': x}, 'norm': {'scale': y}}))(
            jnp.asarray(x.ravel()), jnp.asarray(y.ravel())
        )
    ).reshape(x.shape)
    axes.contour(x, y, values, levels=np.geomspace(0.01, 6, 10), colors='#b0bec5', linewidths=0.8)
    axes.axhline(1.0, color='#b0bec5', linewidth=0.8, linestyle=':')
    momentum = MOMENTUM if uses_momentum(name) else 0.0
    drawn = {'sgd': ('SGD', '#1565c0')}
    if name != 'sgd':
        drawn[name] = (name, '#d84315')
    for method, (label, color) in drawn.items():
        places = path(method, momentum)
        axes.plot(*places.T, '.-', color=color, linewidth=0.9, markersize=3, label=label)
        axes.plot(*places[-1], 'o', color=color, markersize=7)
    axes.plot(*START, 'k*', markersize=9, label='start')
    axes.set(xlim=(0.2, 4.2), ylim=(-0.1, 2.1), xlabel='x (sharp to flat)', ylabel='y')
    axes.legend(loc='lower right', fontsize=8)
    file = io.StringIO()
    fig.savefig(file, format='svg', metadata={'Date': None})
    return file.getvalue()


# What MkDocs calls.


def on_config(config):
    """Puts the pages of the methods into the navigation."""
    from sam_jax import sharpness

    for part in config.nav:
        if 'Methods' in part:
            part['Methods'] += [
                {name: f'methods/{name}.md'}
                for name in sharpness.METHODS
                if {name: f'methods/{name}.md'} not in part['Methods']
            ]
    return config


def on_files(files, config):
    """Adds the pages and pictures that are made of the code."""
    from mkdocs.structure.files import File

    from sam_jax import sharpness

    made = dict(pages())
    made.update(
        {f'methods/{name}.svg': picture(name) for name in sharpness.METHODS if not why_not(name)}
    )
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    return files
