"""Make nbs/sidebar.yml, the contents of the site, from the pages that are there; nothing beside Python's own library is needed.

`python3 .ci/sidebar.py` writes it; `--check` only says whether it is right.
"""
import sys
from pathlib import Path

nbs = Path(__file__).resolve().parent.parent/'nbs'
path = nbs/'sidebar.yml'

# section -> numbers of its rooms
rooms = {'Ground': range(0, 10), 'Measuring': range(10, 20), 'The loop': range(20, 30), 'Training well': range(30, 40),
         'Inside the network': range(40, 50), 'Findings and reports': range(50, 60), 'Labs': range(60, 70)}
# what to read first; others come behind, by name
first = ['first_fit', 'see_inside', 'why_is_my_net_dead', 'from_failing_to_92', 'write_a_callback', 'any_loop', 'write_a_lens', 'write_a_rule']


def pages(folder):
    "Paths below nbs/ of the notebooks in `folder`; those whose name begins with _ are templates."
    return [o.relative_to(nbs).as_posix() for o in sorted((nbs/folder).glob('*.ipynb')) if not o.name.startswith('_')]


def place(page):
    name = Path(page).stem
    return (first.index(name) if name in first else len(first)), name


def sections():
    "Titles and pages of the sections, in order."
    yield 'Tutorials', sorted(pages('tutorials'), key=place)
    numbered = [o for o in pages('.') if o[:2].isdigit()]
    for title, numbers in rooms.items(): yield title, [o for o in numbered if int(o[:2]) in numbers]
    yield 'Explanations', pages('explanations')


def make():
    "The text of sidebar.yml."
    lines = ['# Made by .ci/sidebar.py from the pages that are there.', 'website:', '  sidebar:', '    contents:', '      - index.ipynb']
    for title, found in sections():
        if found: lines += [f'      - section: {title}', '        contents:', *(f'          - {o}' for o in found)]
    lines += [f'      - {o}' for o in pages('.') if not o[:2].isdigit() and o != 'index.ipynb']
    return '\n'.join(lines) + '\n'


if __name__ == '__main__':
    text = make()
    if '--check' in sys.argv: sys.exit(0 if path.exists() and path.read_text() == text else 'sidebar.yml is not what the pages make. Run .ci/sidebar.py')
    path.write_text(text)
    print(f'nbs/sidebar.yml: {text.count(".ipynb")} pages')
