"""The pages: clean, small, without errors, with links that lead somewhere; tutorials with pictures and proofs; what contributing.ipynb says to do, done; the site.

The last part needs nbconvert, playwright and chromium: `pip install nbconvert playwright`, Debian's package chromium.
"""
import ast, importlib, os, re, shutil, subprocess, sys
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pytest

from notebooks import by_page, by_room, cells, code, markdown, outputs, pages, root, rooms, script

tutorials = [o for o in pages if o.parent.name == 'tutorials']
chromium = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')


# --- rules: what is wrong with a page, as a list ---

def clean(page):
    from nbdev.clean import clean_nb
    from execnb.nbio import nb2str, read_nb
    nb = read_nb(page)
    before = nb2str(nb)
    clean_nb(nb)
    return ['run nbdev_clean']*(nb2str(nb) != before)


def small(page):
    "A notebook can be read as a diff and cloned fast. A JPEG beside a PNG is the same picture twice."
    size = page.stat().st_size
    figures = [len(o['data']['image/png'])*3//4 for o in outputs(page) if 'image/png' in o.get('data', {})]
    return [f'{size} bytes']*(size > 150_000) + [f'a figure of {o} bytes' for o in figures if o > 40_000] + \
        ['a JPEG' for o in outputs(page) if 'image/jpeg' in o.get('data', {})]


def of_no_machine(page): return re.findall(r'/(?:home|root|Users|tmp|work)/\w+', page.read_text(encoding='utf-8'))


def quiet(page):
    "No errors, no bars, no widgets in the outputs that are kept."
    wrong = []
    for o in outputs(page):
        text = ''.join(o.get('text', '')) + ''.join(o.get('data', {}).get('text/plain', ''))
        if o['output_type'] == 'error' or o.get('name') == 'stderr': wrong.append(str(o)[:200])
        if 'Traceback' in text or '\r' in text or re.search(r'\d+%\|', text): wrong.append(text[:200])
        wrong += [k for k in o.get('data', {}) if 'widget' in k]
    return wrong


def runs(page):
    "nbdev_test leaves out cells marked `slow`, and the page tells its reader so; no cell is left out in another way."
    slow = [o for o in code(page) if re.search(r'^#\|\s*slow', o['source'], re.M)]
    wrong = [o for c in code(page) for o in c['source'].splitlines() if re.match(r'#\|\s*(eval: *false|skip|cuda)', o)]
    if slow and '--flags slow' not in markdown(page): wrong.append('slow cells, and no word about them')
    if len(slow) >= len(code(page))/2 and slow and page.parent.name != 'explanations': wrong.append('most cells are slow')
    return wrong


def linked(page):
    targets = [o.split('#')[0] for o in re.findall(r'\]\(([^)\s]+)\)', markdown(page)) if not re.match(r'[a-z]+:|#', o)]
    return [o for o in targets if not (page.parent/o).exists()]


@by_page
@pytest.mark.parametrize('rule', [clean, small, of_no_machine, quiet, runs, linked], ids=lambda o: o.__name__)
def test_page(page, rule): assert not rule(page)


def begins(room):
    first, second = (o['source'] for o in cells(room)[:2])
    return first.strip() == f'#| default_exp {room.stem[3:]}' and re.match(r'# .+\n\n> .+', second)


def test_rooms_begin_with_title_and_summary(): assert not [o.stem for o in rooms if not begins(o)]


@by_room
def test_room_shows_its_public_names(room):
    "Every exported function and class can be shown with its arguments."
    from nbdev.showdoc import show_doc
    module = importlib.import_module(f'miniai.{room.stem[3:]}')
    for nm in module.__all__:
        o = getattr(module, nm)
        if callable(o) and getattr(o, '__module__', '') == module.__name__: assert f'### {o.__name__}\n' in show_doc(o)._repr_markdown_()


# --- tutorials ---

def test_there_are_the_tutorials():
    wanted = {'first_fit', 'see_inside', 'any_loop', 'write_a_callback', 'write_a_lens', 'activation_functions',
              'why_is_my_net_dead', 'scale_out', 'from_the_course'}
    assert wanted <= {o.stem for o in tutorials}


@pytest.mark.parametrize('page', tutorials, ids=lambda o: o.stem)
def test_tutorial(page):
    "It is in the README, begins with title and summary, has pictures and proofs, and lines that fit."
    assert f'nbs/tutorials/{page.name}' in (root/'README.md').read_text(encoding='utf-8')
    assert re.match(r'# .+\n\n> .+', cells(page)[0]['source'])
    assert any('image/png' in o.get('data', {}) for o in outputs(page))
    source = '\n'.join(o['source'] for o in code(page))
    assert re.search(r'^\s*(assert |test_)', source, re.M)
    assert not [o for o in source.splitlines() if len(o) > 140 and not o.startswith('#|')]


# --- what contributing.ipynb says to do, word for word, in a copy of the project ---

contributing = markdown(root/'nbs'/'contributing.ipynb')


def commands(title):
    section = re.search(rf'^## {title}\n(.*?)(?=^## |\Z)', contributing, re.M | re.S)[1]
    return re.search(r'^```sh\n(.*?)^```', section, re.M | re.S)[1]


@pytest.fixture
def sh(tmp_path):
    "Runs a command in a copy of the project, which is a repository with nothing uncommitted."
    listed = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard'], cwd=root, capture_output=True, text=True)
    if listed.returncode: pytest.skip('not a git checkout')
    copy = tmp_path/'copy'
    for o in listed.stdout.splitlines():
        if not (root/o).exists(): continue
        (copy/o).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root/o, copy/o)
    env = {k: v for k, v in os.environ.items() if not k.startswith(('GIT_', 'PYTEST_'))}
    path = f'{Path(sys.executable).parent}{os.pathsep}{env["PATH"]}'
    env |= dict(PATH=path, PYTHONPATH=str(copy), GIT_AUTHOR_NAME='a', GIT_AUTHOR_EMAIL='a@b', GIT_COMMITTER_NAME='a',
                GIT_COMMITTER_EMAIL='a@b', HOME=str(tmp_path), PYTHONDONTWRITEBYTECODE='1')
    def run(command):
        res = subprocess.run(['bash', '-euo', 'pipefail', '-c', command], cwd=copy, env=env, capture_output=True, text=True)
        assert res.returncode == 0, f'{command}\n{res.stdout[-3000:]}\n{res.stderr[-3000:]}'
        return res.stdout
    run('git init -q && git add -A && git commit -qm all')
    run.copy = copy
    return run


def rewrite(path, old, new):
    "Change what stands once in a file."
    text = path.read_text(encoding='utf-8')
    assert text.count(old) == 1, f'{old!r} in {path.name}'
    path.write_text(text.replace(old, new), encoding='utf-8')


def uncommitted(out): return {o for o in out.splitlines() if re.match('( M|[?]{2}) ', o)}


def test_hooks_and_a_changed_page(sh):
    "What the hooks write is not the project's; of a changed page the module has the change; nothing else differs afterwards."
    assert 'nbdev_install_hooks' in commands('Set up')
    sh('nbdev_install_hooks')
    assert 'nbdev_merge' in sh('git config --get merge.nbdev-merge.driver') and sh('git status --short') == ''
    path = sh.copy/'nbs'/'27_conv.ipynb'
    nb = nbformat.read(path, 4)
    next(o for o in nb.cells if 'def conv(' in o.source).source += '\n\ndef _twice(x): return 2*x   # a change'
    nb.metadata['something'] = 'an editor wrote'
    nbformat.write(nb, path)
    steps = 'nbdev_export', 'nbdev_test', 'nbdev_clean', 'git status --short'
    assert tuple(o for line in commands('Change something').splitlines() for o in steps if line.startswith(o)) == steps
    # in this process: its own take longer to start
    out = sh('nbdev_export\nnbdev_test --n_workers 0 --path nbs/27_conv.ipynb\nnbdev_clean --fname nbs/27_conv.ipynb\ngit status --short')
    assert uncommitted(out) == {' M miniai/_modidx.py', ' M miniai/conv.py', ' M nbs/27_conv.ipynb'}
    assert 'def _twice' in (sh.copy/'miniai'/'conv.py').read_text(encoding='utf-8')
    assert 'an editor wrote' not in path.read_text(encoding='utf-8')


templates = dict(callback='28_my_callback', statistic='17_my_statistic', rule='59_my_rule', lens='62_my_lens')   # -> a free number


def test_there_is_a_template_of_each():
    found = {o.stem: max(len(c['source'].splitlines()) for c in code(o)) for o in pages if o.parent.name == 'templates'}
    assert set(found) == {f'_{o}' for o in templates} and max(found.values()) <= 40


def test_the_numbers_of_the_recipe_are_free():
    "Those in its table, and that of its command."
    free, table = script('imports').free(), re.search(r'^\| template .*?\n\n', contributing, re.M | re.S)[0]
    named = [o.split('|')[-2] for o in re.findall(r'`_\w+.ipynb`.*', table)] + [commands('A room of your own')]
    assert len(named) == len(templates) + 1
    taken = set(re.findall(r'\b\d\d(?=\b|_my)', ' '.join([*named, *templates.values()]))) - set(free)
    assert not taken, f'rooms have {taken}; name numbers that are free in nbs/contributing.ipynb, and in `templates` here: {free}'


def test_the_templates_become_rooms(sh):
    """By the command of the recipe, all at once: it wants a row in the index, and `held` raised; then it makes what is made, and tests.

    Only the new pages, what is made of all pages and the two edited files differ afterwards."""
    recipe = commands('A room of your own')
    assert 'cp nbs/templates/_callback.ipynb nbs/28_my_callback.ipynb\n.ci/room 28_my_callback\n' in recipe
    for nm, room in templates.items(): shutil.copy(sh.copy/'nbs'/'templates'/f'_{nm}.ipynb', sh.copy/'nbs'/f'{room}.ipynb')
    every = recipe.replace('.ci/room 28_my_callback', f'.ci/room {" ".join(templates.values())}')
    assert 'add to its table: | [28_my_callback](28_my_callback.ipynb)' in sh(f'({every}) 2>&1 || true')
    first = '"| [00_device](00_device.ipynb)'
    rows = ''.join(f'"| [{o}]({o}.ipynb) | of a template |\\n",\n    ' for o in templates.values())
    rewrite(sh.copy/'nbs'/'index.ipynb', first, rows + first)
    rewrite(sh.copy/'tests'/'test_project.py', 'held = dict(total=', 'held = dict(total=1_000+')
    rewrite(sh.copy/'tests'/'test_project.py', 'cell=40, names=', 'cell=1_000, names=10+')   # of cells elsewhere others tell
    out = sh(every)
    assert re.search(r'\d+ passed', out) and 'failed' not in out
    made = 'README.md', 'miniai/_modidx.py', 'nbs/contributing.ipynb', 'nbs/index.ipynb', 'nbs/sidebar.yml', 'tests/test_project.py'
    assert uncommitted(out) == {f' M {o}' for o in made} | {f'?? {o}' for room in templates.values()
                                                           for o in (f'miniai/{room[3:]}.py', f'nbs/{room}.ipynb')}
    assert '| `MyCB` | Records the largest' in (sh.copy/'README.md').read_text(encoding='utf-8')


def test_the_command_for_a_room_says_what_is_wrong(sh):
    assert 'there is no nbs/28_none.ipynb; give the name of a page' in sh('.ci/room 28_none 2>&1 || true')
    assert 'give the names of pages' in sh('.ci/room 2>&1 || true')


def test_everything_it_names_is_there():
    for o in re.findall(r'`((?:\.ci|tests|nbs|miniai)/[\w./]+\.\w+)`', contributing): assert re.search('NN_|/name', o) or (root/o).exists(), o


# --- the site: pages processed by nbdev, settings; then rendered to HTML and looked at in a browser ---

in_browser = bool(chromium and find_spec('nbconvert') and find_spec('playwright'))
published = [o for o in pages if not o.name.startswith('_')]
few = [o for o in published if o.stem in ('index', '27_conv', 'contributing', 'first_fit')]
shown = published if in_browser else few


@pytest.fixture(scope='module')
def processed(tmp_path_factory):
    "The folder of pages that nbdev makes for Quarto: hidden cells gone, `show_doc` run. A few of them where there is no browser."
    copy = tmp_path_factory.mktemp('site')
    for o in ('nbs', 'miniai', 'tests'): shutil.copytree(root/o, copy/o)
    for o in ('settings.ini', 'README.md'): shutil.copy(root/o, copy)
    for o in pages:
        if o not in shown: (copy/o.relative_to(root)).unlink()
    # what `nbdev_proc_nbs` does; the command itself would install Quarto, and the project, where there is no Quarto
    res = subprocess.run([sys.executable, '-c', 'from nbdev.quarto import refresh_quarto_yml, proc_nbs; refresh_quarto_yml(); proc_nbs(n_workers=0)'],
                         cwd=copy, env={**os.environ, 'PYTHONPATH': str(root)}, capture_output=True, text=True)
    assert res.returncode == 0, res.stdout[-2000:] + res.stderr[-2000:]
    return copy/'_proc'


def site_runs(cell):
    "nbdev runs a cell for the site if it is exported, or imports anything, be it among other lines."
    if 'nbdev_export()' in cell['source']: return False
    return re.search(r'^#\|\s*export|^show_doc', cell['source'], re.M) or \
        any(isinstance(o, (ast.Import, ast.ImportFrom)) for o in ast.walk(ast.parse(cell['source'])))


@by_room
def test_site_runs_no_cell_without_what_it_uses(room):
    "An import beside code that uses the page's names ends the making of the site: it goes to the imports of the page."
    from pyflakes.checker import Checker
    from pyflakes.messages import UndefinedName
    source = '\n'.join(['from nbdev.showdoc import show_doc', *(o['source'] for o in code(room) if site_runs(o))])
    assert not [str(o) for o in Checker(ast.parse(source)).messages if isinstance(o, UndefinedName)]


def test_settings_of_the_site(processed):
    yaml = pytest.importorskip('yaml')
    site = yaml.safe_load((processed/'_quarto.yml').read_text())
    for o in (*site['metadata-files'], site['format']['html']['css']): assert (processed/o).exists(), o
    made = yaml.safe_load((processed/'nbdev.yml').read_text())
    assert made['website']['title'] == 'miniai' and made['project']['output-dir'] == '_docs'


def test_processed_pages_show_names_and_hide_what_is_hidden(processed):
    for page in shown:
        found = nbformat.read(processed/page.relative_to(root/'nbs'), 4).cells
        assert not any('nbdev_export()' in c.source for c in found)
        markdown = '\n'.join(str(o.get('data', {}).get('text/markdown', '')) for c in found if c.cell_type == 'code' for o in c.outputs)
        for cell in code(page):
            if not re.search(r'^#\|\s*export\s*$', cell['source'], re.M): continue
            for nm in re.findall(r'^(?:def|class) ([a-zA-Z]\w*)', cell['source'], re.M):
                if not re.search(rf'^@patch.*\n([@#].*\n)*def {nm}\b', cell['source'], re.M): assert f'### {nm}\n' in markdown, nm


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
    if not in_browser: pytest.skip('nbconvert, playwright or chromium is missing')
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=['--no-sandbox'])
        yield browser
        browser.close()


@pytest.mark.parametrize('page', published, ids=lambda o: o.stem)
def test_page_in_a_browser(browser, processed, page):
    "No error, no bar, no broken picture, and nothing wider than the window, on a desk and on a phone."
    from nbconvert import HTMLExporter
    notebook = processed/page.relative_to(root/'nbs')
    html = notebook.with_suffix('.html')   # beside the notebook: its pictures are named from there
    html.write_text(HTMLExporter().from_filename(str(notebook))[0], encoding='utf-8')
    for device, width in widths.items():
        tab = browser.new_page(viewport=dict(width=width, height=900))
        tab.goto(html.as_uri(), wait_until='domcontentloaded')
        found = {k: v for k, v in tab.evaluate(look).items() if v}
        if folder := os.environ.get('MINIAI_SCREENSHOTS'): tab.screenshot(path=f'{folder}/{page.stem}_{device}.png', full_page=True)
        tab.close()
        assert not found, f'{device}: {found}'
