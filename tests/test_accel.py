"Acceleration: mixed precision, accumulation, clipping, compilation, and several processes that equal one."
import importlib.util, os, subprocess, sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.utils.data import DataLoader, IterableDataset

from shared import HandSGD

from miniai import accel
from miniai.accel import AccelerateCB, AccumulateCB, CompileCB, DDPCB, GradClipCB, MixedPrecision, Shard, half_type
from miniai.activations import ActivationStats
from miniai.callback import Callback, CancelBatchException, events
from miniai.conv import conv
from miniai.datasets import DataLoaders, MemoryLoader, fashion_mnist
from miniai.device import set_seed
from miniai.hooks import count_hooks
from miniai.learner import (DeviceCB, Learner, MetricsCB, SingleBatchCB, TrainCB)
from miniai.sgd import EMACB, OneCycleCB
from miniai.training import accuracy

root = Path(__file__).resolve().parent.parent
has_accelerate = importlib.util.find_spec('accelerate') is not None
needs_accelerate = pytest.mark.skipif(not has_accelerate, reason='the optional package accelerate is not installed')


def columns(n=40):
    g = torch.Generator().manual_seed(0)
    return dict(x=torch.randn(n, 8, generator=g), y=torch.randint(0, 4, (n,), generator=g))

def small_dls(bs=8, n=40):
    cols = columns(n)
    return DataLoaders(MemoryLoader(None, cols, bs, shuffle=True), MemoryLoader(None, cols, bs))

def small_net(dtype=torch.float32): return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).to(dtype)

def learner(*cbs, dls=None, lr=.1, model=None, cls=Learner, **kw):
    set_seed(1)
    return cls(model or small_net(), dls or small_dls(), F.cross_entropy, lr=lr, cbs=list(cbs), **kw)

def weights(learn): return torch.cat([p.detach().flatten() for p in learn.model.parameters()])
def fitted(learn, *args, **kw):
    set_seed(3)
    learn.fit(*args, **kw)
    return learn

def quiet(*cbs): return [TrainCB(), *cbs]

class RaiseAt(Callback):
    def __init__(self, event, e, order=500):
        self.order, self.e = order, e
        setattr(self, event, self._go)
    def _go(self, learn): raise self.e


# ---- mixed precision

def test_bf16_trains_as_float32():
    dls = DataLoaders.in_memory(fashion_mnist('small'), batch_size=64)
    def last(worker):
        set_seed(1)
        model = nn.Sequential(conv(1, 8, ks=5), conv(8, 16), conv(16, 32), conv(32, 64), conv(64, 10, act=False), nn.Flatten())
        for m in model.modules():
            if isinstance(m, nn.Conv2d): nn.init.kaiming_normal_(m.weight)
        learn = Learner(model, dls, F.cross_entropy, lr=.1, cbs=[worker, MetricsCB(accuracy=accuracy)])
        learn.fit(3)
        return learn.history.series('epoch', 'accuracy', 'valid').values[-1]
    full, half = last(TrainCB()), last(MixedPrecision())
    assert full > .75 and abs(full-half) < .01

@pytest.mark.parametrize('event', events)
@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt])
def test_no_context_stays_open(event, error):
    e = error('stop')
    if event in ('predict', 'get_loss', 'backward', 'step', 'zero_grad'):
        worker = type('Failing', (MixedPrecision,), {event: lambda self, learn: (_ for _ in ()).throw(e)})()
        cbs = [worker]
    else: cbs = [MixedPrecision(), RaiseAt(event, e)]
    learn = learner(*cbs, AccumulateCB(2), GradClipCB(), CompileCB(backend='eager'), ActivationStats())
    with pytest.raises(type(e)) as found: learn.fit(1)
    assert not torch.is_autocast_enabled('cpu') and not count_hooks(learn.model)
    assert learn.model._compiled_call_impl is None and not learn.hold
    said = str(found.value) + ' '.join(getattr(found.value, '__notes__', [])) + getattr(found.value, 'where', '')
    assert f'event `{event}`' in said and ('RaiseAt' in said or 'Failing' in said)

def test_autocast_is_closed_when_the_loss_fails():
    def bad(preds, yb): raise ArithmeticError('no loss')
    learn = learner(MixedPrecision())
    learn.loss_func = bad
    with pytest.raises(ArithmeticError): learn.fit(1)
    assert not torch.is_autocast_enabled('cpu')

def test_types_that_the_device_cannot_do():
    with pytest.raises(ValueError, match="Use 'bf16'"): learner(MixedPrecision(dtype='fp16')).fit(1)
    with pytest.raises(ValueError, match='float8'): half_type('cpu', 'float8')

def test_mixed_precision_with_an_optimizer_by_hand():
    learn = learner(MixedPrecision(), GradClipCB(.1), AccumulateCB(2), opt_func=HandSGD)
    before = weights(learn)
    learn.fit(1)
    assert not torch.equal(before, weights(learn))

def five_convs():
    set_seed(1)
    model = nn.Sequential(conv(1, 8, ks=5), conv(8, 16), conv(16, 10, act=False), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for m in model.modules():
        if isinstance(m, nn.Conv2d): nn.init.kaiming_normal_(m.weight)
    return model

@pytest.mark.gpu
@pytest.mark.parametrize('dtype', ['bf16', 'fp16'])
def test_half_precision_on_a_gpu(dtype):
    dls = DataLoaders.in_memory(fashion_mnist('small'), batch_size=64, device='cuda')
    def fit(worker):
        learn = Learner(five_convs(), dls, F.cross_entropy, lr=.1, cbs=[worker, DeviceCB('cuda'), MetricsCB(accuracy=accuracy), GradClipCB()])
        learn.fit(2)
        return learn
    full, half = fit(TrainCB()), fit(MixedPrecision(dtype=dtype))
    last = [o.history.series('epoch', 'accuracy', 'valid').values[-1] for o in (full, half)]
    assert abs(last[0]-last[1]) < .03
    norms = [o.history.series('gradient', 'norm').values[0] for o in (full, half)]
    assert abs(norms[0]-norms[1]) < .05*norms[0]   # unscaled before it is measured
    assert not torch.is_autocast_enabled('cuda')

@pytest.mark.gpu
def test_fp16_with_accumulation_and_inductor():
    dls = DataLoaders.in_memory(fashion_mnist('small'), batch_size=16, device='cuda')
    learn = Learner(five_convs(), dls, F.cross_entropy, lr=.05,
                    cbs=[MixedPrecision(dtype='fp16'), DeviceCB('cuda'), AccumulateCB(4), GradClipCB(), CompileCB(), ActivationStats(nn.ReLU)])
    learn.fit(1, valid=False)
    loss = learn.history.series('batch', 'loss').values
    assert loss[-50:].mean() < loss[:50].mean()


# ---- accumulation

@pytest.mark.parametrize('n,k', [(40, 4), (37, 4), (37, 3), (9, 5), (40, 1)])
@pytest.mark.parametrize('opt_func', [optim.SGD, optim.AdamW])
def test_accumulation_equals_the_large_batch(n, k, opt_func):
    one = learner(*quiet(), dls=small_dls(4*k, n), model=small_net(torch.float64), opt_func=opt_func, lr=.01)
    many = learner(*quiet(AccumulateCB(k)), dls=small_dls(4, n), model=small_net(torch.float64), opt_func=opt_func, lr=.01)
    for learn in (one, many):
        for dl in (learn.dls.train, learn.dls.valid): dl.columns['x'] = dl.columns['x'].double()
        set_seed(2)
        learn.model.apply(lambda m: m.reset_parameters() if hasattr(m, 'reset_parameters') else None)
        learn.fit(3)
    torch.testing.assert_close(weights(one), weights(many), rtol=0, atol=1e-9)
    assert one.n_steps == many.n_steps
    losses = many.history.series('batch', 'loss')
    assert losses.values.max() < 5 and set(losses.samples) <= {4, n % 4}   # not scaled

def test_a_schedule_steps_when_the_optimizer_does(recwarn):
    "Accumulation with a schedule equals the large batch with one: the same rates, and as many."
    def fit(bs, *more):
        learn = fitted(learner(*quiet(*more, OneCycleCB(pct_start=.3), cb), dls=small_dls(bs), opt_func=optim.AdamW), 3, valid=False)
        return weights(learn), rates
    for n in 2, 3, 4:
        found = []
        for bs, more in ((8, [AccumulateCB(n)]), (8*n, [])):
            rates = []
            cb = Callback()
            cb.after_step = lambda learn: rates.append(learn.opt.param_groups[0]['lr'])
            found.append(fit(bs, *more))
        (many, lrs), (one, expected) = found
        assert lrs == expected and len(lrs) == 3*-(-40//(8*n)) and torch.allclose(many, one, atol=1e-6)
    assert not [o for o in recwarn if 'lr_scheduler.step()' in str(o.message)]

def test_held_batches_do_not_clip_or_step():
    seen = []
    class Look(Callback):
        def after_backward(self, learn): seen.append(('backward', learn.iter))
        def after_step(self, learn): seen.append(('step', learn.iter))
    learn = learner(*quiet(AccumulateCB(2), GradClipCB(1e-3), Look()))
    learn.fit(1)
    assert seen == [(o, i) for i in (1, 3, 4) for o in ('backward', 'step')]
    assert len(learn.history.series('gradient', 'norm')) == 3

@pytest.mark.parametrize('event', ['before_batch', 'after_predict', 'after_loss', 'after_backward', 'after_batch'])
def test_a_batch_cut_short_leaves_no_half_gradients(event):
    "The step after it is one of a fresh accumulation."
    class Cut(Callback):
        order = 100
        def _go(self, learn):
            if learn.training and learn.iter == 1: raise CancelBatchException()
    setattr(Cut, event, Cut._go)
    norms = []
    class Look(Callback):
        def after_backward(self, learn): norms.append(int(cb.samples))
    cb = AccumulateCB(2)
    learn = learner(*quiet(cb, Cut(), Look()))
    learn.fit(1, valid=False)
    assert all(p.grad is None for p in learn.model.parameters()) and set(norms) <= {8, 16}

def test_accumulation_without_a_length_says_what_it_drops():
    cols = columns()
    class Stream(IterableDataset):
        def __iter__(self): return iter(zip(cols['x'], cols['y']))
    dl = DataLoader(Stream(), batch_size=8)
    learn = learner(*quiet(AccumulateCB(2)), dls=DataLoaders(dl, dl))
    with pytest.warns(UserWarning, match='after 1 of 2 batches'): learn.fit(1, valid=False)
    assert learn.n_steps == 2 and all(p.grad is None for p in learn.model.parameters())

def test_callbacks_can_be_fitted_twice_and_cancelled():
    cbs = quiet(AccumulateCB(2), GradClipCB(), CompileCB(backend='eager'))
    learn = learner(*cbs)
    learn.fit(1)
    learn.fit(1, cbs=SingleBatchCB())
    assert all(p.grad is None for p in learn.model.parameters()) and not learn.hold
    learn.fit(1)
    assert learn.lr_find(plot=False).lrs.size

def test_n_is_checked():
    with pytest.raises(ValueError, match='n is 0'): AccumulateCB(0)


# ---- clipping

@pytest.mark.parametrize('kind', [2., float('inf')])
def test_clipping_before_and_after(kind):
    seen = []
    class Norms(Callback):
        def __init__(self, order): self.order = order
        def after_backward(self, learn):
            grads = torch.cat([p.grad.flatten() for p in learn.model.parameters()])
            seen.append(torch.linalg.vector_norm(grads, kind).item())
    learn = learner(*quiet(Norms(5), GradClipCB(.05, kind), Norms(50)))
    learn.fit(2)
    h = learn.history
    np.testing.assert_allclose(h.series('gradient', 'norm').values, seen[::2], rtol=1e-5)
    np.testing.assert_allclose(h.series('gradient', 'norm clipped').values, seen[1::2], rtol=1e-5)
    assert max(seen[1::2]) <= .05001 < min(seen[::2])

def test_clipping_where_nothing_has_a_gradient():
    learn = learner(*quiet(GradClipCB()))
    learn.opt = optim.SGD(learn.model.parameters(), lr=.1)
    learn.cbs[1].after_backward(learn)
    assert not len(learn.history.series('gradient', 'norm'))
    for bad in (0, -1., float('nan')):
        with pytest.raises(ValueError, match='max_norm'): GradClipCB(bad)

def test_a_nan_gradient_is_recorded_as_nan():
    learn = learner(*quiet(GradClipCB()))
    learn.loss_func = lambda preds, yb: F.cross_entropy(preds, yb)*float('nan')
    learn.fit(1, valid=False)
    assert np.isnan(learn.history.series('gradient', 'norm').values).all()


# ---- compilation

def test_compiled_model_stays_the_same_object():
    plain, comp = learner(*quiet(a := ActivationStats())), learner(*quiet(b := ActivationStats(), CompileCB(backend='aot_eager'), EMACB()))
    model = comp.model
    fitted(plain, 2), fitted(comp, 2)
    assert comp.model is model and list(model.state_dict()) == list(plain.model.state_dict())
    torch.testing.assert_close(weights(plain), weights(comp), rtol=0, atol=1e-6)
    assert len(a.history) == len(b.history)
    comp.fit(1)
    assert len(b.history) == len(a.history)*3//2


# ---- several processes

train_script = '''
import sys, warnings, torch
from torch import nn, optim
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torcheval.metrics import MulticlassAccuracy, MulticlassAUROC
from miniai.accel import AccelerateCB, AccumulateCB, DDPCB, GradClipCB, MixedPrecision
from miniai.activations import ActivationStats
from miniai.datasets import DataLoaders, MemoryLoader
from miniai.device import set_seed
from miniai.distributed import is_main
from miniai.learner import Learner, MetricsCB, ProgressCB, TrainCB
from miniai.sgd import EMACB, OneCycleCB
from miniai.training import accuracy

size, out, kind, loader = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
set_seed(1)
cols = dict(x=torch.randn(211, 8), y=torch.randint(0, 4, (211,)))
model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))
with torch.no_grad(): model[0].bias[:6] = -3
if loader == 'memory': dls = DataLoaders(MemoryLoader(None, cols, size, shuffle=True), MemoryLoader(None, cols, size))
if loader == 'index':
    pairs = list(zip(cols['x'], cols['y']))
    dls = DataLoaders(DataLoader(pairs, size, shuffle=True, drop_last=True), DataLoader(pairs, size))
work = [AccelerateCB(mixed_precision='no')] if kind == 'accelerate' else [TrainCB(), DDPCB()]
more = [AccumulateCB(3)] if kind == 'accumulate' else []
stats = ActivationStats(nn.ReLU, on_valid=True)
metrics = MetricsCB(share=accuracy, accuracy=MulticlassAccuracy())
learn = Learner(model, dls, F.cross_entropy, lr=.05, opt_func=optim.AdamW,
                cbs=[*work, metrics, stats, ProgressCB(), GradClipCB(.5), OneCycleCB(), EMACB(.9), *more])
learn.lr_find(plot=False, gamma=2)
learn.fit(3)
learn.fit(1)
assert not hasattr(learn.model, 'module') and learn.dls is dls
dead = stats.dead_units()
if is_main(): torch.save([learn.model.state_dict(), learn.history.state_dict(), stats.history.state_dict(), dead.to_dict('list')], out)
'''

launchers = dict(torchrun=['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2'],
                 accelerate=['-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes=2', '--num_machines=1',
                             '--mixed_precision=no', '--dynamo_backend=no', '--main_process_port=0'])

def run(folder, launcher, size, kind='plain', loader='memory'):
    script, out = folder/'train.py', folder/'out.pt'
    script.write_text(train_script)
    env = {**os.environ, 'PYTHONPATH': str(root), 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    res = subprocess.run([sys.executable, *launcher, str(script), str(size), str(out), kind, loader], capture_output=True, text=True, env=env)
    assert res.returncode == 0, res.stderr[-4000:]
    return res.stdout, torch.load(out, weights_only=False)

def tables_equal(one, two, exact=('hist', 'dead_epoch'), tol=1e-5):
    from miniai.history import History
    a, b = History(), History()
    a.load_state_dict(one); b.load_state_dict(two)
    assert a.keys() == b.keys()
    for phase, source, stat in a.keys():
        s, t = a.series(source, stat, phase), b.series(source, stat, phase)
        for fact in ('runs', 'steps', 'epochs', 'samples', 'calls'):
            np.testing.assert_array_equal(getattr(s, fact), getattr(t, fact), err_msg=f'{source} {stat} {fact}')
        same = np.testing.assert_array_equal if stat == 'dead_epoch' else lambda x, y, err_msg: np.testing.assert_allclose(x, y, rtol=tol, atol=tol, err_msg=err_msg)
        if stat == 'hist': assert abs(s.values-t.values).sum() <= 2*len(s)   # a rounding may move an entry over an edge
        else: same(s.values, t.values, err_msg=f'{phase} {source} {stat}')

@pytest.mark.parametrize('launcher,kind,loader', [
    ('torchrun', 'plain', 'memory'), ('torchrun', 'accumulate', 'index'),
    pytest.param('accelerate', 'accelerate', 'memory', marks=needs_accelerate)])
def test_two_processes_equal_one(tmp_path, launcher, kind, loader):
    (tmp_path/'one').mkdir(), (tmp_path/'two').mkdir()
    text1, one = run(tmp_path/'one', [], 16, kind, loader)
    text2, two = run(tmp_path/'two', launchers[launcher], 8, kind, loader)
    assert text1 == text2 and text1.count('eval') == 4
    for nm, w in one[0].items(): torch.testing.assert_close(w, two[0][nm], rtol=0, atol=1e-6)
    tables_equal(one[1], two[1])
    tables_equal(one[2], two[2])
    assert one[3] == two[3] and len(one[3]['unit'])

@needs_accelerate
def test_accelerate_alone_and_what_it_leaves():
    one, two = learner(TrainCB()), learner(AccelerateCB(mixed_precision='no'))
    for learn in (one, two):
        fitted(learn, 2)
        learn.fit(1, reset_opt=False)
    assert torch.equal(weights(one), weights(two)) and type(two.opt) is optim.SGD
    assert not {'forward', '_original_forward'} & set(vars(two.model)) and not count_hooks(two.model)
    with pytest.raises(RuntimeError, match='stop'): two.fit(1, cbs=RaiseAt('after_loss', RuntimeError('stop')))
    assert 'forward' not in vars(two.model) and type(two.opt) is optim.SGD

def test_processes_that_accelerate_does_not_see_are_refused(monkeypatch):
    "It would train as many models as there are processes, each on its part of the data."
    cb = AccelerateCB(mixed_precision='no')
    cb.acc = SimpleNamespace(num_processes=1)
    monkeypatch.setattr(accel, 'world_size', lambda: 2)
    learn = learner(cb)
    dls = learn.dls
    with pytest.raises(RuntimeError, match='there are 2 processes, and accelerate sees 1'): learn.fit(1)
    assert learn.dls is dls

def test_without_accelerate_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, 'accelerate', None)
    with pytest.raises(ImportError, match=r'pip install accelerate'): learner(AccelerateCB(mixed_precision='no')).fit(1)

def test_a_rest_too_small_for_all_is_said():
    with pytest.warns(UserWarning, match='1 samples at the end'): sizes = [len(o[0]) for o in Shard(MemoryLoader(None, columns(33), 8), 0, 2)]
    assert sizes == [8, 8]

def test_ddp_alone_does_nothing():
    one, two = learner(*quiet()), learner(*quiet(DDPCB()))
    fitted(one, 2), fitted(two, 2)
    assert torch.equal(weights(one), weights(two))
