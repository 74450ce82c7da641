"Parameters that processes divide: what is measured of them, and what is saved, is what one process has; a process that fails is noticed."
import os, signal, socket, subprocess, sys, time
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip('torch')
if not torch.distributed.is_available(): pytest.skip('torch was built without distributed', allow_module_level=True)

root = Path(__file__).resolve().parent.parent
env = {**os.environ, 'PYTHONPATH': str(root), 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', 'TORCH_CPP_LOG_LEVEL': 'ERROR'}

script = '''
import sys, torch
import torch.nn.functional as F
from pathlib import Path
from torch import nn, optim
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from miniai import epochs
from miniai.accel import FSDPCB, GradClipCB, shard_model
from miniai.activations import ActivationStats
from miniai.checkpoint import CheckpointCB, load_weights
from miniai.datasets import DataLoaders, MemoryLoader
from miniai.device import set_seed
from miniai.distributed import rank, start_processes, world_size
from miniai.gradients import GradientStats, UpdateStats
from miniai.inspector import Inspector
from miniai.learner import Learner, MetricsCB, TrainCB
from miniai.lens import (LossMetrics, OutputActivation, OutputStats, ParameterCond, ParameterGradientActivation, ParameterGradientGeometry,
                         ParameterNorm, ParameterUpdateGeometry)

torch.set_num_threads(1)
start_processes('gloo')
out, stats = Path(sys.argv[1]), ('mean', 'std', 'skew', 'kurtosis', 'range', 'hist', 'death_rate', 'activation_rate', 'median')
mesh = init_device_mesh('cpu', (1, 2), mesh_dim_names=('dp', 'tp'))

def net():
    set_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 1))
    with torch.no_grad(): model[0].weight[6:], model[0].bias[6:] = 0, -1
    return model

def run(kind, *cbs, **kw):
    model = net()
    cols = dict(x=torch.randn(70, 6), y=torch.randn(70, 1))
    if kind == 'tensor': parallelize_module(model, mesh['tp'], {'0': ColwiseParallel(), '2': RowwiseParallel()})
    size = 8 if kind == 'fully' else 16
    work = [] if kind == 'alone' else [FSDPCB(mesh['dp'] if kind == 'tensor' else None)]
    watch = [ActivationStats(on_valid=True, stats=stats), GradientStats(), UpdateStats()]
    dls = DataLoaders(MemoryLoader(None, cols, size, shuffle=True), MemoryLoader(None, cols, size))
    learn = Learner(model, dls, F.mse_loss, lr=.01, opt_func=optim.AdamW, cbs=[TrainCB(), *work, MetricsCB(), *watch, GradClipCB(.05), *cbs])
    learn.fit(2, **kw)
    rows = {}
    for i,history in enumerate([learn.history, *(o.history for o in watch)]):
        for phase,source,stat in history.keys():
            s = history.series(source, stat, phase)
            rows[f'{i} {phase} {source} {stat}'] = s.steps, s.samples, s.values
    full = {k: v.full_tensor() if hasattr(v, 'full_tensor') else v for k,v in model.state_dict().items()}
    return dict(rows=rows, weights=full, dead=watch[0].dead_units().to_dict('list'))

def inspected(kind):
    "A loop by hand; with the data divided each process has half of every batch."
    model, loss_fn = net(), nn.MSELoss()
    epochs.world_size = (lambda: 1) if kind == 'alone' else world_size
    if kind == 'tensor': parallelize_module(model, mesh['tp'], {'0': ColwiseParallel(), '2': RowwiseParallel()})
    if kind == 'fully': shard_model(model)
    lenses = [LossMetrics(loss_fn=loss_fn), OutputActivation(), OutputStats(), ParameterGradientGeometry(), ParameterGradientActivation(),
              ParameterNorm(), ParameterUpdateGeometry(), ParameterCond()]
    x, y, opt = torch.randn(48, 6), torch.randn(48, 1), optim.SGD(model.parameters(), .1)
    inspector = Inspector(lenses, visualizer=None).attach(model, optimizer=opt)
    part = slice(rank(), None, 2) if kind == 'fully' else slice(None)
    for epoch in inspector.range(2):
        for i in range(0, 48, 12):
            loss_fn(model(x[i:i+12][part]), y[i:i+12][part]).backward()
            opt.step()
            opt.zero_grad()
    table = inspector.history
    return {' '.join(key): table.series(key[1], key[2], key[0]).values for key in table.keys()}

found = dict(inspected={nm: inspected(nm) for nm in ('alone', 'fully', 'tensor')}, alone=run('alone'), fully=run('fully', CheckpointCB(out/'fully', every=3, keep=None)),
             tensor=run('tensor', CheckpointCB(out/'tensor', every=3, keep=None)))
for nm in ('fully', 'tensor'):
    (out/f'{nm} again').mkdir(exist_ok=True)
    found[f'{nm} again'] = run(nm, CheckpointCB(out/f'{nm} again', every=3), resume=out/nm/'step_000000006.pt')
    found[f'{nm} loaded'] = dict(load_weights(out/nm/'step_000000010.pt', net()).state_dict())
torch.save(found, out/f'{rank()}.pt')
'''

def port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

def started(path, *args):
    "A script in two processes that no launcher looks after."
    path.write_text(args[0])
    where = dict(WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port()))
    return [subprocess.Popen([sys.executable, str(path), *map(str, args[1:])], env={**env, **where, 'RANK': str(i), 'LOCAL_RANK': str(i)},
                             stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for i in range(2)]

@pytest.fixture(scope='module')
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp('shards')
    both = started(folder/'train.py', script, folder)
    said = [o.communicate(timeout=400) for o in both]
    assert all(o.returncode == 0 for o in both), [err[-3000:] for _,err in said]
    return [torch.load(folder/f'{i}.pt', weights_only=False) for i in range(2)]

def same_rows(one, two, tol):
    assert set(one) == set(two) and len(one) > 150
    for key,(steps,samples,values) in one.items():
        np.testing.assert_array_equal(two[key][0], steps, err_msg=key)
        np.testing.assert_array_equal(two[key][1], samples, err_msg=key)
        exact = key.endswith(('death_rate', 'dead_epoch', 'activation_rate'))
        np.testing.assert_allclose(two[key][2], values, rtol=0 if exact else tol, atol=0 if exact else tol, err_msg=key)

@pytest.mark.parametrize('kind', ['fully', 'tensor'])
def test_divided_parameters_give_the_statistics_of_one_process(found, kind):
    "All of outputs, gradients, updates, loss, clipping; on both processes, the last one's layer has a unit for one of them only."
    alone = found[0]['alone']
    for o in found:
        same_rows(alone['rows'], o[kind]['rows'], 2e-6)
        assert o[kind]['dead'] == alone['dead'] and len(alone['dead']['unit']) >= 2
        for nm,w in alone['weights'].items(): torch.testing.assert_close(o[kind]['weights'][nm], w, rtol=0, atol=1e-6)
    clipped = alone['rows']['0 train gradient norm clipped'][2]
    assert (clipped < alone['rows']['0 train gradient norm'][2]).any() and clipped.max() <= .0501
    assert {key.split()[-1] for key in alone['rows'] if key.startswith('2 train all')} == {'grad_norm', 'grad_norm_clipped'}

@pytest.mark.parametrize('kind', ['fully', 'tensor'])
def test_divided_parameters_are_saved_whole_and_resumed(found, kind):
    for o in found:
        for nm,w in o[kind]['weights'].items():
            assert torch.equal(o[f'{kind} again']['weights'][nm], w)
            assert torch.equal(o[f'{kind} loaded'][nm], w)
        same_rows(o[kind]['rows'], o[f'{kind} again']['rows'], 0)


@pytest.mark.parametrize('kind', ['fully', 'tensor'])
def test_an_inspector_sees_divided_parameters_whole(found, kind):
    alone = found[0]['inspected']['alone']
    assert len(alone) > 100 and any('condition' in key for key in alone)
    for o in found:
        two = o['inspected'][kind]
        assert set(two) == set(alone)
        for key,values in alone.items():
            if kind == 'fully' and key.startswith('train loss') and not key.endswith('mean'): continue   # of two halves each
            if kind == 'fully' and 'batches' in key: continue
            np.testing.assert_allclose(two[key], values, rtol=1e-5, atol=2e-6, err_msg=key)


# --- a process that fails ---

failing = '''
import os, signal, sys, torch
from torch import nn, optim
from miniai.accel import DDPCB
from miniai.callback import Callback
from miniai.distributed import rank
from miniai.learner import Learner, TrainCB
from types import SimpleNamespace

class FailCB(Callback):
    def before_batch(self, learn):
        if learn.n_steps == 3 and rank() == 1:
            print('failing', flush=True)
            os.kill(os.getpid(), getattr(signal, sys.argv[1]))

torch.set_num_threads(1)
batches = [(torch.randn(4, 3), torch.randn(4, 1))]*40
Learner(nn.Linear(3, 1), SimpleNamespace(train=batches, valid=batches), cbs=[TrainCB(), DDPCB(timeout=int(sys.argv[2])), FailCB()]).fit(1)
'''

@pytest.mark.parametrize('how,timeout', [('SIGKILL', 60), ('SIGSTOP', 5)], ids=['killed', 'frozen'])
def test_others_have_a_word_when_a_process_fails(tmp_path, how, timeout):
    "At once if it is gone, after `timeout` seconds if it only does not answer."
    first, second = started(tmp_path/'fail.py', failing, how, timeout)
    try:
        assert second.stdout.readline() == 'failing\n'
        began = time.monotonic()
        _, said = first.communicate(timeout=60)
        assert time.monotonic() - began < 60 and first.returncode
        word = 'Connection closed by peer' if how == 'SIGKILL' else f'Timed out waiting {timeout}000ms'
        assert word in said or 'Connection reset' in said, said[-2000:]
    finally:
        for o in (first, second):
            if o.poll() is None: os.kill(o.pid, signal.SIGKILL)
            o.communicate()
