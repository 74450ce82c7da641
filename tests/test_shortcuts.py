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
from miniai.learner import Learner, TrainCB
from miniai.lens import ParameterGradientGeometry
from miniai.shortcuts import ClosureCB, MixUpCB

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
