"""Make README.md from nbs/index.ipynb; nothing beside Python's own library is needed.

`python3 .ci/readme.py` writes README.md and its pictures; `--check` only says whether they are right.
"""
import base64, json, re, sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
notebook, images = root/'nbs'/'index.ipynb', Path('nbs')/'images'


def text(o): return ''.join(o)


def fence(body, language=''): return f'```{language}\n{body.strip()}\n```'


def relink(md):
    "Links of the notebook, which start in nbs/, as links that start beside README.md."
    def fix(m):
        if re.match(r'[a-z]+:|#|/', m[2]): return m[0]
        return f"{m[1]}({m[2][3:] if m[2].startswith('../') else 'nbs/' + m[2]})"
    return re.sub(r'(!?\[[^\]]*\])\(([^)\s]+)\)', fix, md)


def picture(data, alt, files):
    "A link to the picture, which is kept in `files` under its path."
    path = images/f'index_{len(files)}.png'
    files[path] = base64.b64decode(text(data))
    return f'![{alt}]({path.as_posix()})'


def output(o, alt, files):
    "One output of a cell in Markdown; '' for what a README does not show."
    if o['output_type'] == 'stream': return fence(text(o['text'])) if o['name'] == 'stdout' else ''
    data = o.get('data', {})
    if 'image/png' in data: return picture(data['image/png'], alt, files)
    if 'text/markdown' in data: return relink(text(data['text/markdown']))
    return fence(text(data['text/plain'])) if 'text/plain' in data else ''


def cell(c, files):
    "The parts of one cell; `#| hide` leaves it out, `#| echo: false` its code, `#| output: false` what it put out."
    source = text(c['source'])
    directives = dict((o.split(':', 1) + [''])[:2] for o in re.findall(r'^#\|\s*(.+?)\s*$', source, re.M))
    directives = {k: v.strip() for k, v in directives.items()}
    if 'hide' in directives: return []
    if c['cell_type'] == 'markdown': return [relink(source.strip())]
    code = re.sub(r'^#\|.*\n?', '', source, flags=re.M)
    parts = [] if directives.get('echo') == 'false' else [fence(code, 'python')]
    if directives.get('output') == 'false': return parts
    return parts + [output(o, directives.get('fig-alt', ''), files) for o in c.get('outputs', [])]


def make():
    "The text of README.md, and path -> bytes of its pictures."
    files, head = {}, '<!-- Made from nbs/index.ipynb by .ci/readme.py: change it there. -->'
    cells = json.loads(notebook.read_text(encoding='utf-8'))['cells']
    parts = [o for c in cells if c['cell_type'] in ('markdown', 'code') for o in cell(c, files) if o]
    return '\n\n'.join([head, *parts]) + '\n', files


def differing(readme, files):
    "Which of the files on disk are not what they should be."
    wanted = {Path('README.md'): readme.encode(), **files}
    found = [o.relative_to(root) for o in (root/images).glob('index_*.png')]
    def right(o): return o in wanted and (root/o).exists() and (root/o).read_bytes() == wanted[o]
    return sorted(str(o) for o in {*wanted, *found} if not right(o))


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
