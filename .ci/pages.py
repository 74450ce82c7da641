"""Run notebooks in place and keep their outputs small: `.ci/pages.py [--shrink] [--slow] [--only=TEXT] nbs/40_activations.ipynb ...`

Figures keep 128 colours, which is a quarter of the bytes and no loss that can be seen in a plot. `--shrink` only does
that, to outputs that are there. Cells marked `#| slow` keep the outputs they have, unless `--slow` runs them, too; with `--only=TEXT` so do all
cells that do not have this text in their code. Run `nbdev_clean` afterwards.
"""
import base64, io, os, sys

import nbformat
from PIL import Image

os.environ.setdefault('TQDM_DISABLE', '1')

def small_png(data:str) -> str:
    "A base64 PNG with at most 128 colours, or the same one where that would not make it smaller."
    out = io.BytesIO()
    image = Image.open(io.BytesIO(base64.b64decode(data))).convert('RGB')
    image.quantize(128).save(out, 'png', optimize=True)
    small = base64.b64encode(out.getvalue()).decode()
    return small if len(small) < len(data) else data

def shrink(path:str):
    "Quantize every figure of the notebook at `path`."
    nb = nbformat.read(path, 4)
    for cell in nb.cells:
        for output in cell.get('outputs', []):
            if 'image/png' in output.get('data', {}): output.data['image/png'] = small_png(output.data['image/png'])
    nbformat.write(nb, path)

def is_slow(cell): return cell.cell_type == 'code' and '#| slow' in cell.source.splitlines()

def run(path:str, slow:bool, only:str=''):
    "Execute the notebook at `path` in its folder; an error ends the program and leaves the file as it was."
    def stays(cell): return only not in cell.source or is_slow(cell) and not slow
    from execnb.nbio import read_nb, write_nb
    from execnb.shell import CaptureShell
    nb = read_nb(path)
    for cell in nb.cells:
        if cell.cell_type == 'code' and not stays(cell): cell.outputs = []
    here = os.getcwd()
    os.chdir(os.path.dirname(path) or '.')
    CaptureShell(mpl_format='png').run_all(nb, exc_stop=True, preproc=stays)
    os.chdir(here)
    write_nb(nb, path)

if __name__ == '__main__':
    options = {o for o in sys.argv[1:] if o.startswith('--')}
    only = next((o[7:] for o in options if o.startswith('--only=')), '')
    for path in [o for o in sys.argv[1:] if o not in options]:
        if '--shrink' not in options: run(path, '--slow' in options, only)
        if not only: shrink(path)   # once is enough
        print(path, f'{os.path.getsize(path)//1024} KB')
