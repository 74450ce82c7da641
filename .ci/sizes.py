"""How large the project is: `python .ci/sizes.py`.

Exported lines, functions, test cells beside export cells, tests, pages; and the time of `import miniai.learner` beside that of torch.
"""
import ast, json, re, subprocess, sys
from pathlib import Path
from statistics import median, quantiles

root = Path(__file__).resolve().parent.parent


def functions(tree):
    "Number of lines of each function and method, decorators and docstring included."
    for o in ast.walk(tree):
        if isinstance(o, (ast.FunctionDef, ast.AsyncFunctionDef)): yield o.end_lineno - o.lineno + 1


def body_lines(tree):
    "The same without signature and docstring: what is to be read as code."
    for o in ast.walk(tree):
        if not isinstance(o, (ast.FunctionDef, ast.AsyncFunctionDef)): continue
        body = o.body[1:] if ast.get_docstring(o) is not None else o.body
        yield body[-1].end_lineno - body[0].lineno + 1 if body else 0


def said(name, lengths): return f'{name}: median {median(lengths):.0f}, 90th percentile {quantiles(lengths, n=10)[-1]:.0f}, longest {max(lengths)}'


def cells():
    "(cells that export, cells that check something) in the rooms."
    exports = checks = 0
    for path in sorted((root/'nbs').glob('[0-9][0-9]_*.ipynb')):
        for c in json.loads(path.read_text(encoding='utf-8'))['cells']:
            text = ''.join(c['source'])
            if c['cell_type'] != 'code' or 'nbdev_export()' in text: continue
            if re.search(r'^#\|\s*export', text, re.M): exports += 1
            elif re.search(r'\btest_\w+\(|\bassert\b|assert_close\(', text): checks += 1
    return exports, checks


def import_times():
    "Seconds for torch, and for miniai.learner after it; the best of three."
    code = 'from time import perf_counter as t; a=t(); import torch; b=t(); import miniai.learner; print(b-a, t()-b)'
    runs = [subprocess.run([sys.executable, '-c', code], cwd=root, capture_output=True, text=True, check=True) for _ in range(3)]
    return [min(o) for o in zip(*([float(v) for v in r.stdout.split()] for r in runs))]


if __name__ == '__main__':
    modules = [o for o in sorted((root/'miniai').glob('*.py')) if o.stem not in ('__init__', '_modidx')]
    trees = [ast.parse(o.read_text(encoding='utf-8')) for o in modules]
    lines = [len(o.read_text(encoding='utf-8').splitlines()) for o in modules]
    tests = sum(len(o.read_text(encoding='utf-8').splitlines()) for o in (root/'tests').glob('*.py'))
    exports, checks = cells()
    print(f'{len(modules)} rooms, {sum(lines)} exported lines; a module: median {median(lines):.0f}, longest {max(lines)}')
    print(said('lines of a function', [n for o in trees for n in functions(o)]))
    print(said('without signature and docstring', [n for o in trees for n in body_lines(o)]))
    print(f'{checks} test cells to {exports} export cells ({checks/exports:.2f}); {tests} lines of tests beside the pages')
    big = max((root/'nbs').rglob('*.ipynb'), key=lambda o: o.stat().st_size)
    print(f'{len(list((root/"nbs").rglob("*.ipynb")))} pages; the largest, {big.name}, has {big.stat().st_size//1000} KB')
    torch, ours = import_times()
    print(f'import torch {torch:.2f} s; import miniai.learner after it {ours:.2f} s more, {ours/torch:.1%}')
