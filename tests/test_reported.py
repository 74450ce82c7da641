"""Kinds of error that people have reported of systems like this one: each with its right value, in all doors that it concerns.

The number behind a name is that of the kind; its neighbours are the parameters of its test.
"""
import copy, io, pickle, subprocess, sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim

from miniai.accel import AccumulateCB, CompileCB
from miniai.activations import ActivationStats
from miniai.callback import Callback
from miniai.learner import Learner, MetricsCB, TrainCB, TrainLearner
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
