"An InspectorCB beside DDPCB or AccelerateCB: two processes see what one sees that has the whole batches."
import json, os, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
import torch

root = Path(__file__).resolve().parent.parent

worker = '''
import json, sys, torch
from torch import nn, optim
import torch.nn.functional as F
from miniai.accel import AccelerateCB, DDPCB, GradClipCB
from miniai.datasets import DataLoaders, MemoryLoader
from miniai.device import set_seed
from miniai.distributed import is_main
from miniai.inspector import InspectorCB
from miniai.learner import Learner, TrainCB
from miniai.lens import *

size, out, kind = int(sys.argv[1]), sys.argv[2], sys.argv[3]
set_seed(1)
cols = dict(x=torch.randn(100, 8), y=torch.randint(0, 4, (100,)))
model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
dls = DataLoaders(MemoryLoader(None, cols, size, shuffle=True), MemoryLoader(None, cols, size))
work = [AccelerateCB(mixed_precision='no')] if kind == 'accelerate' else [TrainCB(), DDPCB()]
lenses = [LossMetrics(), OutputActivation(record_eval=True), OutputNorm(), ParameterGradientGeometry(before_clipping=True),
          ParameterGradientActivation(), ParameterNorm(), ParameterUpdateGeometry()]
cb = InspectorCB(lenses, visualizer=None)
learn = Learner(model, dls, F.cross_entropy, lr=.05, opt_func=optim.SGD, cbs=[*work, cb, GradClipCB(.1)])
learn.lr_find(plot=False, gamma=2)
learn.fit(2)
learn.fit(1, valid=False)
rows = {' '.join(key): cb.history.series(key[1], key[2], key[0]).values.tolist() for key in cb.history.keys()}
if is_main(): open(out, 'w').write(json.dumps(rows))
'''

def run(folder, size, kind, *command):
    (folder/'worker.py').write_text(worker)
    env = {**os.environ, 'PYTHONPATH': str(root), 'OMP_NUM_THREADS': '1', 'ACCELERATE_USE_CPU': 'true', 'CUDA_VISIBLE_DEVICES': ''}
    out = folder/f'{size}.json'
    res = subprocess.run([sys.executable, *command, str(folder/'worker.py'), str(size), str(out), kind], env=env, capture_output=True, text=True, timeout=180)
    assert res.returncode == 0, res.stderr[-3000:]
    return json.loads(out.read_text())

@pytest.mark.parametrize('kind', ['ddp', 'accelerate'])
def test_two_processes_equal_one(tmp_path, kind):
    if not torch.distributed.is_available(): pytest.skip('torch was built without distributed')
    if kind == 'accelerate': pytest.importorskip('accelerate', reason='the package accelerate is not installed')
    one = run(tmp_path, 16, kind)
    two = run(tmp_path, 8, kind, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2')
    assert set(one) == set(two) and len(one) > 80
    for key,values in one.items():
        stat = key.split()[-1]
        if 'batches' in key: continue                                      # a process counts its own halves
        # rows of outputs add up, so death rates and spreads are exact; a loss is that of a part of the batch
        if 'loss' in key and stat != 'mean': continue
        np.testing.assert_allclose(two[key], values, rtol=1e-3, atol=1e-5, err_msg=key)
    assert len(one['train 0.weight grad_norm mean']) == 3
    before, after = (np.array(two[f'train all {o} mean']) for o in ('grad_norm', 'grad_norm_clipped'))
    assert (before > after).all() and (after < .1001).all()
