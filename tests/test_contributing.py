"What nbs/contributing.ipynb says to do, done word for word in a copy of the project."
import os, re, shutil, subprocess, sys
from pathlib import Path

import nbformat
import pytest

root = Path(__file__).resolve().parent.parent
text = '\n\n'.join(o.source for o in nbformat.read(root/'nbs'/'contributing.ipynb', 4).cells if o.cell_type == 'markdown')


def section(title): return re.search(rf'^## {title}\n(.*?)(?=^## |\Z)', text, re.M | re.S)[1]
def commands(title): return re.search(r'^```sh\n(.*?)^```', section(title), re.M | re.S)[1]


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


def test_template_exports_and_passes_as_it_stands(sh):
    out = sh(commands('A callback'))
    assert re.search(r'\d+ passed', out) and 'failed' not in out
    assert set(out.splitlines()[-4:]) == {' M miniai/_modidx.py', ' M nbs/sidebar.yml', '?? miniai/my_callback.py',
                                          '?? nbs/24_my_callback.ipynb'}


def test_a_page_changed(sh):
    "Only the page, its module and the index differ, and the module has the change."
    path = sh.copy/'nbs'/'27_conv.ipynb'
    nb = nbformat.read(path, 4)
    cell = next(o for o in nb.cells if 'def conv(' in o.source)
    cell.source += '\n\ndef twice(x): return 2*x   # a change'
    nb.metadata['something'] = 'an editor wrote'
    nbformat.write(nb, path)
    steps = commands('Change something')
    named = re.findall(r'^(nbdev_export|nbdev_test|nbdev_clean|git status --short)', steps, re.M)
    assert named == ['nbdev_export', 'nbdev_test', 'nbdev_clean', 'git status --short']
    out = sh('\n'.join(o.replace('nbdev_test', 'nbdev_test --path nbs/27_conv.ipynb') for o in named))
    changed = {o[3:] for o in out.splitlines() if o[:2] == ' M'}
    assert changed == {'nbs/27_conv.ipynb', 'miniai/conv.py', 'miniai/_modidx.py'}
    assert 'def twice' in (sh.copy/'miniai'/'conv.py').read_text()
    assert 'an editor wrote' not in path.read_text()


def test_hooks_are_installed(sh):
    assert 'nbdev_install_hooks' in commands('Set up')
    sh('nbdev_install_hooks')
    assert 'nbdev_merge' in sh('git config --get merge.nbdev-merge.driver')
    assert sh('git status --short') == ''   # what they write is not the project's


def test_everything_it_names_is_there():
    for o in re.findall(r'`((?:\.ci|tests|nbs|miniai)/[\w./]+\.\w+)`', text): assert re.search('NN_|/name', o) or (root/o).exists(), o
    for o in re.findall(r'\]\(([\w/]+\.ipynb)\)', text): assert (root/'nbs'/o).exists(), o
