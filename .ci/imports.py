"""Write into nbs/contributing.ipynb which room imports which, and which numbers are free; Python's own library is all it needs.

`python .ci/imports.py` writes it and prints the free numbers; `--check` only says whether it is right.
"""
import ast, json, sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
page, mark = root/'nbs'/'contributing.ipynb', '<!-- Made by .ci/imports.py -->'


def rooms():
    "Notebook names of the rooms, in order."
    return sorted(o.stem for o in (root/'nbs').glob('[0-9][0-9]_*.ipynb'))


def free():
    "Numbers that no room has, of those that have a place in the contents of the site."
    taken = {o[:2] for o in rooms()}
    return [o for o in map('{:02}'.format, range(70)) if o not in taken]


def imported(room):
    "The modules of ours that a room imports, wherever in it and however it is written."
    tree = ast.parse((root/'miniai'/f'{room[3:]}.py').read_text(encoding='utf-8'))
    for o in ast.walk(tree):
        names = [a.name for a in o.names] if isinstance(o, (ast.Import, ast.ImportFrom)) else []
        if isinstance(o, ast.ImportFrom) and o.level: yield from [o.module.split('.')[0]] if o.module else names
        elif isinstance(o, ast.ImportFrom) and o.module.split('.')[0] == 'miniai':
            yield from o.module.split('.')[1:2] or names
        elif isinstance(o, ast.Import): yield from [a.split('.')[1] for a in names if a.startswith('miniai.')]


def picture():
    "A line for each room, with an x under the number of each room that it imports."
    found = rooms()
    width = max(map(len, found))
    lines = [' '*width + ''.join(f' {o[i]}' for o in found) for i in (0, 1)]
    for i, room in enumerate(found):
        used = set(imported(room))
        marks = ['x' if o[3:] in used else '.' for o in found[:i]]
        lines.append(f'{room:<{width}} ' + ' '.join([*marks, '\\']))
    return '\n'.join(lines)


def cell_text(): return f'{mark}\n```\n{picture()}\n```\nNumbers that no room has yet: {", ".join(free())}.'


def notebook(): return json.loads(page.read_text(encoding='utf-8'))


def the_cell(nb):
    "The cell that holds the picture."
    return next(o for o in nb['cells'] if ''.join(o['source']).startswith(mark))


if __name__ == '__main__':
    nb = notebook()
    cell = the_cell(nb)
    if '--check' in sys.argv:
        sys.exit(0 if ''.join(cell['source']) == cell_text() else 'contributing.ipynb does not show the imports that there are. Run .ci/imports.py')
    cell['source'] = cell_text().splitlines(keepends=True)
    page.write_text(json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + '\n', encoding='utf-8')
    print(f'{page.name}: {len(rooms())} rooms; free numbers: {" ".join(free())}')
