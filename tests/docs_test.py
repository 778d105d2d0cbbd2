"""README and the site: links, anchors, pages; and, where its tools are, the site itself.

The latter by ./scripts/docs.sh test, which builds the site strictly, looks at it in a browser and
executes the notebooks.
"""

import ast
import functools
import html
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib

import doc_commands
import pytest
import yaml
from helpers import ROOT

from sam_jax import settings, sharpness

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


def _torn_tables(text):
    """First lines of blocks of table rows that have no head."""
    blocks = re.findall(r'(?:^\|.*\n?)+', _prose(text), re.MULTILINE)
    return [b.splitlines()[0] for b in blocks if not re.match(r'.*\n\|[-:| ]+\|(\n|$)', b)]


def test_no_table_is_torn(sources):
    assert {name: torn for name, text in sources.items() if (torn := _torn_tables(text))} == {}
    assert _torn_tables('| a |\n|---|\n| b |\n\n| c |\n') == ['| c |']


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


@pytest.fixture(scope='module')
def commands(sources):
    """[(page, command)] of README, the pages and the configs' docstrings."""
    texts = dict(sources)
    for path in (ROOT / 'configs').glob('*.py'):
        texts[f'configs/{path.name}'] = ast.get_docstring(ast.parse(path.read_text())) or ''
    return [
        (page, command)
        for page, text in texts.items()
        for command in doc_commands.shown(text)
        # Of the examples that the reader of these pages writes. They were followed once.
        if not (page.startswith('docs/contribute/') and re.search('stripes|plain|halfway', command))
    ]


def test_commands_are_right(commands, tmp_path):
    answers = doc_commands.problems([command for _, command in commands], tmp_path)
    wrong = [
        f'{page}: {command}: {answer}'
        for (page, command), answer in zip(commands, answers)
        if answer
    ]
    assert not wrong, '\n'.join(wrong)
    names = {doc_commands.split(command)[0] for _, command in commands}
    assert len(commands) > 120 and names >= {*doc_commands.SCRIPTS.values()}
    assert {f'./{path.relative_to(ROOT)}' for path in (ROOT / 'scripts').glob('*.sh')} - names == {
        './scripts/environment.sh'  # sourced by the others
    }
    benchmarks = {p.stem for p in (ROOT / 'sam_jax' / 'benchmarks').glob('*.py')}
    assert {f'sam_jax.benchmarks.{name}' for name in benchmarks - {'__init__', 'pytorch_peer'}} <= (
        names
    )


WRONG = {
    'sam-jax-train --confg=digits --workdir=x': 'confg',
    'sam-jax-train --config=digit --workdir=x': 'No such file',
    'sam-jax-train --config=digits:nois=0.4 --workdir=x': "'nois'",
    'sam-jax-train --config=digits --config.sam.roh=1': 'sam.roh',
    'sam-jax-train --config=digits --config.sam.rho=-1': 'sam.rho is -1',
    'sam-jax-train --config=digits --config.batch_size=many': 'batch_size=many',
    'sam-jax-train digits --workdir=x': "'digits' is no flag",
    './scripts/train.sh configs/digit.py': 'No such file',
    'configs/cifar.py:model=vgg17': 'vgg17',
    './scripts/trian.sh configs/digits.py': 'trian.sh is not there',
    './scripts/docs.sh sevre': "'sevre'",
    './scripts/launch_slurm.sh --node=4 configs/digits.py --workdir=DIR': '--node=4',
    './scripts/launch_local.sh 2 configs/digits.py:x=1 --workdir=DIR': "'x'",
    'sam-jax-sweep --config=digits --sweep=sam.roh=1,2 --workdir=x': 'sam.roh',
    'sam-jax-sweep --config=digits --sweep=sam.rho=-1 --workdir=x': 'sam.rho is',
    'sam-jax-sweep --config=digits --sweep=1 --workdir=x': "'1'",
    'sam-jax-sweep --config=digits --seeds=5': '--workdir',
    'sam-jax-sweep --config=digits --sweep=sam.rho=1,2,3 --search=halving --workdir=x': (
        'data.validation False'
    ),
    'sam-jax-sweep --config=digits --sweep=sam.rho=1,2,3 --search=halving --engine=print '
    '--workdir=x': '--engine is print',
    'sam-jax-jobset --name=x --image=i --target=tpu:v5e:4x4 --hosts=2 --claim=c '
    '--config=digits --workdir=/data/x': '--hosts is 2; tpu:v5e:4x4 has 4',
    'sam-jax-jobset --name=x --image=i --target=tpu:v5e:4x4 --claim=c --config=digits '
    '--workdir=/home/x': 'must lie on the volume, under /data',
    'sam-jax-jobset --name=x --target=tpu:v5e:4x4 --claim=c --config=digits --workdir=/data/x': (
        '--image is missing'
    ),
    'sam-jax-analyze --workdir=RUN --what=spectra': "'spectra'",
    'sam-jax-preview --config=digits --what=op': 'op',
    'sam-jax-report runs/rho --ouf=x': 'ouf',
    'sam-jax-figure 4 runs/rho --ouf=x': 'ouf',
    'sam-jax-nothing --x=1': 'sam-jax-nothing',
    'taskset -c 0 python -m sam_jax.benchmarks.step --case=digits': 'case',
    'python -m sam_jax.benchmarks.step --methods=sma': 'sma',
    'python -m sam_jax.benchmarks.hessian --examples=few': 'few',
    'python -m sam_jax.benchmarks.quantize_digits --bitz=4': '--bitz',
    'python -m sam_jax.nothing --x=1': 'nothing',
}


@pytest.fixture(scope='module')
def noticed(tmp_path_factory):
    return doc_commands.problems([*WRONG], tmp_path_factory.mktemp('wrong'))


@pytest.mark.parametrize('i', range(len(WRONG)), ids=lambda i: [*WRONG][i])
def test_wrong_commands_are_noticed(i, noticed):
    assert [*WRONG.values()][i] in noticed[i], noticed[i]


def test_commands_are_found():
    text = """Inline `sam-jax-doctor`, `sam_jax`, `./scripts/test.sh -m slow` and
`XLA_FLAGS=--x python -m sam_jax.benchmarks.step`.

    sam-jax-train --config=digits \\
        --workdir=DIR    # a comment

```bash
python -m sam_jax.cli.doctor
import jax
```
"""
    assert list(map(doc_commands.split, doc_commands.shown(text))) == [
        ('sam_jax.main', ['--config=digits', '--workdir=DIR']),
        ('sam_jax.cli.doctor', []),
        ('sam_jax.cli.doctor', []),
        ('./scripts/test.sh', ['-m', 'slow']),
        ('sam_jax.benchmarks.step', []),
    ]


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


# What a page is like once it is shown, told to the page that frames it: a window of the browser is
# never narrower than 500 pixels, a frame is.
LOOK = """
<script>addEventListener('load', () => setTimeout(() => parent.postMessage(JSON.stringify({
  width: innerWidth,
  wide: Math.max(0, document.documentElement.scrollWidth - innerWidth),
  broken: [...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)}), '*'),
500));</script>
"""
FRAME = """
<script>addEventListener('message', e => { document.title = e.data; });</script>
<iframe src="PAGE" style="width: WIDTHpx; height: 2000px; border: 0"></iframe>
"""


def _shown(page, width):
    """Returns {'width', 'wide': pixels beyond it, 'broken': images} of a page, a pathlib.Path."""
    looked_at = page.with_name(f'{page.stem}_looked_at.html')
    looked_at.write_text(page.read_text().replace('</head>', f'{LOOK}</head>'))
    frame = page.with_name(f'{page.stem}_frame.html')
    frame.write_text(FRAME.replace('PAGE', looked_at.name).replace('WIDTH', str(width)))
    done = subprocess.run(
        [
            'chromium',
            '--headless',
            '--no-sandbox',
            '--disable-gpu',
            '--window-size=1400,2100',
            '--virtual-time-budget=5000',
            '--dump-dom',
            frame.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    return json.loads(html.unescape(re.search('<title>(.*?)</title>', done.stdout, re.DOTALL)[1]))


needs_chromium = pytest.mark.skipif(not shutil.which('chromium'), reason='there is no chromium')


@pytest.mark.docs
@needs_chromium
@pytest.mark.parametrize('width', [1280, 400])
@pytest.mark.parametrize(
    'page',
    [
        'index',
        'methods/index',
        'methods/gsam',
        'methods/wsam',
        'methods/measured',
        'settings',
        'zoo',
        'notebooks/flatness',
        'reference/experiment',
        'reference/sharpness',
    ],
)
def test_a_page_is_no_wider_than_its_window(site, page, width):
    """Wide tables scroll by themselves; every picture is there."""
    assert _shown(site / f'{page}.html', width) == {'width': width, 'wide': 0, 'broken': []}


@pytest.mark.docs
@needs_chromium
def test_a_wide_page_is_noticed(tmp_path):
    page = tmp_path / 'wide.html'
    page.write_text(
        '<html><head></head><body style="margin: 0"><div style="width: 700px">x</div>'
        '<img src="none.png"></body></html>'
    )
    seen = _shown(page, 400)
    assert seen['wide'] == 300 and len(seen['broken']) == 1


@pytest.mark.docs
@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path):
    import nbclient
    import nbformat

    nbclient.NotebookClient(
        nbformat.read(path, as_version=4), timeout=600, resources={'metadata': {'path': str(ROOT)}}
    ).execute()
