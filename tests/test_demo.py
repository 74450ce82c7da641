"The console command, as a person types it."
import subprocess, sys
from pathlib import Path

import numpy as np
import pytest

views = 'color_dim', 'dead_chart', 'plot_stats'
pictures = {f'{run}_{view}.png' for run in ('failing', 'cured') for view in views} | {'comparison.png'}
pages = {'report.html', 'report_cured.html'}


def command(*options, cwd=None):
    "Run it in a process of its own; by the script that pip installed, where there is one."
    installed = Path(sys.executable).with_name('miniai_demo')
    start = [str(installed)] if installed.exists() else [sys.executable, '-c', 'from miniai.demo import main; main()']
    return subprocess.run([*start, *map(str, options)], capture_output=True, text=True, cwd=cwd, timeout=300)


@pytest.fixture(scope='module')
def done(tmp_path_factory):
    "The command with its defaults, in an empty folder, done twice."
    folders = [tmp_path_factory.mktemp('demo') for _ in range(2)]
    return folders, [command(cwd=o) for o in folders]


def numbers(res):
    "What the command says but for the lines of time, cost and folder."
    return [o for o in res.stdout.splitlines() if not o.startswith(('Time:', 'Pictures:', 'Watching took'))]


def test_pictures(done):
    from matplotlib.image import imread
    folder = done[0][0]/'miniai_demo'
    assert {o.name for o in folder.iterdir()} == pictures | pages
    for path in folder.glob('*.png'):
        im = imread(path)
        assert im.shape[0] > 150 and im.shape[1] > 400
        assert np.std(im[..., :3]) > .02, f'{path.name} is empty'


def test_pages(done):
    for name, run in (('report.html', 'failing'), ('report_cured.html', 'cured')):
        path = done[0][0]/'miniai_demo'/name
        html = path.read_text(encoding='utf-8')
        assert f'the {run} run</h1>' in html and 1e6 < path.stat().st_size < 4e6
        assert all(f'<option value="{i}">{layer}</option>' in html for i, layer in enumerate(('0.0', '0.1', '1.0', '1.1')))


def test_findings(done):
    "The failing run has an error, the cured one none; what is said is what the page says."
    said = done[1][0].stdout.split('What is wrong:')[1].split('Everything')[0]
    failing, cured = said.split('\ncured: ')
    assert 'error, ' in failing and 'error' not in cured and 'Rules checked' in cured
    html = (done[0][0]/'miniai_demo'/'report.html').read_text(encoding='utf-8')
    assert html.count('class="finding error"') == failing.count('    error, ')


def test_without_plotly_it_says_how_to_get_it(capsys, monkeypatch, tmp_path):
    from miniai.demo import main
    from miniai.report import plotly_script
    monkeypatch.setitem(sys.modules, 'plotly.offline', None)
    plotly_script.cache_clear()
    main(['--epochs', '1', '--out', str(tmp_path)])
    assert 'pip install plotly' in capsys.readouterr().out
    assert {o.name for o in tmp_path.iterdir()} == pictures


def test_what_it_says(done):
    folder, res = done[0][0], done[1][0]
    assert res.returncode == 0, res.stderr
    for words in ('accuracy', 'shipped with miniai', '6,000 training, 1,000 test', 'Time: ', *pictures):
        assert words in res.stdout
    assert str(folder/'miniai_demo') in res.stdout
    assert 'Traceback' not in res.stderr


def test_same_seed_same_numbers(done):
    one, two = map(numbers, done[1])
    assert one == two and len(one) > 30


def test_other_seed_other_numbers(done, tmp_path):
    one, two = (numbers(command('--seed', o, '--epochs', 1, '--out', tmp_path)) for o in (1, 2))
    assert one != two


@pytest.mark.parametrize('seed', [1, 2, 3])
def test_it_fails_and_is_cured(seed):
    from miniai.datasets import DataLoaders, fashion_mnist
    from miniai.demo import train_run
    dls = DataLoaders.in_memory(fashion_mnist('small'), 512)
    failing, cured = (train_run(o, dls, cured=o == 'cured', seed=seed) for o in ('failing', 'cured'))
    assert failing.last('accuracy') + .15 < cured.last('accuracy') > .65


def test_a_run_leaves_no_hook_behind():
    from miniai.datasets import DataLoaders, fashion_mnist
    from miniai.demo import train_run
    run = train_run('cured', DataLoaders.in_memory(fashion_mnist('small'), 512), cured=True, epochs=1)
    assert not any(m._forward_hooks for m in run.learn.model.modules())


def test_diverging_run_is_drawn(tmp_path):
    "With a learning rate of 1000 the losses are NaN: pictures and sentences all the same."
    res = command('--lr', 1000, '--epochs', 1, '--out', tmp_path)
    assert res.returncode == 0, res.stderr
    assert {o.name for o in tmp_path.iterdir()} == pictures | pages and 'nan' in res.stdout
    assert 'error, not_finite' in res.stdout


@pytest.mark.parametrize('options,words', [
    (['--epochs', '0'], '--epochs is 0; it must be above 0'),
    (['--epochs', '1.5'], "--epochs: invalid int value: '1.5'"),
    (['--lr', '-1'], '--lr is -1.0; it must be above 0'),
    (['--lr', 'nan'], '--lr is nan; it must be above 0'),
    (['--batch-size', 'x'], "--batch-size: invalid int value: 'x'"),
    (['--source', 'mnist'], "invalid choice: 'mnist'"),
    (['--source', 'idx', '--path', '.'], 'lacks train-images-idx3-ubyte'),
    (['--path', '.'], "'small' is in the package"),
])
def test_bad_options(options, words, tmp_path):
    res = command(*options, cwd=tmp_path)
    assert res.returncode == 2
    assert words in res.stderr and 'Traceback' not in res.stderr


def test_output_folder_is_a_file(tmp_path):
    (tmp_path/'taken').write_text('x')
    res = command('--out', tmp_path/'taken')
    assert res.returncode == 2 and 'taken' in res.stderr and 'Traceback' not in res.stderr
