"""Kinds of error that people have reported of systems like this one: each with its right value, in all doors that it concerns.

The number behind a name is that of the kind; its neighbours are the parameters of its test.
"""
import copy, io, os, pickle, subprocess, sys, warnings
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.utils.checkpoint import checkpoint

from miniai.accel import AccumulateCB, CompileCB, GradClipCB, MixedPrecision
from miniai.activations import ActivationStats
from miniai.callback import Callback
from miniai.checkpoint import CheckpointCB
from miniai.gradients import GradientStats, UpdateStats
from miniai.history import History, plain_frame, read_table, write_table
from miniai.inspector import Inspector, InspectorCB
from miniai.learner import Learner, LRFinderCB, MetricsCB, TrainCB, TrainLearner
import miniai.augment, miniai.diagnose  # noqa: F401 (`learn.capture_preds`, `learn.diagnose`)
from miniai.watch import RangeStats


def batches(n=8, size=16, seed=0):
    "Batches of six numbers and a class of three that can be learned from them."
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(6, 3, generator=g)
    xs = [torch.randn(size, 6, generator=g) for _ in range(n)]
    return [(x, (x@w).argmax(1)) for x in xs]

def loaders(n=8): return SimpleNamespace(train=batches(n), valid=batches(3, seed=1))

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))

def learner(*cbs, model=None, dls=None, loss_func=F.cross_entropy, **kw):
    return TrainLearner(model or net(), dls or loaders(), loss_func, cbs=cbs, **kw)

def quiet(**metrics):
    "Metrics that are not printed."
    cb = MetricsCB(**metrics)
    cb._log = lambda d: None
    return cb


# --- 18, 19: compiled ---

class OwnSequential(nn.Sequential): "A class without a forward of its own."
class OwnLinear(nn.Linear): "Another one."

compiled_models = dict(sequential=net, linear=lambda: nn.Linear(6, 3), subclass=lambda: OwnSequential(nn.Linear(6, 3)),
                       own_linear=lambda: OwnLinear(6, 3))

class Graphs(list):
    "A backend that keeps what it is given to compile."
    def __call__(self, graph, inputs):
        self.append(graph)
        return graph.forward

@pytest.mark.parametrize('name', compiled_models)
def test_18_every_model_is_compiled_and_once(name):
    graphs, others = Graphs(), Graphs()
    users = torch.compile(lambda x: (x*2).sin(), backend=others)
    users(torch.ones(3))
    learn = learner(CompileCB(backend=graphs), model=compiled_models[name]())
    learn.fit(1)
    assert len(graphs) == 2                                 # for training and for validation
    learn.fit(1)
    users(torch.ones(3))
    assert len(graphs) == 2 and len(others) == 1            # nothing is thrown away, of the user neither
    twin = copy.deepcopy(learn.model)
    assert 'forward' not in vars(learn.model) and torch.equal(twin(torch.ones(2, 6)), learn.model(torch.ones(2, 6)))

def test_18_the_ninth_model_of_a_class_is_compiled_too():
    for _ in range(9):
        graphs = Graphs()
        learner(CompileCB(backend=graphs)).fit(1, valid=False)
        assert len(graphs) == 1

@pytest.mark.parametrize('compiled', ['by the callback', 'by the user', 'in place', 'a part'])
def test_19_only_steps_that_are_sampled_run_without_compiled_code(compiled):
    graphs, model = Graphs(), net()
    eager = ActivationStats(every=4)
    learner(eager, model=net(), dls=loaders(16)).fit(2)
    if compiled == 'in place': model.compile(backend=graphs)
    if compiled == 'by the user': model = torch.compile(model, backend=graphs)
    if compiled == 'a part': model[0] = torch.compile(model[0], backend=graphs)
    acts = ActivationStats(every=4)
    cbs = [CompileCB(backend=graphs)]*(compiled == 'by the callback')
    seen = []
    class Look(Callback):
        order = 10**6
        def before_batch(self, learn): seen.append(torch._dynamo.eval_frame._stance.stance)
    learn = learner(acts, Look(), *cbs, model=model, dls=loaders(16))
    learn.fit(2)
    for nm in ('0', '2'):
        assert np.allclose(acts.rows(nm, 'mean').values, eager.rows(nm, 'mean').values) and len(acts.rows(nm, 'mean')) == 8
    assert len(graphs) == (0 if compiled == 'in place' else 2)   # PyTorch itself compiles nothing of a Sequential in place
    assert seen.count('force_eager') == 8 and torch._dynamo.eval_frame._stance.stance == 'default'
    assert not [o for o in vars(learn) if 'stance' in o]


# --- 16: copies in the middle of a fit ---

class Once(Callback):
    "Keeps what a function of the learner gives in the third batch."
    found = None
    def __init__(self, f): self.f = f
    def after_loss(self, learn):
        if learn.iter == 2 and learn.training and self.f: (f, self.f) = (self.f, None); self.found = f(learn)

def in_the_middle(f, *cbs, **kw):
    "What `f(learn)` gives in the third batch of a fit that is watched."
    once, learn = Once(f), learner(RangeStats(), *cbs, **kw)
    learn.watch(every=1, ranks=True)
    learn.fit(1, cbs=once)
    return once.found

def saved(o):
    file = io.BytesIO()
    torch.save(o, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)

@pytest.mark.parametrize('copied', [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o)), saved])
def test_16_copies_of_a_learner_and_its_model_in_the_middle_of_a_fit(copied):
    x = torch.ones(2, 6)
    model, wanted = in_the_middle(lambda learn: (copied(learn.model), learn.model(x)))
    assert torch.equal(model(x), wanted)
    twin = in_the_middle(copied)
    assert twin.n_steps == 2 and not twin.loss.requires_grad
    twin.fit(1)                                   # with the callbacks that it has
    assert len(twin.history.series('batch', 'loss')) == 2 + 8

def test_16_a_model_that_was_saved_in_a_fit_needs_no_miniai(tmp_path):
    in_the_middle(lambda learn: torch.save(learn.model, tmp_path/'model.pt'))
    code = f'''
import sys
sys.modules['miniai'] = None
import torch
print(torch.load({str(tmp_path/'model.pt')!r}, weights_only=False)(torch.ones(2, 6)).shape)'''
    found = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert found.stdout.strip() == 'torch.Size([2, 3])', found.stderr


# --- 22: silent, or in Python's words ---

@pytest.mark.parametrize('name,event', [
    ('on_epoch_end', 'after_epoch'), ('on_epoch_begin', 'before_epoch'), ('on_train_begin', 'before_fit'), ('on_train_end', 'after_fit'),
    ('on_train_epoch_start', 'before_epoch'), ('on_train_batch_end', 'after_batch'), ('on_batch_begin', 'before_batch'),
    ('on_validation_end', 'after_epoch'), ('on_fit_start', 'before_fit'), ('begin_fit', 'before_fit'), ('begin_batch', 'before_batch')])
def test_22_events_of_other_libraries_are_told(name, event):
    cb = type('Mine', (Callback,), {name: lambda self, learn: None})()
    with pytest.warns(UserWarning, match=f'Mine.{name} is never called.*Did you mean `{event}`'): learner(cb).fit(1)

@pytest.mark.parametrize('change,said', [
    (dict(loss_func=None), 'loss_func is None; give a function'), (dict(loss_func='ce'), "loss_func is 'ce'; give a function"),
    (dict(opt_func='adam'), "opt_func is 'adam' .str.; give what makes an optimizer"), (dict(opt_func=3), 'opt_func is 3 .int.'),
    (dict(opt_func=optim), 'opt_func is <module .* as optim.Adam'), (dict(lr=[.1, .2]), r'lr is \[0.1, 0.2\] .list.; it must be a number')])
@pytest.mark.parametrize('cls', [TrainLearner, Learner])
def test_22_wrong_arguments_are_said_in_our_words(cls, change, said):
    args = dict(dict(model=net(), dls=loaders(), loss_func=F.cross_entropy), **change)
    with pytest.raises(TypeError, match=said): cls(**args, cbs=TrainCB() if cls is Learner else None).fit(1)

def test_22_a_model_with_a_loss_of_its_own_needs_no_loss_func():
    class Own(TrainLearner):
        def get_loss(self): self.loss = self.preds.square().mean()
    Own(net(), loaders(), None).fit(1)


# --- 9: accumulation of losses that are no means over samples ---

def padded(n=4, size=8):
    "Batches of which more and more targets are ignored."
    return [(x, torch.where(torch.arange(size) < 2*i, -100, y)) for i,(x,y) in enumerate(batches(n, size))]

class Gradient(Callback):
    def after_backward(self, learn): self.found = torch.cat([p.grad.flatten() for p in learn.model.parameters()]).clone()

def gradient_of(data, loss_func, *cbs):
    got = Gradient()
    learner(*cbs, got, dls=SimpleNamespace(train=data), loss_func=loss_func, lr=0.).fit(1, valid=False)
    return got.found

def per_token(preds, y): return F.cross_entropy(preds, y)
w = torch.tensor([1., 5., .2])

@pytest.mark.parametrize('loss_func,weight_of', [
    (F.cross_entropy, None), (nn.CrossEntropyLoss(), None), (nn.CrossEntropyLoss(weight=w, label_smoothing=.1), None),
    (partial(F.cross_entropy, weight=w), None), (nn.CrossEntropyLoss(reduction='sum'), None), (partial(F.cross_entropy, reduction='sum'), None),
    (nn.Sequential(), None), (per_token, lambda batch: (batch[1] != -100).sum())],
    ids=['function', 'ignored', 'weights', 'partial', 'sum', 'partial sum', 'samples', 'weight_of'])
def test_9_accumulated_gradients_are_those_of_the_large_batch(loss_func, weight_of):
    data = padded()
    if isinstance(loss_func, nn.Sequential): loss_func, data = lambda preds, y: (preds[:, 0] - y).square().mean(), batches(4, 8)
    whole = [tuple(map(torch.cat, zip(*data)))]
    one, many = gradient_of(whole, loss_func), gradient_of(data, loss_func, AccumulateCB(4, weight_of))
    assert torch.allclose(one, many, atol=1e-6*float(one.abs().max()) + 1e-7) and one.abs().max() > 1e-3


def test_9_entries_are_what_most_losses_of_numbers_are_means_over():
    torch.manual_seed(0)
    model, data = nn.Linear(1, 1), [(torch.randn(4, n, 1), torch.randn(4, n, 1)) for n in (2, 9, 5, 30)]
    learn = Learner(model, SimpleNamespace(train=data), F.mse_loss, .1, [TrainCB(), AccumulateCB(4)])
    weight = model.weight.detach().clone()
    errors = torch.cat([(model(x) - y).flatten() for x,y in data])
    grad, = torch.autograd.grad(errors.square().mean(), model.weight)
    learn.fit(1, valid=False)
    assert torch.allclose(weight - .1*grad, model.weight, rtol=1e-5)

def test_9_what_a_loss_of_ones_own_is_a_mean_over_is_asked():
    x, y = torch.randn(4, 5, 3), torch.randint(0, 3, (4, 5))
    def own(preds, y): return F.cross_entropy(preds.transpose(1, 2), y)
    fit = lambda **kw: Learner(nn.Linear(3, 3), SimpleNamespace(train=[(x, y)]*2), own, .1, [TrainCB(), AccumulateCB(2, **kw)]).fit(valid=False)
    with pytest.warns(UserWarning, match='what .*own.* is a mean over is not known'): fit()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        fit(weight_of=lambda batch: (batch[1] != -100).sum())


# --- 6: optimizers that step inside backward ---

def steps_inside(model, names=''):
    "Let parameters whose names begin with `names` step as soon as their gradient is there, and keep none."
    def step(p):
        with torch.no_grad(): p -= .1*p.grad
        p.grad = None
    for nm,p in model.named_parameters():
        if nm.startswith(names): p.register_post_accumulate_grad_hook(step)

class StepsOthers(TrainCB):
    def step(self, learn): learn.opt and learn.opt.step()
    def zero_grad(self, learn): learn.opt and learn.opt.zero_grad()

class Adversaries(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gen = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
        self.dis = nn.Sequential(nn.Linear(2, 16), nn.LeakyReLU(.2), nn.Linear(16, 1))

    def forward(self, x): return self.dis(x)

def judged(scores, real): return F.binary_cross_entropy_with_logits(scores, torch.full_like(scores, float(real)))

class GanCB(TrainCB):
    "The discriminator by the parts of the loop, or with all else in `step`; the generator always there."
    def __init__(self, all_in_step):
        super().__init__()
        self.all_in_step = all_in_step

    def predict(self, learn):
        self.fake = learn.model.gen(torch.randn(len(learn.batch[0]), 4))
        learn.preds = learn.model(learn.batch[0]), learn.model(self.fake.detach())

    def get_loss(self, learn): learn.loss = judged(learn.preds[0], 1) + judged(learn.preds[1], 0)

    def backward(self, learn):
        if not self.all_in_step: learn.loss.backward()

    def step(self, learn):
        if self.all_in_step: learn.loss.backward()
        learn.opt['dis'].step()
        learn.opt['gen'].zero_grad()
        judged(learn.model(self.fake), 1).backward()
        learn.opt['gen'].step()

@pytest.mark.parametrize('all_in_step', [False, True])
def test_6_gradients_that_come_in_the_step_are_no_fault(all_in_step):
    model, data = Adversaries(), [(torch.randn(16, 2)*.3 + 1,) for _ in range(30)]
    opts = lambda params, lr: dict(gen=optim.Adam(model.gen.parameters(), lr), dis=optim.Adam(model.dis.parameters(), lr))
    learn = Learner(model, SimpleNamespace(train=data), lr=2e-3, cbs=GanCB(all_in_step), opt_func=opts)
    watcher, start = learn.watch(every=1), model.gen[0].weight.detach().clone()
    learn.fit(2, valid=False)
    assert not learn.diagnose().of('error', 'warning'), learn.diagnose()
    assert not watcher.gradients.unreached
    moved = watcher.updates.rows('gen.0.weight', 'update_norm').values
    assert len(moved) >= 59 and (moved > 0).all() and not torch.equal(start, model.gen[0].weight)


@pytest.mark.parametrize('inside', ['', '0.'], ids=['all', 'a part'])
def test_6_steps_inside_backward_are_seen(inside):
    plain, model = net(), net()
    steps_inside(model, inside)
    rows = {}
    for nm,m,opt in (('plain', plain, optim.SGD), ('inside', model, lambda params, lr: optim.SGD(list(params)[2:], lr))):
        learn = Learner(m, loaders(), F.cross_entropy, lr=.1, cbs=StepsOthers() if m is model else TrainCB(), opt_func=opt)
        if m is model and not inside: learn.opt_func, learn.opt = None, SimpleNamespace(step=lambda: 0, zero_grad=lambda: 0)
        watcher = learn.watch(every=1)
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            learn.fit(2)
        rows[nm] = watcher
        assert not watcher.gradients.unreached and not watcher.gradients.gaps
        found = {o.rule for o in learn.diagnose()}
        assert not found & {'no_gradient', 'not_trained'}, found
    one, two = rows['plain'], rows['inside']
    for nm in ('0.weight', '0.bias', '2.weight', '2.bias', 'all'):
        assert np.allclose(one.gradients.rows(nm, 'grad_norm').values, two.gradients.rows(nm, 'grad_norm').values, rtol=1e-5)
    for nm in ('0.weight', '2.weight'):
        a, b = (o.updates.rows(nm, 'update_ratio') for o in (one, two))
        assert np.allclose(a.values[-len(b):], b.values, rtol=1e-4) and len(b) >= len(a) - 1
    assert not any(len(p._backward_hooks or ()) for p in model.parameters())


# --- 5: what a batch weighs ---

class Keyword(nn.Module):
    def __init__(self): super().__init__(); self.layer = nn.Linear(6, 3)
    def forward(self, *, x): return self.layer(x)

class ByKeyword(TrainCB):
    def predict(self, learn): learn.preds = learn.model(x=learn.batch['x'])
    def get_loss(self, learn): learn.loss = learn.loss_func(input=learn.preds, target=learn.batch['y'])

def test_5_batches_by_keyword_weigh_by_their_samples():
    data = [dict(x=torch.full((n, 6), float(n)), y=torch.zeros(n, dtype=torch.long)) for n in (1, 99)]
    torch.manual_seed(0)
    learn = Learner(Keyword(), SimpleNamespace(train=data), nn.CrossEntropyLoss(), lr=0., cbs=[ByKeyword(), quiet()])
    watcher = learn.watch(every=1)
    learn.fit(1, valid=False)
    losses = [F.cross_entropy(learn.model(x=o['x']), o['y']).item() for o in data]
    assert np.isclose(learn.history.series('epoch', 'loss').values[0], (losses[0] + 99*losses[1])/100)
    for s in (watcher.activations.rows('layer', 'mean'), watcher.gradients.rows('layer.weight', 'grad_norm'),
              learn.history.series('batch', 'loss')): assert s.samples.tolist() == [1, 99]

@pytest.mark.parametrize('reduction', ['sum', 'mean'])
def test_5_an_empty_batch_weighs_nothing(reduction):
    data = [(torch.randn(n, 6), torch.zeros(n, dtype=torch.long)) for n in (5, 0)]
    learn = learner(quiet(n=lambda preds, y: float(len(y))), loss_func=nn.CrossEntropyLoss(reduction=reduction),
                    dls=SimpleNamespace(train=data[:1], valid=data))
    learn.fit(1)
    loss, n = (learn.history.series('epoch', nm, 'valid') for nm in ('loss', 'n'))
    assert n.values[0] == 5 == n.samples[0] and np.isfinite(loss.values[0])
    assert np.isclose(loss.values[0], learn.loss_func(learn.model(data[0][0]), data[0][1]).item())


# --- 17: metrics ---

class NumpyMetric:
    "A metric that counts in NumPy, and keeps what it was given."
    def __init__(self): self.reset()
    def reset(self): self.seen = []
    def update(self, preds, y): self.seen.append(np.abs(preds.numpy()).mean() + 0*y.numpy().mean())
    def compute(self): return torch.tensor(np.mean(self.seen))

@pytest.mark.parametrize('worker', [TrainCB, MixedPrecision])
@pytest.mark.parametrize('metric', [NumpyMetric(), lambda preds, y: np.abs(preds.numpy()).mean()], ids=['object', 'function'])
def test_17_metrics_may_use_numpy_in_half_precision(worker, metric):
    learn = Learner(net(), loaders(), F.cross_entropy, cbs=[worker(), quiet(size=metric)])
    learn.fit(1)
    assert .05 < learn.history.series('epoch', 'size', 'valid').values[0] < 1

def test_17_a_metric_that_the_device_cannot_have_stays_on_the_cpu():
    class Float64(NumpyMetric):
        "As one whose state is float64, where the loss is on MPS."
        def to(self, device):
            if device != 'cpu': raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
    cb = quiet(size=Float64(), other=NumpyMetric())
    learn = learner(cb)
    learn.fit(1)
    one, two = (learn.history.series('epoch', nm, 'valid').values for nm in ('size', 'other'))
    assert cb._on_cpu == {'size'} and one == two


# --- 15: outputs of any type keep it ---

@dataclass
class Output: logits: torch.Tensor; size: torch.Tensor = None
Pair = namedtuple('Pair', 'logits twice')
class Named(OrderedDict):
    "As the outputs of transformers: a dictionary that has its keys as attributes."
    def __getattr__(self, name):
        if name in self: return self[name]
        raise AttributeError(name)

outputs = dict(dataclass=lambda o: Output(o, o.mean()), namedtuple=lambda o: Pair(o, 2*o), named=lambda o: Named(logits=o, twice=2*o),
               nested=lambda o: Pair(o, [Output(o, None), 'text']))

@pytest.mark.parametrize('kind', outputs)
def test_15_outputs_keep_their_type(kind):
    class Wraps(nn.Module):
        def __init__(self): super().__init__(); torch.manual_seed(0); self.layer = nn.Linear(6, 3)
        def forward(self, x): return outputs[kind](self.layer(x))
    right = lambda preds, y: (preds.logits.argmax(1) == y).float().mean()
    learn = learner(quiet(right=right), model=Wraps(), loss_func=lambda preds, y: F.cross_entropy(preds.logits, y))
    learn.lr_find(max_epochs=1)
    learn.fit(1)
    assert type(learn.preds) is type(outputs[kind](torch.ones(1))) and not learn.preds.logits.requires_grad
    preds, targets = learn.capture_preds()
    assert type(preds) is type(learn.preds) and preds.logits.shape == (48, 3) and not preds.logits.requires_grad
    with torch.no_grad(): wanted = learn.model.layer(torch.cat([x for x,_ in learn.dls.valid]))
    assert torch.equal(preds.logits, wanted)
    assert np.isclose(right(preds, targets).item(), learn.history.series('epoch', 'right', 'valid').values[0])
    if kind == 'dataclass': assert preds.size.shape == (3,)


# --- 20: a second watcher ---

def test_20_a_second_watch_is_not_dropped():
    learn = learner()
    first = learn.watch(every=2)
    learn.fit(1)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert learn.watch() is first and learn.watch(every=2) is first
    with pytest.raises(TypeError, match='evry'): learn.watch(evry=3)
    assert first in list(learn.cbs)                          # nothing is lost by an error
    for kw in (dict(every=3), dict(every=3, ranges=True), dict(mod_filter=nn.ReLU), dict(bins=7)):
        with pytest.warns(UserWarning, match='what was watched with other arguments ends here'): second = learn.watch(**kw)
        assert second is not first and second is learn.watch() and ('ranges' in second.parts) == ('ranges' in kw)
        assert len([o for o in learn.cbs if isinstance(o, ActivationStats) and not isinstance(o, RangeStats)]) == 1
    learn.fit(1)
    assert second.activations.bins == 7 and len(second.activations.rows('0', 'mean')) == 8
    assert len(first.activations.rows('0', 'mean')) == 4     # kept, and no more

def test_20_callbacks_of_ones_own_are_used_again():
    own = ActivationStats(every=2)
    learn = learner(own)
    learn.watch()
    learn.watch()
    assert learn.watch().activations is own


# --- 1, 2, 3: settled by the one engine ---

class Mod(nn.Module):
    "Two layers, of which the first is computed again in the backward pass if it is checkpointed."
    def __init__(self, how=None):
        super().__init__()
        self.how, self.first, self.act, self.last = how, nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)
    def part(self, x): return self.act(self.first(x))
    def forward(self, x):
        return self.last(self.part(x) if self.how is None else checkpoint(self.part, x, use_reentrant=self.how == 'reentrant'))

@pytest.mark.parametrize('n', [1, 2, 3])
def test_1_sampling_is_decided_once_a_step(n):
    learn = learner(*[AccumulateCB(n)]*(n > 1), dls=loaders(12))
    watcher = learn.watch(every=2)
    learn.fit(1)
    steps = list(range(0, 12//n, 2))
    for s in (watcher.activations.rows('0', 'mean'), watcher.gradients.rows('0.weight', 'grad_norm'), watcher.updates.rows('0.weight', 'update_ratio')):
        assert s.steps.tolist() == steps and s.samples.tolist() == [16*n]*len(steps)

def test_1_gradients_are_watched_where_outputs_are_not():
    learn = learner()
    watcher = learn.watch(every=1, on_train=False, on_valid=True)
    learn.fit(1)
    assert len(watcher.gradients.rows('0.weight', 'grad_norm')) == 8 and len(watcher.activations.rows('0', 'mean', 'valid')) == 3
    assert not {'no_gradient', 'dead'} & {o.rule for o in learn.diagnose()}

@pytest.mark.parametrize('nans', [1, 6, 8])
def test_2_a_nan_loss_is_no_gap(nans):
    class Spoil(Callback):
        def after_loss(self, learn):
            if learn.epoch == 1 and learn.training and learn.iter >= 8-nans: learn.loss = learn.loss*torch.nan
    learn = learner(quiet(), Spoil())
    with pytest.warns(UserWarning, match='NaN'):
        learn.watch(every=1)
        learn.fit(2)
    epochs = learn.history.series('epoch', 'loss').values
    assert np.isfinite(epochs[0]) and np.isnan(epochs[1])
    assert next(o for o in learn.diagnose()).rule == 'not_finite'

class Calls(Callback):
    "Calls the model where the loop does not."
    def after_loss(self, learn): learn.model(learn.batch[0]*3)
    def after_batch(self, learn): learn.model(learn.batch[0])

@pytest.mark.filterwarnings('ignore:None of the inputs')
@pytest.mark.parametrize('how,cbs', [('reentrant', ()), ('not', ()), (None, (Calls(),))], ids=['reentrant', 'without', 'callback'])
def test_3_only_calls_of_the_loop_are_calls(how, cbs):
    found = []
    for model,more in ((Mod(), ()), (Mod(how), cbs)):
        model.load_state_dict(Mod().state_dict() if not found else found[0][0])
        start = copy.deepcopy(model.state_dict())
        data = [(x.clone().requires_grad_(), y) for x,y in batches()]
        learn = learner(*more, model=model, dls=SimpleNamespace(train=data, valid=batches(3)))
        watcher = learn.watch(every=1)
        learn.fit(1)
        found.append((start, watcher))
    one, two = (o for _,o in found)
    assert two.activations.panels() == ['first', 'act', 'last']
    for nm in one.activations.panels():
        assert np.allclose(one.activations.rows(nm, 'mean').values, two.activations.rows(nm, 'mean').values, rtol=1e-5)


# --- 4, 10, 12: outputs that are no activations, or cannot be measured ---

kinds = dict(
    sparse=lambda x: x.to_sparse(), csr=lambda x: x.detach().to_sparse_csr(), nested=lambda x: torch.nested.nested_tensor(list(x.detach())),
    jagged=lambda x: torch.nested.nested_tensor(list(x.detach()), layout=torch.jagged), float8=lambda x: x.to(torch.float8_e4m3fn),
    mkldnn=lambda x: x.detach().to_mkldnn(), meta=lambda x: x.to('meta'), quantized=lambda x: torch.quantize_per_tensor(x.detach(), .1, 0, torch.qint8),
    integers=lambda x: x.long(), booleans=lambda x: x > 0, nothing=lambda x: None, text=lambda x: 'out', empty=lambda x: x[:0])

measured = 'sparse', 'csr', 'nested', 'jagged', 'float8', 'mkldnn'   # whatever their layout

class Odd(nn.Module):
    def __init__(self, f): super().__init__(); self.f = f
    def forward(self, x): return self.f(x)

class Around(nn.Module):
    "A layer whose output is odd, and is used by nobody, between two others."
    def __init__(self, f): super().__init__(); self.first, self.odd, self.last = nn.Linear(6, 12), Odd(f), nn.Linear(12, 3)
    def forward(self, x):
        h = self.first(x)
        self.odd(h)
        return self.last(h)

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('kind', kinds)
def test_10_and_12_an_odd_output_ends_no_fit_and_spoils_no_other_layer(kind):
    torch.manual_seed(0)
    learn = learner(model=Around(kinds[kind]), dls=loaders(3))
    watcher = learn.watch(every=1, ranges=True, ranks=True)
    watcher.ranks.sampler.every = 1
    learn.fit(1)
    for nm in ('first', 'last'):
        for part,stat in ((watcher.activations, 'mean'), (watcher.ranges, 'range'), (watcher.ranks, 'effective_rank')):
            assert np.isfinite(part.rows(nm, stat).values).all() and len(part.rows(nm, stat)) == 3, (nm, stat)
        assert len(watcher.gradients.rows(f'{nm}.weight', 'grad_norm')) == 3
    found = watcher.activations.rows('odd', 'mean')
    assert not watcher.activations.silent and len(found) == (3 if kind in measured else 0)
    if kind in measured: assert np.allclose(found.values, watcher.activations.rows('first', 'mean').values, rtol=1e-5 if kind != 'float8' else .2, atol=.01)

def test_4_indices_beside_an_output_are_not_told():
    class Pool(nn.Module):
        def __init__(self): super().__init__(); self.layer, self.pool, self.head = nn.Linear(6, 12), nn.MaxPool1d(2, return_indices=True), nn.Linear(6, 3)
        def forward(self, x): return self.head(self.pool(self.layer(x))[0])
    learn = learner(model=Pool())
    watcher = learn.watch(every=1, ranges=True, ranks=True)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learn.fit(1)
    for part in (watcher.activations, watcher.ranges): assert part.panels() == ['layer', 'pool[0]', 'head']
    assert list(watcher.ranks.limits) == ['layer', 'pool[0]', 'head']


# --- 21: what is saved ---

@pytest.mark.filterwarnings('ignore:History')
@pytest.mark.parametrize('way', ['state', 'pickle', 'parquet', 'jsonl'])
def test_21_a_thinned_table_knows_it_when_it_is_read_again(way, tmp_path):
    acts = ActivationStats(max_bytes=100_000)
    learner(acts, dls=loaders(200)).fit(1)
    thinned, path = acts.history.thinned(), tmp_path/f'table.{way}'
    assert max(thinned.values()) > 1
    if way == 'pickle': again = pickle.loads(pickle.dumps(acts)).history
    elif way == 'state': (again := History()).load_state_dict(acts.history.state_dict())
    else:
        write_table(plain_frame(acts.history), path)
        again, facts = read_table(path)
        assert 'thinned' not in facts
    assert again.thinned() == thinned
    assert np.array_equal(again.series('0', 'mean').steps, acts.history.series('0', 'mean').steps)

@pytest.mark.parametrize('door', ['ranges', 'inspector', 'gradients', 'updates'])
def test_21_tables_go_on_after_a_resume(door, tmp_path):
    class Kill(Callback):
        order = 10**6
        def after_batch(self, learn):
            if learn.training and learn.n_steps == 11: raise KeyboardInterrupt
    def made(folder):
        make = dict(ranges=RangeStats, inspector=partial(InspectorCB, visualizer=None), gradients=GradientStats, updates=UpdateStats)
        cb = make[door]()
        return learner(cb, CheckpointCB(tmp_path/folder, every=1)), cb
    (whole, one), (killed, _), (resumed, two) = made('one'), made('two'), made('two')
    whole.fit(2)
    with pytest.raises(KeyboardInterrupt): killed.fit(2, cbs=Kill())
    resumed.fit(2, resume=tmp_path/'two')
    a, b = one.history.frame(), two.history.frame()
    assert len(a) == len(b) > 40 and a.drop(columns='value').equals(b.drop(columns='value'))
    assert all(np.array_equal(x, y, equal_nan=True) for x,y in zip(a['value'], b['value']))


# --- 9, 14: several processes ---

processes = '''
import sys, warnings, torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from miniai.accel import AccumulateCB, DDPCB
from miniai.activations import ActivationStats
from miniai.callback import Callback
from miniai.datasets import DataLoaders
from miniai.distributed import rank
from miniai.learner import Learner, LRFinderCB, MetricsCB, TrainCB

torch.manual_seed(0)
x, y = torch.randn(35, 6), torch.randint(0, 3, (35,))
y[3:12] = -100

class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(x, y))

def fit(*cbs, size, loss_func=F.cross_entropy, norm=False, data=TensorDataset(x, y), **kw):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), *[nn.BatchNorm1d(8)]*norm, nn.ReLU(), nn.Linear(8, 3))
    dl = DataLoader(data, size, **kw)
    learn = Learner(model, DataLoaders(dl, dl), loss_func, lr=.1, cbs=[TrainCB(), *cbs])
    learn.fit(2)
    return learn, torch.cat([p.flatten() for p in model.parameters()]).detach()

for loss_func in (F.cross_entropy, nn.CrossEntropyLoss(weight=torch.tensor([1., 5., .2])), nn.CrossEntropyLoss(reduction='sum')):
    for more in ([], [AccumulateCB(2)]):
        (_, one), (_, two) = fit(*more, size=16, loss_func=loss_func), fit(*more, DDPCB('gloo'), size=8, loss_func=loss_func)
        assert torch.allclose(one, two, atol=1e-5), (loss_func, len(more), (one-two).abs().max())
one, two = fit(size=16, data=Stream())[1], fit(DDPCB('gloo'), size=8, data=Stream())[1]
assert torch.allclose(one, two, atol=1e-5)
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter('always')
    learn = fit(DDPCB('gloo'), size=8, norm=True)[0]
assert learn.n_steps == 4   # 3 samples are too few for two processes
assert rank() or any('3 samples at the end of the data are too few' in str(o.message) for o in told)
for cb in (MetricsCB(), ActivationStats()):
    try: fit(DDPCB('gloo'), *[cb]*(rank() == 0), size=8)
    except ValueError as e: assert 'give all the same' in str(e) and type(cb).__name__ in str(e)
    else: raise AssertionError('not refused')
class Mine(Callback): "Of one's own, in one process: it waits for nobody."
fit(DDPCB('gloo'), *[Mine()]*(rank() == 0), size=8)
print('fine')
'''

def test_9_and_14_two_processes(tmp_path):
    (tmp_path/'train.py').write_text(processes)
    env = {**os.environ, 'PYTHONPATH': str(Path(__file__).resolve().parent.parent), 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2', str(tmp_path/'train.py')]
    found = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert found.returncode == 0 and found.stdout.count('fine') == 2, found.stderr[-3000:]


# --- healthy runs: no warning, no error ---

def images(n=15, size=32, seed=0):
    "Images of 8x8 with the class in the place of a bright patch, and noise."
    g = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(n):
        y = torch.randint(0, 4, (size,), generator=g)
        x = torch.randn(size, 1, 8, 8, generator=g)*.5
        for i,c in enumerate(y.tolist()): x[i, 0, 4*(c//2):4*(c//2)+4, 4*(c%2):4*(c%2)+4] += 1
        out.append((x, y))
    return out

def mlp(act, depth=2, norm=None, width=32):
    layers, n = [nn.Flatten()], 64
    for _ in range(depth):
        layers += [nn.Linear(n, width), *([norm(width)] if norm else []), act()]
        n = width
    return nn.Sequential(*layers, nn.Linear(n, 4))

def cnn(act, norm=None, pool=False):
    layers, n = [], 1
    for nf in (8, 16, 32):
        layers += [nn.Conv2d(n, nf, 3, stride=1 if pool else 2, padding=1), *([norm(nf)] if norm else []), act(), *([nn.MaxPool2d(2)] if pool else [])]
        n = nf
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n, 4))

class Residual(nn.Module):
    def __init__(self, n): super().__init__(); self.body = nn.Sequential(nn.Conv2d(n, n, 3, padding=1), nn.BatchNorm2d(n), nn.ReLU(), nn.Conv2d(n, n, 3, padding=1), nn.BatchNorm2d(n))
    def forward(self, x): return F.relu(x + self.body(x))
def resnet(): return nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), Residual(16), nn.MaxPool2d(2), Residual(16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))

nets = {f'mlp {a.__name__}': partial(mlp, a) for a in (nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.ELU, nn.LeakyReLU, nn.SELU)}
nets |= {'mlp deep': partial(mlp, nn.ReLU, 4), 'mlp bn': partial(mlp, nn.ReLU, 3, nn.BatchNorm1d), 'mlp ln': partial(mlp, nn.GELU, 3, nn.LayerNorm),
         'mlp wide': partial(mlp, nn.ReLU, 2, None, 128), 'linear': partial(mlp, nn.ReLU, 0), 'cnn': partial(cnn, nn.ReLU), 'cnn gelu': partial(cnn, nn.GELU),
         'cnn bn': partial(cnn, nn.ReLU, nn.BatchNorm2d), 'cnn gn': partial(cnn, nn.ReLU, partial(nn.GroupNorm, 4)), 'cnn pool': partial(cnn, nn.ReLU, None, True),
         'cnn pool bn': partial(cnn, nn.ReLU, nn.BatchNorm2d, True), 'dropout': lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Dropout(.2), nn.Linear(64, 4)), 'resnet': resnet}
opts = dict(SGD=(partial(optim.SGD, momentum=.9), .05), Adam=(optim.Adam, 3e-3), AdamW=(optim.AdamW, 3e-3))

class Tokens(nn.Module):
    "A small transformer that says which of four tokens a sequence begins with."
    def __init__(self, norm_first, bert=False, d=16):
        super().__init__()
        self.embed, self.place = nn.Embedding(20, d), nn.Parameter(torch.randn(1, 8, d)*.02)
        self.norm = nn.LayerNorm(d) if bert else nn.Identity()
        self.body = nn.TransformerEncoder(nn.TransformerEncoderLayer(d, 2, 32, 0., 'gelu', batch_first=True, norm_first=norm_first), 2, enable_nested_tensor=False)
        self.head = nn.Linear(d, 4)
        if bert:
            for m in self.modules():
                if isinstance(m, (nn.Linear, nn.Embedding)): nn.init.normal_(m.weight, 0, .02)
    def forward(self, x): return self.head(self.body(self.norm(self.embed(x) + self.place))[:, 0])

class Recurrent(nn.Module):
    def __init__(self): super().__init__(); self.embed, self.lstm, self.head = nn.Embedding(20, 16), nn.LSTM(16, 32, batch_first=True), nn.Linear(32, 4)
    def forward(self, x): return self.head(self.lstm(self.embed(x))[1][0][0])

def tokens(n=40, size=32, seed=0):
    g = torch.Generator().manual_seed(seed)
    xs = [torch.randint(0, 20, (size, 8), generator=g) for _ in range(n)]
    return [(x, x[:, 0] % 4) for x in xs]

def healthy_fit(make, data, opt, lr, epochs=6):
    torch.manual_seed(0)
    learn = TrainLearner(make(), SimpleNamespace(train=data[5:], valid=data[:5]), F.cross_entropy, lr=lr, opt_func=opt)
    learn.watch()
    learn.fit(epochs)
    return learn

class Lora(nn.Module):
    "A layer that is frozen, and two small ones beside it."
    def __init__(self, layer, r=2):
        super().__init__()
        self.layer, self.down, self.up = layer.requires_grad_(False), nn.Linear(layer.in_features, r, bias=False), nn.Linear(r, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)
    def forward(self, x): return self.layer(x) + self.up(self.down(x))

def lora():
    model = healthy_fit(partial(mlp, nn.ReLU), images(), optim.AdamW, 3e-3).model
    for i in (1, 3): model[i] = Lora(model[i])
    for p in model[5].parameters(): p.requires_grad_(False)
    other = [(.5*x - .5, y) for x,y in images()]
    return healthy_fit(lambda: model, other, lambda params, lr: optim.AdamW([p for p in params if p.requires_grad], lr), 1e-2)

class GAN(nn.Module):
    def __init__(self): super().__init__(); self.gen, self.dis = nn.Sequential(nn.Linear(4, 32), nn.LeakyReLU(.2), nn.Linear(32, 2)), nn.Sequential(nn.Linear(2, 32), nn.LeakyReLU(.2), nn.Linear(32, 1))
    def forward(self, x): return self.dis(x)

class GANCB(TrainCB):
    "The discriminator and the generator step in turns, each with an optimizer of its own."
    def before_fit(self, learn):
        self.opts = optim.Adam(learn.model.gen.parameters(), 2e-3, (.5, .9)), optim.Adam(learn.model.dis.parameters(), 2e-3, (.5, .9))
    def predict(self, learn):
        x, m = learn.batch[0], learn.model
        self.fake = m.gen(torch.randn(len(x), 4))
        learn.preds = m.dis(torch.cat([x, self.fake.detach()]))
    def get_loss(self, learn):
        y = torch.cat([torch.ones(len(learn.preds)//2, 1), torch.zeros(len(learn.preds)//2, 1)])
        learn.loss = F.binary_cross_entropy_with_logits(learn.preds, y)
    def backward(self, learn):
        learn.loss.backward()
        dis = [None if p.grad is None else p.grad.clone() for p in learn.model.dis.parameters()]
        F.binary_cross_entropy_with_logits(learn.model.dis(self.fake), torch.ones(len(self.fake), 1)).backward()
        for p,g in zip(learn.model.dis.parameters(), dis): p.grad = g
    def step(self, learn):
        for o in self.opts: o.step()
    def zero_grad(self, learn):
        for o in self.opts: o.zero_grad()

def gan():
    torch.manual_seed(0)
    t = [torch.rand(64)*6.28 for _ in range(60)]
    data = [(torch.stack([o.cos(), o.sin()], 1)+.05*torch.randn(64, 2),) for o in t]
    model = GAN()
    learn = Learner(model, SimpleNamespace(train=data[5:], valid=data[:5]), None, cbs=GANCB(), opt_func=lambda p, lr: optim.Adam(p, lr), lr=2e-3)
    learn.watch()
    learn.fit(4)
    return learn

pictures, sequences = images(), tokens()
healthy = {f'{nm}, {o}': partial(healthy_fit, make, pictures, *opts[o]) for nm,make in nets.items() for o in opts}
healthy |= {'pre-norm, Adam': partial(healthy_fit, partial(Tokens, True), sequences, optim.Adam, 3e-3), 'pre-norm, AdamW': partial(healthy_fit, partial(Tokens, True), sequences, optim.AdamW, 3e-3),
            'post-norm, Adam': partial(healthy_fit, partial(Tokens, False), sequences, optim.Adam, 3e-3), 'BERT-like, AdamW': partial(healthy_fit, partial(Tokens, False, True), sequences, optim.AdamW, 3e-3),
            'LSTM, Adam': partial(healthy_fit, Recurrent, sequences, optim.Adam, 1e-2), 'GAN': gan, 'LoRA': lora}

@pytest.mark.parametrize('name', healthy)
def test_8_a_healthy_run_has_no_warning(name):
    found = healthy[name]().diagnose()
    told = {o.rule for o in found if o.level != 'note'}
    assert not told, found

@pytest.mark.parametrize('losses', [[1., 2, 3, 4, 5], [5., 4, 3, 2, 1], [1., 1, 1, 1, 1], [2., 1, 2, 3, 4], [np.nan, 1, 2, 3, 4, np.inf]])
def test_8_a_rate_that_is_suggested_was_tried(losses):
    finder = LRFinderCB()
    finder.lrs, finder.losses = list(np.geomspace(1e-3, 1., len(losses))), losses
    tried = np.array(finder.lrs)[np.isfinite(losses)]
    assert all(tried[0] <= o <= tried[-1] for o in finder.suggest())

class NoStep(TrainCB):
    def step(self, learn): pass

def diagnosed(*cbs, worker=TrainCB, scale=1, shift=0, opt=optim.Adam, lr=3e-3, epochs=6, door='learner'):
    "What is found of a small net; by an Inspector without the callbacks."
    torch.manual_seed(0)
    train, valid = ([(x*scale, y) for x,y in images(n, seed=i)] for i,n in enumerate((15, 5)))
    valid = [(x, (y+shift) % 4) for x,y in valid]
    if door == 'learner':
        right = quiet(accuracy=lambda preds, y: (preds.argmax(1) == y).float().mean())
        learn = Learner(mlp(nn.ReLU), SimpleNamespace(train=train, valid=valid), F.cross_entropy, lr, [worker(), right, *cbs], opt_func=opt)
        learn.watch(every=1)
        learn.fit(epochs)
        return learn.diagnose()
    model, loss_fn = mlp(nn.ReLU), nn.CrossEntropyLoss()
    inspector = Inspector(visualizer=None).attach(model, optimizer=(opt := opt(model.parameters(), lr)), loss_fn=loss_fn)
    for _ in range(epochs):
        for x,y in train:
            loss_fn(model.train()(x), y).backward()
            if worker is TrainCB: opt.step()
            opt.zero_grad()
        with torch.no_grad(): [loss_fn(model.eval()(x), y) for x,y in valid]
        inspector.tick_epoch()
    return inspector.detach().diagnose()

doors = pytest.mark.parametrize('door', ['learner', 'inspector'])

@doors
@pytest.mark.parametrize('kw', [dict(epochs=8), dict(scale=30), dict(opt=optim.SGD, lr=.2, epochs=15)], ids=['accuracy of 1', 'unscaled', 'converged'])
def test_8_a_solved_run_is_left_alone(kw, door): assert not diagnosed(door=door, **kw)

@doors
def test_8_shifted_labels_of_validation_are_no_overfitting(door):
    found = {o.rule for o in diagnosed(shift=1, epochs=8, door=door) if o.level != 'note'}
    assert 'learned_by_heart' in found and found <= {'learned_by_heart', 'always_wrong'}

@doors
@pytest.mark.filterwarnings('ignore:.*has made no step that PyTorch knows of')
def test_8_a_step_that_is_never_made_is_no_low_rate(door):
    found = diagnosed(worker=NoStep, door=door)
    assert 'learning_rate_low' not in {o.rule for o in found}
    assert 'opt.step' in found[0].causes[0] and found[0].rule == 'unchanged'

def test_8_large_scores_of_a_net_that_is_right_are_not_chance():
    torch.manual_seed(0)
    x = torch.randn(1500, 8)*1e3
    data = [(a, (a[:, :3].sum(1) > 0).long()) for a in x.split(64)]
    right = quiet(accuracy=lambda preds, y: (preds.argmax(1) == y).float().mean())
    learn = Learner(nn.Linear(8, 2), SimpleNamespace(train=data[:-4], valid=data[-4:]), F.cross_entropy, .1, [TrainCB(), right])
    learn.watch(every=1)
    learn.fit(6)
    found = learn.diagnose()
    assert learn.history.series('epoch', 'accuracy').values[-1] > .95 and learn.history.series('batch', 'loss').values[-20:].mean() > 2
    assert {o.rule for o in found.of('error', 'warning')} == {'input_scale'}, found

def test_8_a_second_fit_of_a_solved_net_has_no_warning():
    torch.manual_seed(2)
    x = torch.randn(512, 4)*torch.tensor([20., 1, 1, 1])
    data = [(a, (a[:, 0] > 0).long()) for a in x.split(16)]
    wrong = quiet(err=lambda preds, y: (preds.argmax(1) != y).float().mean())
    learn = Learner(nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2)), SimpleNamespace(train=data[:26], valid=data[26:]), F.cross_entropy, .05, [TrainCB()])
    learn.fit(6)
    learn.watch(every=1)
    learn.fit(6, lr=.01, cbs=wrong)
    assert not learn.diagnose().of('error', 'warning'), learn.diagnose()

def test_8_clipping_that_eats_the_step_is_named():
    found, = diagnosed(GradClipCB(1e-5), opt=optim.SGD, lr=.05).of('error')[:1]
    assert found.rule == 'learning_rate_low' and 'clipping, which leaves' in found.causes[0] and 'thousand' not in str(found.tries)
