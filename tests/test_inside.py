"Looking inside: hooks, statistics, history and ActivationStats together, on real fits."
import collections.abc, copy, dataclasses, gc, io, pickle, warnings, weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shared import CountReads, ReadsPerStep

from miniai.activations import ActivationStats, HooksCallback, append_stats, get_hist, get_min
from miniai.callback import Callback, CancelBatchException, CancelEpochException, CancelFitException, events, run_cbs
from miniai.conv import conv
from miniai.datasets import DataLoaders
from miniai.collect import Sampler
from miniai.hooks import Hooks, count_hooks, select_modules
from miniai.learner import DeviceCB, Learner, MetricsCB, ProgressCB, TrainCB, TrainLearner
from miniai.stats import abs_hist, mean_std
from miniai.training import accuracy


def five_convs():
    return nn.Sequential(conv(1, 8, ks=5), conv(8, 16), conv(16, 32), conv(32, 64), conv(64, 10, act=False), nn.Flatten())

def batches(n, bs=16, device='cpu'):
    g = torch.Generator().manual_seed(0)
    return [(torch.rand(bs, 1, 28, 28, generator=g).to(device), torch.randint(0, 10, (bs,), generator=g).to(device))
            for _ in range(n)]

def watched_learner(model, dls, *cbs, device='cpu', **kw):
    astats = ActivationStats(**kw)
    return Learner(model, dls, F.cross_entropy, lr=.05, cbs=[TrainCB(), DeviceCB(device), astats, *cbs]), astats


# --- nothing is read from the device in a step ---

@pytest.mark.parametrize('every', [1, 7])
def test_200_steps_read_nothing(every):
    from torcheval.metrics import MulticlassAccuracy
    counter = CountReads()
    steps = ReadsPerStep(counter)
    learn, astats = watched_learner(five_convs(), DataLoaders(batches(200), batches(2)), every=every)
    learn.cbs += [MetricsCB(MulticlassAccuracy(), acc=accuracy), ProgressCB(plot=True), steps]
    with counter: learn.fit(1, valid=False)
    assert len(steps.per_step) == 200 and sum(steps.per_step) == 0
    assert len(astats.rows('0.0', 'mean')) == len(range(0, 200, every))

def test_the_counter_counts():
    class Reader(Callback):
        def after_loss(self, learn): learn.loss.item()
    counter = CountReads()
    steps = ReadsPerStep(counter)
    learn = Learner(five_convs(), DataLoaders(batches(3), batches(1)), F.cross_entropy, cbs=[TrainCB(), Reader(), steps])
    with counter: learn.fit(1, valid=False)
    assert all(n >= 1 for n in steps.per_step) and len(steps.per_step) == 3

@pytest.mark.gpu
def test_no_sync_on_a_gpu():
    class Strict(Callback):
        order = -1000
        def before_batch(self, learn): torch.cuda.set_sync_debug_mode('error')
        def cleanup_batch(self, learn): torch.cuda.set_sync_debug_mode('default')
    dls = DataLoaders(batches(200, device='cuda'), batches(2, device='cuda'))
    learn, astats = watched_learner(five_convs(), dls, MetricsCB(acc=accuracy), ProgressCB(plot=True), Strict(), device='cuda')
    learn.fit(1, valid=False)
    assert len(astats.rows('0.0', 'hist')) == 200

@pytest.mark.gpu
def test_histogram_on_a_gpu_in_deterministic_mode():
    a = torch.randn(10_000, device='cuda')*5
    torch.use_deterministic_algorithms(True)
    try: counts = abs_hist(a)
    finally: torch.use_deterministic_algorithms(False)
    assert torch.equal(counts.cpu(), abs_hist(a.cpu()))


# --- nothing is left on the model ---

class RaiseAt(Callback):
    order = 500
    def __init__(self, event, e): self.e = e; setattr(self, event, self._raise)
    def _raise(self): raise self.e

exits = [CancelBatchException, CancelEpochException, CancelFitException, ValueError, KeyboardInterrupt]

@pytest.mark.parametrize('event', [e for e in events if e not in ('predict', 'get_loss', 'backward', 'step', 'zero_grad')])
@pytest.mark.parametrize('exc', exits, ids=lambda e: e.__name__)
def test_no_hook_is_left_after_any_exit(event, exc):
    model = five_convs()
    learn, astats = watched_learner(model, DataLoaders(batches(2), batches(1)), RaiseAt(event, exc()), on_valid=True)
    try: learn.fit(1)
    except (Exception, KeyboardInterrupt): pass
    assert count_hooks(model) == 0
    copy.deepcopy(model), pickle.dumps(model), torch.save(model, io.BytesIO())
    learn.cbs = [o for o in learn.cbs if not isinstance(o, RaiseAt)]
    learn.fit(1)
    assert len(astats.rows('0.0', 'mean')) >= 2 and count_hooks(model) == 0

def test_copies_made_during_a_fit_carry_no_live_hook():
    class Copies(Callback):
        def after_step(self, learn):
            self.twin, self.bytes = copy.deepcopy(learn.model), pickle.dumps(learn.model)
    model, copies = five_convs(), Copies()
    learn, astats = watched_learner(model, DataLoaders(batches(3), batches(1)), copies)
    learn.fit(1)
    rows = len(astats.history)
    copies.twin(torch.rand(2, 1, 28, 28)), pickle.loads(copies.bytes)(torch.rand(2, 1, 28, 28))
    assert len(astats.history) == rows
    assert len(copies.bytes) < len(pickle.dumps(model)) + 10_000      # nothing of the learner came along

def test_a_watched_model_can_be_freed():
    model = five_convs()
    learn, astats = watched_learner(model, DataLoaders(batches(2), batches(1)))
    learn.fit(1)
    ref = weakref.ref(model)
    astats.hooks = []
    del learn.model, model, learn, astats.learn
    gc.collect()
    assert ref() is None and astats.panels()


@pytest.mark.parametrize('event', ['before_batch', 'after_predict', 'after_step', 'after_epoch'])
def test_a_callback_that_is_taken_out_in_a_fit_leaves_no_hook(event):
    class TakeOut(Callback):
        order = 500
        def __init__(self): setattr(self, event, self._take)
        def _take(self):
            if any(cb is astats for cb in self.learn.cbs): self.learn.cbs.remove(astats)
    learn, astats = watched_learner(five_convs(), DataLoaders(batches(3), batches(1)), TakeOut())
    learn.fit(2)
    assert count_hooks(learn.model) == 0 and len(astats.rows('0.0', 'mean')) <= 3

def test_two_of_a_kind_are_said():
    for other, said in ((ActivationStats(), True), (ActivationStats(every=2), False), (ActivationStats(nn.Conv2d), False)):
        learn, _ = watched_learner(five_convs(), DataLoaders(batches(1), batches(1)), other)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter('always')
            learn.fit(2)
        assert sum('another ActivationStats like this one' in str(w.message) for w in told) == said


# --- whatever a module does, the user's forward goes on ---

@dataclasses.dataclass
class Out:
    logits: torch.Tensor
    extra: object = None

class Odd(nn.Module):
    "Returns something unusual."
    def __init__(self, f): super().__init__(); self.f = f
    def forward(self, x=None, *, k=None): return self.f(x if k is None else k)

odd = {'tuple': (lambda x: (x, [x, x]), 3), 'dict': (lambda x: {'a': x, 'b': None}, 1), 'dataclass': (lambda x: Out(x), 1),
       'int': (lambda x: x.long(), 0), 'bool': (lambda x: x > 0, 0), '0-d': (lambda x: x.sum(), 1), '1-d': (lambda x: x[:, 0], 1),
       'empty': (lambda x: x[:0], 1), 'nothing': (lambda x: None, 0), 'text': (lambda x: 'text', 0),
       'complex': (lambda x: x+1j, 1), 'half': (lambda x: x.half(), 1), 'sparse': (lambda x: x.to_sparse(), 1),
       'namedtuple': (lambda x: collections.namedtuple('P', 'a b')(x, x), 2), 'nan': (lambda x: x*torch.nan, 1)}

@pytest.mark.parametrize('kind', odd)
def test_odd_outputs_never_stop_the_forward(kind):
    f, n = odd[kind]
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.odd, self.head = Odd(f), nn.Linear(784, 10)
        def forward(self, x): self.odd(k=x.flatten(1)); return self.head(x.flatten(1))
    learn, astats = watched_learner(Net(), DataLoaders(batches(2), batches(1)))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        learn.fit(2)
    assert len(astats.sources['odd']) == n
    assert len([w for w in told if "'odd'" in str(w.message)]) == (n == 0)
    assert len(astats.rows('head', 'mean')) == 4
    astats.color_dim(), astats.dead_chart(), astats.plot_stats(), astats.dead_units()

def test_in_place_successor_does_not_change_what_was_seen():
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 8), nn.ReLU(inplace=True), nn.Linear(8, 10))
    plain = copy.deepcopy(net)
    data = DataLoaders(batches(1), batches(1))
    learn, astats = watched_learner(net, data)
    learn.fit(1)
    out = plain[1](data.train[0][0].flatten(1))
    np.testing.assert_allclose(astats.rows('1', 'mean').values[0], out.mean().item(), rtol=1e-4)
    np.testing.assert_allclose(astats.rows('2', 'mean').values[0], out.relu().mean().item(), rtol=1e-4)

def test_shared_layer_and_many_calls():
    class Loop(nn.Module):
        def __init__(self): super().__init__(); self.cell, self.head = nn.Linear(784, 784), nn.Linear(784, 10)
        def forward(self, x):
            x = x.flatten(1)
            for _ in range(20): x = self.cell(x).tanh()
            return self.head(x)
    learn, astats = watched_learner(Loop(), DataLoaders(batches(2), batches(1)))
    with pytest.warns(UserWarning, match='more than 8 times'): learn.fit(1)
    assert len(astats.sources['cell']) == 8
    assert astats.rows('cell (call 2)', 'mean').calls.tolist() == [1, 1]

def test_layer_that_never_fires_is_told_once():
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.used, self.around, self.idle = nn.Linear(784, 8), nn.Linear(8, 10), nn.ReLU()
        def forward(self, x): return self.around.forward(F.relu(self.used(x.flatten(1))))
    learn, astats = watched_learner(Net(), DataLoaders(batches(2), batches(1)))
    with pytest.warns(UserWarning) as told: learn.fit(3)
    told = [str(w.message) for w in told]
    assert [sum(f"'{nm}'" in t and 'never called' in t for t in told) for nm in ('used', 'around', 'idle')] == [0, 1, 1]
    axes = [ax for ax in astats.color_dim().axes if ax.get_visible()]
    assert len(axes) == 3 and axes[2].texts[0].get_text() == 'nothing recorded yet'


# --- the numbers ---

def test_stats_do_not_depend_on_the_door():
    "Hook by hand, HooksCallback and ActivationStats see the same numbers."
    data = DataLoaders(batches(4), batches(1))
    torch.manual_seed(1)
    model = five_convs()
    state = copy.deepcopy(model.state_dict())
    learn, astats = watched_learner(model, data, mod_filter=nn.Conv2d)
    learn.fit(1)
    model.load_state_dict(state)
    callback = HooksCallback(append_stats, mod_filter=lambda m: isinstance(m, nn.Conv2d))
    TrainLearner(model, data, F.cross_entropy, lr=.05, cbs=callback).fit(1)
    model.load_state_dict(state)
    opt = torch.optim.SGD(model.parameters(), .05)
    with Hooks([m for _,m in select_modules(model, nn.Conv2d)], append_stats) as hooks:
        for xb,yb in data.train:
            F.cross_entropy(model(xb), yb).backward()
            opt.step(); opt.zero_grad()
    for a,b,c in zip(astats, callback, hooks):
        for i in range(3):
            assert torch.equal(torch.stack(a.stats[i]), torch.stack(b.stats[i]))
            assert torch.equal(torch.stack(a.stats[i]), torch.stack(c.stats[i]))
        assert torch.equal(get_hist(a), get_hist(c)) and torch.equal(get_min(a), get_min(c))

def test_large_mean_does_not_cancel():
    a = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0)) + 1e4
    mean, std = mean_std(a)
    assert abs(std/a.double().std()-1) < 1e-4 and abs(mean/a.double().mean()-1) < 1e-6

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_counts_every_entry(dtype): assert abs_hist(torch.ones(100_001, dtype=dtype))[4] == 100_001

def test_histogram_in_deterministic_mode():
    torch.use_deterministic_algorithms(True)
    try: assert abs_hist(torch.randn(1000)).sum() == 1000
    finally: torch.use_deterministic_algorithms(False)

@pytest.mark.parametrize('bins,hist_range', [(1, (0, 1)), (40, (0, 10)), (64, (.5, 4)), (255, (0, 3)), (300, (0, 8)), (1000, (1, 5))])
def test_histogram_against_numpy(bins, hist_range):
    a = torch.randn(50_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)*3
    v = a.abs().numpy()
    want = [*np.histogram(v, bins, hist_range)[0], (v < hist_range[0]).sum(), (v > hist_range[1]).sum(), 0, 0]
    assert abs_hist(a, bins, hist_range).tolist() == want

def test_nan_is_not_dead_and_is_shown():
    torch.manual_seed(6)   # all four units live
    class Poison(Callback):
        def after_step(self, learn):
            if learn.n_steps == 1: learn.model[1].bias.data[0] = torch.nan
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 4), nn.ReLU(), nn.Linear(4, 10))
    learn, astats = watched_learner(net, DataLoaders(batches(4), batches(1)), Poison())
    learn.fit(1, valid=False)
    *first, last = astats.rows('2', 'hist').values[:, -1]
    assert first == [0, 0, 16] and last > 16   # a unit that is silent for all samples stays finite
    assert not astats.dead_units().query("layer == '2' and unit == 0").dead.any()
    titles = [ax.get_title() for ax in astats.color_dim().axes]
    assert any('up to 100% NaN, step 2 on' in t for t in titles)

def test_more_than_twelve_layers_are_strips_and_maps():
    "A picture of many layers is no page high, no name lies on another, and an infinite step is red."
    class Poison(Callback):
        def after_step(self, learn):
            if learn.n_steps == 2: learn.model[21].bias.data[0] = torch.inf
    net = nn.Sequential(nn.Flatten(), *[o for i in range(30) for o in (nn.Linear(784 if i == 0 else 10, 10), nn.ReLU())])
    learn, astats = watched_learner(net, DataLoaders(batches(4), batches(1)), Poison())
    learn.fit(1, valid=False)
    fig = astats.color_dim()
    axes = [ax for ax in fig.axes if ax.get_visible()]
    assert len(axes) == 3 and fig.get_figheight() < 8
    assert [o.get_text() for ax in axes for o in ax.get_yticklabels()] == astats.panels()
    assert len({ax.get_title() for ax in axes}) == 1 and axes[0].get_title().startswith('each from 0 to ')
    rows = axes[1].images[0].get_array()[::-1]   # of layers 20 to 39; from the top
    strips = np.split(rows, 20)
    assert not (strips[0] > 1).any() and (strips[2].max(0) > 1).tolist() == [False, False, False, True]
    near, dead = [ax for ax in astats.dead_chart().axes if ax.get_title()]
    assert near.images[0].get_array().shape == dead.images[0].get_array().shape == (61, 4)
    assert astats.rows('2', 'death_rate').values[0] == pytest.approx(dead.images[0].get_array()[::-1][2, 0])
    learn.fit(1, train=False)
    assert [ax.get_title() for ax in astats.dead_chart(phase='train').axes][:2] == ['near-zero', 'dead units']

def test_color_dim_says_above_what():
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 10), nn.ReLU())
    learn, astats = watched_learner(net, DataLoaders(batches(2), batches(1)))
    nn.init.constant_(net[1].bias, 100.)
    nn.init.zeros_(net[1].weight)
    learn.fit(1, valid=False)
    assert astats.color_dim().axes[1].get_title().endswith('\nup to 100% above 10, step 0 on')

def test_short_batch_is_no_darker_in_color_dim():
    X, y = torch.randn(40, 4), torch.zeros(40, dtype=torch.long)
    model = nn.Sequential(nn.Identity(), nn.Linear(4, 2))
    learn, astats = watched_learner(model, DataLoaders.from_arrays(X, y, batch_size=16, valid=(X, y)))
    learn.fit(1, valid=False)
    seen, counts = [np.expm1(ax.collections[0].get_array() if ax.collections else ax.images[0].get_array())
                    for ax in astats.color_dim().axes[:1]][0], astats.rows('0', 'hist').values[:, :-4].T
    assert counts.sum(0).tolist() == [64, 64, 32]
    np.testing.assert_allclose(np.asarray(seen).reshape(counts.shape), counts*[1, 1, 2], atol=1e-4)

def test_validation_without_eval_mode_is_a_series_of_its_own():
    learn, astats = watched_learner(five_convs(), DataLoaders(batches(3), batches(2)), on_valid=True)
    learn.fit(2)
    assert len(astats.rows('0.0', 'mean', 'train')) == 6 and len(astats.rows('0.0', 'mean', 'valid')) == 4
    assert ActivationStats().rows('0.0', 'mean', 'valid').values.tolist() == []

def test_history_grows_by_runs_and_another_model_starts_clean_plots():
    data, astats = DataLoaders(batches(3), batches(1)), ActivationStats()
    learn = Learner(five_convs(), data, F.cross_entropy, cbs=[TrainCB(), astats], lr=.01)
    learn.fit(1), learn.fit(1)
    s = astats.rows('0.0', 'mean')
    assert s.runs.tolist() == [0]*3+[1]*3 and s.steps.tolist() == [0, 1, 2, 3, 4, 5]
    Learner(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), data, F.cross_entropy, cbs=[TrainCB(), astats], lr=.01).fit(1)
    assert astats.panels() == ['0', '1'] and len(astats.rows('1', 'mean')) == 3
    assert len(astats.history.series('0.0', 'mean')) == 6

def test_lr_find_does_not_disturb_what_was_recorded():
    learn, astats = watched_learner(five_convs(), DataLoaders(batches(6), batches(1)))
    learn.fit(1)
    before = astats.rows('0.0', 'mean').values
    learn.lr_find(max_epochs=1)
    assert np.array_equal(astats.rows('0.0', 'mean').values[:6], before) and count_hooks(learn.model) == 0

def test_time_series_units_are_features():
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.lin, self.head = nn.Linear(28, 5), nn.Linear(5*28, 10)
        def forward(self, x): return self.head(F.relu(self.lin(x.squeeze(1))).flatten(1))
    net = Net()
    net.lin.weight.data[2], net.lin.bias.data[2] = 0, 0
    learn, astats = watched_learner(net, DataLoaders(batches(1), batches(1)))
    learn.fit(1)
    dead = astats.dead_units()
    assert dead[['layer', 'unit', 'axis']].values.tolist() == [['lin', 2, 2]]

class Skips(nn.Module):
    "Three layers of one width, the second of which rests in every other step; a unit of each dies for a while."
    def __init__(self):
        super().__init__()
        self.lin, self.acts, self.n = nn.Linear(784, 4), nn.ModuleList(nn.ReLU() for _ in range(3)), 0
    def forward(self, x):
        x = self.lin(x.flatten(1)).abs() + 1
        for i,act in enumerate(self.acts):
            mask = torch.ones(4)
            if self.n % 5 >= 2: mask[i] = 0
            if i != 1 or self.n % 2 == 0: act(x*mask)
        self.n += 1
        return x.repeat(1, 3)[:, :10]

def test_units_are_followed_when_layers_rest():
    learn, astats = watched_learner(Skips(), DataLoaders(batches(20), batches(1)), mod_filter=nn.ReLU)
    learn.fit(1, valid=False)
    table = astats.dead_units().set_index('layer')
    steps = {f'acts.{i}': [n for n in range(20) if i != 1 or n%2 == 0] for i in range(3)}
    for i,(layer,called) in enumerate(steps.items()):
        dead = [n%5 >= 2 for n in called]
        row = table.loc[layer]
        assert (row.unit, row.batches, row.batches_dead) == (i, len(called), sum(dead))
        assert row.returned == sum(a and not b for a,b in zip(dead, dead[1:]))
        assert len(astats.rows(layer, 'mean')) == len(called) and astats.rows(layer, 'hist').steps.tolist() == called
        if dead[-1]: assert row.since == next(called[k] for k in range(len(dead)) if all(dead[k:]))

# --- compiled models ---

def test_compiled_after_attaching_gives_the_same_numbers():
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 8), nn.ReLU(), nn.Linear(8, 10))
    data = batches(4)
    with Hooks(net, append_stats) as plain:
        for xb,_ in data: net(xb)
    with Hooks(net, append_stats) as hooks:
        fast = torch.compile(net, backend='aot_eager')
        for xb,_ in data: fast(xb).sum().backward()
    torch._dynamo.reset()
    for a,b in zip(plain, hooks): torch.testing.assert_close(torch.stack(a.stats[0]), torch.stack(b.stats[0]))

def test_a_compiled_model_is_watched_without_its_compiled_code():
    net = torch.compile(five_convs(), backend='eager')
    learn, astats = watched_learner(net, DataLoaders(batches(2), batches(1)))
    with pytest.warns(UserWarning, match='the model is compiled.* which is all of them'): learn.fit(1)
    assert astats.panels()[0] == '0.0'                # names without the wrapper's prefix
    assert all(len(astats.rows(nm, 'mean')) == 2 for nm in astats.panels())

class Small(nn.Module):
    "A class of which one instance can be compiled before another is watched."
    def __init__(self): super().__init__(); self.first, self.last = nn.Linear(784, 8), nn.Linear(8, 10)
    def forward(self, x): return self.last(self.first(x.flatten(1)).relu())

def test_hooks_silenced_by_a_compiled_sibling_are_said():
    torch.compile(Small(), backend='eager')(batches(1)[0][0])
    net = Small()
    learn, astats = watched_learner(net, DataLoaders(batches(2), batches(1)))
    net.forward = torch.compile(net.forward, backend='eager')   # not a compiled module: nothing to warn of yet
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        learn.fit(1)
    torch._dynamo.reset()
    seen = {name for name in ('first', 'last') if len(astats.rows(name, 'mean'))}
    silent = {name for name in ('first', 'last') if any(f'{name!r} was never called' in str(w.message) for w in told)}
    assert silent == {'first', 'last'} and not seen


# --- bounded ---

def test_memory_of_the_history_does_not_hold_activations():
    learn, astats = watched_learner(five_convs(), DataLoaders(batches(50, bs=64), batches(1)))
    learn.fit(1, valid=False)
    rows = len(astats.panels())*50
    assert astats.history.kept_bytes() < rows*(44*4 + 16*8 + 8 + 5*8)      # counts, sums, units, and what is known of a row
    pending = astats.history.nbytes - astats.history.kept_bytes()
    assert pending <= len(astats.panels())*2**18

def test_a_full_table_thins_itself_and_stays_true():
    learn, astats = watched_learner(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), DataLoaders(batches(10)*200, batches(1)),
                                    max_bytes=200_000)
    with pytest.warns(UserWarning, match='MB are full'): learn.fit(1, valid=False)
    assert astats.history.kept_bytes() <= 200_000
    hists, means = astats.rows('1', 'hist'), astats.rows('1', 'mean')
    assert 10 < len(hists) == len(means) < 2000
    assert len(set(np.diff(hists.steps))) == 1          # equally far apart, over the whole run
    assert hists.steps[0] == 0 and hists.steps[-1] > 1900
    assert 'kept (hist)' in astats.scope('train')      # and the pictures say so
    for view in (astats.color_dim, astats.dead_chart, astats.plot_stats): view()

def test_a_thinned_row_is_the_one_of_its_step():
    seen = {}
    class Keep(Callback):
        def after_loss(self, learn): seen[learn.n_steps] = learn.preds.detach().mean().item()
    learn, astats = watched_learner(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), DataLoaders(batches(10)*150, batches(1)),
                                    Keep(), max_bytes=100_000)
    with pytest.warns(UserWarning, match='MB are full'): learn.fit(1, valid=False)
    for stat in ('mean', 'std', 'hist'): assert astats.rows('1', stat).steps[-1] > 1400
    means = astats.rows('1', 'mean')
    for step,value in zip(means.steps, means.values): assert value == pytest.approx(seen[step], rel=1e-4, abs=1e-6)


# --- cost ---

def test_the_bill():
    learn, astats = watched_learner(five_convs(), DataLoaders(batches(20), batches(3)), every=4)
    learn.fit(2)
    cost = astats.cost()
    assert (cost.layers, cost.steps_seen, cost.steps_sampled) == (10, 40, 10)   # validation is not watched
    assert 0 < cost.seconds < cost.run_seconds and cost.bytes >= astats.history.nbytes
    assert f'{cost.share:.1%} of the time for 10 layers, 10 of 40 steps' in str(cost)

def test_every_watcher_has_a_bill():
    class Look(HooksCallback):
        def __init__(self): super().__init__(lambda hook, mod, inp, outp: None, every=2)
    look = Look()
    watched_learner(five_convs(), DataLoaders(batches(6), batches(1)), look)[0].fit(1)
    assert (look.cost().steps_seen, look.cost().steps_sampled) == (6, 3)

def test_a_budget_is_kept_and_rows_say_their_step():
    learn, astats = watched_learner(five_convs(), DataLoaders(batches(10, bs=64)*20, batches(1)), budget=.05)
    learn.fit(1, valid=False)
    cost, means = astats.cost(), astats.rows('0.0', 'mean')
    assert cost.steps_seen == 200 and len(means) == cost.steps_sampled < 200
    assert cost.steps_sampled >= Sampler.always and (means.steps[:Sampler.always] == range(Sampler.always)).all()
    assert means.steps[0] == 0 and (np.diff(means.steps) > 0).all()
    assert f'{cost.steps_sampled} of 200 steps' in astats.scope('train')

def test_lr_find_is_not_on_the_bill():
    learn, astats = watched_learner(five_convs(), DataLoaders(batches(20), batches(1)))
    learn.lr_find(plot=False)
    assert astats.cost().steps_seen == 0 and astats.cost().run_seconds == 0

def test_only_what_is_asked_for_is_recorded():
    learn, astats = watched_learner(five_convs(), DataLoaders(batches(3), batches(1)), stats=('mean', 'std'))
    learn.fit(1)
    assert {stat for _,source,stat in astats.history.keys()} == {'mean', 'std'}
    assert astats.dead_units().empty

@pytest.mark.parametrize('stats', [('mean',), ('std',), ('hist',), ('death_rate',), ('mean', 'death_rate'), ('mean', 'std')])
def test_every_view_draws_what_there_is(stats):
    learn, astats = watched_learner(five_convs(), DataLoaders(batches(3), batches(1)), stats=stats)
    learn.fit(2)
    for view in (astats.color_dim, astats.dead_chart, astats.plot_stats): view()
    assert '2 fits' not in astats.scope('train')
    learn.fit(1)
    assert '2 fits' in astats.scope('train')

def test_lr_find_before_the_first_fit_of_another_model_with_the_same_callback():
    learn, astats = watched_learner(five_convs(), DataLoaders(batches(4), batches(1)))
    learn.fit(1)
    other = Learner(five_convs(), DataLoaders(batches(4), batches(1)), F.cross_entropy, lr=.05, cbs=learn.cbs)
    other.lr_find(plot=False)
    other.fit(1)
    assert set(astats.rows('0.0', 'mean').runs) == {1}

def test_a_loop_that_knows_no_epochs():
    learn, astats = watched_learner(five_convs(), DataLoaders(batches(2), batches(1)))
    class Bare: model, training = five_convs(), True
    run_cbs([astats], 'before_fit', Bare)
    for xb,_ in batches(3):
        run_cbs([astats], 'before_batch', Bare)
        Bare.model(xb)
        run_cbs([astats], 'cleanup_batch', Bare)
    run_cbs([astats], 'cleanup_fit', Bare)
    assert len(astats.rows('0.0', 'mean')) == len(astats.rows('4', 'mean')) == 3 and astats.cost().run_seconds > 0
    assert count_hooks(Bare.model) == 0

@pytest.mark.parametrize('size', [(1000,), (300, 300)])
def test_deviation_beside_outliers(size):
    torch.manual_seed(0)
    for outlier in (1e3, 1e6, -1e10):
        a = torch.randn(size)*.5
        a.view(-1)[0] = a.view(-1)[7] = outlier
        assert mean_std(a)[1].item() == pytest.approx(a.double().std().item(), rel=1e-5)
    sharp = (torch.randn(64, 3000)*2 + 60*torch.eye(3000)[torch.arange(64)*40]).softmax(-1)
    assert mean_std(sharp)[1].item() == pytest.approx(sharp.double().std().item(), rel=1e-5)

class BadItems(collections.abc.Mapping):
    def __getitem__(self, k): raise RuntimeError('no items')
    def __iter__(self): return iter('a')
    def __len__(self): return 1

class GivesWild(nn.Module):
    def __init__(self): super().__init__(); self.odd, self.lin = OddItems(), nn.Linear(784, 10)
    def forward(self, x): self.odd(x); return self.lin(x.flatten(1))

class OddItems(nn.Module):
    def forward(self, x): return BadItems()

def test_an_output_that_cannot_be_looked_through_is_told():
    learn, astats = watched_learner(GivesWild(), DataLoaders(batches(2), batches(1)))
    with pytest.warns(UserWarning, match="'odd' could not be measured"): learn.fit(1)
    assert len(astats.rows('lin', 'mean')) == 2

def test_layers_that_come_together_by_chance_do_not_fill_the_table():
    class Chance(nn.Module):
        def __init__(self): super().__init__(); self.lin, self.acts = nn.Linear(784, 8), nn.ModuleList(nn.ReLU() for _ in range(12))
        def forward(self, x):
            x = self.lin(x.flatten(1))
            for act in self.acts:
                if torch.rand(()) < .5: act(x)
            return x.repeat(1, 2)[:, :10]
    torch.manual_seed(0)
    learn, astats = watched_learner(Chance(), DataLoaders(batches(100), batches(1)))
    learn.fit(1, valid=False)
    assert len(astats.history.keys()) < 150
    assert sum(len(astats.rows(f'acts.{i}', 'mean')) for i in range(12)) > 500

@pytest.mark.gpu
def test_time_on_a_gpu_is_taken_without_waiting():
    learn, astats = watched_learner(five_convs(), DataLoaders(batches(50, device='cuda'), batches(1)), device='cuda')
    learn.fit(1, valid=False)
    torch.cuda.synchronize()
    assert 0 < astats.cost().seconds < astats.cost().run_seconds


# --- several fits, several learners, trials ---

@pytest.mark.parametrize('exc', [CancelBatchException, KeyError])
def test_a_batch_cut_short_before_it_is_seen(exc):
    class Early(Callback):
        order = -1
        def before_batch(self, learn):
            if learn.iter == 0: raise exc('of the user')
    learn, astats = watched_learner(five_convs(), DataLoaders(batches(4), batches(1)), Early(), every=2)
    if exc is KeyError:
        with pytest.raises(KeyError, match='of the user'): learn.fit(1, valid=False)
    else:
        learn.fit(1, valid=False)
        assert astats.rows('0.0', 'mean').steps.tolist() == [0, 2]     # steps done; the batch cut short made none
    assert count_hooks(learn.model) == 0

def test_one_list_of_callbacks_shows_the_learner_fitted_last():
    data, cbs = DataLoaders(batches(4), batches(1)), [TrainCB(), ActivationStats()]
    for _ in range(3): Learner(five_convs(), data, F.cross_entropy, lr=.01, cbs=cbs).fit(1)
    hook = cbs[1].hooks[0]
    assert len(hook.stats[0]) == 4 and get_hist(hook).shape == (40, 4) and get_min(hook).shape == (4,)
    assert len(cbs[1].history.series('0.0', 'mean')) == 12

def test_lr_find_before_a_fit_leaves_nothing_in_its_statistics():
    seen = []
    for finds in (False, True):
        torch.manual_seed(1)
        learn, astats = watched_learner(five_convs(), DataLoaders(batches(6), batches(1)))
        if finds: learn.lr_find(max_epochs=2, plot=False)
        learn.fit(1)
        seen.append((astats.rows('0.0', 'mean').values, astats.rows('0.0', 'mean').steps, astats.dead_units().values.tolist()))
    assert np.array_equal(seen[0][0], seen[1][0]) and np.array_equal(seen[0][1], seen[1][1]) and str(seen[0][2]) == str(seen[1][2])
    assert not learn.trial

class InStep2(Callback):
    "Calls `f` once, at an event of step 2."
    order = 500
    def __init__(self, event, f): self.f = f; setattr(self, event, self._once)
    def _once(self):
        if self.learn.n_steps == 2 and self.f is not None: (f, self.f) = (self.f, None); f()

@pytest.mark.parametrize('event', ['before_batch', 'after_predict', 'after_backward', 'after_batch'])
@pytest.mark.parametrize('load', [False, True])
def test_state_in_the_middle_of_a_batch(event, load):
    whole, parted = ActivationStats(), ActivationStats()
    def _save():
        state = parted.history.state_dict()
        if load: parted.history.load_state_dict(state)
    for astats,cbs in ((whole, []), (parted, [InStep2(event, _save)])):
        torch.manual_seed(0)
        learn = Learner(five_convs(), DataLoaders(batches(5), batches(1)), F.cross_entropy, cbs=[TrainCB(), astats, *cbs])
        learn.fit(1)
    for nm in whole.panels():
        a, b = whole.rows(nm, 'mean'), parted.rows(nm, 'mean')
        assert a.steps.tolist() == b.steps.tolist() and np.array_equal(a.values, b.values)

class PaddedConvs(nn.Module):
    "Layers whose units are the second of three axes, which only the first one's type says."
    def __init__(self):
        super().__init__()
        self.conv, self.pad, self.act, self.late, self.head = nn.Conv1d(28, 8, 3), nn.ConstantPad1d(1, 0.), nn.ReLU(), nn.GELU(), nn.Linear(8, 10)
    def forward(self, xb):
        return self.head(self.late(F.pad(self.act(self.pad(self.conv(xb[:, 0]))), (1, 1))).mean(2))

@pytest.mark.parametrize('chosen', [None, nn.ReLU, nn.GELU, ['act', 'late']])
@pytest.mark.parametrize('every', [1, 2])
def test_the_axis_is_that_of_a_layer_in_front_that_is_not_chosen(chosen, every):
    model = PaddedConvs()
    kw = {} if chosen is None else dict(mod_filter=chosen)
    learn, astats = watched_learner(model, DataLoaders(batches(3), batches(1)), every=every, **kw)
    learn.fit(2)
    assert all(axis == 1 for nm,axis in astats.axes.items() if nm != 'head') and set(astats.axes) & {'act', 'late'}
    assert count_hooks(model) == 0 and not len(astats.tap.others)

def test_a_fit_inside_a_fit_leaves_no_hook():
    class Inner(Callback):
        def after_epoch(self, learn):
            if learn.training: Learner(learn.model, learn.dls, F.cross_entropy, lr=.01, cbs=[TrainCB(), astats]).fit(1)
    learn, astats = watched_learner(five_convs(), DataLoaders(batches(2), batches(1)))
    learn.cbs.append(Inner())
    learn.fit(1)
    assert count_hooks(learn.model) == 0

def test_training_is_training_whatever_mode_the_model_is_in():
    class Frozen(Callback):
        def before_epoch(self, learn): learn.model.eval()
    model = five_convs()
    before = model[0][0].weight.detach().clone()
    learn, astats = watched_learner(model, DataLoaders(batches(3), batches(1)), Frozen())
    learn.fit(1)
    assert not torch.equal(before, model[0][0].weight) and len(astats.rows('0.0', 'mean')) == 3

def test_a_fitted_callback_can_be_pickled():
    learn, astats = watched_learner(five_convs(), DataLoaders(batches(2), batches(1)))
    learn.fit(1)
    del astats.learn
    again = pickle.loads(pickle.dumps(astats))
    assert len(again.rows('0.0', 'mean')) == 2 and again.panels() == astats.panels()

def test_axis_and_phase_are_checked():
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    learn, astats = watched_learner(net, DataLoaders(batches(1), batches(1)), axis=lambda module, ndim: 3)
    with pytest.warns(UserWarning, match='axis is 3'): learn.fit(1)
    for ask in (astats.color_dim, astats.dead_units, lambda phase: astats.rows('1', 'mean', phase)):
        with pytest.raises(ValueError, match="phase is 'val'"): ask(phase='val')

def test_nested_outputs_have_stats():
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.rnn, self.head = nn.LSTM(28, 6, batch_first=True), nn.Linear(6, 10)
        def forward(self, x): return self.head(self.rnn(x.squeeze(1))[0][:, -1])
    learn, astats = watched_learner(Net(), DataLoaders(batches(2), batches(1)))
    learn.fit(1)
    assert astats.panels() == ['rnn[0]', 'rnn[1][0]', 'rnn[1][1]', 'head'] and len(astats.hooks[0].stats[0]) == 2
