"Code as users of the course library have it in their notebooks: star imports, and classes of their own over our Callback."
import math
from functools import partial

import fastcore.all as fc
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim
from torcheval.metrics import MulticlassAccuracy

from miniai.datasets import *
from miniai.learner import *
from miniai.conv import *

x, y = 'image', 'label'

@pytest.fixture(scope='module')
def dd():
    small = fashion_mnist('small')
    small['train'], small['test'] = small['train'].select(range(256)), small['test'].select(range(128))
    return small

@pytest.fixture(scope='module')
def flat_dls(dd):
    @inplace
    def flatten(b): b[x] = [torch.tensor(np.array(o)).flatten()/255 for o in b[x]]
    return DataLoaders.from_dd(dd.with_transform(flatten), 64)

@pytest.fixture(scope='module')
def dls(dd):
    @inplace
    def to_tensors(b): b[x] = [torch.tensor(np.array(o))[None]/255*2-0.8 for o in b[x]]
    return DataLoaders.from_dd(dd.with_transform(to_tensors), 64)

def mlp():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(28*28, 50), nn.ReLU(), nn.Linear(50, 10))

def cnn_layers(): return [conv(1, 8, ks=5), conv(8, 16), conv(16, 32), conv(32, 64), conv(64, 10, act=False), nn.Flatten()]

def cnn():
    torch.manual_seed(1)
    return nn.Sequential(*cnn_layers()).to(def_device)


# ---- a metric class, and callbacks in the first style, on a Learner of one's own

class Metric:
    def __init__(self): self.reset()
    def reset(self): self.vals,self.ns = [],[]
    def add(self, inp, targ=None, n=1):
        self.last = self.calc(inp, targ)
        self.vals.append(self.last)
        self.ns.append(n)
    @property
    def value(self):
        ns = torch.tensor(self.ns)
        return (torch.tensor(self.vals)*ns).sum()/ns.sum()
    def calc(self, inps, targs): return inps

class Accuracy(Metric):
    def calc(self, inps, targs): return (inps==targs).float().mean()

class DeviceOfMineCB(Callback):
    def __init__(self, device=def_device): fc.store_attr()
    def before_fit(self):
        if hasattr(self.learn.model, 'to'): self.learn.model.to(self.device)
    def before_batch(self): self.learn.batch = to_device(self.learn.batch, device=self.device)

class EpochReportCB(Callback):
    def before_fit(self): self.reports = []
    def before_epoch(self): self.acc,self.loss = Accuracy(),Metric()
    def after_batch(self):
        xb,yb = to_cpu(self.learn.batch)
        self.acc.add(to_cpu(self.learn.preds).argmax(dim=1), yb, len(xb))
        self.loss.add(to_cpu(self.learn.loss), n=len(xb))
    def after_epoch(self): self.reports.append((self.learn.epoch, self.learn.model.training, self.loss.value.item(), self.acc.value.item()))

def test_first_style_on_our_learner(flat_dls):
    report = EpochReportCB()
    learn = TrainLearner(mlp(), flat_dls, F.cross_entropy, lr=0.2, cbs=[DeviceOfMineCB(), report])
    learn.fit(1)
    assert [o[:2] for o in report.reports] == [(0, True), (0, False)]
    losses = learn.history.series('batch', 'loss', 'valid')
    np.testing.assert_allclose(report.reports[1][2], np.average(losses.values, weights=losses.samples), rtol=1e-5)

class BareLearner:
    "A learner that hands itself to its callbacks and calls them with nothing."
    def __init__(self, model, dls, loss_func, lr, cbs, opt_func=optim.SGD):
        fc.store_attr()
        for cb in cbs: cb.learn = self
    def one_batch(self):
        self.preds = self.model(self.batch[0])
        self.loss = self.loss_func(self.preds, self.batch[1])
        if self.model.training:
            self.loss.backward()
            self.opt.step()
            self.opt.zero_grad()
    def one_epoch(self, train):
        self.model.train(train)
        try:
            self.callback('before_epoch')
            for self.iter,self.batch in enumerate(self.dls.train if train else self.dls.valid):
                try:
                    self.callback('before_batch')
                    self.one_batch()
                    self.callback('after_batch')
                except CancelBatchException: pass
            self.callback('after_epoch')
        except CancelEpochException: pass
    def fit(self, n_epochs):
        self.opt = self.opt_func(self.model.parameters(), self.lr)
        try:
            self.callback('before_fit')
            for self.epoch in range(n_epochs):
                self.one_epoch(True)
                self.one_epoch(False)
            self.callback('after_fit')
        except CancelFitException: pass
    def callback(self, method_nm): run_cbs(self.cbs, method_nm)

def test_first_style_on_a_learner_of_ones_own(flat_dls):
    report = EpochReportCB()
    BareLearner(mlp().to(def_device), flat_dls, F.cross_entropy, lr=0.2, cbs=[DeviceOfMineCB(), report]).fit(1)
    assert [o[:2] for o in report.reports] == [(0, True), (0, False)]


# ---- callbacks run by hand, in the preferred style

class CompletionCB(Callback):
    def before_fit(self, learn): self.count = 0
    def after_batch(self, learn): self.count += 1
    def after_fit(self, learn): print(f'{self.count} batches')

class StopAfterCB(Callback):
    order = CompletionCB.order + 1
    def after_batch(self, learn): raise CancelFitException()

def test_run_by_hand(capsys):
    cbs = [CompletionCB()]
    run_cbs(cbs, 'before_fit')
    run_cbs(cbs, 'after_batch')
    run_cbs(cbs, 'after_fit')
    assert capsys.readouterr().out == '1 batches\n'
    with pytest.raises(CancelFitException): run_cbs([StopAfterCB()], 'after_batch')


# ---- a learner with levels of one's own

class CancelStepException(Exception): pass

class LevelsLearner:
    def __init__(self, model, dls=(0,), loss_func=F.mse_loss, lr=0.1, cbs=None, opt_func=optim.SGD):
        cbs = fc.L(cbs)
        fc.store_attr()
    @with_cbs('step')
    def one_step(self): self.opt.step()
    @with_cbs('batch')
    def _one_batch(self):
        self.predict()
        self.get_loss()
        if self.training:
            self.backward()
            self.one_step()
            self.zero_grad()
    @with_cbs('epoch')
    def _one_epoch(self):
        for self.iter,self.batch in enumerate(self.dl): self._one_batch()
    def one_epoch(self, train):
        self.model.train(train)
        self.dl = self.dls.train if train else self.dls.valid
        self._one_epoch()
    @with_cbs('fit')
    def _fit(self, train, valid):
        for self.epoch in self.epochs:
            if train: self.one_epoch(True)
            if valid: torch.no_grad()(self.one_epoch)(False)
    def fit(self, n_epochs=1, train=True, valid=True):
        self.n_epochs,self.epochs = n_epochs,range(n_epochs)
        self.opt = self.opt_func(self.model.parameters(), self.lr)
        self._fit(train, valid)
    def __getattr__(self, name):
        if name in ('predict', 'get_loss', 'backward', 'step', 'zero_grad'): return partial(self.callback, name)
        raise AttributeError(name)
    def callback(self, method_nm): run_cbs(self.cbs, method_nm, self)
    @property
    def training(self): return self.model.training

class NoStepCB(Callback):
    def before_step(self, learn): raise CancelStepException()
    def cleanup_step(self): self.cleaned = getattr(self, 'cleaned', 0) + 1

def test_levels_of_ones_own(flat_dls):
    model, cb, count = mlp(), NoStepCB(), CompletionCB()
    before = [p.clone() for p in model.parameters()]
    LevelsLearner(model, flat_dls, F.cross_entropy, lr=0.2, cbs=[TrainCB(), DeviceCB(), cb, count]).fit(1)
    assert cb.cleaned == 4 and count.count == 4 + 1   # validation takes batches of twice the size
    assert all(torch.equal(p.cpu(), q) for p,q in zip(model.parameters(), before))


# ---- everyday use

def test_one_list_of_callbacks_for_ten_learners(flat_dls, capsys):
    metrics = MetricsCB(accuracy=MulticlassAccuracy())
    cbs = [TrainCB(), DeviceCB(), metrics, ProgressCB(plot=True)]
    for _ in range(10):
        learn = Learner(mlp(), flat_dls, F.cross_entropy, lr=0.2, cbs=cbs)
        learn.fit(1)
        assert len(learn.history.series('epoch', 'accuracy', 'valid')) == 1 and len(cbs) == 4
    assert capsys.readouterr().out.count('eval') == 10

def test_train_and_momentum_learners(flat_dls, capsys):
    cbs = [DeviceCB(), MetricsCB(MulticlassAccuracy()), ProgressCB()]
    for cls in (TrainLearner, partial(MomentumLearner, mom=0.9)):
        learn = cls(mlp(), flat_dls, F.cross_entropy, lr=0.1, cbs=cbs)
        learn.fit(1)
        learn.fit(1, train=False)
    out = capsys.readouterr().out.split('\n')
    assert sum('eval' in o for o in out) == 4 and sum(o.endswith('train') and 'epoch' not in o for o in out) == 2

def test_single_batch(flat_dls):
    learn = Learner(mlp(), flat_dls, F.cross_entropy, lr=0.1, cbs=fc.L(TrainCB(), DeviceCB()) + [CompletionCB()])
    learn.fit(1, cbs=[SingleBatchCB()])
    assert learn.preds.shape == (64, 10) and learn.batch[0].shape == (64, 784)

class FinderOfMineCB(Callback):
    def __init__(self, lr_mult=1.3): fc.store_attr()
    def before_fit(self, learn): self.lrs,self.losses,self.min = [],[],math.inf
    def after_batch(self, learn):
        if not learn.training: raise CancelEpochException()
        self.lrs.append(learn.opt.param_groups[0]['lr'])
        loss = to_cpu(learn.loss)
        self.losses.append(loss)
        if loss < self.min: self.min = loss
        if loss > self.min*3: raise CancelFitException()
        for g in learn.opt.param_groups: g['lr'] *= self.lr_mult

def test_a_finder_of_ones_own_and_ours(flat_dls):
    finder = FinderOfMineCB()
    learn = MomentumLearner(mlp(), flat_dls, F.cross_entropy, lr=1e-4, cbs=[DeviceCB(), finder])
    learn.fit(10)
    assert len(finder.losses) > 5 and learn.epoch < 10
    found = MomentumLearner(mlp(), flat_dls, F.cross_entropy, cbs=DeviceCB()).lr_find(start_lr=1e-3, plot=False)
    assert 1e-4 < found.valley < 10


# ---- looking inside with one's own classes

class SequentialModel(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.act_means, self.act_stds = [[] for _ in layers], [[] for _ in layers]
    def __call__(self, x):
        for i,l in enumerate(self.layers):
            x = l(x)
            self.act_means[i].append(to_cpu(x).mean())
            self.act_stds[i].append(to_cpu(x).std())
        return x
    def __iter__(self): return iter(self.layers)

def fit(model, dls, cbs, epochs=1, xtra_cbs=None):
    learn = Learner(model, dls, loss_func=F.cross_entropy, lr=0.6, cbs=cbs+fc.L(xtra_cbs))
    learn.fit(epochs)
    return learn

def test_a_model_that_records_itself(dls):
    model = SequentialModel(*cnn_layers())
    fit(model, dls, [TrainCB(), DeviceCB()])
    assert [len(o) for o in model.act_means] == [4+1]*6

class Hook():
    def __init__(self, m, f): self.hook = m.register_forward_hook(partial(f, self))
    def remove(self): self.hook.remove()
    def __del__(self): self.remove()

def append_stats(hook, mod, inp, outp):
    if not hasattr(hook, 'stats'): hook.stats = ([], [], [])
    acts = to_cpu(outp)
    hook.stats[0].append(acts.mean())
    hook.stats[1].append(acts.std())
    hook.stats[2].append(acts.abs().histc(40, 0, 10))

class Hooks(list):
    def __init__(self, ms, f): super().__init__([Hook(m, f) for m in ms])
    def __enter__(self, *args): return self
    def __exit__(self, *args): self.remove()
    def __del__(self): self.remove()
    def __delitem__(self, i):
        self[i].remove()
        super().__delitem__(i)
    def remove(self):
        for h in self: h.remove()

class HooksCallback(Callback):
    def __init__(self, hookfunc, mod_filter=fc.noop, on_train=True, on_valid=False, mods=None):
        fc.store_attr()
        super().__init__()
    def before_fit(self, learn):
        mods = self.mods or fc.filter_ex(learn.model.modules(), self.mod_filter)
        self.hooks = Hooks(mods, partial(self._hookfunc, learn))
    def _hookfunc(self, learn, *args, **kwargs):
        if (self.on_train and learn.training) or (self.on_valid and not learn.training): self.hookfunc(*args, **kwargs)
    def after_fit(self, learn): self.hooks.remove()
    def __iter__(self): return iter(self.hooks)
    def __len__(self): return len(self.hooks)

def get_min(h):
    h1 = torch.stack(h.stats[2]).t().float()
    return h1[0]/h1.sum(0)

class ActivationStats(HooksCallback):
    def __init__(self, mod_filter=fc.noop): super().__init__(append_stats, mod_filter)

def n_hooks(model): return sum(len(m._forward_hooks) for m in model.modules())

def test_hooks_of_ones_own(dls):
    model = cnn()
    with Hooks(model, append_stats) as hooks: fit(model, dls, [TrainCB(), DeviceCB()])
    assert [len(h.stats[0]) for h in hooks] == [5]*6 and n_hooks(model) == 0

def test_hooks_callback_of_ones_own(dls):
    hc, model = HooksCallback(append_stats, mod_filter=fc.risinstance(nn.Conv2d)), cnn()
    fit(model, dls, [TrainCB(), DeviceCB()], xtra_cbs=[hc])
    assert len(hc) == 5 and [len(h.stats[0]) for h in hc] == [4]*5 and n_hooks(model) == 0

def test_activation_stats_of_ones_own_as_the_only_callback(dls, capsys):
    astats, model = ActivationStats(fc.risinstance(nn.ReLU)), cnn()
    learn = TrainLearner(model, dls, F.cross_entropy, lr=0.1, cbs=[DeviceCB(), MetricsCB(accuracy=MulticlassAccuracy())])
    learn.fit(1, cbs=astats)   # iterable, and still one callback
    assert len(astats) == 4 and all(0 <= get_min(h).min() <= 1 for h in astats) and n_hooks(model) == 0

def test_activation_stats_of_ones_own_equal_ours(dls):
    ours = pytest.importorskip('miniai.activations')
    mine, theirs = ActivationStats(fc.risinstance(nn.ReLU)), ours.ActivationStats(fc.risinstance(nn.ReLU))
    fit(cnn(), dls, [TrainCB(), DeviceCB(), theirs, mine])
    for a,b in zip(mine, theirs):
        for p,q in zip(a.stats[:2], b.stats[:2]): np.testing.assert_allclose(np.array(p), np.array(q), rtol=1e-4, atol=1e-6)
