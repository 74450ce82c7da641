"The pages for readers: each tutorial is listed, its links lead somewhere, it is a story with pictures, and it shows no error."
import re
from pathlib import Path

import nbformat
import pytest

root = Path(__file__).resolve().parent.parent
tutorials = sorted((root/'nbs'/'tutorials').glob('*.ipynb'))
pages = [root/'nbs'/'index.ipynb', *tutorials, *sorted((root/'nbs'/'explanations').glob('*.ipynb'))]
by_tutorial = pytest.mark.parametrize('page', tutorials, ids=lambda o: o.stem)
by_page = pytest.mark.parametrize('page', pages, ids=lambda o: o.stem)


def cells(page, kind): return [o for o in nbformat.read(page, as_version=4).cells if o.cell_type == kind]
def text(page): return '\n\n'.join(o.source for o in cells(page, 'markdown'))
def outputs(page): return [o for c in cells(page, 'code') for o in c.outputs]


def test_there_are_the_tutorials():
    wanted = {'first_fit', 'see_inside', 'any_loop', 'write_a_callback', 'write_a_lens', 'activation_functions',
              'why_is_my_net_dead', 'scale_out', 'from_the_course'}
    assert wanted <= {o.stem for o in tutorials}


@by_tutorial
def test_the_readme_names_it(page): assert f'nbs/tutorials/{page.name}' in (root/'README.md').read_text(encoding='utf-8')


@by_tutorial
def test_it_begins_with_title_and_summary(page):
    assert re.match(r'# .+\n\n> .+', nbformat.read(page, as_version=4).cells[0].source)


@by_tutorial
def test_it_has_pictures_and_proofs(page):
    code = '\n'.join(o.source for o in cells(page, 'code'))
    assert any('image/png' in o.get('data', {}) for o in outputs(page))
    assert re.search(r'^\s*(assert |test_)', code, re.M)


@by_page
def test_links_between_pages_lead_somewhere(page):
    targets = re.findall(r'\]\(([^)\s]+)\)', text(page))
    ours = [o.split('#')[0] for o in targets if not re.match(r'[a-z]+:|#', o)]
    assert not [o for o in ours if not (page.parent/o).exists()]


@by_page
def test_it_shows_no_error_and_no_noise(page):
    assert not [o for o in outputs(page) if o.output_type == 'error']
    assert not [o.text[:200] for o in outputs(page) if o.output_type == 'stream' and o.name == 'stderr']


@by_page
def test_pictures_have_one_form_only(page):
    "A JPEG beside a PNG is the same picture twice."
    assert not [o for o in outputs(page) if 'image/jpeg' in o.get('data', {})]


@by_tutorial
def test_lines_of_code_fit(page):
    wide = [o for c in cells(page, 'code') for o in c.source.splitlines() if len(o) > 140 and not o.startswith('#|')]
    assert not wide


def test_the_readme_shows_what_it_promises():
    readme = (root/'README.md').read_text(encoding='utf-8')
    assert readme.index('![') < readme.index('## Start') < readme.index('## Fit') < readme.index('## See inside')
    assert readme.index('## See inside') < readme.index('## Any loop') < readme.index('## Beside others')
    assert len(re.findall(r'^```python', readme, re.M)) >= 3
