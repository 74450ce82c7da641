"""All doors, all statistics: the same model, seed and batches give equal numbers; and no step reads a value."""
import warnings
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from miniai import history, rows
from miniai.accel import AccumulateCB
from miniai.activations import ActivationStats
from miniai.actfns import measure_number_dead_neurons
from miniai.datasets import DataLoaders
from miniai.gradients import GradientStats, UpdateStats
from miniai.hooks import select_modules
from miniai.inspector import Inspector, InspectorCB
from miniai.learner import DeviceCB, Learner, TrainCB
from miniai.lens import Lens
import miniai.watch  # noqa: F401 (`learn.watch`)
from miniai.stats import Sums, grad_bins, measure, output_bins, stat_name, statistic, statistics, unit_axis


# --- models: each is a function that makes it, and one that makes a batch of n inputs ---

class Twice(nn.Module):
    "Calls one layer two times."
    def __init__(self): super().__init__(); self.a, self.act, self.head = nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)
    def forward(self, x): return self.head(self.act(self.a(self.a(x))))

class Checkpointed(nn.Module):
    "Computes its block again in the backward pass."
    def __init__(self): super().__init__(); self.block, self.head = nn.Sequential(nn.Linear(6, 8), nn.ReLU()), nn.Linear(8, 3)
    def forward(self, x): return self.head(checkpoint(self.block, x, use_reentrant=False))

def tied():
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    net[2].weight = net[0].weight
    return net

class Last(nn.Module):
    def forward(self, x): return x[:, -1]

nets = {'MLP': (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), (6,)),
        'CNN': (lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3)), (1, 8, 8)),
        'channels_last': (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).to(
            memory_format=torch.channels_last), (3, 8, 8)),
        'Conv1d': (lambda: nn.Sequential(nn.Conv1d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3)), (2, 8)),
        '[B,T,F]': (lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3), Last()), (4, 6)),
        'twice': (Twice, (6,)), 'checkpointed': (Checkpointed, (6,)), 'tied': (tied, (6,))}

def batches(shape, sizes=(8, 8, 8, 8, 8, 5), seed=1):
    gen = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, *shape, generator=gen), torch.randint(0, 3, (n,), generator=gen)) for n in sizes]

def make(name, seed=0):
    torch.manual_seed(seed)
    net = nets[name][0]()
    layer = next(m for m in net.modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd)))
    with torch.no_grad(): layer.bias[:2] = -100   # two units that are dead
    return net


# --- the reference: hooks and loops as one writes them by hand ---

class Reference:
    "Rows of sums of a hand-written loop, by (tap, source), one for each step."
    def __init__(self, net, data, every=1, accumulate=1, lr=.1):
        self.rows, self.outputs, self.inside, self.axes, before = {}, {}, False, {}, {}
        opt = torch.optim.SGD(net.parameters(), lr)
        for nm,m in select_modules(net): m.register_forward_hook(partial(self.keep, nm))
        for step,parts in enumerate([data[i:i+accumulate] for i in range(0, len(data), accumulate)]):
            self.outputs, self.inputs, n = {}, {}, sum(len(x) for x,_ in parts)
            for x,y in parts:
                self.inside, self.calls, self.last = True, {}, None
                preds = net(x)
                self.inside = False
                (F.cross_entropy(preds, y)*len(x)/n).backward()
            start = {nm: p.detach().clone() for nm,p in net.named_parameters()}
            grads = {nm: p.grad.clone() for nm,p in net.named_parameters()}
            opt.step()
            opt.zero_grad()
            if step % every: continue
            for nm,outs in self.outputs.items():
                self.add('output', nm, measure(torch.cat(outs), self.axes[nm]))
                self.add('input', nm, measure(torch.cat(self.inputs[nm]), self.axes['input', nm]))
            for nm,p in net.named_parameters():
                grad, now, was = (o[:, None] if o.ndim == 1 else o for o in (grads[nm], p.detach(), start[nm]))
                self.add('grad', nm, measure(grad, 0, grad_bins, before.get(('grad', nm))))   # a bias has one entry for each unit
                self.add('update', nm, measure(now, 0, grad_bins, before.get(('update', nm)), was))
                before['grad', nm], before['update', nm] = grad, now - was

    def keep(self, nm, m, inp, out):
        if not self.inside: return   # computed again
        call = self.calls[nm] = self.calls.get(nm, 0) + 1
        nm = nm if call == 1 else f'{nm} (call {call})'
        given = inp[0].detach()
        like = self.last and self.last[0] == tuple(given.shape)
        axis = unit_axis(m, given.ndim, self.last[1] if like else None)
        self.axes['input', nm] = self.axes.get(('input', nm), axis)
        self.inputs.setdefault(nm, []).append(given.clone())
        same = like and tuple(given.shape) == tuple(out.shape)
        self.axes[nm] = unit_axis(m, out.ndim, self.last[1] if same else None)
        self.last = tuple(out.shape), self.axes[nm]
        self.outputs.setdefault(nm, []).append(out.detach().clone())

    def add(self, tap, nm, row): self.rows.setdefault((tap, nm), []).append(row)

def same(found, wanted, what):
    assert found.shape == wanted.shape, what
    assert np.allclose(found, wanted, rtol=2e-4, atol=1e-6, equal_nan=True), (what, found, wanted)

by_counts = 'hist', 'death_rate', 'activation_rate', 'near_zero', 'nan_fraction', 'inf_fraction'

def compare(ref, tap, source, series, skip=()):
    "All statistics of the registry that this tap has."
    bins = grad_bins if tap in ('grad', 'update') else output_bins
    sums = Sums.of(torch.stack(ref.rows[tap, source]), bins)
    for nm,f in statistics.items():
        if nm in skip or (f.taps and tap not in f.taps): continue
        found, wanted = series(source, stat_name(tap, nm)).values, f(sums)
        if nm in by_counts: assert np.array_equal(found, wanted, equal_nan=True), (tap, source, nm)
        else: same(found, wanted, (tap, source, nm))


@pytest.mark.parametrize('name', nets)
@pytest.mark.parametrize('every,accumulate', [(1, 1), (3, 1), (1, 2), (2, 2)])
def test_the_callbacks_give_all_statistics(name, every, accumulate):
    data = batches(nets[name][1])
    ref = Reference(make(name), data, every, accumulate)
    every_stat = tuple(o for o in statistics if not statistics[o].taps)
    acts = ActivationStats(every=every, stats=every_stat)
    grads, updates = GradientStats(every=every), UpdateStats(every=every)
    cbs = [TrainCB(), acts, grads, updates] + [AccumulateCB(accumulate)]*(accumulate > 1)
    Learner(make(name), DataLoaders(data, data), F.cross_entropy, lr=.1, cbs=cbs).fit(1, valid=False)
    names = list(acts.panels())
    assert names == [nm for tap,nm in ref.rows if tap == 'output']          # in the order of the first forward
    pairs = 'correlation', 'ratio', 'start_norm'
    for nm in names: compare(ref, 'output', nm, acts.rows, skip=pairs)
    params = [nm for tap,nm in ref.rows if tap == 'grad']
    flat = 'sample_norm', 'sample_rms'   # a parameter has no samples
    for nm in params:
        if name == 'tied' and nm == '2.weight': continue
        compare(ref, 'grad', nm, grads.rows, skip=flat)
        # an update has no histogram and units unless they are asked for
        compare(ref, 'update', nm, updates.rows, skip=(*flat, *by_counts, 'median', 'q10', 'q90', 'q99'))
    total = np.sqrt(sum(statistics['norm'](Sums.of(torch.stack(ref.rows['grad', nm]), grad_bins))**2 for nm in params))
    same(grads.rows('all', 'grad_norm').values, total, 'all')


def all_statistics(tap):
    return {stat_name(tap, nm): nm for nm,f in statistics.items() if not f.taps or tap in f.taps}

def by_hand(net, data, inspector, accumulate, lr=.1):
    "A loop as people write it, with parts of a batch that weigh by their samples."
    opt = torch.optim.SGD(net.parameters(), lr)
    with inspector.attach(net, optimizer=opt):
        for parts in (data[i:i+accumulate] for i in range(0, len(data), accumulate)):
            n = sum(len(x) for x,_ in parts)
            for x,y in parts: (F.cross_entropy(net(x), y)*len(x)/n).backward()
            opt.step()
            opt.zero_grad()

@pytest.mark.parametrize('door', ['loop', 'Learner'])
@pytest.mark.parametrize('name', nets)
@pytest.mark.parametrize('every,accumulate', [(1, 1), (3, 1), (1, 2), (2, 2)])
def test_the_inspector_gives_all_statistics(name, every, accumulate, door):
    data = batches(nets[name][1])
    ref = Reference(make(name), data, every, accumulate)
    lenses = [Lens(tap, inplace=False, **all_statistics(tap)) for tap in ('input', 'output', 'grad', 'update')]
    if door == 'loop': by_hand(make(name), data, inspector := Inspector(lenses, every=every, visualizer=None), accumulate)
    else:
        cb = InspectorCB(lenses, every=every, visualizer=None)
        cbs = [TrainCB(), cb] + [AccumulateCB(accumulate)]*(accumulate > 1)
        Learner(make(name), DataLoaders(data, data), F.cross_entropy, lr=.1, cbs=cbs).fit(1, valid=False)
        inspector = cb.inspector
    for tap,nm in ref.rows:
        if name == 'tied' and nm == '2.weight': continue   # the same parameter
        flat = () if tap in ('input', 'output') else ('sample_norm', 'sample_rms')   # a parameter has no samples
        pairs = () if tap in ('grad', 'update') else ('correlation', 'ratio', 'start_norm')
        compare(ref, tap, nm, inspector.history.series, skip=(*flat, *pairs))


@pytest.mark.parametrize('name', ['MLP', 'CNN', 'Conv1d'])
def test_the_lab_counts_the_same_dead_units(name):
    net, data = make(name), batches(nets[name][1])
    acts = ActivationStats(on_train=False, on_valid=True)
    Learner(net, DataLoaders(data, data), F.cross_entropy, cbs=[TrainCB(), acts]).fit(1, train=False)
    table = measure_number_dead_neurons(net, data, verbose=False).set_index('layer')
    for layer,row in table.iterrows():
        always_dead = acts.rows(layer, 'dead_epoch', 'valid').values[0]
        assert np.flatnonzero(always_dead).tolist() == row.indices and len(row.indices) >= 2


# --- parts add up, exactly ---

def test_four_parts_of_a_batch_are_the_batch():
    data = batches((6,), (32,)*3)
    parts = [(x[i:i+8], y[i:i+8]) for x,y in data for i in range(0, 32, 8)]
    found = []
    for dl,more in ((data, []), (parts, [AccumulateCB(4)])):
        acts = ActivationStats(stats=('mean', 'std', 'hist', 'death_rate', 'activation_rate', 'min', 'max', 'sample_norm'))
        Learner(make('MLP'), DataLoaders(dl, dl), F.cross_entropy, lr=.1, cbs=[TrainCB(), acts, *more]).fit(1, valid=False)
        found.append(acts)
    whole, accumulated = found
    for nm in whole.panels():
        for stat in whole.stats:
            one, two = (o.rows(nm, stat) for o in found)
            assert (one.samples == two.samples).all() and one.samples[0] == 32
            if stat in by_counts: assert np.array_equal(one.values, two.values), (nm, stat)
            else: assert np.allclose(one.values, two.values, rtol=1e-5), (nm, stat)


# --- no step reads a value ---

def test_a_watched_fit_on_meta(monkeypatch):
    "Tensors with shapes and no data: any read of a value raises. Only what the flush brings is made up."
    made_up = lambda o: torch.ones(o.shape, dtype=o.dtype)
    monkeypatch.setattr(rows, 'to_host', lambda tensors: [made_up(o).numpy() for o in tensors])
    monkeypatch.setattr(history, 'to_host', rows.to_host)
    net = make('CNN').to('meta')
    data = [(x.to('meta'), y.to('meta')) for x,y in batches((1, 8, 8))]
    learn = Learner(net, DataLoaders(data, data), F.cross_entropy, lr=.1, cbs=[TrainCB(), DeviceCB('meta')])
    watcher = learn.watch(every=1, ranges=True, tracer=False)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learn.fit(2, valid=False)
    assert len(watcher.activations.rows('0', 'mean')) == 12 == len(watcher.updates.rows('0.weight', 'update_ratio'))


# --- a statistic that a user adds ---

def test_an_added_statistic_is_right_through_all_doors():
    "It may need any part of the sums, whatever else is recorded; it is in the picture, too."
    data = batches((6,))
    statistic('above_one', taps=('output',))(lambda o: (o.hist[:, 4:40].sum(1) + o.hist[:, 41])/o.n)   # 40 bins to 10
    try:
        found = {}
        for stats in (('mean',), ('above_one',), ('mean', 'std', 'hist', 'death_rate')):
            acts = ActivationStats(stats=stats)
            Learner(make('MLP'), DataLoaders(data, data), F.cross_entropy, lr=.1, cbs=[TrainCB(), acts]).fit(1, valid=False)
            found[stats] = acts.rows('1', 'above_one').values
        inspector = Inspector([Lens('output', above='above_one', inplace=False)], visualizer=None)
        by_hand(make('MLP'), data, inspector, 1)
        found['lens'] = inspector.history.series('1', 'above').values
        titles = [ax.get_title() for ax in acts.plot_stats().axes]
    finally: del statistics['above_one']
    ref = Reference(make('MLP'), data)
    wanted = Sums.of(torch.stack(ref.rows['output', '1']), output_bins).hist
    wanted = (wanted[:, 4:40].sum(1) + wanted[:, 41])/wanted.sum(1)
    assert wanted.max() > 0 and all(np.allclose(o, wanted) for o in found.values()), found
    assert 'Above one' in titles
