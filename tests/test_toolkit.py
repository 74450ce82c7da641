"Training rooms on odd models and at odd moments: initialisation, schedules, averaged weights, summaries, predictions."
import copy, math, pickle, random
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.optim import lr_scheduler as lrs

from shared import CountReads

from miniai.activations import ActivationStats
from miniai.augment import CapturePreds, RandCopy, RandErase, rand_copy, rand_erase
from miniai.callback import Callback, CancelBatchException, CancelEpochException, CancelFitException, events
from miniai.conv import conv as plain_conv
from miniai.datasets import DataLoaders, MemoryLoader
from miniai.device import set_seed
from miniai.hooks import Hook, Hooks, count_hooks
from miniai.init import (BatchTransformCB, GeneralRelu, conv, get_model, init_weights, kaiming_init,
                         lsuv, lsuv_init, plot_func, undisturbed)
from miniai.learner import DeviceCB, Learner, MetricsCB, SingleBatchCB, TrainCB, TrainLearner
from miniai.resnet import ResBlock, act_gr, get_resnet
from miniai.sgd import BatchSchedCB, EMACB, EpochSchedCB, OneCycleCB, RecorderCB
from miniai.stats import mean_std
from miniai.training import accuracy


def same(a, b): torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)

def everything(model, learn=None):
    "All that a look at a model must not change."
    state = dict(params=[p.detach().clone() for p in model.parameters()], buffers=[b.clone() for b in model.buffers()],
                 grads=[None if p.grad is None else p.grad.clone() for p in model.parameters()])
    rest = [m.training for m in model.modules()], count_hooks(model), random.getstate(), np.random.get_state()[1].tolist()
    if learn is not None: rest += (sorted(vars(learn)), learn.opt, learn.epoch, learn.n_steps, len(learn.history),
                                   learn.history.run, list(learn.cbs))
    return state, torch.get_rng_state(), rest

def unchanged(before, after):
    for k in ('params', 'buffers', 'grads'):
        for a, b in zip(before[0][k], after[0][k]): assert (a is None and b is None) or torch.equal(a.nan_to_num(), b.nan_to_num())
    assert torch.equal(before[1], after[1]) and before[2] == after[2]

def batches(n=4, bs=16, shape=(1, 28, 28)):
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(bs, *shape, generator=g), torch.randint(0, 10, (bs,), generator=g)) for _ in range(n)]

def image_dls(n=4, n_valid=2): return DataLoaders(batches(n), batches(n_valid))

def line_dls(n=8):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n*16, 5, generator=g)
    y = x @ torch.tensor([[1.], [-2], [0], [3], [1]])
    parts = list(zip(x.split(16), y.split(16)))
    return DataLoaders(parts, parts[:2])

def line_learner(cbs=None, lr=.1, opt_func=optim.SGD, dls=None):
    set_seed(1)
    return TrainLearner(nn.Linear(5, 1), dls or line_dls(), F.mse_loss, lr=lr, cbs=cbs, opt_func=opt_func)

class RaiseAt(Callback):
    "Raises `e` at an event, in the phases wanted."
    def __init__(self, event, e, order=500, training=None):
        self.e, self.order, self.wanted = e, order, training
        setattr(self, event, self._go)
    def _go(self, learn):
        if self.wanted in (None, learn.training): raise self.e


# ---- convolution block and norms

@pytest.mark.parametrize('norm, bias', [
    (None, True), (False, True), (nn.BatchNorm2d, False), (partial(nn.BatchNorm2d, eps=1e-3), False),
    (nn.InstanceNorm2d, False), (lambda nf: nn.GroupNorm(2, nf), True), (lambda nf: nn.GroupNorm(nf, nf), False)])
def test_bias_only_where_a_norm_leaves_it(norm, bias):
    block = conv(3, 8, norm=norm)
    assert (block[0].bias is not None) == bias
    assert conv(3, 8, norm=norm, bias=not bias)[0].bias is None if bias else conv(3, 8, norm=norm, bias=True)[0].bias is not None
    assert block(torch.randn(4, 3, 9, 9)).shape == (4, 8, 5, 5)

@pytest.mark.parametrize('norm', [nn.BatchNorm2d, nn.InstanceNorm2d, lambda nf: nn.GroupNorm(nf, nf)])
def test_a_bias_there_has_no_effect(norm):
    block, x = conv(3, 8, norm=norm, act=None, bias=True), torch.randn(4, 3, 9, 9)
    before = block(x)
    with torch.no_grad(): block[0].bias += 5
    torch.testing.assert_close(block(x), before, atol=1e-4, rtol=0)

@pytest.mark.parametrize('ks, stride', [(3, 2), (5, 1), (1, 1)])
def test_the_two_convs_agree(ks, stride):
    set_seed(1); a = plain_conv(2, 4, ks, stride)
    set_seed(1); b = conv(2, 4, ks, stride)
    same(a.state_dict(), b.state_dict())
    set_seed(1); a = plain_conv(2, 4, ks, stride, act=False)
    set_seed(1); b = conv(2, 4, ks, stride, act=False)
    same(a(torch.ones(1, 2, 8, 8)), b(torch.ones(1, 2, 8, 8)))
    assert isinstance(conv(2, 4, act=True)[1], nn.ReLU)

@pytest.mark.parametrize('kw', [dict(), dict(leak=.1), dict(leak=.1, sub=.4), dict(sub=.4, maxv=2.), dict(maxv=0.), dict(leak=0.)])
def test_general_relu(kw):
    x = torch.linspace(-3, 3, 50, requires_grad=True)
    before, y = x.detach().clone(), GeneralRelu(**kw)(x)
    expected = torch.where(x > 0, x, x*kw.get('leak', 0)) - kw.get('sub', 0)
    torch.testing.assert_close(y, expected.clamp(max=kw.get('maxv', 100)))
    y.sum().backward()
    same(x.detach(), before)

def test_plot_func_draws_where_it_is_told():
    import matplotlib.pyplot as plt
    ax = plt.subplots()[1]
    assert plot_func(torch.tanh, -2, 2, 9, ax=ax, title='tanh') is ax and ax.get_title() == 'tanh'
    assert len(ax.lines[0].get_xdata()) == 9 and plot_func(nn.ReLU()) is not ax


# ---- Kaiming

class Functional(nn.Module):
    "No activation is a module."
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)
    def forward(self, x): return F.log_softmax(self.d(torch.tanh(self.c(F.leaky_relu(self.b(self.a(x).relu_()), .3)))), dim=-1)

class TwoInputs(nn.Module):
    def __init__(self): super().__init__(); self.a, self.b, self.out = nn.Linear(3, 8), nn.Linear(4, 8), nn.Linear(8, 10)
    def forward(self, u, v): return self.out(F.relu(self.a(u) + self.b(v)))

class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp, self.layer, self.out = nn.Linear(6, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 3)
    def forward(self, x): return self.out(self.layer(self.inp(x)).mean(1))

def inplace_net(): return nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Dropout(.2), nn.Linear(16, 4))

def test_kaiming_takes_the_function_that_really_follows():
    table = kaiming_init(Functional(), torch.randn(10, 8))
    assert list(table.follows) == ['relu_', 'leaky_relu', 'tanh', 'nothing']
    gains = [nn.init.calculate_gain(*o) for o in (('relu',), ('leaky_relu', .3), ('tanh',), ('linear',))]
    assert np.allclose(table.gain, gains, rtol=.06) and np.allclose(table.gain[:2], gains[:2], rtol=1e-5)

@pytest.mark.parametrize('model, x, follows', [
    (nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.SiLU(), nn.Flatten(), nn.Linear(36, 2)),
     torch.randn(4, 1, 8, 8), ['silu', 'nothing']),
    (nn.Sequential(nn.ConvTranspose1d(2, 3, 3), nn.PReLU(3), nn.Conv1d(3, 2, 1)), torch.randn(4, 2, 9), ['prelu', 'nothing']),
    (TwoInputs(), (torch.randn(5, 3), torch.randn(5, 4)), ['relu', 'relu', 'nothing']),
    (inplace_net(), torch.randn(5, 8), ['relu', 'nothing']),
    (nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 2)), torch.randn(5, 8), ['nothing', 'gelu', 'nothing'])])
def test_kaiming_follows(model, x, follows):
    before = everything(model)
    assert list(kaiming_init(model, x).follows) == follows
    after = everything(model)
    assert all(p.isfinite().all() for p in model.parameters()) and not torch.equal(before[1], after[1])
    after = after[0], before[1], after[2]   # it draws weights, of course
    for o in (before, after): o[0]['params'] = []
    unchanged(before, after)

def test_kaiming_says_what_it_leaves():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 2))
    kept = {k: v.clone() for k, v in model[0].state_dict().items()}
    table = kaiming_init(model, torch.randn(3, 4))
    assert 'left as it is' in table.follows['0'] and table.follows['2'] == 'nothing'
    same(model[0].state_dict(), kept)
    table = kaiming_init(Attention(), torch.randn(4, 5, 6))
    assert table.follows['layer.linear1'] == 'relu' and table.follows['layer.linear2'] == 'nothing'
    assert not [o for o in table.index if 'self_attn' in o]   # left to PyTorch's own

@pytest.mark.parametrize('act, depth', [(nn.ReLU, 20), (partial(nn.LeakyReLU, .2), 20), (nn.Tanh, 20), (nn.SELU, 20),
    (partial(GeneralRelu, leak=.1), 20), (nn.SiLU, 4), (nn.GELU, 4)])   # of the last two, errors grow from layer to layer
def test_kaiming_keeps_the_mean_square_through_many_layers(act, depth):
    set_seed(1)
    model = nn.Sequential(*[o for _ in range(depth) for o in (nn.Linear(400, 400), act())])
    x = torch.randn(200, 400)
    kaiming_init(model, x)
    out = model[:-1](x)   # in front of the last activation
    squares = out.detach().square().mean()
    gain = kaiming_init(copy.deepcopy(model), x).gain.iloc[-1]
    assert 1/3 < squares/gain**2 < 3

def test_init_weights_is_the_courses():
    set_seed(1); ours = get_model().apply(partial(init_weights, leaky=.2))
    set_seed(1); theirs = get_model()
    for m in theirs.modules():
        if isinstance(m, nn.Conv2d): nn.init.kaiming_normal_(m.weight, a=.2)
    same(ours.state_dict(), theirs.state_dict())
    init_weights(nn.LazyConv2d(3, 3)), init_weights(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))), init_weights(nn.ReLU())


# ---- LSUV

lsuv_models = {
    'course': (lambda: get_model(act=act_gr).cpu(), torch.randn(64, 1, 28, 28)),
    'relu': (lambda: get_model().cpu(), torch.randn(64, 1, 28, 28)),
    'without bias': (lambda: nn.Sequential(nn.Linear(8, 32, bias=False), GeneralRelu(.1, .4), nn.Linear(32, 8, bias=False)), torch.randn(99, 8)),
    'functional': (Functional, torch.randn(99, 8)),
    'two inputs': (TwoInputs, (torch.randn(99, 3), torch.randn(99, 4))),
    'in place, dropout': (inplace_net, torch.randn(99, 8)),
    'attention': (Attention, torch.randn(99, 5, 6)),
    'one dimension': (lambda: nn.Sequential(nn.Conv1d(2, 8, 3), nn.ELU(), nn.ConvTranspose1d(8, 4, 3), nn.Sigmoid()), torch.randn(64, 2, 20)),
    'resnet': (lambda: get_resnet(nfs=(8, 16), norm=None).cpu(), torch.randn(64, 1, 28, 28)),
    'large input': (lambda: get_model(act=act_gr).cpu(), torch.rand(64, 1, 28, 28)*1e4 + 1e4),
    'tiny input': (lambda: get_model(act=act_gr).cpu(), torch.rand(64, 1, 28, 28)*1e-6)}

@pytest.mark.parametrize('nm', lsuv_models)
def test_lsuv_on_any_model(nm):
    set_seed(1)
    make, x = lsuv_models[nm]
    model = make()
    before = everything(model)
    table = lsuv(model, x)
    after = everything(model)
    for o in (before, after): o[0]['params'] = []
    unchanged(before, after)
    assert all(p.isfinite().all() for p in model.parameters())
    assert (table.passes <= 50).all() and len(table)
    good = table[table.note == '']
    assert len(good) and np.allclose(good['std'], 1, atol=2e-3)

def test_the_table_is_what_one_measures():
    set_seed(1)
    model, x = get_model(act=act_gr).cpu(), torch.randn(64, 1, 28, 28)
    def measured():
        res = []
        with Hooks([m for m in model.modules() if isinstance(m, GeneralRelu)], lambda h, m, i, o: res.append(mean_std(o).tolist())):
            with torch.no_grad(): model(x)
        return res
    before = measured()
    table = lsuv(model, x)
    assert np.allclose(table[['mean_before', 'std_before']][:4], before, atol=1e-6)
    assert np.allclose(table[['mean', 'std']][:4], measured(), atol=1e-6)

def test_lsuv_leaves_normalised_layers_alone():
    model = nn.Sequential(conv(1, 4, norm=nn.BatchNorm2d), conv(4, 4), nn.Flatten())
    kept = model[0][0].weight.clone()
    table = lsuv(model, torch.randn(32, 1, 8, 8))
    assert 'normalised' in table.note['0.0'] and table.passes['0.0'] == 0
    same(model[0][0].weight, kept)
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    assert 'LayerNorm' in lsuv(model, torch.randn(32, 4)).note['0']

@pytest.mark.parametrize('harm', ['dead', 'zero weights', 'nan weights', 'nan input', 'inf input'])
@pytest.mark.parametrize('bias', [True, False])
def test_what_lsuv_cannot_help_is_said_and_left(harm, bias):
    set_seed(1)
    model, x = nn.Sequential(nn.Linear(8, 16, bias=bias), nn.ReLU(), nn.Linear(16, 2)), torch.randn(50, 8)
    with torch.no_grad():
        if harm == 'dead': model[0].weight.abs_().neg_(); x = x.abs()
        if harm == 'dead' and bias: model[0].bias.fill_(-1)
        if harm == 'zero weights': model[0].weight.zero_()
        if harm == 'nan weights': model[0].weight[0, 0] = torch.nan
    if harm == 'nan input': x[0, 0] = torch.nan
    if harm == 'inf input': x[0, 0] = torch.inf
    kept = copy.deepcopy(model[0].state_dict())
    res = lsuv_init(model, model[1], model[0], x)
    if harm == 'zero weights' and bias: assert res.passes <= 50    # its bias still differs between units
    else: assert 'left as it was' in res.note; same(model[0].state_dict(), kept)
    assert model[0].weight.isnan().sum() == (harm == 'nan weights')
    table = lsuv(model, x)
    assert (table.note != '').any() or harm == 'zero weights'

@pytest.mark.parametrize('f', [lsuv, kaiming_init, lambda m, x: lsuv_init(m, m[0], m[0], x)])
@pytest.mark.parametrize('xb', [[[1.]], None, np.ones((4, 3)), DataLoaders([(torch.ones(4, 3), 1)], [])])
def test_an_input_without_a_tensor_is_refused(f, xb):
    model = nn.Sequential(nn.Linear(3, 2))
    before = model[0].weight.clone()
    with pytest.raises(TypeError, match=f'xb is a {type(xb).__name__} .*next.iter.loader'): f(model, xb)
    assert model[0].weight.equal(before) and not count_hooks(model)

def test_lsuv_ends(): # a deviation of 1 is out of reach
    model, x = nn.Sequential(nn.Linear(8, 16), nn.Sigmoid()), torch.randn(50, 8)
    calls = []
    with Hook(model[0], lambda *_: calls.append(1)): res = lsuv_init(model, model[1], model[0], x, max_iter=7)
    assert len(calls) == res.passes <= 7 and 'not reached' in res.note
    assert model[0].weight.abs().max() < 1e6

def test_lsuv_on_a_shared_layer_and_in_training():
    layer = nn.Linear(8, 8)
    model = nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU())
    assert len(lsuv(model, torch.randn(50, 8))) == 1
    model = inplace_net()
    model(torch.randn(4, 8)).sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    lsuv(model, torch.randn(50, 8))
    same([p.grad for p in model.parameters()], grads)
    assert all(p.requires_grad for p in model.parameters())

def test_undisturbed_restores_after_an_error():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout())
    before = everything(model)
    with pytest.raises(ZeroDivisionError):
        with undisturbed(model):
            model.train()(torch.randn(9, 4)), model.eval(), random.random(), np.random.rand(), setattr(model, 'counter', 1)
            1/0
    unchanged(before, everything(model))
    assert not hasattr(model, 'counter') and torch.is_grad_enabled()


# ---- BatchTransformCB

def test_transforms_come_after_the_device_and_in_their_order():
    seen = []
    def tfm(nm): return lambda b: (seen.append(nm), b)[1]
    learn = Learner(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), image_dls(1, 1), F.cross_entropy,
                    cbs=[BatchTransformCB(tfm('a')), BatchTransformCB(tfm('b'), on_val=False), BatchTransformCB(tfm('c'), on_valid=False),
                         BatchTransformCB(tfm('d'), on_train=False), TrainCB(), DeviceCB('cpu')])
    learn.fit(1)
    assert seen == list('abcad') and BatchTransformCB.order > DeviceCB.order


# ---- schedulers

schedulers = {
    'StepLR': partial(lrs.StepLR, step_size=3), 'MultiStepLR': partial(lrs.MultiStepLR, milestones=[2, 5]),
    'ExponentialLR': partial(lrs.ExponentialLR, gamma=.9), 'CosineAnnealingLR': partial(lrs.CosineAnnealingLR, T_max=16),
    'CosineAnnealingWarmRestarts': partial(lrs.CosineAnnealingWarmRestarts, T_0=5), 'LambdaLR': partial(lrs.LambdaLR, lr_lambda=lambda i: 1/(1+i)),
    'LinearLR': partial(lrs.LinearLR, total_iters=7), 'PolynomialLR': partial(lrs.PolynomialLR, total_iters=16),
    'CyclicLR': partial(lrs.CyclicLR, base_lr=.01, max_lr=.1, step_size_up=4, cycle_momentum=False),
    'OneCycleLR': partial(lrs.OneCycleLR, max_lr=.1, total_steps=16, cycle_momentum=False),
    'SequentialLR': lambda opt: lrs.SequentialLR(opt, [lrs.ConstantLR(opt, .1, 4), lrs.ExponentialLR(opt, .9)], [4])}

def rates_by_hand(sched, n, lr=.1):
    p = nn.Parameter(torch.zeros(1))
    opt = optim.SGD([p], lr=lr)
    s, res = sched(opt), []
    for _ in range(n):
        res.append(opt.param_groups[0]['lr'])
        opt.step(), s.step()
    return res

@pytest.mark.parametrize('nm', schedulers)
def test_any_scheduler_by_batch_and_by_epoch(nm, recwarn):
    rec = RecorderCB(lr=lambda cb: cb.pg['lr'])
    line_learner([BatchSchedCB(schedulers[nm]), rec]).fit(2)
    assert rec.recs['lr'] == rates_by_hand(schedulers[nm], 16)
    line_learner([EpochSchedCB(schedulers[nm]), rec]).fit(10)
    assert rec.recs['lr'][::8] == rates_by_hand(schedulers[nm], 10)
    assert not [w for w in recwarn if 'optimizer.step' in str(w.message)]

def test_plateau_waits_for_what_it_is_told():
    sched = partial(lrs.ReduceLROnPlateau, patience=0, threshold=.99)
    for kw in (dict(), dict(monitor='loss', phase='train'), dict(monitor='mae')):
        metrics = MetricsCB(mae=F.l1_loss)
        metrics._log = lambda row: None
        rec = RecorderCB(lr=lambda cb: cb.pg['lr'])
        cb = EpochSchedCB(sched, **kw)
        learn = line_learner([cb, rec, metrics])
        learn.fit(4)
        assert rec.recs['lr'][0] == .1 > rec.recs['lr'][-1]
        phase, nm = kw.get('phase', 'valid'), kw.get('monitor', 'loss')
        values = learn.history.series('epoch', nm, phase).values
        assert math.isclose(cb.schedo.best, min(values), rel_tol=.05) or cb.schedo.best >= min(values)
    with pytest.raises(ValueError, match='phase'): EpochSchedCB(sched, phase='val')

def test_a_schedule_stays_out_of_validation_trials_and_captures():
    made = []
    def sched(opt): made.append(opt); return lrs.ExponentialLR(opt, .5)
    learn = line_learner([BatchSchedCB(sched)])
    learn.fit(1)
    rate = learn.opt.param_groups[0]['lr']
    learn.fit(1, train=False), learn.lr_find(plot=False), learn.capture_preds(), learn.summary()
    assert len(made) == 1 and learn.opt.param_groups[0]['lr'] == rate

def test_schedule_state_can_be_carried_over():
    rec = RecorderCB(lr=lambda cb: cb.pg['lr'])
    sched = BatchSchedCB(partial(lrs.CosineAnnealingLR, T_max=32))
    learn = line_learner([sched, rec])
    learn.fit(2)
    state = copy.deepcopy(sched.state_dict())
    other = BatchSchedCB(partial(lrs.CosineAnnealingLR, T_max=32))
    other.load_state_dict(state)
    assert other.state_dict() == state   # also while it waits for its scheduler
    learn.cbs = [other, rec]
    learn.fit(2, reset_opt=False)
    assert np.allclose(rec.recs['lr'], rates_by_hand(partial(lrs.CosineAnnealingLR, T_max=32), 32)[16:], rtol=1e-5)
    assert other.state_dict()['last_epoch'] == 32 and BatchSchedCB(sched).state_dict() == {}

def test_a_scheduler_that_is_made_already_is_refused():
    with pytest.raises(TypeError, match='sched is a StepLR, made already'):
        line_learner([BatchSchedCB(lrs.StepLR(optim.SGD([torch.zeros(1)], .1), 2))]).fit(1)

def test_one_cycle_in_one_line():
    rec = RecorderCB(lr=lambda cb: cb.pg['lr'], mom=lambda cb: cb.pg['betas'][0])
    learn = line_learner([OneCycleCB(pct_start=.5), rec], opt_func=optim.AdamW)
    learn.fit(4)
    lr = rec.recs['lr']
    assert len(lr) == 32 and math.isclose(max(lr), .1, rel_tol=.02) and 14 <= np.argmax(lr) <= 16
    learn.fit(2, lr=.3)
    assert math.isclose(max(rec.recs['lr']), .3, rel_tol=.02) and len(rec.recs['lr']) == 16
    class Endless:
        def __iter__(self): return iter(batches(3, shape=(5,)))
    learn = line_learner([OneCycleCB()], dls=DataLoaders(Endless(), []))
    with pytest.raises(ValueError, match='total_steps'): learn.fit(1, valid=False)


# ---- recorder

def two_groups(params, lr):
    weight, bias = params
    return optim.SGD([dict(params=[weight], lr=lr), dict(params=[bias], lr=lr/2)])

def test_recorder_sees_all_groups_and_reads_nothing():
    rec, other = RecorderCB(lr=lambda cb: cb.pg['lr'], norm=lambda cb: cb.learn.model.weight.detach().norm()), RecorderCB(lr=lambda cb: 7)
    learn = line_learner([rec, other], opt_func=two_groups)
    with CountReads() as counter: learn.fit(2, valid=False)
    assert counter.reads == 0
    assert {k: len(v) for k, v in rec.recs.items()} == {'lr': 16, 'lr[1]': 16, 'norm': 16}
    assert rec.recs['lr[1]'] == [.05]*16 and other.recs == {'lr': [7]*16}
    fig = rec.plot()
    assert [len(ax.get_lines()) >= n for ax, n in zip(fig.axes, (2, 1))] == [True, True] and [ax.get_title() for ax in fig.axes] == ['lr', 'norm']
    learn.fit(1)
    learn.fit(1, train=False), learn.lr_find(plot=False)
    assert len(rec.recs['lr']) == 8
    assert fig is not rec.plot()

def test_recorder_without_param_groups_says_so():
    class Bare:
        def __init__(self, params, lr): self.params = list(params)
        def step(self): pass
        def zero_grad(self): [setattr(p, 'grad', None) for p in self.params]
    learn = line_learner(RecorderCB(lr=lambda cb: cb.pg['lr']), opt_func=Bare)
    with pytest.raises(AttributeError, match="'Bare' object has no attribute 'param_groups'"): learn.fit(1)
    assert RecorderCB(a=len).recs == {}


# ---- averaged weights

@pytest.mark.parametrize('event', [e for e in events if e not in ('predict', 'get_loss', 'backward', 'step', 'zero_grad')])
@pytest.mark.parametrize('exc', [CancelBatchException, CancelEpochException, CancelFitException, ValueError, KeyboardInterrupt],
                         ids=lambda e: e.__name__)
def test_trained_weights_are_back_after_any_exit(event, exc):
    for order in (-500, 500):
        class Last(Callback):
            order = 1000
            def after_step(self, learn): self.weight = learn.model.weight.detach().clone()
        last = Last()
        learn = line_learner([EMACB(.5, warmup=False), last, RaiseAt(event, exc(), order, training=False)])
        start = learn.model.weight.detach().clone()
        try: learn.fit(2)
        except (Exception, KeyboardInterrupt): pass
        same(learn.model.weight.detach(), getattr(last, 'weight', start))

def test_averages_of_tied_frozen_half_and_buffers():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm, self.frozen = nn.Linear(784, 784), nn.BatchNorm1d(784), nn.Linear(784, 10)
            self.b = nn.Linear(784, 784)
            self.b.weight = self.a.weight
            self.frozen.requires_grad_(False)
            self.register_buffer('low', torch.ones(3, dtype=torch.half))
        def forward(self, x): return self.frozen(self.norm(self.b(self.a(x.flatten(1)))))
    ema, model = EMACB(.9), Tied()
    learn = TrainLearner(model, image_dls(), F.cross_entropy, lr=.01, cbs=ema)
    learn.fit(1)
    trained = copy.deepcopy(model.state_dict())
    with ema.swapped(model):
        same(model.norm.running_mean, ema.averages['norm.running_mean'])
        same(model.b.weight.detach(), ema.averages['a.weight'])
        assert not torch.equal(model.a.weight, trained['a.weight']) and model.low.dtype == torch.half
    same(model.state_dict(), trained)
    assert ema.averages['low'].dtype == torch.float32 and 'norm.num_batches_tracked' not in ema.averages

def test_averages_read_nothing_and_do_not_disturb():
    plain, ema = line_learner(), EMACB()
    learn = line_learner(ema)
    plain.fit(2)
    with CountReads() as counter: learn.fit(2, valid=False)
    assert counter.reads == 0 and ema.n == 16
    same(learn.model.state_dict(), plain.model.state_dict())
    before = copy.deepcopy(ema.averages)
    learn.lr_find(plot=False)
    same(ema.averages, before)
    learn.summary(), learn.capture_preds()
    same(ema.averages, before)
    same(learn.model.state_dict(), plain.model.state_dict())

def test_averages_go_on_or_start_again():
    whole, parts = EMACB(.9), EMACB(.9)
    line_learner(whole).fit(4)
    learn = line_learner(parts)
    learn.fit(2)
    learn.fit(2, reset_opt=False)
    same(whole.averages, parts.averages)
    halves = [line_learner(EMACB(.9)) for _ in range(2)]
    halves[0].fit(2)
    halves[1].model = halves[0].model
    halves[1].cbs[0].load_state_dict(halves[0].cbs[0].state_dict())
    halves[1].fit(2)
    same(whole.averages, halves[1].cbs[0].averages)
    learn.fit(1)
    assert parts.n == 8   # anew
    learn.model = nn.Linear(5, 2)
    with pytest.raises(ValueError, match='another model'): parts.copy_to(nn.Sequential(nn.Linear(5, 1)))

def test_predictions_are_those_of_the_averages():
    ema = EMACB(.9)
    learn = line_learner(ema)
    learn.fit(1)
    preds, _ = learn.capture_preds()
    with ema.swapped(learn.model), torch.no_grad(): expected = torch.cat([learn.model(x) for x, _ in learn.dls.valid])
    same(preds, expected)


# ---- residual blocks

@pytest.mark.parametrize('size', [1, 2, 5, 14, 27])
@pytest.mark.parametrize('stride', [1, 2, 3])
@pytest.mark.parametrize('ks', [1, 3, 5])
def test_both_ways_through_a_block_fit(size, stride, ks):
    for ni, nf in ((3, 3), (3, 4)):
        block = ResBlock(ni, nf, stride, ks=ks, act=nn.ReLU, norm=nn.BatchNorm2d)
        assert block(torch.randn(2, ni, size, size)).shape == (2, nf, -(-size//stride), -(-size//stride))

def test_blocks_can_be_copied_pickled_and_scripted_by_state():
    block = ResBlock(3, 8, stride=2)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(block)))
    x = torch.randn(2, 3, 8, 8)
    same(block(x), twin(x))


# ---- summary

class DictLearner(TrainLearner):
    "Batches are dicts."
    def predict(self): self.preds = self.model(self.batch['x'])
    def get_loss(self): self.loss = F.cross_entropy(self.preds, self.batch['y'])

def as_dicts(bs): return [dict(x=x, y=y) for x, y in bs]

class Recurrent(nn.Module):
    def __init__(self): super().__init__(); self.rnn, self.out = nn.LSTM(28, 8, batch_first=True), nn.Linear(8, 10)
    def forward(self, x): return self.out(self.rnn(x[:, 0])[0][:, -1])

class Dicts(nn.Module):
    def __init__(self): super().__init__(); self.a = nn.Linear(784, 10)
    def forward(self, x): return dict(logits=self.a(x.flatten(1)), extra=None)

def test_summary_changes_nothing_and_adds_up():
    metrics = MetricsCB(acc=accuracy)
    metrics._log = lambda row: None
    model, astats, rec, ema = get_resnet(nfs=(4, 8)).cpu(), ActivationStats(), RecorderCB(lr=lambda cb: cb.pg['lr']), EMACB()
    cbs = [TrainCB(), DeviceCB('cpu'), metrics, astats, rec, ema, OneCycleCB(), BatchTransformCB(lambda b: (rand_erase(b[0]), b[1]))]
    learn = Learner(model, image_dls(), F.cross_entropy, lr=.01, cbs=cbs, opt_func=optim.AdamW)
    before = everything(model, learn)
    table = learn.summary()
    unchanged(before, everything(model, learn))
    learn.fit(1)
    F.cross_entropy(model(batches(1)[0][0]), batches(1)[0][1]).backward()   # gradients that are in work
    opt_state, rows, recs = copy.deepcopy(learn.opt.state_dict()), len(astats.history), rec.recs
    before = everything(model, learn)
    again = learn.summary()
    learn.show_image_batch()
    unchanged(before, everything(model, learn))
    assert str(again) == str(table) and len(astats.history) == rows and rec.recs == recs
    same(learn.opt.state_dict()['state'], opt_state['state'])
    frame = table.frame()
    assert frame.params.sum() == table.params == sum(p.numel() for p in model.parameters()) and frame.macs.sum() == table.macs
    assert frame.macs['0.convs.0.0'] == 28*28*25*4 and frame.out['1.act'] == '16×8×14×14'
    assert table._repr_markdown_().count('\n') == len(frame) + 3

@pytest.mark.parametrize('nm', ['lstm', 'dict batch', 'dict output', 'attention', 'two inputs', 'compiled', 'single'])
def test_summary_of_any_model(nm):
    dls, cls, kw = image_dls(), TrainLearner, {}
    model = dict([('lstm', Recurrent), ('dict output', Dicts), ('attention', Attention), ('two inputs', TwoInputs)]).get(nm, lambda: None)()
    if nm == 'dict batch': model, cls, dls = get_model().cpu(), DictLearner, DataLoaders(as_dicts(batches()), [])
    if nm == 'attention': dls = DataLoaders(batches(shape=(5, 6)), [])
    if nm == 'two inputs': cls, dls, kw = Learner, DataLoaders([(torch.randn(4, 3), torch.randn(4, 4), torch.zeros(4).long())], []), dict(cbs=TrainCB(n_inp=2))
    if nm == 'compiled': model = torch.compile(get_model().cpu(), backend='eager')
    if nm == 'single': model, dls = nn.Linear(28, 10), DataLoaders(batches(shape=(28,)), [])
    before = everything(model)
    table = cls(model, dls, F.cross_entropy, **kw).summary()
    unchanged(before, everything(model))
    assert table.params == sum(p.numel() for p in model.parameters())
    macs = {'lstm': 28*4*8*(28+8) + 80, 'dict output': 7840, 'two inputs': 24+32+80, 'single': 280,
            'attention': 5*48 + 5*(4*64 + 2*5*8 + 2*128) + 24}
    if nm in macs: assert table.macs == macs[nm]
    assert all('never called' not in o.inp for o in table.rows if nm != 'attention')

def test_summary_of_lazy_layers_is_refused():
    learn = TrainLearner(nn.Sequential(nn.Flatten(), nn.LazyLinear(10)), image_dls(), F.cross_entropy)
    with pytest.raises(ValueError, match='lazy'): learn.summary()
    learn.model(batches(1)[0][0])
    assert learn.summary().params == 7850
    with pytest.raises(ValueError, match='no module'): learn.summary(nn.Conv2d)

def test_an_error_in_the_model_leaves_no_trace():
    class Breaks(nn.Module):
        def __init__(self): super().__init__(); self.norm = nn.BatchNorm2d(1)
        def forward(self, x): self.norm(x); raise ZeroDivisionError('here')
    model = Breaks()
    learn = TrainLearner(model, image_dls(), F.cross_entropy)
    before = everything(model, learn)
    with pytest.raises(ZeroDivisionError): learn.summary()
    unchanged(before, everything(model, learn))


# ---- predictions

def test_capture_preds_keeps_optimizer_history_and_order():
    metrics = MetricsCB(acc=accuracy)
    metrics._log = lambda row: None
    learn = TrainLearner(get_model().cpu(), image_dls(3, 3), F.cross_entropy, lr=.05, cbs=metrics, opt_func=partial(optim.SGD, momentum=.9))
    learn.fit(1)
    opt, state, rows, run = learn.opt, copy.deepcopy(learn.opt.state_dict()), len(learn.history), learn.history.run
    params = copy.deepcopy(learn.model.state_dict())
    preds, targs, inps = learn.capture_preds(inps=True)
    same(inps, torch.cat([x for x, _ in learn.dls.valid])), same(targs, torch.cat([y for _, y in learn.dls.valid]))
    with torch.no_grad(): same(preds, torch.cat([learn.model(x) for x, _ in learn.dls.valid]))
    assert learn.opt is opt and (len(learn.history), learn.history.run) == (rows, run) and learn.model.training
    same(learn.opt.state_dict()['state'], state['state']), same(learn.model.state_dict(), params)
    before = learn.epochs_done
    learn.fit(1, reset_opt=False)
    assert learn.epochs_done == before+1

def test_capture_preds_of_nested_things():
    data = [(torch.randn(4, 3), torch.randn(4, 4), torch.zeros(4).long())]*2
    learn = Learner(TwoInputs(), DataLoaders(data, data), F.cross_entropy, cbs=TrainCB(n_inp=2))
    preds, targs, inps = learn.capture_preds(inps=True)
    assert preds.shape == (8, 10) and targs.shape == (8,) and [o.shape for o in inps] == [(8, 3), (8, 4)]
    loss = lambda preds, yb: F.cross_entropy(preds['logits'], yb)
    preds, _ = TrainLearner(Dicts(), image_dls(), loss).capture_preds()
    assert preds['logits'].shape == (32, 10)
    learn = DictLearner(get_model().cpu(), DataLoaders(as_dicts(batches()), as_dicts(batches())), F.cross_entropy)
    preds, targs = learn.capture_preds()
    assert preds.shape == (64, 10) and targs['y'].shape == (64,)

def test_captured_in_a_fit():
    cp = CapturePreds()
    learn = TrainLearner(get_model().cpu(), image_dls(2, 3), F.cross_entropy, lr=.05, cbs=cp)
    learn.fit(3)
    assert cp.all_preds.shape == (48, 10) and cp.all_inps.shape == (48, 1, 28, 28)
    learn.fit(1, cbs=SingleBatchCB())
    learn.fit(1, train=False, cbs=SingleBatchCB())
    assert cp.all_preds.shape == (16, 10)

def test_tta_needs_one_order():
    g = torch.Generator().manual_seed(1)
    cols = dict(image=torch.rand(64, 1, 28, 28, generator=g), label=torch.randint(0, 10, (64,), generator=g))
    dls = DataLoaders(None, MemoryLoader(None, cols, 16, shuffle=True))
    learn = TrainLearner(get_model().cpu(), dls, F.cross_entropy)
    with pytest.raises(ValueError, match='must not shuffle'): learn.tta(lambda b: b)
    dls.valid.shuffle = False
    preds, targs = learn.tta(lambda b: (b[0].flip(-1), b[1]))
    with torch.no_grad(): expected = (learn.model(cols['image']) + learn.model(cols['image'].flip(-1)))/2
    torch.testing.assert_close(preds, expected, atol=1e-5, rtol=1e-4)
    same(targs, cols['label'])


# ---- erasing and copying

@pytest.mark.parametrize('f', [rand_erase, rand_copy, RandErase(), RandCopy()], ids=['rand_erase', 'rand_copy', 'RandErase', 'RandCopy'])
def test_the_data_set_is_not_changed(f):
    data = torch.rand(32, 1, 28, 28)
    labels, kept = torch.zeros(32).long(), data.clone()
    views = [(data[i:i+8], labels[i:i+8]) for i in range(0, 32, 8)]   # batches that are views of it
    seen = []
    class Look(Callback):
        order = 100
        def before_batch(self, learn): seen.append(learn.batch[0].clone())
    learn = TrainLearner(get_model().cpu(), DataLoaders(views, views), F.cross_entropy, lr=.01,
                         cbs=[BatchTransformCB(lambda b: (f(b[0]), b[1])), Look()])
    learn.fit(5)
    same(data, kept)
    assert any((o != data[:8]).any() for o in seen)

@pytest.mark.parametrize('f', [rand_erase, rand_copy])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.half, torch.bfloat16, torch.uint8])
def test_patches_keep_type_range_and_size(f, dtype):
    set_seed(1)
    x = (torch.rand(4, 3, 17, 23)*200).to(dtype)
    changed = []
    for _ in range(30):
        y = f(x, pct=.3, max_num=1)
        assert y.dtype == dtype and y.shape == x.shape and y.min() >= x.min() and y.max() <= x.max()
        rows, cols = ((y != x).any(0).any(0).any(i) for i in (1, 0))
        if rows.any(): changed.append((int(rows.nonzero().max()-rows.nonzero().min())+1, int(cols.nonzero().max()-cols.nonzero().min())+1))
    assert changed and all(h <= 5 and w <= 6 for h, w in changed) and max(changed) == (5, 6)
    same(f(x, max_num=0), x)

def test_patches_read_nothing_from_the_device():
    x = torch.rand(8, 1, 28, 28)
    with CountReads() as counter:
        for _ in range(20): rand_erase(x), rand_copy(x)
    assert counter.reads == 0

@pytest.mark.gpu
def test_no_sync_on_a_gpu():
    x = torch.rand(8, 1, 28, 28, device='cuda')
    model = get_resnet(nfs=(4, 8)).cuda()
    ema, rec = EMACB(), RecorderCB(loss=lambda cb: cb.learn.loss)
    class Strict(Callback):
        order = -1000
        def before_batch(self, learn): torch.cuda.set_sync_debug_mode('error')
        def cleanup_batch(self, learn): torch.cuda.set_sync_debug_mode('default')
    data = [(x, torch.zeros(8, device='cuda', dtype=torch.long))]*20
    cbs = [TrainCB(), ema, rec, OneCycleCB(), BatchTransformCB(lambda b: (rand_copy(rand_erase(b[0])), b[1])), Strict()]
    learn = Learner(model, DataLoaders(data, data), F.cross_entropy, lr=.01, cbs=cbs, opt_func=optim.SGD)
    learn.fit(1, valid=False)
    assert len(rec.recs['loss']) == 20
