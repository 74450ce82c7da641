"""The site as it is before Quarto: pages processed by nbdev, contents, settings; then rendered to HTML and looked at in a browser.

The last part needs nbconvert, playwright and chromium: `pip install nbconvert playwright`, Debian's package chromium.
"""
import os, re, shutil, subprocess, sys
from pathlib import Path

import nbformat
import pytest

root = Path(__file__).resolve().parent.parent
pages = sorted(o.relative_to(root/'nbs') for o in (root/'nbs').rglob('*.ipynb')
               if not o.name.startswith('_') and '.ipynb_checkpoints' not in o.parts)
by_page = pytest.mark.parametrize('page', pages, ids=lambda o: o.stem)


def run(*command, cwd=root, **kw):
    res = subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True, **kw)
    assert res.returncode == 0, res.stdout[-2000:] + res.stderr[-2000:]
    return res.stdout


@pytest.fixture(scope='module')
def processed(tmp_path_factory):
    "The folder of pages that nbdev makes for Quarto: hidden cells gone, `show_doc` run."
    copy = tmp_path_factory.mktemp('site')
    for o in ('nbs', 'miniai', 'tests'): shutil.copytree(root/o, copy/o)
    for o in ('settings.ini', 'README.md'): shutil.copy(root/o, copy)
    # what `nbdev_proc_nbs` does; the command itself would install Quarto, and the project, where there is no Quarto
    run('-c', 'from nbdev.quarto import refresh_quarto_yml, proc_nbs; refresh_quarto_yml(); proc_nbs(n_workers=0)', cwd=copy,
        env={**os.environ, 'PYTHONPATH': str(root)})
    return copy/'_proc'


def test_contents_are_what_the_pages_make(): run('.ci/sidebar.py', '--check')


def test_settings_of_the_site(processed):
    yaml = pytest.importorskip('yaml')
    site = yaml.safe_load((processed/'_quarto.yml').read_text())
    for o in (*site['metadata-files'], site['format']['html']['css']): assert (processed/o).exists(), o
    listed = re.findall(r'- (\S+\.ipynb)', (processed/'sidebar.yml').read_text())
    assert sorted(listed) == sorted(o.as_posix() for o in pages)
    made = yaml.safe_load((processed/'nbdev.yml').read_text())
    assert made['website']['title'] == 'miniai' and made['project']['output-dir'] == '_docs'


def source(page): return nbformat.read(root/'nbs'/page, 4).cells


@by_page
def test_page_shows_its_public_names(processed, page):
    "Every exported function and class with its arguments, where it is defined; nothing hidden comes through."
    cells = nbformat.read(processed/page, 4).cells
    shown = '\n'.join(str(o.get('data', {}).get('text/markdown', '')) for c in cells if c.cell_type == 'code'
                      for o in c.outputs)
    for cell in source(page):
        if not re.search(r'^#\|\s*export\s*$', cell.source, re.M): continue
        for nm in re.findall(r'^(?:def|class) ([a-zA-Z]\w*)', cell.source, re.M):
            if not re.search(rf'^@patch.*\n([@#].*\n)*def {nm}\b', cell.source, re.M): assert f'### {nm}\n' in shown, nm
    assert not any('nbdev_export()' in c.source for c in cells)


# --- in a browser ---

widths = dict(desktop=1280, phone=390)
look = """() => {
    const wide = o => o.scrollWidth > o.clientWidth + 1 && !['auto', 'scroll'].includes(getComputedStyle(o).overflowX);
    const outside = o => o.getBoundingClientRect().right > document.documentElement.clientWidth + 1;
    const scrolls = o => { for (; o; o = o.parentElement)
        if (['auto', 'scroll', 'hidden'].includes(getComputedStyle(o).overflowX) && o !== document.body) return true; return false; };
    const said = o => o.tagName + ' ' + (o.alt || o.innerText || '').slice(0, 60);
    const main = document.querySelector('main') || document.body;
    return {
        page: document.documentElement.scrollWidth - document.documentElement.clientWidth,
        figures: [...main.querySelectorAll('img, svg')].filter(o => o.closest('.jp-OutputArea-output') && outside(o) && !scrolls(o)).map(said),
        tables: [...main.querySelectorAll('table')].filter(o => outside(o) && !scrolls(o)).map(said),
        broken: [...main.querySelectorAll('img')].filter(o => o.complete && !o.naturalWidth).map(said),
        errors: [...main.querySelectorAll('[data-mime-type="application/vnd.jupyter.error"], .jp-mod-error')].map(said),
        stderr: [...main.querySelectorAll('[data-mime-type="application/vnd.jupyter.stderr"]')].map(said),
        bars: [...main.querySelectorAll('progress, .jupyter-widgets')].map(said)}}"""


@pytest.fixture(scope='module')
def browser():
    playwright = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
    pytest.importorskip('nbconvert', reason='nbconvert is not installed')
    chromium = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
    if not chromium: pytest.skip('there is no chromium')
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=['--no-sandbox'])
        yield browser
        browser.close()


@by_page
def test_page_in_a_browser(browser, processed, page, tmp_path):
    "No error, no bar, no broken picture, and nothing wider than the window, on a desk and on a phone."
    from nbconvert import HTMLExporter
    html = tmp_path/f'{page.stem}.html'
    html.write_text(HTMLExporter(embed_images=True).from_filename(str(processed/page))[0], encoding='utf-8')
    for device, width in widths.items():
        tab = browser.new_page(viewport=dict(width=width, height=900))
        tab.goto(html.as_uri(), wait_until='domcontentloaded')
        found = {k: v for k, v in tab.evaluate(look).items() if v}
        if folder := os.environ.get('MINIAI_SCREENSHOTS'): tab.screenshot(path=f'{folder}/{page.stem}_{device}.png', full_page=True)
        tab.close()
        assert not found, f'{device}: {found}'
