"""Kinds of error that people have reported of systems like this one, in loops written by hand that an Inspector watches.

A comment names the kind; its neighbours are the parameters of its tests. The same kinds in a `Learner`: test_reported.py.
"""
import gc, os, subprocess, sys, warnings, weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim

from miniai.inspector import Inspector, InspectorCB
from miniai.learner import Learner, TrainCB
from miniai.activations import ActivationStats
from miniai.lens import Lens, LossMetrics, OutputNorm, OutputStats, ParameterGradientGeometry, ParameterUpdateGeometry
from miniai.stats import _failed, statistic, statistics
import miniai.diagnose, miniai.report  # noqa: F401 (methods of learners and inspectors)
from test_reported import Around, batches, kinds, learner, loaders, measured, net


def table(inspector, source, stat, phase='train'): return inspector.history.series(source, stat, phase)

def quietly(f, *args, **kw):
    "What a function gives that warns of nothing."
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        return f(*args, **kw)


# --- sampling is decided once for all optimizers that take turns ---

class Parts(nn.Module):
    "Two networks, one behind the other."
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Sequential(nn.Linear(6, 12), nn.ReLU()), nn.Linear(12, 3)
    def forward(self, x): return self.two(self.one(x))

@pytest.mark.parametrize('every', [2, 4])
@pytest.mark.parametrize('steps_of_one', [1, 5])
def test_optimizers_that_take_turns_are_all_sampled(every, steps_of_one):
    "As generator and critic: each second step is not always that of the same."
    model = Parts()
    inspector = Inspector(visualizer=None, every=every).attach(model)
    opts = [optim.SGD(o.parameters(), .1) for o in (model.one, model.two)]
    def run():
        for i,(x, y) in enumerate(batches(48)):
            opt = opts[i % (steps_of_one+1) == steps_of_one]
            F.cross_entropy(model(x), y).backward()
            opt.step()
            for o in opts: o.zero_grad()
        inspector.tick_epoch()
    quietly(run)
    steps = [table(inspector, nm, 'update_ratio').steps for nm in ('one.0.weight', 'two.weight')]
    share = np.array([len(o) for o in steps])*every/48
    assert abs(share - [steps_of_one/(steps_of_one+1), 1/(steps_of_one+1)]).max() < .25 and min(map(len, steps)) > 0
    assert not {'no_gradient', 'unchanged'} & {o.rule for o in inspector.diagnose()}
    assert table(inspector, 'two', 'mean').samples.tolist() == [16]*sum(map(len, steps))

def test_turns_of_optimizers_in_a_learner():
    "Optimizers that a callback makes for itself count, too."
    class Turns(TrainCB):
        def before_fit(self, learn): self.opts = [optim.SGD(o.parameters(), .1) for o in (learn.model.one, learn.model.two)]
        def step(self, learn): self.opts[learn.iter % 2].step()
        def zero_grad(self, learn):
            for o in self.opts: o.zero_grad()
    cb = InspectorCB(visualizer=None, every=2)
    learn = Learner(Parts(), loaders(), F.cross_entropy, cbs=[Turns(), cb])
    quietly(learn.fit, 2)
    assert all(len(table(cb, nm, 'grad_norm')) == 4 for nm in ('one.0.weight', 'two.weight'))

def test_a_layer_that_is_called_before_the_model_is_has_its_first_row():
    model = Parts()
    inspector = Inspector([OutputNorm(inplace=False)], module=model, visualizer=None)
    for x,_ in batches(3):
        model.two(model.one(x).detach()).sum().backward()
        optim.SGD(model.parameters(), .1).step()
    inspector.tick_epoch()
    assert len(table(inspector, 'one.1', 'norm')) == 3


# --- steps inside backward, and by closures ---

def test_gradients_of_a_closure_are_those_of_its_own_step():
    "LBFGS: what is there when its step begins is of the step before."
    model, loss_fn, wanted = net(), nn.CrossEntropyLoss(), []
    opt = optim.LBFGS(model.parameters(), .1, max_iter=3)
    inspector = Inspector([ParameterGradientGeometry(inplace=False), ParameterUpdateGeometry(inplace=False)], visualizer=None)
    inspector.attach(model, optimizer=opt)
    for x,y in batches():
        def closure(x=x, y=y):
            opt.zero_grad()
            loss = loss_fn(model(x), y)
            loss.backward()
            return loss
        opt.step(closure)
        wanted.append(model[0].weight.grad.norm().item())
    inspector.tick_epoch()
    found = table(inspector, '0.weight', 'grad_norm')
    assert np.allclose(found.values, wanted) and found.samples.tolist() == [48]*8   # three calls of 16
    assert table(inspector, '0.weight', 'update_norm').samples.tolist() == [48]*8

@pytest.mark.parametrize('inside', ['', '0.', '2.'], ids=['all', 'the first', 'the last'])
def test_parameters_that_step_in_backward_are_not_untrained(inside):
    "By a hook of one's own, without an optimizer: what is not known is not said."
    model, loss_fn = net(), nn.CrossEntropyLoss()
    def step(p):
        with torch.no_grad(): p -= .1*p.grad
        p.grad = None
    for nm,p in model.named_parameters():
        if nm.startswith(inside): p.register_post_accumulate_grad_hook(step)
    rest = [p for nm,p in model.named_parameters() if not nm.startswith(inside)]
    opt = optim.SGD(rest, .1) if rest else None
    inspector = Inspector(visualizer=None).attach(model, optimizer=opt, loss_fn=loss_fn)
    for x,y in batches():
        loss_fn(model(x), y).backward()
        if opt: opt.step(); opt.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore' if not rest else 'error')
        inspector.tick_epoch()
    assert not {'no_gradient', 'not_trained'} & {o.rule for o in inspector.diagnose()}


# --- what a batch weighs ---

@pytest.mark.parametrize('reduction', ['mean', 'sum'])
def test_an_empty_batch_weighs_nothing(reduction):
    model, loss_fn = net(), nn.CrossEntropyLoss(reduction=reduction)
    inspector = Inspector(visualizer=None).attach(model, optimizer=(opt := optim.SGD(model.parameters(), 0.)), loss_fn=loss_fn)
    for n in (5, 0):
        loss_fn(model(torch.ones(n, 6)), torch.zeros(n).long()).backward()
        opt.step(); opt.zero_grad()
    inspector.tick_epoch()
    loss, = table(inspector, 'loss', 'loss mean').values
    norms = table(inspector, '0.weight', 'grad_norm')
    assert np.isclose(loss, loss_fn(model(torch.ones(5, 6)), torch.zeros(5).long()).item())
    assert norms.samples.tolist() == [5, 0]
    assert np.isclose(table(inspector, '0.weight', 'grad_norm mean').values[0], norms.values[0])


# --- sharded models: what is sharded is measured, and no other layer is spoilt ---

sharded = '''
import sys, warnings, torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from types import SimpleNamespace
import miniai.diagnose, miniai.report
from miniai.accel import GradClipCB
from miniai.inspector import Inspector
from miniai.learner import Learner, TrainCB

dist.init_process_group('gloo')
mesh, folder = init_device_mesh('cpu', (2,)), sys.argv[1]
data = [(torch.randn(8, 6), torch.randint(0, 3, (8,))) for _ in range(6)]

def made(*sharded):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    for i in sharded: fully_shard(model[i], mesh=mesh)
    if len(sharded) == 2: fully_shard(model, mesh=mesh)
    return model

def watched(f):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        found = f()
    names = {o.rule for o in found.diagnose()}
    assert not {'no_gradient', 'not_trained', 'unregistered'} & names, names
    found.report(f'{folder}/report{dist.get_rank()}.html')
    told = [str(o.message) for o in told if not issubclass(o.category, (DeprecationWarning, FutureWarning))]
    assert not [o for o in told if 'measured' in o or 'divided' in o], told
    return found

def by_hand(model):
    opt, loss_fn = torch.optim.SGD(model.parameters(), .1), nn.CrossEntropyLoss()
    inspector = Inspector(visualizer=None).attach(model, optimizer=opt, loss_fn=loss_fn)
    for x,y in data:
        loss_fn(model(x), y).backward()
        opt.step(); opt.zero_grad()
    inspector.tick_epoch()
    return inspector.detach()

def fit(model, *cbs):
    learn = Learner(model, SimpleNamespace(train=data, valid=data[:2]), F.cross_entropy, lr=.1, cbs=[TrainCB(), *cbs])
    learn.watch(every=1)
    learn.fit(1)
    return learn

for layers,cbs in (((0, 2), [GradClipCB()]), ((0,), [])):
    learn, inspector = watched(lambda: fit(made(*layers), *cbs)), watched(lambda: by_hand(made(*layers)))
    watcher = learn.watch()
    for nm in ('0.weight', '2.weight'):
        assert len(watcher.gradients.rows(nm, 'grad_norm')) == 6, nm
        for stat in ('grad_norm', 'update_ratio'): assert len(inspector.history.series(nm, stat)) == 6, (nm, stat)
    assert len(watcher.activations.rows('0', 'mean')) == len(inspector.history.series('0', 'mean')) == 6
    assert not watcher.gradients.gaps
    if cbs: assert (learn.history.series('gradient', 'norm clipped').values <= 1.001).all()
try: fit(made(0), GradClipCB())
except TypeError as e: assert 'GradClipCB: some parameters are divided among processes' in str(e)
else: raise AssertionError('not refused')
print('fine')
'''

def test_sharded_models_are_measured(tmp_path):
    (tmp_path/'train.py').write_text(sharded)
    env = {**os.environ, 'PYTHONPATH': str(Path(__file__).resolve().parent.parent), 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2', str(tmp_path/'train.py'), str(tmp_path)]
    found = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
    assert found.returncode == 0 and found.stdout.count('fine') == 2, found.stderr[-3000:]


# --- what a loss is a mean over ---

def padded(n=4, size=8):
    "Batches of which more and more targets are ignored."
    return [(x, torch.where(torch.arange(size) < 2*i, -100, y)) for i,(x,y) in enumerate(batches(n, size))]

@pytest.mark.parametrize('door', ['hook', 'learner'])
@pytest.mark.parametrize('loss_fn', [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(weight=torch.tensor([1., 5., .2]))], ids=['ignored', 'weights'])
def test_the_loss_of_an_epoch_is_that_of_its_batches_together(loss_fn, door):
    data, model = padded(), net()
    if door == 'learner':
        inspector = InspectorCB(visualizer=None)
        learner(inspector, model=model, dls=SimpleNamespace(train=data, valid=data), loss_func=loss_fn, lr=0.).fit(1)
    else:
        inspector = Inspector([LossMetrics(loss_fn=loss_fn)], module=model, visualizer=None)
        for x,y in data: loss_fn(model(x), y)
        with torch.no_grad(): [loss_fn(model(x), y) for x,y in data]
        inspector.tick_epoch()
    x, y = map(torch.cat, zip(*data))
    for phase in ('train', 'valid'): assert np.isclose(table(inspector, 'loss', 'loss mean', phase).values[0], loss_fn(model(x), y).item())


# --- what is left behind ---

def test_a_detached_inspector_keeps_no_model_alive():
    model, loss_fn = net(), nn.CrossEntropyLoss()
    inspector = Inspector(visualizer=None).attach(model, optimizer=(opt := optim.SGD(model.parameters(), .1)), loss_fn=loss_fn)
    for x,y in batches():
        loss_fn(model(x), y).backward()
        opt.step(); opt.zero_grad()
    inspector.tick_epoch()
    read = lambda: ([str(o) for o in inspector.panels()], inspector.facts()['unreached'], inspector.measured().to_csv(), inspector.cost().layers)
    there, kept = [weakref.ref(o) for o in (model, *model, *model.parameters())], read()
    inspector.detach()
    del model, opt
    gc.collect()
    assert not [o for o in there if o() is not None] and read() == kept and kept[-1] == 3


# --- what is misspelt, or of a wrong shape, is said ---

def test_a_misspelt_name_is_no_gap():
    model = net()
    inspector = Inspector([OutputNorm(), LossMetrics()], module=model, visualizer=None)
    model(batches()[0][0])
    inspector.push_loss(1., train=True)
    inspector.tick_epoch()
    values = inspector.recording().values
    assert values('loss', 'loss', 'mean') == [1] and np.isnan(values('loss', 'loss', 'mean', 'valid')).all()
    for args,said in ((('los', 'loss', 'mean'), 'give one of .*loss'), (('loss', 'los', 'mean'), "'loss' has no 'los'; it has"),
                      (('loss', 'loss', 'avg'), "how is 'avg'")):
        with pytest.raises(ValueError, match=said): values(*args)

@pytest.mark.parametrize('tap', ['parameter', 'state', 'grad', 'update', 'loss'])
def test_modules_are_for_layers(tap):
    with pytest.raises(ValueError, match=f'for taps on layers, not for {tap!r}'): Lens(tap, '0', n='norm')

def summed(o): return float(o.n.sum())
def raising(o): return 1/0
def two(o): return np.stack([o.n, o.n], 1)

@pytest.mark.parametrize('f', [summed, raising, two])
def test_a_statistic_of_a_wrong_shape_is_left_out(f, tmp_path):
    statistic('strange')(f)
    try:
        with pytest.warns(UserWarning) as told:
            learn = learner()
            watcher = learn.watch(every=1)
            learn.fit(1)
            assert np.isnan(watcher.activations.rows('0', 'strange').values).all()
            learn.diagnose(); learn.report(tmp_path/'report.html'); watcher.activations.plot_stats()
            inspector = Inspector([OutputNorm(), Lens('output', strange='strange')], module=(model := net()), visualizer='matplotlib')
            model(batches()[0][0])
            inspector.tick_epoch(); inspector.visualizer.show_fig()
        assert len([o for o in told if "'strange' is left out" in str(o.message)]) == 1
        assert len(table(inspector, '1', 'norm mean')) == 1 and len(watcher.activations.rows('0', 'mean')) == 8
    finally:
        del statistics['strange']
        _failed.discard(f)


# --- one odd output spoils nothing, and is measured if it has entries ---

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('kind', kinds)
def test_an_odd_output_spoils_no_other_layer(kind):
    torch.manual_seed(0)
    model, loss_fn = Around(kinds[kind]), nn.CrossEntropyLoss()
    inspector = Inspector(visualizer=None).attach(model, optimizer=(opt := optim.SGD(model.parameters(), .1)), loss_fn=loss_fn)
    for x,y in batches(3):
        loss_fn(model(x), y).backward()
        opt.step(); opt.zero_grad()
    inspector.tick_epoch()
    for nm in ('first', 'last'): assert len(table(inspector, nm, 'mean')) == len(table(inspector, f'{nm}.weight', 'grad_norm')) == 3
    odd = table(inspector, 'odd', 'mean').values
    assert inspector.facts()['silent'] == () and len(odd) == (3 if kind in measured else 0)
    if kind in measured: assert np.allclose(odd, table(inspector, 'first', 'mean').values, rtol=1e-5 if kind != 'float8' else .2, atol=.01)

class Encoder(nn.Module):
    "Its fast path in eval mode leaves padding out: nested tensors from layer to layer."
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.emb, self.enc, self.head = nn.Linear(2, 8), nn.TransformerEncoder(layer, 2), nn.Linear(8, 3)
    def forward(self, x):
        x, pad = x.view(-1, 3, 2), torch.zeros(len(x), 3, dtype=torch.bool)
        pad[::2, 2] = True
        return self.head(self.enc(self.emb(x), src_key_padding_mask=pad)[:, 0])

@pytest.mark.filterwarnings('ignore:.*nested tensors is in prototype')
@pytest.mark.parametrize('door', ['learner', 'inspector'])
def test_a_transformer_that_leaves_padding_out_is_seen_in_validation(door):
    model, seen = Encoder(), []
    model.enc.layers[0].norm2.register_forward_hook(lambda m, inp, outp: seen.append(torch.cat(outp.unbind()).mean().item()) if outp.is_nested else None)
    if door == 'learner':
        learn = learner(model=model, dls=loaders(3))
        watcher = learn.watch(every=1, on_valid=True)
        quietly(learn.fit, 1)
        values, names = (lambda nm: watcher.activations.rows(nm, 'mean', 'valid').values), watcher.activations.panels()
    else:
        inspector = Inspector([OutputStats(record_eval=True, inplace=False)], module=model, visualizer=None)
        for x,_ in batches(3): model(x)
        model.eval()
        with torch.no_grad(): [model(x) for x,_ in batches(3, seed=1)]
        quietly(inspector.tick_epoch)
        values, names = (lambda nm: table(inspector, nm, 'mean', 'valid').values), list(inspector.facts()['sources'])
    assert len(names) == 18 and all(len(values(nm)) == 3 for nm in names) and len(seen) == 3
    assert np.allclose(values('enc.layers.0.norm2'), seen, atol=1e-6)

def test_layers_that_are_not_chosen_raise_nothing_either():
    "They are asked for the axis of their units only."
    model = Around(kinds['nested'])
    learn = learner(ActivationStats('last'), model=model, dls=loaders(3))
    learn.fit(1)
    assert len(learn.cbs[-1].rows('last', 'mean')) == 3


# --- nothing of ours is raised into a step, of another model neither ---

class Nothing(nn.Module):
    "Without parameters."
    def forward(self, x): return x*2

class Idle:
    "An optimizer of nothing."
    def zero_grad(self): pass

def one_step(model, opt, loss_fn=F.cross_entropy):
    x, y = batches()[0]
    loss_fn(model(x), y).backward()
    opt.step(); opt.zero_grad()

@pytest.mark.parametrize('door', ['inspector', 'learner'])
def test_a_model_without_parameters_disturbs_no_other(door):
    model, other, wanted = nn.Sequential(Nothing(), nn.ReLU()), net(), net()
    step = lambda m: one_step(m, optim.SGD(m.parameters(), .1))
    step(wanted)
    if door == 'inspector':
        inspector = Inspector(visualizer=None).attach(model)
        model(batches()[0][0])
        quietly(step, other)
        quietly(inspector.tick_epoch)
        found = inspector.detach()
    else:
        class Both(TrainCB):
            def predict(self, learn): learn.preds = learn.model(learn.batch[0])
            def get_loss(self, learn): learn.loss = learn.preds.mean()
            def backward(self, learn): pass
            def step(self, learn):
                if learn.n_steps == 0: step(other)
        found = Learner(model, loaders(2), None, cbs=Both(), opt_func=lambda params, lr: Idle())
        found.watch(every=1)
        quietly(found.fit, 1)
    assert all(map(torch.equal, other.parameters(), wanted.parameters()))
    assert {o.level for o in found.diagnose()} <= {'note'}

def test_whatever_breaks_is_told_once_and_raised_nowhere():
    model = net()
    inspector = Inspector(visualizer=None).attach(model)
    opt, other = optim.SGD(model.parameters(), .1), net()
    inspector.steps = None   # everything fails
    with pytest.warns(UserWarning) as told:
        for _ in range(3): one_step(model, opt)
        one_step(other, optim.SGD(other.parameters(), .1))
    said = [str(o.message) for o in told if 'could not be measured' in str(o.message)]
    assert len(said) == len(set(said)) > 3 and not torch.equal(model[0].weight, net()[0].weight)

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('door', ['inspector', 'learner'])
def test_vmap_ends_no_fit(door):
    model, data = net(), batches(3)
    if door == 'inspector':
        inspector = Inspector(visualizer=None).attach(model)
        for x,_ in data: torch.vmap(model)(x[:, None])
        inspector.tick_epoch()
        return inspector.detach()
    class Mapped(TrainCB):
        def predict(self, learn): learn.preds = torch.vmap(learn.model)(learn.batch[0][:, None])[:, 0]
    learn = Learner(model, SimpleNamespace(train=data, valid=data), F.cross_entropy, cbs=Mapped(), lr=.1)
    watcher = learn.watch(every=1, ranges=True, ranks=True)
    learn.fit(1)
    assert len(watcher.gradients.rows('0.weight', 'grad_norm')) == 3 and learn.history.series('batch', 'loss').values.min() > 0

@pytest.mark.parametrize('door', ['inspector', 'learner'])
def test_values_that_are_all_nan_raise_no_warning_of_numpy(door):
    "As on the meta device, or of predictions that are NaN."
    data = [(torch.full((8, 6), torch.nan), torch.zeros(8, dtype=torch.long))]*3
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        if door == 'learner':
            found = learner(dls=SimpleNamespace(train=data, valid=data))
            found.watch(every=1)
            found.fit(1)
        else:
            model, loss_fn = net(), nn.CrossEntropyLoss()
            found = Inspector(visualizer=None).attach(model, optimizer=(opt := optim.SGD(model.parameters(), .1)), loss_fn=loss_fn)
            for x,y in data: loss_fn(model(x), y).backward(); opt.step(); opt.zero_grad()
            found.tick_epoch()
        assert 'not_finite' in {o.rule for o in found.diagnose()}
    assert not [str(o.message) for o in told if issubclass(o.category, RuntimeWarning)]


# --- what is traced, exported or scripted in a run ---

@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore:.*torch.jit')
@pytest.mark.parametrize('how', ['trace', 'export', 'fx'])
def test_traced_models_compute_the_same_and_leave_the_table_alone(how):
    model, x = net(), batches()[0][0]
    inspector = Inspector(visualizer=None).attach(model)
    one_step(model, optim.SGD(model.parameters(), .1))
    wanted = model(x).detach()
    traced = dict(trace=lambda: torch.jit.trace(model, x), export=lambda: torch.export.export(model, (x,)).module(),
                  fx=lambda: torch.fx.symbolic_trace(model))[how]()
    assert torch.equal(traced(x), wanted)
    quietly(inspector.tick_epoch)
    found = table(inspector, '0', 'mean')   # of two calls, and none that was traced
    assert found.samples.tolist() == [16]*2 and np.isfinite(found.values).all()
    inspector.detach()

@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore:.*torch.jit')
def test_a_model_is_scripted_after_watching_it():
    model, x = net(), batches()[0][0]
    with Inspector(visualizer=None).attach(model):
        with pytest.raises(AttributeError, match='script it after the fit, or after `inspector.detach'): torch.jit.script(model)
    assert torch.equal(torch.jit.script(model)(x), model(x))
    learn = learner(model=model, dls=loaders(2))
    learn.watch(every=1)
    learn.fit(1)
    assert torch.equal(torch.jit.script(model)(x), model(x))


# --- norms of very large, very small and complex numbers ---

class Scale(nn.Module):
    def __init__(self, dtype=torch.float32): super().__init__(); self.weight = nn.Parameter(torch.tensor([1., 2.]).to(dtype))
    def forward(self, x): return self.weight*x

class SumLoss(TrainCB):
    def predict(self, learn): learn.preds = learn.model(learn.batch)
    def get_loss(self, learn): learn.loss = learn.preds.abs().sum()/4

@pytest.mark.filterwarnings('ignore')   # the loss itself may be infinite
@pytest.mark.parametrize('size', [1e-30, 1e-23, 1., 1e19, 3e19, 1e37])
@pytest.mark.parametrize('dtype', [torch.float32, torch.complex64], ids=['real', 'complex'])
def test_norms_neither_overflow_nor_vanish(size, dtype):
    data, wanted = [torch.full((4, 2), size)]*2, size*2**.5
    if dtype is torch.complex64: data = [o*torch.tensor(.6+.8j) for o in data]
    learn = Learner(Scale(dtype), SimpleNamespace(train=data), None, cbs=SumLoss(), lr=0.)
    watcher = learn.watch(every=1)
    learn.fit(1, valid=False)
    model = Scale(dtype)
    inspector = Inspector([ParameterGradientGeometry(inplace=False)], module=model, visualizer=None)
    for x in data:
        (model(x).abs().sum()/4).backward()
        (opt := optim.SGD(model.parameters(), 0.)).step(); opt.zero_grad()
    inspector.tick_epoch()
    for found in (watcher.gradients.rows('weight', 'grad_norm').values, watcher.gradients.rows('all', 'grad_norm').values,
                  table(inspector, 'weight', 'grad_norm').values): assert np.allclose(found/wanted, 1, rtol=1e-4) and len(found) == 2


# --- what is no activation ---

class Lengths(nn.Module):
    "A sequence that is packed: lengths of batches are no activation."
    def __init__(self): super().__init__(); self.layer, self.rnn, self.last = nn.Linear(2, 5), nn.GRU(5, 7, batch_first=True), nn.Linear(7, 3)
    def forward(self, x):
        packed = nn.utils.rnn.pack_padded_sequence(self.layer(x.view(-1, 3, 2)), torch.tensor([3]*8 + [2]*(len(x)-8)), batch_first=True)
        return self.last(self.rnn(packed)[1][0])

def computed(f): return lambda: nn.Sequential(f(nn.Linear(6, 12)), nn.ReLU(), f(nn.Linear(12, 3)))
P = nn.utils.parametrizations
none = dict(lengths=(Lengths, ['layer', 'rnn[0][0]', 'rnn[1]', 'last']), **{f.__name__: (computed(f), ['0', '1', '2']) for f in (P.weight_norm, P.spectral_norm, P.orthogonal)})

@pytest.mark.parametrize('door', ['learner', 'inspector'])
@pytest.mark.parametrize('name', none)
def test_what_is_no_activation_has_no_rows(name, door):
    make, wanted = none[name]
    torch.manual_seed(0)
    model, seen = make(), []
    last = list(model.children())[-1]
    last.register_forward_hook(lambda m, inp, outp: seen.append(outp.mean().item()))
    if door == 'learner':
        learn = learner(model=model, dls=loaders(3))
        watcher = learn.watch(every=1)
        quietly(learn.fit, 1, valid=False)
        names, values = watcher.activations.panels(), watcher.activations.rows(wanted[-1], 'mean').values
    else:
        inspector = Inspector([OutputStats(inplace=False)], module=model, visualizer=None)
        for x,_ in batches(3):
            model(x).sum().backward()
            optim.SGD(model.parameters(), 0.).step()
        quietly(inspector.tick_epoch)
        names, values = list(inspector.facts()['sources']), table(inspector, wanted[-1], 'mean').values
        assert {source for _,source,_ in inspector.history.keys()} == {*wanted, 'batches'}
    assert names == wanted and np.allclose(values, seen, atol=1e-6)


# --- 19: a step that the user has compiled ---

def steps_compiled(watched, every=1):
    "Weights and frames compiled of a loop whose steps are compiled, and how many updates were recorded."
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = net()
    opt, loss_fn = optim.Adam(model.parameters(), 1e-2), nn.CrossEntropyLoss()
    inspector = Inspector(visualizer=None, every=every).attach(model, opt, loss_fn) if watched else None
    step = torch.compile(lambda: opt.step(), backend='eager')
    for x,y in batches(24):
        loss_fn(model(x), y).backward()
        step()
        opt.zero_grad()
    frames = torch._dynamo.utils.counters['frames']['ok']
    n = len(table(inspector.detach(), '0.weight', 'update_ratio')) if watched else 0
    return [o.detach() for o in model.parameters()], frames, n

@pytest.mark.parametrize('every', [1, 6])
def test_a_compiled_step_stays_compiled_and_is_measured(every):
    plain, compiled, _ = steps_compiled(False)
    weights, frames, n = steps_compiled(True, every)
    assert all(map(torch.equal, plain, weights))
    assert n == 24//every and frames <= compiled + 4, (n, frames, compiled)
