"""Make README.md from nbs/index.ipynb; nothing beside Python's own library is needed.

`python3 .ci/readme.py` writes README.md and the pictures it shows; `--check` only says whether they are as they should be.
"""
import base64, json, re, sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
notebook, images = root/'nbs'/'index.ipynb', Path('nbs')/'images'


def text(o): return ''.join(o)


def fence(body, language=''): return f'```{language}\n{body.strip()}\n```'


def relink(md):
    "Links of the notebook, which start in nbs/, as links that start beside README.md; `NN_name.ipynb` as well."
    def fix(m):
        target = m[2]
        return m[0] if re.match(r'[a-z]+:|#|/', target) else f"{m[1]}({'nbs/' + target if not target.startswith('../') else target[3:]})"
    return re.sub(r'(!?\[[^\]]*\])\(([^)\s]+)\)', fix, md)


def picture(data, number, files):
    "A link to the picture, which is kept in `files` under its path."
    path = images/f'index_{number}.png'
    files[path] = base64.b64decode(text(data))
    return f'![]({path.as_posix()})'


def output(o, files):
    "One output of a cell in Markdown; '' for what a README does not show."
    if o['output_type'] == 'stream': return fence(text(o['text'])) if o['name'] == 'stdout' else ''
    data = o.get('data', {})
    if 'image/png' in data: return picture(data['image/png'], len(files), files)
    if 'text/markdown' in data: return relink(text(data['text/markdown']))
    return fence(text(data['text/plain'])) if 'text/plain' in data else ''


def cell(c, files):
    "The parts of one cell; `#| hide` leaves it out, `#| echo: false` leaves out its code."
    source = text(c['source'])
    directives = re.findall(r'^#\|\s*(.+?)\s*$', source, re.M)
    if 'hide' in directives: return []
    if c['cell_type'] == 'markdown': return [relink(source.strip())]
    code = re.sub(r'^#\|.*\n?', '', source, flags=re.M)
    parts = [] if 'echo: false' in directives else [fence(code, 'python')]
    return parts + [output(o, files) for o in c.get('outputs', [])]


def make():
    "The text of README.md, and path -> bytes of its pictures."
    files, head = {}, f'<!-- Made from nbs/index.ipynb by .ci/readme.py: change it there. -->'
    cells = json.loads(notebook.read_text(encoding='utf-8'))['cells']
    parts = [o for c in cells if c['cell_type'] in ('markdown', 'code') for o in cell(c, files) if o]
    return '\n\n'.join([head, *parts]) + '\n', files


def differing(readme, files):
    "Which of the files on disk are not what they should be."
    wanted = {Path('README.md'): readme.encode(), **files}
    found = [o.relative_to(root) for o in (root/images).glob('index_*.png')]
    return [str(o) for o in {*wanted, *found} if o not in wanted or not (root/o).exists() or (root/o).read_bytes() != wanted[o]]


if __name__ == '__main__':
    readme, files = make()
    wrong = differing(readme, files)
    if '--check' in sys.argv:
        sys.exit(f"not as nbs/index.ipynb has it: {', '.join(wrong)}. Run .ci/readme.py" if wrong else 0)
    for old in (root/images).glob('index_*.png'): old.unlink()
    for path, data in {Path('README.md'): readme.encode(), **files}.items():
        (root/path).parent.mkdir(parents=True, exist_ok=True)
        (root/path).write_bytes(data)
    print(f'README.md and {len(files)} picture(s)')
