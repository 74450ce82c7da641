"Two processes, each with its half of every batch, see what one process sees that has both halves."
import json, os, subprocess, sys
from pathlib import Path

import numpy as np
import pytest

worker = '''
import json, sys, os, torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from miniai.inspector import Inspector
from miniai.lens import *

torch.set_num_threads(1)
world = int(os.environ.get('WORLD_SIZE', 1))
if world > 1: dist.init_process_group('gloo')
rank = dist.get_rank() if world > 1 else 0
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
x, y = torch.randn(48, 4), torch.randint(0, 3, (48,))
loss_fn = nn.CrossEntropyLoss()
lenses = [LossMetrics(loss_fn=loss_fn), OutputActivation(record_eval=True), OutputNorm(), OutputGradientGeometry(compute_correlation=False),
          ParameterGradientGeometry(), ParameterGradientActivation(), ParameterNorm(), ParameterUpdateGeometry()]
inspector = Inspector(lenses)
net = DDP(model) if world > 1 else model
opt = torch.optim.SGD(model.parameters(), .1)
inspector.attach(net)
halves = [rank] if world > 1 else [0, 1]
losses = []
for epoch in inspector.range(3):
    for i in range(4):
        opt.zero_grad()
        for half in halves:
            part = slice(12*i + (0, 5)[half], 12*i + (5, 12)[half])        # of different sizes
            # a part's loss counts by its share of the batch; two processes average, so each takes it twice
            (loss_fn(net(x[part]), y[part])*(part.stop-part.start)/12*world).backward()
        opt.step()
    with torch.no_grad():
        xs, ys = (x, y) if world == 1 else (x[rank::2], y[rank::2])
        loss_fn(net(xs), ys)
    inspector.push_metric('rank', float(rank) if world > 1 else .5)
rows = {' '.join(key): inspector.history.series(key[1], key[2], key[0]).values.tolist() for key in inspector.history.keys()}
rows['early stopping'] = [lenses[0].loss(train=False)]
if world > 1: dist.barrier(); dist.destroy_process_group()
open(f'{sys.argv[1]}/{world}_{rank}.json', 'w').write(json.dumps(rows))
'''

def run(folder, *command, worker=worker):
    root = Path(__file__).resolve().parent.parent
    (folder/'worker.py').write_text(worker)
    env = {**os.environ, 'PYTHONPATH': str(root), 'OMP_NUM_THREADS': '1'}
    res = subprocess.run([sys.executable, *command, str(folder/'worker.py'), str(folder)], env=env, capture_output=True, text=True, timeout=180)
    assert res.returncode == 0, res.stderr[-3000:]

def test_two_processes_give_the_statistics_of_one(tmp_path):
    torch = pytest.importorskip('torch')
    if not torch.distributed.is_available(): pytest.skip('torch was built without distributed')
    run(tmp_path)
    run(tmp_path, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2')
    one, *two = (json.loads((tmp_path/f'{nm}.json').read_text()) for nm in ('1_0', '2_0', '2_1'))
    assert two[0] == two[1]                # every process knows, so all stop early together
    assert set(one) == set(two[0]) and len(one) > 80
    for key,values in one.items():
        # DDP scales the local gradient: the gradient of a half's own loss is twice as large there
        factor = 2 if 'output_grad_norm' in key else 1
        if key.split()[-1] in ('min', 'std', 'max', 'Q1', 'Q3', 'median') and 'rank' in key: continue
        if key.startswith('valid loss') and not key.endswith('mean') or 'valid batches' in key: continue   # of the two halves
        np.testing.assert_allclose(np.array(two[0][key])/factor, values, rtol=1e-3, atol=1e-5, err_msg=key)


ragged = """
import json, os, sys, torch
import torch.nn.functional as F
from torch import nn
from miniai.accel import AccumulateCB, DDPCB
from miniai.datasets import DataLoaders
from miniai.learner import Learner, TrainCB
torch.set_num_threads(1)
world = int(os.environ.get('WORLD_SIZE', 1))
torch.manual_seed(0)
batches = [(torch.randn(4, n, 3), torch.randn(4, n, 2)) for n in (1, 7, 5, 2, 3, 9, 8, 8)]
model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
learn = Learner(model, DataLoaders(batches, batches), F.mse_loss, lr=.3, cbs=[TrainCB(), DDPCB() if world > 1 else AccumulateCB(2)])
learn.fit(2)
if int(os.environ.get('RANK', 0)) == 0:
    open(f'{sys.argv[1]}/ragged_{world}.json', 'w').write(json.dumps([w.tolist() for w in model.parameters()]))
"""

def test_processes_with_rows_of_several_lengths_weigh_by_entries(tmp_path):
    "Each process has as many samples, and one of them up to seven times the entries of which the loss is a mean."
    torch = pytest.importorskip('torch')
    if not torch.distributed.is_available(): pytest.skip('torch was built without distributed')
    run(tmp_path, worker=ragged)
    run(tmp_path, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2', worker=ragged)
    one, two = (json.loads((tmp_path/f'ragged_{n}.json').read_text()) for n in (1, 2))
    for a,b in zip(one, two): np.testing.assert_allclose(b, a, atol=1e-6)


divided = """
import sys, torch
import torch.nn.functional as F
from functools import partial
from torch import nn, optim
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from miniai.accel import DDPCB, FSDPCB, GradClipCB
from miniai.datasets import DataLoaders, MemoryLoader
from miniai.device import set_seed
from miniai.distributed import start_processes
from miniai.learner import Learner, MetricsCB, TrainCB
from miniai.sgd import EMACB
from miniai.shortcuts import ClosureCB
torch.set_num_threads(1)
start_processes('gloo')
mesh = init_device_mesh('cpu', (1, 2), mesh_dim_names=('dp', 'tp'))

class SAM(optim.SGD):
    "Steps with the gradient that is found a little uphill."
    def step(self, closure):
        params = [p for g in self.param_groups for p in g['params']]
        with torch.no_grad():
            uphill = [p.grad.clone() for p in params]
            for p,g in zip(params, uphill): p.add_(g, alpha=.05)
        with torch.enable_grad(): closure()
        with torch.no_grad():
            for p,g in zip(params, uphill): p.sub_(g, alpha=.05)
        super().step()

def run(kind, train, opt, loss_func, *cbs):
    set_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 1))
    cols = dict(x=torch.randn(69, 6), y=torch.randn(69, 1))   # the last batch has 5 samples: 3 for one, 2 for the other
    if kind == 'tensor': parallelize_module(model, mesh['tp'], {'0': ColwiseParallel(), '2': RowwiseParallel()})
    size = 16 if kind in ('alone', 'tensor') else 8
    work = dict(alone=[], copies=[DDPCB()], fully=[FSDPCB()], tensor=[FSDPCB(mesh['dp'])])[kind]
    dls = DataLoaders(MemoryLoader(None, cols, size, shuffle=True), MemoryLoader(None, cols, size))
    learn = Learner(model, dls, loss_func, lr=.005, opt_func=opt, cbs=[train(), *work, MetricsCB(), *cbs])
    learn.fit(2)
    found = {f'{phase} {stat}': torch.as_tensor(learn.history.series(source, stat, phase).values) for phase,source,stat in learn.history.keys()}
    held = dict(model.state_dict()) | {f'mean {nm}': o for cb in cbs for nm,o in getattr(cb, 'averages', {}).items()}
    return found | {nm: o.full_tensor() if hasattr(o, 'full_tensor') else o.clone() for nm,o in held.items()}

for what,make in dict(closure=lambda: (ClosureCB, SAM, F.mse_loss, GradClipCB(.5)), means=lambda: (TrainCB, optim.AdamW, F.mse_loss, EMACB(.9)),
                      sums=lambda: (TrainCB, optim.SGD, partial(F.mse_loss, reduction='sum'))).items():
    alone = run('alone', *make())
    for kind in ('copies', 'fully', 'tensor'):
        other = run(kind, *make())
        assert set(other) == set(alone)
        for nm,o in alone.items(): torch.testing.assert_close(other[nm], o, rtol=1e-5, atol=2e-6, msg=f'{what} {kind} {nm}')

try: run('fully', ClosureCB, optim.LBFGS, F.mse_loss)
except TypeError as e: assert 'LBFGS' in str(e) and 'DDPCB' in str(e)
else: raise AssertionError('LBFGS cannot train divided parameters')
open(f'{sys.argv[1]}/done', 'w')
"""

def run_two(folder, worker):
    "Run the code of `worker` in two processes, to its end."
    torch = pytest.importorskip('torch')
    if not torch.distributed.is_available(): pytest.skip('torch was built without distributed')
    run(folder, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2', worker=worker)
    assert (folder/'done').exists()


def test_closures_means_of_weights_and_sums_are_those_of_one_process(tmp_path):
    "However the model is divided: as copies, by `fully_shard`, and by tensor parallel with some parameters whole."
    run_two(tmp_path, divided)


asked_alone = """
import os, sys, threading, torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from miniai.diagnose import diagnose
from miniai.inspector import Inspector
torch.set_num_threads(1)
torch.manual_seed(0)
dist.init_process_group('gloo')
mesh = init_device_mesh('cpu', (2,))

class Gathered(nn.Module):
    def forward(self, p):
        dist.all_reduce(p.detach().clone())
        return p

class Together(nn.Module):
    def forward(self, p, y):
        dist.all_reduce(p.detach().clone())
        return F.cross_entropy(p, y)

for kind in 'plain', 'model', 'loss', 'parts':
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    loss_fn = Together() if kind == 'loss' else nn.CrossEntropyLoss()
    if kind == 'parts': parallelize_module(model, mesh, {'0': ColwiseParallel(), '2': RowwiseParallel()})
    if kind == 'model': model.append(Gathered())
    opt, inspector = torch.optim.SGD(model.parameters(), lr=.1), Inspector()
    inspector.attach(model, opt, loss_fn)
    x, y = torch.randn(32, 8), torch.randint(3, (32,))
    for _ in range(3):
        opt.zero_grad()
        loss_fn(model(x), y).backward()
        opt.step()
    if not dist.get_rank():
        found = []
        asks = threading.Thread(target=lambda: found.append(diagnose(inspector)), daemon=True)
        asks.start()
        asks.join(30)
        if not found:
            print(kind, 'waits for the other process', file=sys.stderr, flush=True)
            os._exit(7)
        tried = found[0].evidence.facts
        assert tried.mixes is None and (tried.summed is None) is (kind == 'loss'), (kind, tried)
    dist.barrier()
if not dist.get_rank(): open(f'{sys.argv[1]}/done', 'w')
"""

def test_one_process_can_ask_without_the_others(tmp_path):
    "A model or a loss that waits for other processes is not tried out."
    run_two(tmp_path, asked_alone)
