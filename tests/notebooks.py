"What the tests of the project and of its pages share: paths, notebooks that are parsed once, scripts of .ci as modules."
import ast, json
from functools import lru_cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent
rooms = sorted((root/'nbs').glob('[0-9][0-9]_*.ipynb'))
pages = sorted(o for o in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in o.parts)
by_room = pytest.mark.parametrize('room', rooms, ids=lambda o: o.stem)
by_page = pytest.mark.parametrize('page', pages, ids=lambda o: o.stem)


@lru_cache(maxsize=None)
def cells(page):
    "The cells of a notebook as dicts, their sources as text; what is returned is shared."
    found = json.loads(page.read_text(encoding='utf-8'))['cells']
    return [{**o, 'source': ''.join(o['source'])} for o in found]


def code(page): return [o for o in cells(page) if o['cell_type'] == 'code']
def markdown(page): return '\n\n'.join(o['source'] for o in cells(page) if o['cell_type'] == 'markdown')
def outputs(page): return [o for c in code(page) for o in c['outputs']]
def module_path(room): return root/'miniai'/f'{room.stem[3:]}.py'


@lru_cache(maxsize=None)
def tree(room):
    "The module of a room, parsed."
    return ast.parse(module_path(room).read_text(encoding='utf-8'))


@lru_cache(maxsize=None)
def script(name):
    "A script of .ci as a module."
    spec = spec_from_file_location(name, root/'.ci'/f'{name}.py')
    res = module_from_spec(spec)
    spec.loader.exec_module(res)
    return res
