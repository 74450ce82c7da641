"Gradients, updates and effective rank in the Learner, beside plain PyTorch and the Inspector."
import copy, pickle, warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.utils._python_dispatch import TorchDispatchMode

from shared import ClosureCB, CountReads, HandSGD, ReadsPerStep

from miniai.accel import AccumulateCB, GradClipCB, MixedPrecision
from miniai.activations import matrix_of
from miniai.callback import Callback, CancelBatchException, CancelFitException
from miniai.checkpoint import CheckpointCB, checkpoints
from miniai.conv import conv
from miniai.datasets import DataLoaders
from miniai.gradients import GradientStats, RankStats, UpdateStats, gradient_stat_names, update_stat_names
from miniai.hooks import count_hooks
from miniai.inspector import InspectorCB
from miniai.learner import Learner, MomentumLearner, TrainCB
from miniai.lens import ParameterGradientActivation, ParameterGradientGeometry, ParameterUpdateGeometry
from miniai.stats import Sums, effective_rank, grad_bins, measure


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))

def batches(n, bs=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(bs, 6, generator=g), torch.randint(0, 3, (bs,), generator=g)) for _ in range(n)]

def learner(*cbs, n=5, model=None, dls=None, **kw):
    dls = dls or DataLoaders(batches(n), batches(1, seed=1))
    return Learner(model or net(), dls, F.cross_entropy, lr=kw.pop('lr', .1), cbs=[TrainCB(), *cbs], **kw)

def values(cb, source, stat): return cb.rows(source, stat).values


class Truth(Callback):
    "Gradients just before the step and parameters around it, kept as they are."
    order = 10_000
    def before_fit(self, learn): self.grads, self.before, self.after = [], [], []
    def _named(self, learn): return learn.model.named_parameters()
    def after_backward(self, learn):
        self.grads.append({nm: None if p.grad is None else p.grad.detach().to_dense().double().clone() for nm, p in self._named(learn)})
        self.before.append({nm: p.detach().double().clone() for nm, p in self._named(learn)})
    def after_step(self, learn): self.after.append({nm: p.detach().double().clone() for nm, p in self._named(learn)})

def close(a, b, rtol=1e-4): np.testing.assert_allclose(np.array(a, dtype=float), np.array(b, dtype=float), rtol=rtol, atol=1e-9)


def hist_of(grads, g):
    "Counts of each bin, then below, above, infinite and NaN, by `torch.bucketize`."
    m, edges = g.abs().float().flatten(), torch.from_numpy(grads.hist_edges)
    at = torch.bucketize(m, edges, right=True)
    at[m == edges[-1]] = grads.bins
    counts = torch.bincount(at, minlength=grads.bins+2)
    return [*counts[1:-1].tolist(), int(counts[0]), int(counts[-1]), 0, 0]


# --- formulas of the design ---

def test_gradients_beside_plain_torch():
    truth, grads = Truth(), GradientStats()
    learner(grads, truth, lr=.5).fit(2)
    for nm in truth.grads[0]:
        g = [o[nm] for o in truth.grads]
        close(values(grads, nm, 'grad_norm'), [o.norm() for o in g])
        cosines = [torch.nan] + [(a.flatten() @ b.flatten())/(a.norm()*b.norm()) for a, b in zip(g, g[1:])]
        cosines = np.array(cosines, dtype=float)
        got = values(grads, nm, 'grad_correlation')
        assert np.isnan(got[0])
        np.testing.assert_allclose(got[1:], cosines[1:], atol=1e-5)
        close(values(grads, nm, 'grad_activation_rate'), [(o != 0).double().mean() for o in g])
        rows = [(o.flatten(1) if o.ndim > 1 else o[:, None]) for o in g]
        close(values(grads, nm, 'grad_death_rate'), [(o == 0).all(1).double().mean() for o in rows])
        got = values(grads, nm, 'grad_hist')
        assert (got.sum(1) == g[0].numel()).all()
        np.testing.assert_array_equal(got, [hist_of(grads, o) for o in g])
        close(got[:, grads.bins], [(o.abs() < 1e-12).sum() for o in g])
    close(values(grads, 'all', 'grad_norm'), [sum(o.norm()**2 for o in g.values())**.5 for g in truth.grads])

@pytest.mark.parametrize('opt', [optim.SGD, lambda p, lr: optim.SGD(p, lr, momentum=.9, weight_decay=.1), optim.AdamW,
                                 lambda p, lr: optim.Adam(p, lr, fused=True), optim.Adadelta, HandSGD], ids=range(6))
def test_updates_of_any_optimizer(opt):
    truth, updates = Truth(), UpdateStats()
    learner(updates, truth, lr=.01, opt_func=opt).fit(2)
    for nm in truth.before[0]:
        step = [after[nm]-before[nm] for before, after in zip(truth.before, truth.after)]
        weight = [o[nm].norm() for o in truth.before]
        close(values(updates, nm, 'update_norm'), [o.norm() for o in step], 1e-3)
        close(values(updates, nm, 'update_ratio'), [o.norm()/w for o, w in zip(step, weight)], 1e-3)
        close(values(updates, nm, 'param_norm'), weight)
        cosines = [float((a.flatten() @ b.flatten())/(a.norm()*b.norm())) for a, b in zip(step, step[1:])]
        np.testing.assert_allclose(values(updates, nm, 'update_correlation')[1:], cosines, atol=1e-3)

def test_an_optimizer_with_a_closure_and_one_that_replaces_data():
    class Replaces(HandSGD):
        def step(self):
            for p in self.params: p.data = p.data - .1*p.grad
    for train, opt in ((ClosureCB(), lambda p, lr: optim.LBFGS(p, lr, max_iter=3)), (TrainCB(), Replaces)):
        truth, updates = Truth(), UpdateStats()
        dls = DataLoaders(batches(4), batches(1))
        Learner(net(), dls, F.cross_entropy, lr=.1, cbs=[train, updates, truth], opt_func=opt).fit(1)
        for nm in truth.before[0]:
            close(values(updates, nm, 'update_norm'), [(a[nm]-b[nm]).norm() for a, b in zip(truth.after, truth.before)], 1e-3)

def test_as_the_inspector():
    lenses = [ParameterGradientGeometry(inplace=False), ParameterGradientActivation(inplace=False),
              ParameterUpdateGeometry(inplace=False)]
    watch, grads, updates = InspectorCB(lenses, visualizer=None), GradientStats(), UpdateStats()
    learner(watch, grads, updates, opt_func=optim.Adam, lr=.01).fit(2)
    stats = [(grads, nm) for nm in gradient_stat_names if nm != 'grad_hist'] + [(updates, nm) for nm in update_stat_names[:3]]
    for cb, stat in stats:
        for nm in ('0.weight', '2.bias', '4.weight'):
            theirs = watch.history.series(nm, stat)
            ours = cb.rows(nm, stat)
            assert ours.steps.tolist() == theirs.steps.tolist() == list(range(10))
            np.testing.assert_allclose(ours.values, theirs.values, rtol=1e-5, atol=1e-7)

class Tied(nn.Module):
    "A layer that is used twice, and two that have one weight."
    def __init__(self):
        super().__init__()
        self.first, self.twice, self.other, self.head = (nn.Linear(6, n) for n in (6, 6, 6, 3))
        self.other.weight = self.twice.weight
    def forward(self, xb): return self.head(self.other(self.twice(self.twice(self.first(xb).relu()).relu()).relu()))

ragged = lambda: [*batches(10), *batches(1, bs=5, seed=3)]
two = [(AccumulateCB, 2)]
same_steps = dict(plain=((), 1), accumulated=(two, 1), seldom=((), 3), both=(two, 2))

@pytest.mark.parametrize('opt', [optim.SGD, optim.Adam], ids=['sgd', 'adam'])
@pytest.mark.parametrize('cbs,every', same_steps.values(), ids=same_steps)
@pytest.mark.parametrize('make', [net, Tied], ids=['mlp', 'tied'])
def test_all_statistics_beside_plain_torch(make, cbs, every, opt):
    torch.manual_seed(0)
    truth, grads, updates = Truth(), GradientStats(every=every), UpdateStats(every=every)
    learner(*(cls(n) for cls, n in cbs), grads, updates, truth, model=make(), opt_func=opt, lr=.01,
            dls=DataLoaders(ragged(), batches(1))).fit(2)
    at = list(range(0, len(truth.grads), every))
    n_steps = 12 if cbs else 22
    assert len(truth.grads) == n_steps == grads.cost().steps_seen and grads.cost().steps_sampled == len(at)
    sizes = 2*[*([24]*5 if cbs else [12]*10), 5]
    assert grads.rows('all', 'grad_norm').samples.tolist() == [sizes[i] for i in at]
    before, after, g = ([o[i] for i in at] for o in (truth.before, truth.after, truth.grads))
    for nm in g[0]:
        assert grads.rows(nm, 'grad_norm').steps.tolist() == at == updates.rows(nm, 'update_norm').steps.tolist()
        mine = [o[nm] for o in g]
        moved = [b[nm].float() - a[nm].float() for a, b in zip(before, after)]
        close(values(grads, nm, 'grad_norm'), [o.norm() for o in mine], 1e-9)
        np.testing.assert_array_equal(values(grads, nm, 'grad_hist'), [hist_of(grads, o) for o in mine])
        close(values(grads, nm, 'grad_activation_rate'), [(o != 0).double().mean() for o in mine], 1e-12)
        units = [(o.flatten(1) if o.ndim > 1 else o[:, None]) for o in mine]
        close(values(grads, nm, 'grad_death_rate'), [(o == 0).all(1).double().mean() for o in units], 1e-12)
        close(values(updates, nm, 'update_norm'), [o.double().norm() for o in moved], 1e-9)
        close(values(updates, nm, 'param_norm'), [o[nm].norm() for o in before], 1e-9)
        close(values(updates, nm, 'update_ratio'), [m.double().norm()/o[nm].norm() for m, o in zip(moved, before)], 1e-9)
        for cb, stat, tensors in ((grads, 'grad_correlation', mine), (updates, 'update_correlation', moved)):
            pairs = list(zip(tensors, tensors[1:]))
            cosines = [F.cosine_similarity(a.double().flatten(), b.double().flatten(), 0, eps=0) for a, b in pairs]
            assert np.isnan(values(cb, nm, stat)[0])
            np.testing.assert_allclose(values(cb, nm, stat)[1:], cosines, atol=1e-9)
    close(values(grads, 'all', 'grad_norm'), [sum(o.norm()**2 for o in gs.values())**.5 for gs in g], 1e-9)


# --- when it looks ---

def test_accumulated_gradients_are_read_once_a_step():
    truth, grads, updates = Truth(), GradientStats(), UpdateStats()
    learner(AccumulateCB(3), grads, updates, truth, n=7).fit(1)
    assert len(truth.grads) == 3                                          # 3 + 3 + the last one
    norm = grads.rows('2.weight', 'grad_norm')
    close(norm.values, [o['2.weight'].norm() for o in truth.grads])       # after the rest is weighted, too
    assert norm.steps.tolist() == [0, 1, 2] and norm.samples.tolist() == [36, 36, 12]
    assert len(updates.rows('2.weight', 'update_norm')) == 3

def test_before_and_after_clipping():
    truth, clip, grads = Truth(), GradClipCB(.2), GradientStats()
    learn = learner(clip, grads, truth, lr=.5)
    learn.fit(1)
    before, after = values(grads, 'all', 'grad_norm'), values(grads, 'all', 'grad_norm_clipped')
    close(before, learn.history.series('gradient', 'norm').values)
    close(after, learn.history.series('gradient', 'norm clipped').values)
    assert (before > .2).any() and (after < .2001).all()
    factor = after/before
    close(values(grads, '2.weight', 'grad_norm')*factor, [o['2.weight'].norm() for o in truth.grads])   # before clipping

def test_without_anybody_who_clips_there_is_no_second_norm():
    grads, forced = GradientStats(), GradientStats(clipped=True)
    learner(grads, forced).fit(1)
    assert not len(grads.rows('all', 'grad_norm_clipped'))
    close(values(forced, 'all', 'grad_norm_clipped'), values(forced, 'all', 'grad_norm'))
    learn = learner()
    watcher = learn.watch(every=1)   # all its parts only look
    learn.fit(1)
    assert not len(watcher.gradients.rows('all', 'grad_norm_clipped'))

def test_a_scaled_loss_is_unscaled():
    class Scaler:
        "As `torch.amp.GradScaler`, on a CPU."
        def scale(self, loss): return loss*1024
        def unscale_(self, opt):
            for p in opt.param_groups[0]['params']: p.grad /= 1024
        def step(self, opt): opt.step()
        def update(self): pass
    class Mixed(MixedPrecision):
        def before_epoch(self, learn):
            super().before_epoch(learn)
            self._used['enabled'], self.scaler = False, Scaler()
    plain, scaled = GradientStats(), GradientStats()
    learner(plain).fit(1)
    Learner(net(), DataLoaders(batches(5), batches(1)), F.cross_entropy, lr=.1, cbs=[Mixed(), scaled]).fit(1)
    close(values(plain, '0.weight', 'grad_norm'), values(scaled, '0.weight', 'grad_norm'))

def test_every_and_budget():
    seldom, cheap = GradientStats(every=3), UpdateStats(budget=.01)
    learner(seldom, cheap, n=100).fit(2)
    assert seldom.rows('0.weight', 'grad_norm').steps.tolist() == list(range(0, 200, 3))
    assert cheap.sampler.always <= cheap.cost().steps_sampled < 200 and cheap.cost().steps_seen == 200
    assert np.isnan(values(seldom, '0.weight', 'grad_correlation')[0])

def test_every_second_step_of_two_batches():
    grads, updates = GradientStats(every=2), UpdateStats(every=2)
    learner(AccumulateCB(2), grads, updates, n=13).fit(1)                 # seven steps, the last of one batch
    for s in (grads.rows('0.weight', 'grad_norm'), updates.rows('0.weight', 'update_norm')):
        assert s.steps.tolist() == [0, 2, 4, 6] and s.samples.tolist() == [24, 24, 24, 12]
    assert grads.cost().steps_seen == 7 and grads.cost().steps_sampled == 4

def test_a_sampler_of_several():
    class Joined(Callback):
        order = 50
        def before_fit(self, learn): updates.sampler = grads.sampler
    grads, updates = GradientStats(every=2), UpdateStats()
    learner(grads, updates, Joined(), AccumulateCB(2), n=10).fit(2)
    assert grads.sampler is updates.sampler and grads.cost().steps_seen == 10
    assert updates.rows('0.weight', 'update_norm').steps.tolist() == grads.rows('0.weight', 'grad_norm').steps.tolist() == [0, 2, 4, 6, 8]
    learner(grads, updates, Joined(), n=4, model=net(1)).fit(1)           # another model: counted anew
    assert grads.cost().steps_seen == 4 and updates.rows('0.weight', 'update_norm').steps.tolist() == [0, 2]

class CountCalls(TorchDispatchMode):
    "Counts operations of PyTorch."
    def __init__(self): super().__init__(); self.calls = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))

def test_a_step_that_is_not_sampled_does_nothing():
    def calls_of(*cbs):
        counter, seen = CountCalls(), []
        class Count(Callback):
            order = 1000
            def cleanup_batch(self, learn): seen.append(counter.calls)
        learn = learner(*cbs, Count(), n=6)
        with counter: learn.fit(1, valid=False)
        return np.diff([0, *seen])
    plain, watched = calls_of(), calls_of(GradientStats(every=4), UpdateStats(every=4))
    assert [i for i in range(6) if watched[i] > plain[i]] == [0, 4]

def test_buffers_live_in_a_fit():
    class Held(Callback):
        def after_step(self, learn): self.bytes = [sum(o.nbytes for o in d.values()) for d in (grads.tap.before, updates.tap.before, updates.tap.starts)]
    held, grads, updates = Held(), GradientStats(), UpdateStats()
    learn = learner(held, grads, updates)
    learn.fit(1)
    size = sum(p.nbytes for p in learn.model.parameters())
    assert held.bytes == [size]*3
    assert not any((*o.tap.before, *o.tap.starts, *o.table.cells) for o in (grads, updates))

def test_a_failure_is_a_warning_and_a_gap():
    grads, updates = GradientStats(), UpdateStats()
    def fails(*args): raise RuntimeError('out of memory')
    class Break(Callback):
        def before_batch(self, learn):
            for cb in (grads, updates): cb._choose = fails if learn.n_steps in (1, 2) else type(cb)._choose.__get__(cb)
    with pytest.warns(UserWarning, match="could not be measured and is left out .RuntimeError: out of memory") as found:
        learner(Break(), grads, updates).fit(1)
    assert len(found) == 2
    for s in (grads.rows('0.weight', 'grad_norm'), updates.rows('0.weight', 'update_norm')): assert s.steps.tolist() == [0, 3, 4]

@pytest.mark.parametrize('make', [GradientStats, UpdateStats, lambda: RankStats(every=5)], ids=['gradients', 'updates', 'ranks'])
def test_nothing_is_read_in_a_step(make):
    counter = CountReads()
    steps = ReadsPerStep(counter)
    learn = learner(make(), GradClipCB(record=False), steps, n=30)
    with counter: learn.fit(1, valid=False)
    assert len(steps.per_step) == 30 and sum(steps.per_step) == 0

def test_a_step_that_is_cancelled_leaves_no_update():
    class Cancel(Callback):
        order = 50
        def after_backward(self, learn):
            if learn.n_steps == 2 and not getattr(self, 'done', False):
                self.done = True
                raise CancelBatchException()
    updates, grads = UpdateStats(), GradientStats()
    learner(updates, grads, Cancel(), n=5).fit(1)
    assert updates.rows('0.weight', 'update_norm').steps.tolist() == [0, 1, 2, 3]
    assert grads.rows('all', 'grad_norm').steps.tolist() == [0, 1, 2, 2, 3]
    close(values(grads, 'all', 'grad_norm'), sum(values(grads, o.name, 'grad_norm')**2 for o in grads.params)**.5, 1e-9)


# --- which parameters ---

class Odd(nn.Module):
    "An embedding with sparse gradients, tied layers, one that is not used, one that is not used at first."
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(20, 6, sparse=True)
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
        self.two.weight = self.one.weight
        self.unused, self.late, self.head = nn.Linear(2, 2), nn.Linear(6, 6), nn.Linear(6, 3)
        self.calls = 0
    def forward(self, xb):
        self.calls += self.training
        out = self.two(self.one(self.words(xb).mean(1)).relu())
        return self.head(out + self.late(out) if self.calls > 3 else out)

def odd_batches(n):
    g = torch.Generator().manual_seed(0)
    return [(torch.randint(0, 20, (8, 4), generator=g), torch.randint(0, 3, (8,), generator=g)) for _ in range(n)]

def test_parameters_that_are_not_there():
    torch.manual_seed(0)
    truth, grads, updates, model = Truth(), GradientStats(), UpdateStats(), Odd()
    model.head.bias.requires_grad_(False)
    learn = learner(grads, updates, truth, model=model, dls=DataLoaders(odd_batches(6), odd_batches(1)))
    with pytest.warns(UserWarning, match='unused.weight, unused.bias') as told: learn.fit(2)
    assert len([o for o in told if 'unused' in str(o.message)]) == 1
    assert set(grads.gaps) == {'unused.weight', 'unused.bias', 'head.bias'} == set(updates.gaps)
    assert grads.unreached == updates.unreached == ('unused.weight', 'unused.bias')
    assert 'frozen' in grads.gaps['head.bias'] and 'has had no gradient' in grads.gaps['unused.bias']
    close(values(grads, 'words.weight', 'grad_norm'), [o['words.weight'].norm() for o in truth.grads])
    assert len(grads.rows('one.weight', 'grad_norm')) == 12 and not len(grads.rows('two.weight', 'grad_norm'))
    with pytest.warns(UserWarning, match='UpdateStats: unused.weight'):      # alone, the other one says it
        learner(UpdateStats(), model=Odd(), dls=DataLoaders(odd_batches(6), odd_batches(1))).fit(1)
    late = grads.rows('late.weight', 'grad_norm')
    assert late.steps.tolist() == list(range(3, 12))
    close(late.values, [o['late.weight'].norm() for o in truth.grads[3:]])
    hist = values(grads, 'words.weight', 'grad_hist')
    assert (hist.sum(1) == 120).all() and (hist[:, grads.bins] > 0).all()

def test_frozen_again_and_unfrozen():
    class Freeze(Callback):
        def before_batch(self, learn):
            if learn.training: learn.model[0].requires_grad_(learn.n_steps not in (2, 3))
    grads, updates = GradientStats(), UpdateStats()
    learner(Freeze(), grads, updates, n=6).fit(1)
    for s in (grads.rows('0.weight', 'grad_norm'), updates.rows('0.weight', 'update_norm')):
        assert s.steps.tolist() == [0, 1, 4, 5] and np.isfinite(s.values).all()      # a gap is no row
    assert values(grads, '0.weight', 'grad_hist').sum(1).tolist() == [48]*4 and not grads.gaps
    assert len(grads.rows('0.weight', 'has_grad')) == 0
    assert matrix_of([grads.rows(nm, 'grad_norm') for nm in ('0.weight', '2.weight')])[2].shape == (2, 6)
    assert np.isnan(matrix_of([grads.rows('0.weight', 'grad_norm'), grads.rows('2.weight', 'grad_norm')])[2][0]).tolist() == [False, False, True, True, False, False]
    assert np.isfinite(values(grads, '2.weight', 'grad_norm')).all()

def test_parameters_that_the_optimizer_does_not_have():
    grads, model = GradientStats(), net()
    learner(grads, model=model, opt_func=lambda params, lr: optim.SGD(model[4].parameters(), lr)).fit(1)
    assert 'optimizer' in grads.gaps['0.weight'] and not len(grads.rows('0.weight', 'grad_norm'))
    close(values(grads, 'all', 'grad_norm')**2, values(grads, '4.weight', 'grad_norm')**2 + values(grads, '4.bias', 'grad_norm')**2)

def test_chosen_parameters():
    grads = GradientStats(parameters=('2.*',))
    learner(grads).fit(1)
    assert {k[1] for k in grads.history.keys()} == {'2.weight', '2.bias', 'all'}
    with pytest.raises(ValueError, match="no parameter is called '7.weight'"): learner(GradientStats('7.weight')).fit(1)

def test_half_precision_and_complex_parameters():
    model = nn.Sequential(nn.Linear(6, 3)).to(torch.bfloat16)
    truth, grads = Truth(), GradientStats(clipped=True)
    data = [(x.to(torch.bfloat16), y) for x, y in batches(3)]
    learner(grads, truth, model=model, dls=DataLoaders(data, data)).fit(1)
    close(values(grads, '0.weight', 'grad_norm'), [o['0.weight'].norm() for o in truth.grads])
    close(values(grads, 'all', 'grad_norm_clipped'), values(grads, 'all', 'grad_norm'))
    class Wave(nn.Module):
        def __init__(self): super().__init__(); self.lin, self.w = nn.Linear(6, 3), nn.Parameter(torch.ones(3, dtype=torch.complex64))
        def forward(self, xb): return (self.lin(xb)*self.w).abs()
    class Moduli(Truth):
        def after_backward(self, learn): self.grads.append({nm: p.grad.clone() for nm, p in self._named(learn)})
        def after_step(self, learn): pass
    truth, grads, updates = Moduli(), GradientStats(clipped=True), UpdateStats()
    learner(grads, updates, truth, model=Wave()).fit(1)
    assert not grads.gaps and len(grads.rows('lin.weight', 'grad_norm')) == 5
    close(values(grads, 'w', 'grad_norm'), [o['w'].abs().norm() for o in truth.grads])       # by the modulus
    flat = [torch.view_as_real(o['w']).flatten() for o in truth.grads]
    cosines = [F.cosine_similarity(a, b, 0) for a, b in zip(flat, flat[1:])]
    np.testing.assert_allclose(values(grads, 'w', 'grad_correlation')[1:], cosines, atol=1e-5)
    close(values(updates, 'w', 'update_norm'), [.1*o['w'].abs().norm() for o in truth.grads])
    close(values(updates, 'w', 'param_norm')[0], 3**.5)
    close(values(grads, 'all', 'grad_norm_clipped'), values(grads, 'all', 'grad_norm'))

def test_nan_is_no_gap():
    class Spoil(Callback):
        order = -15
        def after_backward(self, learn):
            if learn.n_steps == 2: learn.model[2].weight.grad[0, 0] = torch.nan
    grads = GradientStats()
    learner(Spoil(), grads, n=4).fit(1)
    assert np.isnan(values(grads, '2.weight', 'grad_norm')).tolist() == [False, False, True, True]
    assert values(grads, '2.weight', 'grad_hist')[2, -1] == 1 and np.isfinite(values(grads, '4.weight', 'grad_norm')[2])
    assert not len(grads.rows('2.weight', 'has_grad'))


# --- fits ---

def test_two_fits_and_lr_find():
    grads, updates, ranks = GradientStats(), UpdateStats(), RankStats(every=1)
    learn = learner(grads, updates, ranks)
    learn.fit(1)
    learn.lr_find(plot=False, max_epochs=5)
    learn.fit(1)
    for s in (grads.rows('0.weight', 'grad_norm'), updates.rows('0.weight', 'update_norm'), ranks.rows('0')):
        assert s.runs.tolist() == [0]*5 + [1]*5 and len(s) == 10
    assert np.isnan(values(grads, '0.weight', 'grad_correlation')[[0, 5]]).all()
    assert grads.cost().steps_seen == 10

def test_callbacks_are_used_again_with_another_model():
    grads = GradientStats()
    learner(grads).fit(1)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learner(grads, model=nn.Sequential(nn.Linear(6, 3))).fit(2)
    assert [o.name for o in grads.params] == ['0.weight', '0.bias']
    assert len(grads.rows('0.weight', 'grad_norm')) == 10 and not len(grads.rows('4.weight', 'grad_norm'))
    assert len(grads.history.series('4.weight', 'grad_norm')) == 5

@pytest.mark.parametrize('exc', [ValueError, KeyboardInterrupt, CancelFitException])
def test_nothing_is_left_after_any_exit(exc):
    class Raises(Callback):
        def after_loss(self, learn):
            if learn.n_steps == 2: raise exc()
    model, cbs = net(), [GradientStats(), UpdateStats(), RankStats(every=1)]
    learn = learner(*cbs, Raises(), model=model)
    try: learn.fit(1)
    except (ValueError, KeyboardInterrupt): pass
    assert count_hooks(model) == 0 and not (cbs[0].tap.before or cbs[1].tap.before or cbs[1].tap.starts or cbs[1]._moving)
    assert len(cbs[0].rows('0.weight', 'grad_norm')) == 2
    copy.deepcopy(model), pickle.dumps(model)

def test_copies_in_the_middle_of_a_fit():
    class Copies(Callback):
        def after_step(self, learn): self.twin, self.bytes = copy.deepcopy(learn.model), pickle.dumps(learn.model)
    copies, grads, updates = Copies(), GradientStats(), UpdateStats()
    learner(copies, grads, updates).fit(1)
    assert len(pickle.loads(copies.bytes).state_dict()) == 6 and count_hooks(copies.twin) == 0
    again = pickle.loads(pickle.dumps(grads))
    assert len(again.rows('0.weight', 'grad_norm')) == 5
    learner(again).fit(1)
    assert len(again.rows('0.weight', 'grad_norm')) == 5     # a model it has not met

def test_resume(tmp_path):
    class Stop(Callback):
        order = 200_000
        def after_batch(self, learn):
            if learn.training and learn.n_steps == 7: raise KeyboardInterrupt
    make = lambda *cbs: learner(GradientStats(), UpdateStats(), RankStats(every=2), *cbs, CheckpointCB(tmp_path, every=4), n=6)
    learn = learner(GradientStats(), UpdateStats(), RankStats(every=2), n=6)
    learn.fit(2)
    with pytest.raises(KeyboardInterrupt): make(Stop()).fit(2)
    again = make()
    again.fit(2, resume=tmp_path)
    assert checkpoints(tmp_path)
    for a, b in zip(learn.cbs[1:4], again.cbs[1:4]):
        for _, source, stat in a.history.keys():
            one, two = a.rows(source, stat), b.rows(source, stat)
            assert one.steps.tolist() == two.steps.tolist(), (source, stat)
            np.testing.assert_array_equal(one.values, two.values)

@pytest.mark.parametrize('make', [lambda: GradientStats(bins=30, hist_range=(1e-8, 10), every=2), UpdateStats])
def test_state_gives_the_same_table(make):
    def same(one, two):
        assert one.history.keys() == two.history.keys() and len(one.history.keys()) > 10
        for _, source, stat in one.history.keys():
            for a, b in zip(vars(one.rows(source, stat)).values(), vars(two.rows(source, stat)).values()): np.testing.assert_array_equal(a, b)
    cb, other = make(), make()
    learn = learner(cb, n=70, model=Odd(), dls=DataLoaders(odd_batches(70), odd_batches(1)))
    with pytest.warns(UserWarning, match='unused.weight'): learn.fit(1)
    state = cb.state_dict()
    other.load_state_dict(copy.deepcopy(state))
    same(cb, other)
    assert other.gaps == cb.gaps and other.unreached == cb.unreached and other.sampler.state_dict() == cb.sampler.state_dict()
    again = pickle.loads(pickle.dumps(cb))
    same(cb, again)
    same(cb, copy.deepcopy(cb))

def test_a_thinned_table_knows_the_norm_of_all():
    grads, small = GradientStats(), GradientStats(max_bytes=100_000)
    with pytest.warns(UserWarning, match='are full'): learner(grads, small, n=150).fit(1)
    whole, thinned = grads.rows('all', 'grad_norm'), small.rows('all', 'grad_norm')
    assert len(small.rows('2.weight', 'grad_norm')) < len(whole) == 150
    np.testing.assert_array_equal(thinned.values, whole.values[thinned.steps])

@pytest.mark.parametrize('kinds', [[torch.bfloat16, torch.float32], [torch.float64, torch.float32], [torch.float32, torch.float64, torch.float32]])
def test_parameters_change_their_type_in_a_fit(kinds):
    class Convert(Callback):
        order = -1000
        def before_batch(self, learn):
            kind = kinds[min(learn.n_steps//2, len(kinds)-1)]
            for p in learn.model.parameters(): p.data, p.grad = p.data.to(kind), None
            learn.batch = learn.batch[0].to(kind), learn.batch[1]
    grads, updates, truth = GradientStats(), UpdateStats(), Truth()
    learner(Convert(), truth, grads, updates, n=6).fit(1, valid=False)
    change = [i for i in range(6) if i == 0 or i % 2 == 0 and i//2 < len(kinds)]
    expected = [F.cosine_similarity(a['2.weight'].flatten(), b['2.weight'].flatten(), 0) for a,b in zip(truth.grads, truth.grads[1:])]
    expected = [np.nan if i in change else float(expected[i-1]) for i in range(6)]
    close(values(grads, '2.weight', 'grad_correlation'), expected, 1e-3)
    assert np.isnan(values(updates, '2.weight', 'update_correlation')).nonzero()[0].tolist() == change

def test_state_loaded_between_backward_and_step():
    updates = UpdateStats()
    class Load(Callback):
        order = 5000
        def after_backward(self, learn):
            if learn.n_steps == 2: updates.load_state_dict(updates.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learner(updates, Load()).fit(1)
    assert updates.rows('0.weight', 'update_norm').steps.tolist() == [0, 1, 3, 4]

def test_a_layer_that_is_replaced():
    class Replace(Callback):
        order = -100
        def before_epoch(self, learn):
            if learn.training and learn.epoch == 1:
                learn.model[4] = nn.Linear(8, 5)
                learn.opt.add_param_group(dict(params=list(learn.model[4].parameters())))
    grads, updates, truth = GradientStats(), UpdateStats(), Truth()
    learner(Replace(), grads, updates, truth).fit(2)
    for nm in ('4.weight', '4.bias', '0.weight'):
        close(values(grads, nm, 'grad_norm'), [o[nm].norm() for o in truth.grads], 1e-6)
        close(values(updates, nm, 'update_norm'), [(a[nm]-b[nm]).norm() for a, b in zip(truth.after, truth.before)], 1e-3)
    close(values(grads, 'all', 'grad_norm'), [sum(o.norm()**2 for o in g.values())**.5 for g in truth.grads])

def test_lazy_layers_doubles_and_channels_last():
    images = [(torch.randn(8, 3, 9, 9), torch.randint(0, 3, (8,))) for _ in range(4)]
    conv_net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    double = [(x.double(), y) for x, y in batches(4)]
    for model, data in ((nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 3)), batches(4)), (net().double(), double),
                        (conv_net.to(memory_format=torch.channels_last), images)):
        truth, grads, updates = Truth(), GradientStats(), UpdateStats()
        learner(grads, updates, truth, model=model, dls=DataLoaders(data, data)).fit(2)
        for nm in ('0.weight', '0.bias', '2.weight'):
            g = [o[nm] for o in truth.grads]
            close(values(grads, nm, 'grad_norm'), [o.norm() for o in g], 1e-6)
            close(values(updates, nm, 'update_norm'), [(a[nm]-b[nm]).norm() for a, b in zip(truth.after, truth.before)], 1e-3)
            cosines = [F.cosine_similarity(a.flatten(), b.flatten(), 0) for a, b in zip(g, g[1:])]
            np.testing.assert_allclose(values(grads, nm, 'grad_correlation')[1:], cosines, atol=1e-6)

def test_the_ratio_of_a_parameter_that_is_zero_is_a_gap():
    model, updates = net(), UpdateStats()
    model[0].bias.data.zero_()
    learner(updates, model=model).fit(1)
    assert np.isnan(values(updates, '0.bias', 'update_ratio')).tolist() == [True] + [False]*4

def test_momentum_in_the_gradient():
    grads = GradientStats()
    dls = DataLoaders(batches(3), batches(1))
    MomentumLearner(net(), dls, F.cross_entropy, lr=0., cbs=grads).fit(1)
    assert len(grads.rows('0.weight', 'grad_norm')) == 3

@pytest.mark.parametrize('wrong', [dict(stats='grad_norm'), dict(stats=('norm',)), dict(every=0), dict(hist_range=(0, 1)), dict(budget=2)])
def test_wrong_arguments(wrong):
    with pytest.raises(ValueError): GradientStats(**wrong)


# --- effective rank ---

def test_effective_rank_beside_numpy():
    for a in (torch.randn(50, 7), torch.randn(4, 9), torch.randn(30, 3) @ torch.randn(3, 12)):
        s = np.linalg.svd(a.double().numpy(), compute_uv=False)
        p = s/s.sum()
        p = p[p > 1e-9]
        assert abs(effective_rank(a) - np.exp(-(p*np.log(p)).sum())) < 1e-2

def test_ranks_of_layers():
    class Keep(Callback):
        def after_predict(self, learn): self.out = learn.model.out
    class Body(nn.Module):
        def __init__(self): super().__init__(); self.conv, self.head = conv(1, 4), nn.Linear(4*9, 3)
        def forward(self, xb):
            self.out = self.conv(xb)
            return self.head(self.out.flatten(1))
    data = [(torch.randn(10, 1, 6, 6), torch.randint(0, 3, (10,)))]
    keep, ranks, centered = Keep(), RankStats(every=1, samples=1000), RankStats(every=1, samples=1000, center=True)
    Learner(Body(), DataLoaders(data, data), F.cross_entropy, lr=0., cbs=[TrainCB(), ranks, centered, keep]).fit(1, valid=False)
    rows = keep.out.detach().movedim(1, -1).reshape(-1, 4)
    np.testing.assert_allclose(values(ranks, 'conv.1', 'effective_rank'), [effective_rank(rows)], rtol=1e-5)
    np.testing.assert_allclose(values(centered, 'conv.1', 'effective_rank'), [effective_rank(rows-rows.mean(0))], rtol=1e-5)
    assert ranks.limits == {'conv.0': 4, 'conv.1': 4, 'head': 3}

def test_ranks_of_what_has_none():
    class Strange(nn.Module):
        def forward(self, xb): return {'whole': xb.argmax(1), 'flat': xb.sum(1), 'nan': xb*torch.nan, 'fine': xb}
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.strange, self.lin = Strange(), nn.Linear(6, 3)
        def forward(self, xb): return self.lin(self.strange(xb)['fine'])
    ranks = RankStats(every=1)
    learner(ranks, model=Net()).fit(1)
    assert set(ranks.limits) == {"strange['nan']", "strange['fine']", 'lin'}
    assert np.isnan(values(ranks, "strange['nan']", 'effective_rank')).all()
    assert (values(ranks, "strange['fine']", 'effective_rank') > 4).all()

def test_rank_samples_do_not_pile_up():
    ranks = RankStats(every=1)
    ranks.max_waiting = 5000
    learner(ranks, n=20).fit(1)
    assert len(ranks.rows('0')) == 20 and not ranks._waiting

def test_logarithmic_histogram_counts_everything():
    a = torch.tensor([0., 1e-40, -1e-13, 1e-12, 1e4, 1.01e4, -torch.inf, torch.nan, .5, 3e38])
    got = Sums.of(measure(a, bins=grad_bins), grad_bins).hist[0]
    assert got[48:].tolist() == [3, 2, 1, 1] and got.sum() == len(a) and got[0] == 1 and got[47] == 1


# --- pictures ---

def test_views_say_why_they_are_empty():
    texts = [o.axes[0].texts[0].get_text() for o in
             (GradientStats().plot_norm(), GradientStats().plot_flow(), GradientStats().plot_heat(), GradientStats().color_dim(),
              UpdateStats().plot_ratio(), RankStats().plot_ranks(), GradientStats(stats=('grad_norm',)).color_dim())]
    assert GradientStats().color_dim().get_figheight() == 1
    assert all('Nothing to draw' in o for o in texts) and "'grad_hist' is not among" in texts[-1]

def test_views_draw_what_is_in_the_table():
    sizes = [6, *[7]*14, 3]
    layers = [o for a, b in zip(sizes, sizes[1:]) for o in (nn.Linear(a, b), nn.ReLU())][:-1]
    grads, updates = GradientStats(), UpdateStats()
    learner(grads, updates, GradClipCB(.1), model=nn.Sequential(*layers)).fit(2)
    norms = grads.plot_norm().axes[0].lines
    assert [o.get_label() for o in norms if not o.get_label().startswith('_')] == ['before clipping', 'after clipping']
    image = grads.plot_heat().axes[0].images[0].get_array()
    assert image.shape == (15, 10)
    np.testing.assert_allclose(image[-1].filled(np.nan), np.log10(values(grads, '0.weight', 'grad_norm')), rtol=1e-5)
    bars = grads.plot_flow(first=2, last=4).axes[0].patches
    np.testing.assert_allclose(bars[15].get_height(), values(grads, '0.weight', 'grad_norm')[2:5].mean(), rtol=1e-5)
    assert updates.plot_ratio().axes[0].images and len(updates.plot_ratio(('0.*', '2.weight')).axes[0].lines) >= 4
    import matplotlib.pyplot as plt
    plt.close('all')

def test_histograms_of_many_gradients_are_strips():
    "Names are shortened, the figure is no page high, and zeros are seen at the lower edge."
    net = nn.Sequential(*[nn.Linear(8, 8) for _ in range(14)])
    nn.init.zeros_(net[-1].weight)
    x = torch.randn(8, 8)
    grads = GradientStats()
    Learner(net, DataLoaders([(x, x)]*3, []), F.mse_loss, .1, cbs=[TrainCB(), grads]).fit(1, valid=False)
    ax, = [ax for ax in grads.color_dim().axes if ax.get_visible()]
    assert [o.get_text() for o in ax.get_yticklabels()] == [f'{i}.weight' for i in range(14)]
    first, last = (np.split(ax.images[0].get_array()[::-1], 14)[i] for i in (0, -1))
    assert (first[-1, 0] == 1) and (first[:-1, 0] == 0).sum() > 0   # nothing passes the zeros in the first step
    assert last[-1, 0] == 0 and last[:, 0].max() > .5
