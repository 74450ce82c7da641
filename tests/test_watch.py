"learn.watch, its bill, and where the first NaN or Inf came from."
import copy, pickle, warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim

from shared import CountReads, ReadsPerStep

from miniai.accel import AccumulateCB, GradClipCB
from miniai.activations import ActivationStats
from miniai.callback import Callback, CancelFitException
from miniai.checkpoint import CheckpointCB
from miniai.datasets import DataLoaders
from miniai.hooks import count_hooks
from miniai.history import History
from miniai.kernels import add_to_row
from miniai.learner import Learner, TrainCB
from miniai.rows import Rows
from miniai.watch import NanTracer, stages


class Backward(torch.autograd.Function):
    "The identity, whose gradient is multiplied."
    @staticmethod
    def forward(ctx, xb, value): ctx.value = value; return xb.clone()
    @staticmethod
    def backward(ctx, grad): return grad*ctx.value, None


class Faulty(nn.Module):
    "The identity; in training call `at` it spoils one number of its output, or in the backward pass the gradient."
    def __init__(self, at=None, value=torch.nan, backward=False, valid=False):
        super().__init__()
        self.at, self.value, self.backward, self.valid, self.calls = at, value, backward, valid, 0
    def forward(self, xb):
        counts = self.training != self.valid
        now, self.calls = counts and self.calls == self.at, self.calls + counts
        if not now: return xb.clone()
        if self.backward: return Backward.apply(xb, self.value)
        res = xb.clone()
        res[0, 0] = self.value
        return res


def net(*args, **kw):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), Faulty(*args, **kw), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))

def batches(n, bs=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(bs, 6, generator=g), torch.randint(0, 3, (bs,), generator=g)) for _ in range(n)]

def learner(model=None, *cbs, n=6, loss_func=F.cross_entropy, **kw):
    return Learner(model or net(), DataLoaders(batches(n), batches(2, seed=1)), loss_func, lr=.1, cbs=[TrainCB(), *cbs], **kw)

def traced(learn, epochs=2, **kw):
    "What was found in a fit that is watched."
    watcher = learn.watch(**{'every': 1, **kw})
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.fit(epochs)
    return watcher.tracer.found

class Before(Callback):
    "Does `f` before the batch of step `at`."
    def __init__(self, at, f): self.at, self.f = at, f
    def before_batch(self, learn):
        if learn.training and learn.n_steps == self.at:
            with torch.no_grad(): self.f(learn)


# --- planted faults ---

@pytest.mark.parametrize('value,kind', [(torch.nan, 'NaN'), (torch.inf, 'Inf'), (-torch.inf, 'Inf')])
@pytest.mark.parametrize('at', [0, 3, 6, 9])
def test_forward(at, value, kind):
    found, = traced(learner(net(at, value)))
    assert (found.step, found.epoch, found.phase, found.stage, found.source, found.kind) == (at, at//6, 'train', 'forward', '2', kind)
    assert found.spread and found.located
    assert f'1 {kind} of 96' in found.text and '2 (Faulty)' in found.text and '1 (ReLU)' in found.text
    assert found.text.split('Before it: ')[1].startswith('0 (Linear)' if at else '')

@pytest.mark.parametrize('value,kind', [(torch.nan, 'NaN'), (torch.inf, 'Inf')])
@pytest.mark.parametrize('at', [0, 4, 5, 8])
def test_backward_only(at, value, kind):
    found, = traced(learner(net(at, value, backward=True)))
    assert (found.step, found.stage, found.spread) == (at, 'backward', True)
    assert found.source in ('0.weight', '0.bias') and '3.' in found.text and 'The forward pass was finite' in found.text

@pytest.mark.parametrize('at', [0, 4, 11])
def test_loss_only(at):
    class Loss:
        calls = 0
        def __call__(self, preds, targets):
            self.calls += torch.is_grad_enabled()
            return F.cross_entropy(preds, targets)*(torch.nan if self.calls == at+1 else 1)
    found, = traced(learner(loss_func=Loss()))
    assert (found.step, found.stage, found.source, found.located) == (at, 'loss', 'loss', True)
    assert 'all 6 layers' in found.text and '5 (Linear)' in found.text

@pytest.mark.parametrize('at', [0, 4, 6])
@pytest.mark.parametrize('layer', [0, 3, 5])
def test_weights(at, layer):
    def spoil(learn): learn.model[layer].weight[0, 0] = torch.nan
    found, = traced(learner(net(), Before(at, spoil)))
    assert (found.step, found.stage, found.source) == (at, 'weights', f'{layer}.weight')
    if at: assert 'something else has changed it' in found.text

def test_an_optimizer_that_divides_by_zero():
    class Bad(optim.SGD):
        calls = 0
        def step(self, closure=None):
            super().step(closure)
            self.calls += 1
            if self.calls == 3:
                with torch.no_grad(): self.param_groups[0]['params'][2].div_(0.)
    found, = traced(learner(opt_func=Bad))
    assert (found.step, found.stage, found.source) == (2, 'update', '3.weight') and 'though its gradient is finite' in found.text

def test_overflow_by_itself():
    "Nothing is planted: a learning rate of a million."
    learn = Learner(net(), DataLoaders(batches(30), batches(1)), F.mse_loss, lr=1e6, cbs=[TrainCB()])
    learn.dls = DataLoaders([(x, x[:, :3]*10) for x, _ in batches(30)], [])
    watcher = learn.watch(every=1)
    with pytest.warns(UserWarning, match='NanTracer: step'): learn.fit(1, valid=False)
    found, = watcher.tracer.found
    losses = learn.history.series('batch', 'loss').values
    first = int(np.flatnonzero(~np.isfinite(losses))[0])
    assert found.step in (first-1, first) and found.spread and found.stage in ('forward', 'loss', 'backward', 'update')

def test_validation_only():
    found, = traced(learner(net(3, valid=True)), on_valid=True)      # the second epoch's second validation batch
    assert (found.phase, found.stage, found.source, found.step, found.epoch) == ('valid', 'forward', '2', 12, 1)
    found, = traced(learner(net(3, valid=True)))                     # validation is not looked at
    assert (found.phase, found.stage, found.located) == ('valid', 'loss', False)

def test_first_by_calls_not_by_order_of_definition():
    class Turned(nn.Module):
        def __init__(self): super().__init__(); self.head, self.last, self.fault = nn.Linear(8, 3), nn.ReLU(), Faulty(2); self.first = nn.Linear(6, 8)
        def forward(self, xb): return self.head(self.last(self.fault(self.first(xb))))
    found, = traced(learner(Turned()))
    assert (found.step, found.source) == (2, 'fault') and 'Before it: first (Linear)' in found.text

def test_accumulated_batches():
    found, = traced(learner(net(5), AccumulateCB(2), n=8))           # the sixth batch is in the third step
    assert (found.step, found.stage, found.source) == (2, 'forward', '2')

def test_clipping_makes_one_infinite_gradient_all_nan():
    found, = traced(learner(net(4, torch.inf, backward=True), GradClipCB(1.)))
    assert (found.step, found.stage) == (4, 'backward') and found.source.startswith('0.')


# --- what spreads, and what is known ---

class Mask(nn.Module):
    "Minus infinity by design, which softmax makes zero."
    def forward(self, xb): return xb.masked_fill(torch.arange(8) > 3, -torch.inf)

class Masked(nn.Module):
    def __init__(self, at=None): super().__init__(); self.lin, self.mask, self.fault, self.head = nn.Linear(6, 8), Mask(), Faulty(at), nn.Linear(8, 3)
    def forward(self, xb): return self.head(self.fault(self.mask(self.lin(xb)).softmax(1)))

def test_infinite_by_design_is_kept_apart():
    learn = learner(Masked())
    watcher = learn.watch(every=1)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learn.fit(2)
    found, = watcher.tracer.found
    assert (found.source, found.spread, found.kind) == ('mask', False, 'Inf') and 'So far the loss is finite' in found.text
    contained, found = traced(learner(Masked(at=9)))                 # and does not hide what comes later
    assert (contained.spread, found.spread) == (False, True) and (found.step, found.source) == (9, 'fault')

def test_gradients_that_a_scaler_throws_away():
    class Skips(TrainCB):
        def step(self, learn):
            if all(p.grad.isfinite().all() for p in learn.model.parameters()): learn.opt.step()
    learn = Learner(net(3, torch.inf, backward=True), DataLoaders(batches(6), batches(1)), F.cross_entropy, lr=.1, cbs=[Skips()])
    found, = traced(learn)
    assert (found.step, found.stage, found.spread) == (3, 'backward', False)

def test_a_step_that_was_not_looked_at():
    learn = learner(net(4))
    found, = traced(learn, every=3)
    assert (found.step, found.stage, found.located) == (4, 'loss', False)
    assert 'last in step 3' in found.text and 'ranges=True' in found.text
    found, = traced(learner(net(4)), every=3, ranges=True)
    assert (found.step, found.stage, found.source, found.located) == (4, 'forward', '2', True) and 'in [0, ' in found.text

def test_missing_gradients_are_no_nan():
    class Freeze(Callback):
        def before_batch(self, learn):
            if learn.training: learn.model[0].requires_grad_(learn.n_steps not in (2, 3))
    assert traced(learner(net(), Freeze())) == []
    found, = traced(learner(net(4, backward=True), Freeze()))
    assert (found.step, found.stage) == (4, 'backward')

@pytest.mark.parametrize('parts', [dict(gradients=False), dict(updates=False), dict(gradients=False, updates=False), dict(stats=('mean',)),
                                   dict(stats=('std',)), dict(mod_filter=nn.Linear)])
def test_with_fewer_parts(parts):
    found, = traced(learner(net(4)), **parts)
    expected = '3' if 'mod_filter' in parts else '2'
    assert (found.step, found.stage, found.source) == (4, 'forward', expected)

def test_the_tracer_alone():
    tracer = NanTracer()
    learn = learner(net(4), tracer)
    with pytest.warns(UserWarning, match='NanTracer: step 4'): learn.fit(1)
    assert tracer.found[0].stage == 'loss' and not tracer.found[0].located

def test_nothing_found():
    learn = learner()
    watcher = learn.watch(every=1)
    learn.fit(2)
    assert watcher.tracer.found == [] and watcher.report() == 'Nothing but finite numbers so far.'
    assert len(watcher.tracer.history) == 0

def test_the_row_of_a_finding_and_two_fits():
    learn = learner(net(4))
    found, = traced(learn, epochs=1)
    learn.model = net(8)
    _, found = traced(learn, epochs=2)
    assert found.run == 1 and found.step == 14 and learn.watch().tracer.report().count('\n') == 1
    rows = learn.watch().tracer.history.series('2', 'nonfinite')
    assert rows.steps.tolist() == [4, 14] and (rows.values == stages.index('forward')).all()

def test_told_before_the_epoch_ends():
    class Stop(Callback):
        order = 1000
        def after_batch(self, learn):
            if tracer.found: self.at = learn.n_steps; raise CancelFitException()
    tracer, stop = NanTracer(every=2), Stop()
    learn = learner(net(3), ActivationStats(), tracer, stop)
    with pytest.warns(UserWarning, match='NanTracer: step 3'): learn.fit(1)
    assert stop.at == 3 and tracer.found[0].source == '2'


# --- one call ---

def test_watch_twice_is_watch_once():
    learn = learner()
    watcher = learn.watch(every=2)
    assert learn.watch() is watcher is learn.watch(every=2) and len(learn.cbs) == 7
    learn.fit(1)
    for part, name in ((watcher.activations, '0'), (watcher.gradients, '0.weight'), (watcher.updates, '0.weight')):
        assert part.rows(name, part.stats[0]).steps.tolist() == [0, 2, 4]
    assert set(watcher.histories) == {'activations', 'gradients', 'updates', 'loss', 'tracer'}
    learn.unwatch()
    assert [type(o).__name__ for o in learn.cbs] == ['TrainCB'] and len(watcher.gradients.rows('0.weight', 'grad_norm')) == 3
    assert learn.watch() is not watcher

@pytest.mark.parametrize('event', ['before_batch', 'after_predict', 'after_backward', 'after_step', 'after_batch', 'after_epoch'])
def test_unwatch_in_a_fit_leaves_nothing(event):
    class Stop(Callback):
        order = 500
        def __init__(self): setattr(self, event, lambda: self.learn.unwatch())
    learn = learner(net(), Stop())
    watcher = learn.watch(every=1, ranks=True, ranges=True)
    learn.fit(2)
    assert count_hooks(learn.model) == 0 and len(watcher.activations.rows('0', 'mean')) <= 6

@pytest.mark.parametrize('tap', ['output', 'loss'])
def test_a_nan_in_a_thinned_table_is_seen(tap):
    history, seen = History(), {}
    table = history.add_table(Rows('output'))
    def add(step, value):
        if tap == 'loss': return history.record('batch', 'loss', torch.tensor(value), step=step)
        table.open('train', 0, step, 0)
        add_to_row(table.row('a', 1), torch.tensor([value]))
        table.close()
    history.start_run()
    for i in range(100): add(i, 1.)
    assert not history.not_finite(('loss',), seen)
    next(iter((table if tap == 'output' else history.values).chunks.values())).thin()
    for i in (100, 101, 102, 103): add(i, float('nan') if i == 102 else 1.)
    assert history.not_finite(('loss',), seen) and not history.not_finite(('loss',), seen)

def test_many_short_epochs_keep_few_pieces():
    learn = learner(n=1)
    watcher = learn.watch(every=1)
    learn.fit(130, valid=False)
    columns = *learn.history.values.chunks.values(), *watcher.activations.table.chunks.values()
    assert max(len(o.chunks) for o in columns) < 12 and len(learn.history.series('batch', 'loss', 'train')) == 130

def test_what_is_there_is_used():
    mine = ActivationStats(nn.ReLU, every=3)
    learn = learner(net(), mine)
    watcher = learn.watch(every=1)
    learn.fit(1)
    assert watcher.activations is mine and [type(o) for o in learn.cbs].count(ActivationStats) == 1
    assert watcher.gradients.rows('0.weight', 'grad_norm').steps.tolist() == [0, 3]    # all look at the same steps

def test_one_budget_for_all():
    learn = learner(n=40)
    watcher = learn.watch()
    learn.fit(5)
    cost = watcher.cost()
    assert watcher.activations.sampler.budget == .05 and 75 <= cost.steps_sampled < cost.steps_seen == 200
    assert watcher.gradients.sampler.sampled['train'] == watcher.updates.sampler.sampled['train'] == cost.steps_sampled
    assert watcher.activations.sampler is watcher.gradients.sampler is watcher.updates.sampler   # one bill
    assert cost.seconds == watcher.activations.sampler.seconds and cost.layers == 6
    assert 'gradients: ' in str(watcher) and repr(watcher) == f'Watcher: {cost}'
    assert str(watcher).count('% of the time') == 1   # of all, whose time is not counted apart

def test_with_everything():
    learn = learner()
    watcher = learn.watch(every=2, ranks=True, ranges=True)
    learn.fit(1)
    assert set(watcher.histories) == {'activations', 'gradients', 'updates', 'loss', 'ranks', 'ranges', 'tracer'}
    assert len(watcher.ranks.rows('0')) == 1 and len(watcher.ranges.history.series('0', 'range')) == 6
    figures = [getattr(watcher, nm)() for nm in ('color_dim', 'dead_chart', 'plot_stats', 'plot_flow', 'plot_heat', 'plot_norm',
                                                 'plot_ratio', 'plot_ranks')]
    assert all(o.axes for o in figures) and 'plot_flow' in dir(watcher)
    import matplotlib.pyplot as plt
    plt.close('all')

def test_views_of_parts_that_are_not_there():
    learn = learner()
    watcher = learn.watch(gradients=False)
    with pytest.raises(AttributeError, match='belongs to gradients, which is not watched'): watcher.plot_flow()
    with pytest.raises(AttributeError, match="no attribute 'plot_nothing'"): watcher.plot_nothing()
    assert watcher.gradients is None

def test_nothing_is_read_in_a_step():
    counter = CountReads()
    steps = ReadsPerStep(counter)
    learn = learner(net(7), steps, n=20)
    learn.watch(every=1, ranges=True)
    with counter, pytest.warns(UserWarning): learn.fit(1, valid=False)
    assert len(steps.per_step) == 20 and sum(steps.per_step) == 0

def test_lr_find_leaves_no_row():
    learn = learner()
    watcher = learn.watch(every=1, ranks=True, ranges=True)
    learn.lr_find(plot=False, max_epochs=3)
    assert all(len(o) == 0 for o in watcher.histories.values())
    learn.fit(1)
    assert watcher.activations.rows('0', 'mean').steps.tolist() == list(range(6)) and count_hooks(learn.model) == 0

@pytest.mark.parametrize('exc', [ValueError, KeyboardInterrupt, CancelFitException])
def test_nothing_is_left_after_any_exit(exc):
    class Raises(Callback):
        def after_loss(self, learn):
            if learn.n_steps == 2: raise exc()
    learn = learner(net(), Raises())
    watcher = learn.watch(every=1, ranks=True, ranges=True)
    try: learn.fit(1)
    except (ValueError, KeyboardInterrupt): pass
    assert count_hooks(learn.model) == 0 and len(watcher.gradients.rows('0.weight', 'grad_norm')) == 2

def test_copies_while_watching():
    class Copies(Callback):
        def after_step(self, learn): self.twin, self.bytes = copy.deepcopy(learn.model), pickle.dumps(learn.model)
    copies = Copies()
    learn = learner(net(), copies)
    watcher = learn.watch(every=1, ranges=True)
    learn.fit(1)
    rows = len(watcher.ranges.history)
    copies.twin(torch.randn(3, 6)), pickle.loads(copies.bytes)(torch.randn(3, 6))
    assert len(watcher.ranges.history) == rows
    for o in (watcher.gradients, watcher.updates, watcher.tracer): assert len(pickle.loads(pickle.dumps(o)).history) == len(o.history)

def test_resume(tmp_path):
    class Stop(Callback):
        order = 200_000
        def after_batch(self, learn):
            if learn.training and learn.n_steps == 7: raise KeyboardInterrupt
    def make(*cbs):
        learn = learner(net(), *cbs)
        return learn, learn.watch(every=1)
    learn, watcher = make(Stop(), CheckpointCB(tmp_path, every=4))
    with pytest.raises(KeyboardInterrupt): learn.fit(2)
    learn, watcher = make(CheckpointCB(tmp_path, every=4))
    learn.fit(2, resume=tmp_path)
    for part, name in ((watcher.activations, '0'), (watcher.gradients, '0.weight'), (watcher.updates, '0.weight')):
        assert part.rows(name, part.stats[0]).steps.tolist() == list(range(12))

def test_a_finding_is_saved(tmp_path):
    tracer = NanTracer()
    learn = learner(net(2), ActivationStats(), tracer)
    with pytest.warns(UserWarning): learn.fit(1)
    again = NanTracer()
    again.load_state_dict(tracer.state_dict())
    assert again.report() == tracer.report() and again.found == tracer.found

@pytest.mark.parametrize('wrong', [0, -1, 1.5])
def test_wrong_arguments(wrong):
    with pytest.raises(ValueError, match='NanTracer: every'): NanTracer(every=wrong)
    with pytest.raises(ValueError, match='every'): learner().watch(every=wrong if wrong else -2)


def test_before_the_first_fit():
    watcher = learner().watch()
    assert watcher.cost().steps_seen == 0 and 'nothing watched yet' in repr(watcher)
    assert watcher.gradients.cost().steps_seen == watcher.updates.cost().steps_seen == 0


def test_a_kept_watcher_does_not_hold_the_learner():
    learn = learner()
    watcher = learn.watch(every=1, ranks=True, ranges=True)
    learn.fit(1)
    learn.loss_func = lambda preds, targets: None   # cannot be pickled
    again = pickle.loads(pickle.dumps(watcher))
    assert all(getattr(o, 'learn', None) is None for o in (again, *again.parts.values()))
    assert again.gradients.rows('0.weight', 'grad_norm').values.tolist() == watcher.gradients.rows('0.weight', 'grad_norm').values.tolist()
