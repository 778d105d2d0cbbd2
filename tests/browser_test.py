"""A report in a real browser: ./scripts/test_browser.sh."""

import html
import json
import re
import subprocess

import numpy as np
import pytest
from PIL import Image
from report_runs import write_sweep
from results_test import run_report

pytestmark = pytest.mark.browser

# What the page is like once it is shown, left in its title.
LOOK = """
<script>addEventListener('load', () => {
  const images = [...document.images].map(i => ({
    alt: i.alt, complete: i.complete, natural: i.naturalWidth, width: i.width, height: i.height}));
  const tables = [...document.querySelectorAll('table')].map(t => ({
    rows: t.rows.length, cells: new Set([...t.rows].map(r => r.cells.length)).size}));
  document.title = JSON.stringify({images, tables, fetched: performance.getEntriesByType('resource')
    .map(r => r.name).filter(n => !n.startsWith('data:')),
    wide: document.documentElement.scrollWidth - innerWidth,
    headings: [...document.querySelectorAll('h1, h2')].map(h => h.textContent)});
});</script>
"""


def _browser(page, width, *flags):
    done = subprocess.run(
        ['chromium', '--headless', '--no-sandbox', '--disable-gpu', f'--window-size={width},2400',
         '--virtual-time-budget=5000', *flags, page.as_uri()],
        capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize('width', [1200, 500])
def test_a_report_is_shown_whole(width, tmp_path):
    write_sweep(tmp_path / 'runs')
    assert run_report(tmp_path / 'runs').returncode == 0
    page = tmp_path / 'runs' / 'report' / 'report.html'
    looked_at = tmp_path / 'looked_at.html'
    looked_at.write_text(page.read_text().replace('</head>', f'{LOOK}</head>'))
    title = re.search('<title>(.*?)</title>', _browser(looked_at, width, '--dump-dom'), re.DOTALL)
    seen = json.loads(html.unescape(title[1]))
    assert [i['alt'] for i in seen['images']] == [
        'Error against rho', 'Error reduction by switching to SAM', 'Training loss and test error']
    for image in seen['images']:
        assert image['complete'] and image['natural'] > 300 and image['height'] > 50
        assert image['width'] <= width
    assert [t['rows'] for t in seen['tables']] == [1 + 5, 1 + 1]
    assert all(t['cells'] == 1 for t in seen['tables']), 'rows of different length'
    assert seen['wide'] <= 0, 'wider than the window'
    assert not seen['fetched']
    assert len(seen['headings']) == 6

    shot = tmp_path / 'shot.png'
    _browser(page, width, f'--screenshot={shot}')
    pixels = np.asarray(Image.open(shot).convert('RGB')).reshape(-1, 3)
    colored = (np.ptp(pixels.astype(int), axis=1) > 60).mean()
    assert colored > 1e-3, 'no curve is to be seen'
