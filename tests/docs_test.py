"""README and the site: links, anchors, pages; and, where its tools are, the site itself.

The latter by

    ./scripts/docs.sh test            # builds the site strictly, looks at it in a browser
    ./scripts/docs.sh test -m slow    # executes the notebooks
"""

import ast
import copy
import functools
import html
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib

import pytest
import yaml
from helpers import ROOT

from sam_jax import settings, sharpness
from sam_jax.errors import UserError
from sam_jax.experiments import grid

DOCS = ROOT / 'docs'
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
NOTEBOOKS = sorted((DOCS / 'notebooks').glob('*.ipynb'))


@pytest.fixture(scope='module')
def generate():
    """The module that makes pages of the code; its pictures are left out."""
    sys.path.insert(0, str(DOCS))
    try:
        import generate
    finally:
        sys.path.remove(str(DOCS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, 'picture_text', lambda name: 'A picture.')
        generate.pages.cache_clear()
        yield generate
    generate.pages.cache_clear()


@pytest.fixture(scope='module')
def sources(generate):
    """{path below the root: Markdown} of README, the pages, the notebooks and what is generated."""
    found = {'README.md': ROOT / 'README.md', 'CONTRIBUTING.md': ROOT / 'CONTRIBUTING.md'}
    found.update({str(p.relative_to(ROOT)): p for p in DOCS.rglob('*.md')})
    texts = {name: path.read_text() for name, path in found.items()}
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text())['cells']
        texts[str(path.relative_to(ROOT))] = '\n\n'.join(
            ''.join(cell['source']) for cell in cells if cell['cell_type'] == 'markdown'
        )
    texts.update({f'docs/{name}': text for name, text in generate.pages().items()})
    return texts


def _prose(text):
    """Without code, in which there is neither a heading nor a link."""
    text = re.sub(r'^```.*?^```$', '', text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r'`[^`\n]*`', 'code', re.sub(r'^    .*$', '', text, flags=re.MULTILINE))


@functools.cache
def _anchors(text):
    """As Python-Markdown and GitHub make them of headings."""
    text = re.sub(r'^```.*?^```$', '', text, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r'^#+ (.*)$', text, flags=re.MULTILINE)
    return {re.sub(r'[-\s]+', '-', re.sub(r'[^\w\s-]', '', h).strip().lower()) for h in headings}


def test_readme_is_short():
    assert len((ROOT / 'README.md').read_text().splitlines()) <= 150


def test_every_page_of_the_navigation_exists(sources):
    def pages(part):
        if isinstance(part, str):
            yield part
        for inner in part.values() if isinstance(part, dict) else part * isinstance(part, list):
            yield from pages(inner)

    named = list(pages(yaml.safe_load((ROOT / 'mkdocs.yml').read_text())['nav']))
    assert len(named) > 30 and not {f'docs/{name}' for name in named} - {*sources}
    methods = {f'docs/methods/{name}.md' for name in sharpness.METHODS}
    left_out = {name for name in sources if name.startswith('docs/')} - methods
    assert left_out == {f'docs/{name}' for name in named}


def test_every_link_and_anchor_leads_somewhere(sources):
    dead, seen = [], 0
    for name, text in sources.items():
        for target in re.findall(r'\]\(([^)\s]+)\)', _prose(text)):
            if re.match(r'[a-z]+:', target):
                continue
            seen += 1
            path, _, anchor = target.partition('#')
            there = os.path.normpath(os.path.join(os.path.dirname(name), path)) if path else name
            made = there.endswith('.svg') and f'{there[:-4]}.md' in sources
            if not (there in sources or made or (ROOT / there).exists()):
                dead.append(f'{name}: {target}')
            elif anchor and anchor not in _anchors(sources[there]):
                dead.append(f'{name}: {target}')
    assert not dead and seen > 100


def test_the_pages_of_the_methods_say_it_all(sources):
    """Settings with defaults, cost, source, and the figures where there are some."""
    for name, entry in sharpness.METHODS.items():
        page = sources[f'docs/methods/{name}.md']
        for option, default in sharpness.options(name).items():
            assert f'| `sam.{option}` | `{default!r}` | ' in page, (name, option)
        assert not re.search(r'\|  \|$', page.partition('## Measured')[0], re.MULTILINE), name
        assert str(entry.cost or entry.gradients) in page and '## Its path' in page
    assert '3.1 ± 0.6' in sources['docs/methods/sam.md']
    assert '2102.11600' in sources['docs/methods/asam.md']
    assert 'Not measured yet' in sources['docs/methods/le_sam.md']


def test_the_page_of_the_settings_has_every_key(sources):
    for key, described in settings.KEYS.items():
        assert f'| `{key}` | ' in sources['docs/settings.md'], key
        assert described.meaning in sources['docs/settings.md']


BEGIN = r'(?:[A-Z_]+=\S+ |taskset -c \S+ )*(?:sam-jax-|\./scripts/train\.sh|python -m sam_jax\.)'


def _commands(text):
    """Yields (module, its arguments) of the commands that a page shows."""
    blocks = '\n'.join(re.findall(r'^    .*$', text, re.MULTILINE))
    inline = '\n'.join(re.findall(rf'`({BEGIN}[^`\n]*)`', text))
    for line in re.sub(r'\\\n\s*', '', f'{blocks}\n{inline}').splitlines():
        if not re.match(rf' *{BEGIN}', line):
            continue
        for command in line.split(' & '):
            words = shlex.split(command, comments=True)
            while words and not re.match(r'sam-jax-|\./|python', words[0]):
                del words[0]
            if words[:2] == ['python', '-m']:
                yield words[2], words[3:]
            elif words and words[0] in PROJECT['scripts']:
                yield PROJECT['scripts'][words[0]].partition(':')[0], words[1:]
            elif words and words[0] == './scripts/train.sh':
                yield (
                    'sam_jax.main',
                    [
                        f'--config={a}' if re.match(r'configs/|[a-z_]+$', a) else a
                        for a in words[1:]
                    ],
                )


def _flags_of(module):
    """The names of the flags that a module defines."""
    source = (ROOT / f'{module.replace(".", "/")}.py').read_text()
    defined = re.findall(r"(?:DEFINE_\w+|add_argument)\(\s*'(?:--)?(\w+)'", source)
    return {*defined, 'help', 'helpfull'}


def _check(module, arguments, workdir):
    """Raises where a command is not right: its flags, config, keys, values, runs."""
    given = [a.strip('[]') for a in arguments if a.strip('[]').startswith('--')]
    names = {a[2:].partition('=')[0] for a in given}
    unknown = {n for n in names if not n.startswith('config.')} - _flags_of(module)
    assert not unknown, (module, unknown)
    if re.search(r'NAME|CONFIG|my/|mine|\.\.\.|CKPT|FILE', ' '.join(arguments)):
        return
    values = [a[2:].partition('=')[::2] for a in given]
    flag = next((value for name, value in values if name == 'config'), 'digits')
    changes = {
        name.removeprefix('config.'): value for name, value in values if name.startswith('config.')
    }
    if 'config' not in _flags_of(module) or not ({'config'} & names or changes):
        return
    hyper = [grid.parse(value) for name, value in values if name == 'sweep']
    if module.endswith('sweep') and hyper:
        assert grid.make_runs(flag, grid.product(hyper), changes, workdir)
        return
    config = copy.deepcopy(settings.load(flag)[1])
    for key, value in changes.items():
        settings.override(config, key, value)
    settings.check(config)


@pytest.fixture(scope='module')
def shown(sources):
    """[(page, module, arguments)] of README, the pages and the configs' docstrings."""
    texts = {
        name: text
        for name, text in sources.items()
        # Their commands need the examples that the reader writes; they were followed once.
        if not name.startswith('docs/contribute/')
    }
    for path in (ROOT / 'configs').glob('*.py'):
        texts[f'configs/{path.name}'] = ast.get_docstring(ast.parse(path.read_text())) or ''
    return [(page, *command) for page, text in texts.items() for command in _commands(text)]


def test_commands_are_right(shown, tmp_path):
    for page, module, arguments in shown:
        try:
            _check(module, arguments, str(tmp_path))
        except Exception as e:
            raise AssertionError(f'{page}: {module} {" ".join(arguments)}: {e}') from e
    modules = {module for _, module, _ in shown}
    assert (
        len(shown) > 100
        and {
            'sam_jax.main',
            'sam_jax.cli.sweep',
            'sam_jax.cli.report',
            'sam_jax.cli.analyze',
            'sam_jax.cli.predict',
            'sam_jax.cli.preview',
            'sam_jax.cli.doctor',
            'sam_jax.benchmarks.step',
            'sam_jax.benchmarks.methods',
        }
        <= modules
    )


@pytest.mark.parametrize(
    'line',
    [
        'sam-jax-train --confg=digits',
        'sam-jax-train --config=digit',
        'sam-jax-train --config=digits:nois=0.4',
        'sam-jax-train --config=digits --config.sam.roh=1',
        'sam-jax-train --config=digits --config.sam.rho=-1',
        './scripts/train.sh configs/digit.py',
        'sam-jax-sweep --config=digits --sweep=sam.roh=1,2',
        'sam-jax-sweep --config=digits --sweep=1',
        'taskset -c 0 python -m sam_jax.benchmarks.step --case=digits',
        'python -m sam_jax.benchmarks.quantize_digits --bit=4',
        'python -m sam_jax.nothing --x=1',
    ],
)
def test_wrong_commands_are_noticed(line, tmp_path):
    ((module, arguments),) = _commands(f'    {line}\n')
    with pytest.raises((AssertionError, UserError, FileNotFoundError)):
        _check(module, arguments, str(tmp_path))


def test_every_method_is_drawn_or_says_why_not(generate):
    """All but those that need their training loop."""
    refused = {name for name in sharpness.METHODS if generate.why_not(name)}
    assert refused == {'esam', 'saf', 'mesa', 'sampa'}
    assert 'term of the loss' in generate.why_not('saf')
    stays, moves = generate.path('sgd')[-1], generate.path('sam')[-1]
    assert stays[0] < 1.0 and moves[0] > 2.5, 'SAM goes to the flat end of the valley'


def test_notebooks_have_run():
    """All cells, in order, and without errors; no name of a machine's folder in what they print."""
    assert len(NOTEBOOKS) == 3
    for path in NOTEBOOKS:
        cells = [c for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'code']
        assert [c['execution_count'] for c in cells] == list(range(1, len(cells) + 1)), path.name
        printed = json.dumps([c['outputs'] for c in cells])
        assert 'ename' not in printed and '/home/' not in printed and '/tmp/' not in printed


# What needs more than the tests do.


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp('site')
    done = subprocess.run(
        [sys.executable, '-m', 'mkdocs', 'build', '--strict', '--site-dir', str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, 'NO_MKDOCS_2_WARNING': '1'},
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


@pytest.mark.docs
def test_the_site_is_built(site):
    drawn = {p.stem for p in (site / 'methods').glob('*.svg')}
    assert len(drawn) == len(sharpness.METHODS) - 4
    assert (site / 'methods' / 'sam.html').exists() and (site / 'settings.html').exists()
    assert (site / 'notebooks' / 'drop_in.html').stat().st_size > 20_000
    assert (
        'id="sam_jax.experiment.Experiment.from_config"'
        in (site / 'reference' / 'experiment.html').read_text()
    )


LOOK = """
<script>addEventListener('load', () => setTimeout(() => {
  document.title = JSON.stringify({
    wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    broken: [...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)});
}, 500));</script>
"""


@pytest.mark.docs
@pytest.mark.parametrize('width', [1280, 500])
@pytest.mark.parametrize(
    'page',
    [
        'index',
        'methods/index',
        'methods/wsam',
        'settings',
        'zoo',
        'notebooks/flatness',
        'reference/sharpness',
    ],
)
def test_a_page_is_no_wider_than_its_window(site, page, width):
    """Wide tables scroll by themselves; every picture is there."""
    if not shutil.which('chromium'):
        pytest.skip('there is no chromium')
    path = site / f'{page}.html'
    looked_at = path.with_name(f'{path.stem}_looked_at.html')
    looked_at.write_text(path.read_text().replace('</head>', f'{LOOK}</head>'))
    done = subprocess.run(
        [
            'chromium',
            '--headless',
            '--no-sandbox',
            '--disable-gpu',
            f'--window-size={width},2000',
            '--virtual-time-budget=5000',
            '--dump-dom',
            looked_at.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    seen = json.loads(html.unescape(re.search('<title>(.*?)</title>', done.stdout, re.DOTALL)[1]))
    assert seen == {'wide': 0, 'broken': []}


@pytest.mark.slow
@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path):
    nbclient, nbformat = map(pytest.importorskip, ('nbclient', 'nbformat'))
    nbclient.NotebookClient(
        nbformat.read(path, as_version=4), timeout=600, resources={'metadata': {'path': str(ROOT)}}
    ).execute()
