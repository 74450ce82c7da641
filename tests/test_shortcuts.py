"Optimizers that ask again get what a loop by hand gives them; short epochs, frozen layers and bare batches."
import os, subprocess, sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim

from miniai.accel import AccelerateCB, AccumulateCB, GradClipCB, MixedPrecision
from miniai.callback import Callback
from miniai.datasets import DataLoaders
from miniai.device import set_seed
from miniai.inspector import InspectorCB
from miniai.learner import Learner, TrainCB, TrainLearner
from miniai.lens import ParameterGradientGeometry
from miniai.sgd import OneCycleCB, RecorderCB
from miniai.shortcuts import ClosureCB, MixUpCB, ShortEpochCB

x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
y = (x.sum(1) > 0).long()
batches = list(zip(x.split(16), y.split(16)))


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def learner(*cbs, dls=None, **kw): return Learner(net(), dls or DataLoaders(batches, batches), F.cross_entropy, cbs=cbs, **{'lr': .5, **kw})
def equal(a, b): return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def by_hand(make, change=lambda model: None, penalty=lambda model: 0., n=2):
    model = net()
    opt = make(model.parameters(), .5)
    for xb, yb in batches*n:
        def closure():
            opt.zero_grad()
            loss = F.cross_entropy(model(xb), yb) + penalty(model)
            loss.backward()
            change(model)
            return loss
        opt.step(closure)
    return model


lbfgs = partial(optim.LBFGS, max_iter=4, line_search_fn='strong_wolfe')
kinds = dict(sgd=optim.SGD, adam=optim.Adam, lbfgs=lbfgs)


@pytest.mark.parametrize('kind', kinds)
def test_each_gradient_of_a_closure_is_clipped(kind):
    learn = learner(ClosureCB(), GradClipCB(.01), opt_func=kinds[kind])
    watch = learn.watch(every=1)
    learn.fit(2)
    clip = lambda model: nn.utils.clip_grad_norm_(model.parameters(), .01)
    assert equal(learn.model, by_hand(kinds[kind], clip)) and not equal(learn.model, by_hand(kinds[kind]))
    for stat in 'norm', 'norm clipped': assert learn.history.series('gradient', stat).steps.tolist() == list(range(8))
    clipped = watch.gradients.history.series('all', 'grad_norm_clipped')
    assert clipped.steps.tolist() == list(range(8)) and (clipped.values < .0101).all()
    assert (watch.gradients.history.series('all', 'grad_norm').values > .0101).all()


class Penalty(Callback):
    def after_loss(self, learn):
        if learn.training: learn.loss = learn.loss + self.of(learn.model)
    @staticmethod
    def of(model): return .1*model[0].weight.abs().sum()


class Sign(Callback):
    "As one of a user's own."
    def after_backward(self, learn): self.of(learn.model)
    @staticmethod
    def of(model):
        for p in model.parameters(): p.grad.sign_()


@pytest.mark.parametrize('kind', kinds)
def test_what_callbacks_do_to_loss_and_gradients_is_done_in_a_closure(kind):
    learn = learner(ClosureCB(), Penalty(), Sign(), opt_func=kinds[kind], lr=.5)
    learn.fit(2)
    assert equal(learn.model, by_hand(kinds[kind], Sign.of, Penalty.of))
    assert learn.loss_func is F.cross_entropy and not learn.trial


def test_a_closure_mixes_losses_as_the_batch_is_mixed():
    models = []
    for worker in TrainCB(), ClosureCB():
        set_seed(3)
        learn = learner(worker, MixUpCB(), opt_func=optim.SGD)
        learn.fit(2)
        models.append(learn.model)
        assert learn.loss_func is F.cross_entropy
    assert equal(*models)


def test_norms_that_an_inspector_reads_around_a_closure_are_its():
    cb = InspectorCB([ParameterGradientGeometry(before_clipping=True)])
    learn = learner(ClosureCB(), GradClipCB(.01), cb, opt_func=optim.SGD)
    learn.fit(1)
    before, clipped = (cb.history.series('all', o).values for o in ('grad_norm min', 'grad_norm_clipped max'))
    assert before[0] > .0101 > clipped[0] > .009


class Holds(Callback):
    order = -20
    def before_batch(self, learn): learn.hold = learn.training and learn.iter % 2 == 0


@pytest.mark.parametrize('cb,name', [(AccumulateCB(2), 'AccumulateCB'), (AccumulateCB(1), 'AccumulateCB'), (Holds(), 'a callback')])
def test_held_batches_are_refused_before_the_first_step(cb, name):
    learn = learner(ClosureCB(), cb, opt_func=optim.LBFGS)
    with pytest.raises(ValueError, match=f'ClosureCB: {name} holds batches.*larger batches'): learn.fit(1)
    assert equal(learn.model, net()) and not learn.n_steps


@pytest.mark.parametrize('worker', [MixedPrecision, AccelerateCB])
def test_another_worker_is_refused(worker):
    other = worker()
    with pytest.raises(ValueError, match=f'(?=.*{worker.__name__}).*ClosureCB.*leave only one'): learner(ClosureCB(), other).fit(1)


script = '''
import sys, torch
import torch.nn.functional as F
from torch import nn, optim
from miniai.accel import DDPCB, GradClipCB
from miniai.datasets import DataLoaders, MemoryLoader
from miniai.distributed import rank
from miniai.learner import Learner
from miniai.shortcuts import ClosureCB
torch.manual_seed(1)
cols = dict(x=torch.randn(37, 4), y=torch.randint(0, 3, (37,)))
model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
dl = MemoryLoader(None, cols, int(sys.argv[1]))
opt = lambda params, lr: optim.LBFGS(params, lr, max_iter=5, line_search_fn='strong_wolfe')
Learner(model, DataLoaders(dl, dl), F.cross_entropy, 1., [ClosureCB(), DDPCB(timeout=20), GradClipCB(1.)], opt).fit(2)
torch.save(model.state_dict(), f'{sys.argv[2]}_{rank()}.pt')
'''


def test_two_processes_search_the_same_line(tmp_path):
    (tmp_path/'train.py').write_text(script)
    env = {**os.environ, 'PYTHONPATH': str(Path(__file__).resolve().parent.parent), 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    for size, out, launcher in (32, 'one', []), (16, 'two', ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2']):
        res = subprocess.run([sys.executable, *launcher, str(tmp_path/'train.py'), str(size), str(tmp_path/out)], capture_output=True, text=True, env=env, timeout=150)
        assert res.returncode == 0, res.stderr[-3000:]
    one, *two = (torch.load(tmp_path/f'{o}.pt') for o in ('one_0', 'two_0', 'two_1'))
    for nm, w in one.items():
        assert torch.equal(two[0][nm], two[1][nm])
        torch.testing.assert_close(w, two[0][nm], rtol=0, atol=1e-4)


class Stream:
    "Does not know its length."
    def __iter__(self): return iter(batches)


def test_a_fraction_of_a_stream_is_refused_in_words():
    with pytest.raises(ValueError, match='size is 0.5.*Stream.*its length; give a number of batches'):
        learner(TrainCB(), ShortEpochCB(.5), dls=DataLoaders(Stream(), Stream())).fit(1)
    learn = learner(TrainCB(), ShortEpochCB(3), dls=DataLoaders(Stream(), Stream()))
    learn.fit(2)
    assert learn.n_steps == 6


def test_one_cycle_of_a_stream_says_what_works():
    make = lambda **kw: learner(TrainCB(), dls=DataLoaders(Stream(), Stream()), **kw)
    with pytest.raises(ValueError, match='Stream.*give max_steps to fit, epoch_sz to the Learner'): make().fit_one_cycle(1)
    make().fit_one_cycle(max_steps=6)
    make(epoch_sz=3).fit_one_cycle(2)
    make().fit(2, cbs=OneCycleCB(total_steps=8))


@pytest.mark.parametrize('size,cbs,steps', [(.5, [], 16), (2, [], 16), (.5, [AccumulateCB(2)], 8)])
def test_a_cycle_is_of_the_short_epochs(size, cbs, steps):
    rates = RecorderCB(lr=lambda cb: cb.pg['lr'])
    learn = learner(TrainCB(), ShortEpochCB(size), rates, *cbs)
    learn.fit_one_cycle(8, .2)
    assert learn.n_steps == steps and max(rates.recs['lr']) == pytest.approx(.2, rel=.05) and rates.recs['lr'][-1] < 1e-4


@pytest.mark.parametrize('make', [TrainLearner, lambda *a: Learner(*a, cbs=TrainCB())])
def test_bare_tensors_are_predicted_for(make):
    learn = make(net(), None, F.cross_entropy)
    found, targets, inputs = learn.get_preds(torch.utils.data.DataLoader(x, 16), inps=True)
    assert torch.equal(inputs, x) and not len(targets)
    torch.testing.assert_close(found, learn.model(x).detach())
    with pytest.raises(TypeError, match='the batch is a dict'): learn.get_preds([dict(x=x)])


@pytest.mark.parametrize('make', [TrainLearner, partial(Learner, cbs=TrainCB())])
def test_a_model_that_is_frozen_says_so(make):
    learn = make(net(), DataLoaders(batches, batches), F.cross_entropy)
    learn.freeze()
    with pytest.raises(RuntimeError) as e: learn.fit(1)
    assert any('every parameter of the model is frozen' in o and 'unfreeze' in o for o in e.value.__notes__)
    learn.unfreeze('2.*')
    learn.fit(1)
