"""Reports and the page of a sweep in a real browser: ./scripts/test_browser.sh."""

import html
import json
import re
import subprocess

import numpy as np
import pytest
from PIL import Image
from report_runs import digits_config, write_many, write_run, write_sweep

from sam_jax.experiments import grid, page, report
from sam_jax.experiments.engines import Status

pytestmark = pytest.mark.browser

# What the page is like once it is shown, told to the page around it.
LOOK = """
<script>addEventListener('load', () => {
  const drawn = i => {
    const bytes = Uint8Array.from(atob(i.src.split(',')[1]), c => c.charCodeAt(0));
    const svg = document.body.appendChild(document.importNode(new DOMParser().parseFromString(
      new TextDecoder().decode(bytes), 'image/svg+xml').documentElement, true));
    const own = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll('text')];
    const seen = {
      texts: texts.map(t => t.textContent.trim()),
      ticks: [...svg.querySelectorAll('g[id^=xtick] text')].map(t => t.textContent.trim()),
      cut: texts.filter(t => { const r = t.getBoundingClientRect(); return r.left < own.left - 1
        || r.right > own.right + 1 || r.top < own.top - 1 || r.bottom > own.bottom + 1; })
        .map(t => t.textContent.trim())};
    svg.remove();
    return seen;
  };
  const images = [...document.images].map(i => ({
    alt: i.alt, complete: i.complete, natural: i.naturalWidth, width: i.width, height: i.height,
    right: (i.closest('div.box') || i).getBoundingClientRect().right}));
  const tables = [...document.querySelectorAll('table')].map(t => ({
    rows: t.rows.length, cells: new Set([...t.rows].map(r => r.cells.length)).size,
    head: [...t.rows[0].cells].map(c => c.textContent), box: t.parentElement.clientWidth,
    inside: t.parentElement.scrollWidth, scrolled: (t.parentElement.scrollLeft = 1e6,
    t.parentElement.scrollLeft)}));
  const page = {images, tables, scrollWidth: document.scrollingElement.scrollWidth, innerWidth,
    fetched: performance.getEntriesByType('resource').map(r => r.name)
      .filter(n => !n.startsWith('data:')),
    headings: [...document.querySelectorAll('h1, h2')].map(h => h.textContent)};
  page.images.forEach((seen, i) => Object.assign(seen, drawn(document.images[i])));
  parent.postMessage(JSON.stringify(page), '*');
});</script>
"""
# A window has a least width, a frame in it has none.
FRAME = """<!doctype html><body style="margin: 0">
<script>addEventListener('message', e => document.title = e.data);</script>
<iframe src="{address}" style="width: {width}px; height: 2400px; border: 0"></iframe>"""
WIDTHS = [1280, 400]


def _browser(page, width, *flags):
    frame = page.with_name(f'frame_{width}.html')
    frame.write_text(FRAME.format(address=page.as_uri(), width=width))
    done = subprocess.run(
        [
            'chromium',
            '--headless',
            '--no-sandbox',
            '--disable-gpu',
            '--window-size=1280,2400',
            '--virtual-time-budget=5000',
            *flags,
            frame.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _look(page, width):
    """What a browser shows of a page, and what holds for every page: that all of it fits."""
    looked_at = page.with_name(f'looked_at_{width}.html')
    looked_at.write_text(page.read_text().replace('</head>', f'{LOOK}</head>'))
    title = re.search('<title>(.*?)</title>', _browser(looked_at, width, '--dump-dom'), re.DOTALL)
    seen = json.loads(html.unescape(title[1]))
    assert seen['innerWidth'] == width
    assert seen['scrollWidth'] <= seen['innerWidth'], 'wider than the window'
    assert not seen['fetched']
    for table in seen['tables']:
        assert table['cells'] == 1, 'rows of different length'
        assert table['box'] <= width
        # What does not fit can be scrolled to.
        assert table['scrolled'] == pytest.approx(table['inside'] - table['box'], abs=1)
    for image in seen['images']:
        assert image['complete'] and image['natural'] > 300 and image['height'] > 50
        assert image['right'] <= width and not image['cut']
        if 'epoch' in image['texts']:
            assert image['ticks'] and all(tick.isdigit() for tick in image['ticks'])
    return seen


def _colored(page, width, folder):
    """The share of the page's pixels that are no grey."""
    shot = folder / f'shot_{width}.png'
    _browser(page, width, f'--screenshot={shot}')
    pixels = np.asarray(Image.open(shot).convert('RGB')).reshape(-1, 3)
    return (np.ptp(pixels.astype(int), axis=1) > 60).mean()


@pytest.fixture(scope='module')
def reports(tmp_path_factory):
    """{name: report.html} of few settings and of many."""
    folder = tmp_path_factory.mktemp('reports')
    for name, write in (('few', write_sweep), ('many', write_many)):
        write(folder / name)
        report.write([str(folder / name)], str(folder / name / 'report'))
    return {name: folder / name / 'report' / 'report.html' for name in ('few', 'many')}


@pytest.mark.parametrize('width', WIDTHS)
def test_a_report_is_shown_whole(width, reports, tmp_path):
    seen = _look(reports['few'], width)
    assert [i['alt'].partition(':')[0] for i in seen['images']] == [
        'Error against rho',
        'Error reduction by switching to SAM',
        *['Training loss and test error'] * 4,
    ]
    assert [t['rows'] for t in seen['tables']] == [1 + 5, 1 + 1]
    assert len(seen['headings']) == 6
    assert _colored(reports['few'], width, tmp_path) > 1e-3, 'no curve is to be seen'


@pytest.mark.parametrize('width', WIDTHS)
def test_a_report_of_many_settings(width, reports, tmp_path):
    seen = _look(reports['many'], width)
    table = seen['tables'][0]
    assert table['rows'] == 1 + 2 * 4 * 4 + 1
    assert {'model', 'label_noise', 'rho'} <= {*table['head']}
    assert table['inside'] > table['box'] or width > 1000, 'the wide table is in a box of its own'
    titles = {i['alt'].partition(': ')[2] for i in seen['images'] if 'Training' in i['alt']}
    assert {
        f'{model}, label noise {noise}'
        for model in ('wrn10_1', 'wrn28_10')
        for noise in (0, 0.2, 0.4, 0.8)
    } <= titles
    ends = {tick for i in seen['images'] if 'epoch' in i['texts'] for tick in i['ticks']}
    assert {'0', '1', '2', '60', '1750'} <= ends, 'those of runs of 1, 2, 60 and 1800 epochs'
    assert _colored(reports['many'], width, tmp_path) > 1e-3, 'no curve is to be seen'


@pytest.mark.parametrize('width', WIDTHS)
def test_the_page_of_a_sweep(width, tmp_path):
    runs, statuses = [], {}
    for i in range(12):
        name = f'learning_rate={i},warmup_epochs=5,init_from=a_long_name_of_a_file.npz,seed={i}'
        runs.append(grid.Run(name, str(tmp_path / name), digits_config(), ()))
        if i < 8:
            write_run(tmp_path / name, digits_config(), error=2 + i, epochs=60)
        state = 'finished' if i < 8 else 'waiting' if i < 11 else 'failed'
        statuses[name] = Status(state, 'status 1: ' + 'a_word_without_an_end' * 20)
    page.Live(runs, statuses).update()
    file = tmp_path / page.FILE
    file.write_text(re.sub('<meta http-equiv.*?>', '', file.read_text()))  # the look is one
    seen = _look(file, width)
    assert seen['tables'][0]['rows'] == 1 + 12
    assert [i['alt'] for i in seen['images']] == ['Test error']
    assert seen['headings'][1:] == ['Test error', 'Failed']
    assert _colored(file, width, tmp_path) > 1e-3, 'no curve is to be seen'
