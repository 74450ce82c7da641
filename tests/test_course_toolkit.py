"Code as users of the course library have it in their notebooks on initialisation, schedules, ResNets and augmentation."
import io
from functools import partial

import fastcore.all as fc
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.optim import lr_scheduler
from torcheval.metrics import MulticlassAccuracy

from miniai.datasets import *
from miniai.conv import *
from miniai.learner import *
from miniai.activations import *
from miniai.init import *
from miniai.sgd import BaseSchedCB, BatchSchedCB, EpochSchedCB, HasLearnCB, RecorderCB
from miniai.resnet import *
from miniai.augment import *

xl, yl = 'image', 'label'
xmean, xstd = 0.28, 0.35

@pytest.fixture(scope='module')
def dls():
    dd = fashion_mnist('small')
    dd['train'], dd['test'] = dd['train'].select(range(256)), dd['test'].select(range(128))
    @inplace
    def transformi(b): b[xl] = [(torch.tensor(np.array(o))[None]/255 - xmean)/xstd for o in b[xl]]
    return DataLoaders.from_dd(dd.with_transform(transformi), 64, num_workers=0)

@pytest.fixture
def metrics():
    res = MetricsCB(accuracy=MulticlassAccuracy())
    res._log = fc.noop
    return res

def last(learn, nm='loss'): return learn.history.series('epoch', nm, 'valid').values[-1]


def test_star_imports_give_the_names():
    for o in (init_weights, lsuv_init, get_model, GeneralRelu, plot_func, BatchTransformCB, clean_mem, conv, ResBlock, act_gr,
              CapturePreds, rand_erase, RandErase, rand_copy, RandCopy, set_seed, def_device, to_cpu, Hook, Hooks): assert callable(o) or o
    assert 'summary' not in globals() and 'capture_preds' not in globals()   # methods, not names bound to None
    for nm in ('summary', 'capture_preds', 'show_image_batch', 'lr_find'): assert callable(getattr(Learner, nm))

def test_conv_signature_and_indexing():
    block = conv(1, 8, ks=3, stride=2, act=nn.ReLU, norm=nn.BatchNorm2d, bias=None)
    assert [type(o) for o in block] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU] and block[0].bias is None
    act = partial(GeneralRelu, leak=0.1, sub=0.4)
    model = get_model(act=act, nfs=[1, 8, 16], norm=nn.BatchNorm2d)
    assert model[0][0].out_channels == 8 and isinstance(model[1][2], GeneralRelu)


# ---- initialisation

def test_apply_init_weights_and_a_momentum_learner(dls):
    set_seed(42)
    model = get_model()
    iw = partial(init_weights, leaky=0.1)
    model.apply(iw)
    learn = MomentumLearner(model, dls, F.cross_entropy, lr=0.05, cbs=[DeviceCB()])
    learn.fit(2)
    assert learn.history.series('batch', 'loss').values[-4:].mean() < 2

def test_activation_stats_over_a_general_relu(dls, metrics):
    act_gr = partial(GeneralRelu, leak=0.1, sub=0.4)
    astats = ActivationStats(fc.risinstance(GeneralRelu))
    set_seed(42)
    model = get_model(act_gr).apply(partial(init_weights, leaky=0.1))
    learn = TrainLearner(model, dls, F.cross_entropy, lr=0.1, cbs=[metrics, DeviceCB(), astats])
    learn.fit(1)
    assert len(astats) == 4 and astats.color_dim() is not None
    plot_func(GeneralRelu(leak=0.1, sub=0.4))

def test_lsuv_by_hand(dls):
    xb, yb = next(iter(dls.train))
    set_seed(42)
    model = get_model(act_gr)
    relus = [o for o in model.modules() if isinstance(o, GeneralRelu)]
    convs = [o for o in model.modules() if isinstance(o, nn.Conv2d)]
    for ms in zip(relus, convs): lsuv_init(model, *ms, xb.to(def_device))
    def _stats(hook, mod, inp, outp): hook.mean, hook.std = to_cpu(outp).mean(), to_cpu(outp).std()
    with Hooks(relus, _stats) as hooks, torch.no_grad(): model(xb.to(def_device))
    for h in hooks: assert abs(h.mean) < .01 and abs(h.std-1) < .01

def test_norms_written_by_hand_work_in_conv(dls):
    class LayerNormOfMine(nn.Module):
        def __init__(self, dummy, eps=1e-5):
            super().__init__()
            self.eps, self.mult, self.add = eps, nn.Parameter(torch.tensor(1.)), nn.Parameter(torch.tensor(0.))
        def forward(self, x):
            m, v = x.mean((1,2,3), keepdim=True), x.var((1,2,3), keepdim=True)
            return (x-m)/((v+self.eps).sqrt())*self.mult + self.add
    for norm in (LayerNormOfMine, nn.BatchNorm2d):
        set_seed(42)
        model = get_model(act_gr, norm=norm).apply(partial(init_weights, leaky=0.2))
        TrainLearner(model, dls, F.cross_entropy, lr=0.1, cbs=[DeviceCB()]).fit(1)

def test_batch_transform(dls):
    seen = []
    def _norm(b): seen.append(1); return (b[0]-xmean)/xstd, b[1]
    norm = BatchTransformCB(_norm)
    learn = TrainLearner(get_model(), dls, F.cross_entropy, lr=0.1, cbs=[DeviceCB(), norm])
    learn.fit(1)
    assert len(seen) == len(dls.train) + len(dls.valid)
    n = len(seen)
    TrainLearner(get_model(), dls, F.cross_entropy, lr=0.1, cbs=[BatchTransformCB(_norm, on_train=False, on_val=True)]).fit(1)
    assert len(seen) == n + len(dls.valid)


# ---- optimizers of one's own, on the protocol opt_func(params, lr)

class SGD:
    def __init__(self, params, lr, wd=0.):
        params = list(params)
        fc.store_attr()
        self.i = 0
    def step(self):
        with torch.no_grad():
            for p in self.params:
                self.reg_step(p)
                self.opt_step(p)
        self.i += 1
    def opt_step(self, p): p -= p.grad*self.lr
    def reg_step(self, p):
        if self.wd != 0: p *= 1 - self.lr*self.wd
    def zero_grad(self):
        for p in self.params: p.grad.data.zero_()

class Momentum(SGD):
    def __init__(self, params, lr, wd=0., mom=0.9):
        super().__init__(params, lr=lr, wd=wd)
        self.mom = mom
    def opt_step(self, p):
        if not hasattr(p, 'grad_avg'): p.grad_avg = torch.zeros_like(p.grad)
        p.grad_avg = p.grad_avg*self.mom + p.grad*(1-self.mom)
        p -= self.lr*p.grad_avg

class Adam(SGD):
    def __init__(self, params, lr, wd=0., beta1=0.9, beta2=0.99, eps=1e-5):
        super().__init__(params, lr=lr, wd=wd)
        self.beta1, self.beta2, self.eps = beta1, beta2, eps
    def opt_step(self, p):
        if not hasattr(p, 'avg'): p.avg, p.sqr_avg = torch.zeros_like(p.grad.data), torch.zeros_like(p.grad.data)
        p.avg = self.beta1*p.avg + (1-self.beta1)*p.grad
        unbias_avg = p.avg/(1 - self.beta1**(self.i+1))
        p.sqr_avg = self.beta2*p.sqr_avg + (1-self.beta2)*(p.grad**2)
        unbias_sqr_avg = p.sqr_avg/(1 - self.beta2**(self.i+1))
        p -= self.lr*unbias_avg/(unbias_sqr_avg + self.eps).sqrt()

@pytest.mark.parametrize('opt_func', [SGD, partial(SGD, wd=0.1), Momentum, Adam])
def test_optimizers_of_ones_own(dls, opt_func):
    set_seed(42)
    model = get_model(act_gr, norm=nn.BatchNorm2d).apply(partial(init_weights, leaky=0.1))
    lr = 0.2 if opt_func is not Adam else 0.01
    learn = TrainLearner(model, dls, F.cross_entropy, lr=lr, cbs=[DeviceCB()], opt_func=opt_func)
    first = TrainLearner(model, dls, F.cross_entropy).capture_preds()
    learn.fit(2)
    preds, targs = learn.capture_preds()
    assert F.cross_entropy(preds, targs) < F.cross_entropy(*first)
    assert learn.opt.i == 2*len(dls.train)   # the optimizer is still the one of the fit

# ---- schedulers

class BatchSchedOfMine(Callback):
    def __init__(self, sched): self.sched = sched
    def before_fit(self, learn): self.schedo = self.sched(learn.opt)
    def after_batch(self, learn):
        if learn.training: self.schedo.step()

class RecorderOfMine(Callback):
    def __init__(self, **d): self.d = d
    def before_fit(self, learn):
        self.recs = {k: [] for k in self.d}
        self.pg = learn.opt.param_groups[0]
    def after_batch(self, learn):
        if not learn.training: return
        for k, v in self.d.items(): self.recs[k].append(v(self))

def _lr(cb): return cb.pg['lr']
def _beta1(cb): return cb.pg['betas'][0]

def test_batch_scheduler_and_recorder(dls, metrics):
    tmax = 3*len(dls.train)
    sched = partial(lr_scheduler.CosineAnnealingLR, T_max=tmax)
    model = get_model(act_gr, norm=nn.BatchNorm2d).apply(partial(init_weights, leaky=0.1))
    rec, mine = RecorderCB(lr=_lr), RecorderOfMine(lr=_lr)
    cbs = [DeviceCB(), metrics, mine, BatchSchedCB(sched), rec]
    learn = TrainLearner(model, dls, F.cross_entropy, lr=2e-2, cbs=cbs, opt_func=optim.AdamW)
    learn.fit(3)
    assert rec.recs['lr'] == mine.recs['lr'] and len(rec.recs['lr']) == tmax and rec.recs['lr'][0] == 2e-2
    rec.plot()
    learn = TrainLearner(model, dls, F.cross_entropy, lr=2e-2, cbs=[mine, BatchSchedOfMine(sched)], opt_func=optim.AdamW)
    learn.fit(3)
    assert mine.recs['lr'] == rec.recs['lr']

def test_epoch_scheduler(dls):
    rec = RecorderCB(lr=_lr)
    sched = partial(lr_scheduler.CosineAnnealingLR, T_max=3)
    TrainLearner(get_model(), dls, F.cross_entropy, lr=2e-2, cbs=[DeviceCB(), EpochSchedCB(sched), rec], opt_func=optim.AdamW).fit(3)
    steps = np.array(rec.recs['lr']).reshape(3, -1)
    assert (steps.std(1) < 1e-12).all() and steps[0,0] > steps[1,0] > steps[2,0]

def test_one_cycle(dls):
    tmax = 2*len(dls.train)
    sched = partial(lr_scheduler.OneCycleLR, max_lr=6e-2, total_steps=tmax)
    rec = RecorderCB(lr=_lr, mom=_beta1)
    TrainLearner(get_model(), dls, F.cross_entropy, lr=6e-2, cbs=[DeviceCB(), BatchSchedCB(sched), rec], opt_func=optim.AdamW).fit(2)
    fig = rec.plot()
    assert len(fig.axes) == 2 and max(rec.recs['lr']) > 10*rec.recs['lr'][-1] and min(rec.recs['mom']) < .9

def test_own_scheduler_callbacks_on_ours(dls):
    class HalvesCB(BaseSchedCB):
        def after_epoch(self, learn): self._step(learn)
    rec, cb = RecorderCB(lr=_lr), HalvesCB(partial(lr_scheduler.ExponentialLR, gamma=0.5))
    learn = TrainLearner(get_model(), dls, F.cross_entropy, lr=.1, cbs=[DeviceCB(), cb, rec])
    learn.fit(3)
    assert np.allclose(rec.recs['lr'][::len(dls.train)], [.1, .05, .025])
    class Watch(HasLearnCB):
        def after_batch(self, learn): assert self.learn is learn
    learn.fit(1, cbs=Watch())


# ---- residual networks

def _conv_block(ni, nf, stride, act=act_gr, norm=None, ks=3):
    return nn.Sequential(conv(ni, nf, stride=1, act=act, norm=norm, ks=ks), conv(nf, nf, stride=stride, act=None, norm=norm, ks=ks))

class ResBlockOfMine(nn.Module):
    def __init__(self, ni, nf, stride=1, ks=3, act=act_gr, norm=None):
        super().__init__()
        self.convs = _conv_block(ni, nf, stride, act=act, ks=ks, norm=norm)
        self.idconv = fc.noop if ni==nf else conv(ni, nf, ks=1, stride=1, act=None)
        self.pool = fc.noop if stride==1 else nn.AvgPool2d(2, ceil_mode=True)
        self.act = act()
    def forward(self, x): return self.act(self.convs(x) + self.idconv(self.pool(x)))

def resnet_of(block, act=act_gr, nfs=(8, 16, 32), norm=nn.BatchNorm2d):
    layers = [block(1, 8, stride=1, act=act, norm=norm)]
    layers += [block(nfs[i], nfs[i+1], act=act, norm=norm, stride=2) for i in range(len(nfs)-1)]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(nfs[-1], 10, bias=False), nn.BatchNorm1d(10)]
    return nn.Sequential(*layers).to(def_device)

def test_our_blocks_are_those_blocks(dls):
    set_seed(1); mine = resnet_of(ResBlockOfMine)
    set_seed(1); ours = resnet_of(ResBlock)
    x = next(iter(dls.train))[0].to(def_device)
    assert mine.state_dict().keys() == ours.state_dict().keys()
    torch.testing.assert_close(mine(x), ours(x), rtol=0, atol=0)

def test_a_resnet_trains_and_can_be_saved(dls, metrics):
    lr, epochs = 1e-2, 2
    tmax = epochs*len(dls.train)
    sched = partial(lr_scheduler.OneCycleLR, max_lr=lr, total_steps=tmax)
    xtra = [BatchSchedCB(sched)]
    model = resnet_of(ResBlock).apply(partial(init_weights, leaky=0.1))
    learn = TrainLearner(model, dls, F.cross_entropy, lr=lr, cbs=[DeviceCB(), metrics, ProgressCB(plot=True)]+xtra, opt_func=optim.AdamW)
    learn.fit(epochs)
    file = io.BytesIO()
    torch.save(learn.model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    x = next(iter(dls.valid))[0].to(def_device)
    torch.testing.assert_close(again.eval()(x), model.eval()(x))

def test_summary_by_hand_and_by_ours(dls):
    def _print_shape(hook, mod, inp, outp): shapes.append((type(mod).__name__, inp[0].shape, outp.shape))
    shapes, model = [], resnet_of(ResBlock)
    learn = TrainLearner(model, dls, F.cross_entropy, lr=0., cbs=[DeviceCB()])
    with Hooks(model, _print_shape): learn.fit(1, cbs=SingleBatchCB())
    table = TrainLearner(model, dls, F.cross_entropy, cbs=DeviceCB()).summary('?')
    assert len(table.rows) == len(model) == 7
    for row, (kind, inp, out) in zip(table.rows, shapes):
        assert (row.type, row.inp, row.out) == (kind, '×'.join(map(str, inp)), '×'.join(map(str, out)))


# ---- augmentation

def tfm_batch(b, tfm_x=fc.noop, tfm_y=fc.noop): return tfm_x(b[0]), tfm_y(b[1])

def test_augmenting_with_modules(dls, metrics):
    tfms = nn.Sequential(RandErase(), RandCopy(pct=0.2, max_num=2))
    augcb = BatchTransformCB(partial(tfm_batch, tfm_x=tfms), on_val=False)
    set_seed(42)
    learn = TrainLearner(get_model(act_gr, norm=nn.BatchNorm2d), dls, F.cross_entropy, lr=1e-2, cbs=[DeviceCB(), SingleBatchCB(), augcb, metrics],
                         opt_func=optim.AdamW)
    learn.fit(1)
    learn.show_image_batch(max_n=9, cbs=[augcb], imsize=1)
    xb, _ = learn.batch
    assert rand_erase(xb, 0.2, max_num=4).shape == rand_copy(xb, 0.2, 4).shape == xb.shape

def test_test_time_augmentation_by_hand(dls):
    learn = TrainLearner(get_model(act_gr), dls, F.cross_entropy, lr=1e-2, cbs=[DeviceCB()], opt_func=optim.AdamW)
    learn.fit(1)
    ap1, at = learn.capture_preds()
    ttacb = BatchTransformCB(partial(tfm_batch, tfm_x=lambda x: x.flip(-1)), on_val=True)
    ap2, at2 = learn.capture_preds(cbs=[ttacb])
    ap = torch.stack([ap1, ap2]).mean(0).argmax(1)
    acc = (ap==at).float().mean()
    assert torch.equal(at, at2) and 0 < acc <= 1 and not torch.equal(ap1, ap2)
    p, t, x = learn.capture_preds(inps=True)
    assert p.shape == (128, 10) and x.shape == (128, 1, 28, 28) and torch.equal(p, ap1)

def test_capture_preds_as_a_callback(dls):
    cp = CapturePreds()
    learn = TrainLearner(get_model(), dls, F.cross_entropy, lr=1e-2, cbs=[DeviceCB()])
    learn.fit(1, train=False, cbs=[cp])
    assert len(cp.all_preds) == len(cp.all_targs) == len(cp.all_inps) == 128

def test_clean_mem_and_set_seed(dls):
    set_seed(1, True)
    set_seed(1)
    clean_mem()
