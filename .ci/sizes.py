"""How large the project is: `python .ci/sizes.py` prints a line for each room, and the sums.

`--check` ends with an error where a limit is exceeded; nothing beside Python's own library is needed.
"""
import ast, json, re, sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

root = Path(__file__).resolve().parent.parent

# exported lines of all rooms, of one room; lines of a code cell; public names of all rooms
limits = dict(total=10_200, room=600, cell=40, names=200)


@dataclass
class Room:
    "Lines of the module, lines of the notebook's longest code cell, public names."
    name: str
    lines: int
    cell: int
    names: int


def cells(path):
    "The sources of the code cells of a notebook."
    found = json.loads(path.read_text(encoding='utf-8'))['cells']
    return [''.join(o['source']) for o in found if o['cell_type'] == 'code']


def public_names(tree):
    "The names in `__all__` that the module defines itself."
    listed, imported = [], set()
    for o in tree.body:
        is_list = isinstance(o, ast.Assign) and isinstance(o.value, ast.List)   # that of `all` is computed
        if is_list and getattr(o.targets[0], 'id', '') == '__all__': listed = ast.literal_eval(o.value)
        if isinstance(o, (ast.Import, ast.ImportFrom)): imported |= {a.asname or a.name for a in o.names}
    return [o for o in listed if o not in imported]


def rooms():
    "The rooms in order."
    for path in sorted((root/'nbs').glob('[0-9][0-9]_*.ipynb')):
        text = (root/'miniai'/f'{path.stem[3:]}.py').read_text(encoding='utf-8')
        longest = max(len(o.splitlines()) for o in cells(path))
        yield Room(path.stem, len(text.splitlines()), longest, len(public_names(ast.parse(text))))


def exceeded(rooms, total, room, cell, names):
    "What is above a limit, in words."
    rooms = list(rooms)
    found = [(f'{o.name} has {o.lines} lines', o.lines, room) for o in rooms]
    found += [(f'a cell of {o.name} has {o.cell} lines', o.cell, cell) for o in rooms]
    found += [(f'the rooms have {sum(o.lines for o in rooms)} lines', sum(o.lines for o in rooms), total),
              (f'the rooms have {sum(o.names for o in rooms)} public names', sum(o.names for o in rooms), names)]
    return [f'{text}, the limit is {limit}' for text, n, limit in found if n > limit]


def function_lengths(text):
    "Lines of each function and method without signature and docstring: what is to be read as code."
    for o in ast.walk(ast.parse(text)):
        if not isinstance(o, (ast.FunctionDef, ast.AsyncFunctionDef)): continue
        body = o.body[1:] if ast.get_docstring(o) is not None else o.body
        yield body[-1].end_lineno - body[0].lineno + 1 if body else 0


def checking_cells():
    "(cells that export, cells that check something) in the rooms."
    sources = [o for path in (root/'nbs').glob('[0-9][0-9]_*.ipynb') for o in cells(path)]
    exports = [o for o in sources if re.search(r'^#\|\s*export', o, re.M)]
    checks = [o for o in sources if o not in exports and re.search(r'\btest_\w+\(|\bassert\b|assert_close\(', o)]
    return len(exports), len(checks)


def table(rooms):
    "The rooms as text."
    yield f'{"room":<16} {"lines":>7} {"longest cell":>13} {"public names":>13}'
    for o in rooms: yield f'{o.name:<16} {o.lines:>7,} {o.cell:>13} {o.names:>13}'
    sums = sum(o.lines for o in rooms), max(o.cell for o in rooms), sum(o.names for o in rooms)
    yield f'{len(rooms):>2} rooms {"":<7} {sums[0]:>7,} {sums[1]:>13} {sums[2]:>13}'
    yield f'{"limit":<16} {limits["total"]:>7,} {limits["cell"]:>13} {limits["names"]:>13}, {limits["room"]} lines of a room'


if __name__ == '__main__':
    found = list(rooms())
    print(*table(found), sep='\n')
    modules = [(root/'miniai'/f'{o.name[3:]}.py').read_text(encoding='utf-8') for o in found]
    lengths = [n for o in modules for n in function_lengths(o)]
    tests = sum(len(o.read_text(encoding='utf-8').splitlines()) for o in (root/'tests').glob('*.py'))
    exports, checks = checking_cells()
    print(f'a function: median {median(lengths):.0f} lines, 90th percentile {quantiles(lengths, n=10)[-1]:.0f}, longest {max(lengths)}')
    print(f'{checks} cells that test to {exports} that export ({checks/exports:.2f}); {tests:,} lines of tests beside the pages')
    wrong = exceeded(found, **limits)
    if '--check' in sys.argv: sys.exit('\n'.join(['', *wrong]) if wrong else 0)
