"""What every callback of miniai keeps to; all are found by introspection, so a new one is tested without being listed.

Only a callback that cannot be made without arguments needs a line: in `recipes`, below.
"""
import copy, gc, importlib, io, math, pickle, pkgutil, sys, threading, warnings
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn, optim
from torch.nn.modules import module as torch_module
from torch.optim import lr_scheduler, optimizer as torch_optimizer

import miniai
from miniai.callback import (Callback, CancelBatchException, CancelEpochException, CancelFitException, cancels,
                             events, misspelt, work_events)
from miniai.datasets import DataLoaders
from miniai.device import set_seed
from miniai.learner import KeywordCB, Learner, MetricsCB, TrainCB
from miniai.lens import LossMetrics, OutputNorm, ParameterNorm
from shared import CountReads, ReadsPerStep

ours = [importlib.import_module(f'miniai.{o.name}') for o in pkgutil.iter_modules(miniai.__path__)]


def subclasses(cls):
    "All classes below `cls`, however far."
    return {o for sub in cls.__subclasses__() for o in {sub, *subclasses(sub)}}


found = sorted((o for o in subclasses(Callback) if o.__name__ in getattr(sys.modules[o.__module__], '__all__', ())
                and o.__module__.startswith('miniai.')),
               key=lambda o: (o.__module__, o.__name__))
by_callback = pytest.mark.parametrize('cls', found, ids=lambda o: o.__name__)

# how to make those that cannot be made without arguments; `folder` is empty
recipes = dict(
    AccelerateCB=lambda cls, folder: cls(mixed_precision='no', cpu=True),
    AccumulateCB=lambda cls, folder: cls(2),
    BaseSchedCB=lambda cls, folder: cls(partial(lr_scheduler.StepLR, step_size=2)),
    BatchSchedCB=lambda cls, folder: cls(partial(lr_scheduler.StepLR, step_size=2)),
    BatchTransformCB=lambda cls, folder: cls(lambda batch: batch),
    CheckpointCB=lambda cls, folder: cls(folder/'checkpoints'),
    CSVLogCB=lambda cls, folder: cls(folder/'log.csv'),
    LogCB=lambda cls, folder: cls([]),
    CompileCB=lambda cls, folder: cls(backend='eager'),
    EpochSchedCB=lambda cls, folder: cls(partial(lr_scheduler.StepLR, step_size=1)),
    HooksCallback=lambda cls, folder: cls(lambda hook, mod, inp, outp: None),
    InspectorCB=lambda cls, folder: cls([LossMetrics(), OutputNorm(), ParameterNorm()]),
    LRFinderCB=lambda cls, folder: cls(plot=False),
    EarlyStoppingCB=lambda cls, folder: cls(patience=100),
    PatienceCB=lambda cls, folder: cls(patience=100),
    RecorderCB=lambda cls, folder: cls(lr=lambda cb: cb.pg['lr']),
    ReportCB=lambda cls, folder: cls(folder/'report.html'),
    ShortEpochCB=lambda cls, folder: cls(2),
    StopOnCB=lambda cls, folder: cls('nan'))


def make(cls, folder):
    "A callback of class `cls`."
    try: return recipes.get(cls.__name__, lambda cls, folder: cls())(cls, folder)
    except (TypeError, ValueError) as e:
        pytest.fail(f'{cls.__name__}: {e}. Say how it is made: a line in `recipes` of {__file__}')


class Quiet(MetricsCB):
    "Metrics that are not printed; of class level, so that nothing is left on the object."
    def _log(self, d): pass


class Net(nn.Module):
    "Layers, a buffer, dropout; at the top level of this file, so that it can be pickled."
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.1))
        self.head = nn.Linear(6, 3)
    def forward(self, x): return self.head(self.body(x))


class NetWithLoss(Net):
    "Called by keywords, and returns its loss."
    def forward(self, x, labels):
        logits = super().forward(x)
        return dict(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


def by_name(samples): return {nm: torch.stack(o) for nm, o in zip(('x', 'labels'), zip(*samples))}


def accuracy(preds, targets): return (preds.argmax(1) == targets).float().mean()


def learner(cb):
    "A learner with `cb` and what it needs, seeded; two batches a pass."
    set_seed(0)
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    net, collate = (NetWithLoss(), by_name) if isinstance(cb, KeywordCB) else (Net(), None)
    dls = DataLoaders(*[torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 3, collate_fn=collate)]*2)
    works = any(hasattr(cb, o) for o in ('predict', 'backward'))
    others = [*([] if works else [TrainCB()]), *([] if isinstance(cb, MetricsCB) else [Quiet(accuracy=accuracy)])]
    if isinstance(cb, MetricsCB): cb._log = lambda d: None
    return Learner(net.eval(), dls, nn.CrossEntropyLoss(), lr=0.01, cbs=[*others, cb],
                   opt_func=partial(optim.SGD, momentum=0.9))


hook_tables = [o for o in vars(torch_module) if o.startswith('_global_') and 'hooks' in o]
opt_hooks = '_optimizer_step_pre_hooks', '_optimizer_step_post_hooks'


def hooks_of(o): return {nm: len(v) for nm, v in vars(o).items() if 'hooks' in nm and hasattr(v, '__len__')}


def footprint(learn):
    "All that a callback may change for the length of a fit, as it is now."
    model, metrics = learn.model, next((o for o in learn.cbs if isinstance(o, MetricsCB)), None)
    on = lambda o: sorted(vars(o).keys() - {'_compiled_call_impl'})   # whose value is below
    return dict(
        model=model, dls=learn.dls, loaders=[(o, on(o)) for o in (learn.dls.train, learn.dls.valid)],
        loss_func=learn.loss_func, cbs=list(learn.cbs), hold=learn.hold, trial=learn.trial,
        own_methods=[o for o in vars(learn) if callable(getattr(Learner, o, None))],
        hooks=[hooks_of(m) for m in (*model.modules(), *learn.loss_func.modules())],
        tensor_hooks=[(len(p._backward_hooks or ()), len(getattr(p, '_post_accumulate_grad_hooks', None) or ()))
                      for p in model.parameters()],
        attributes=[on(m) for m in model.modules()], modes=[m.training for m in model.modules()],
        compiled=[m._compiled_call_impl for m in model.modules()], dtypes=[p.dtype for p in model.parameters()],
        forward=[(type(m), type(m).forward, type(m).__call__) for m in model.modules()],
        opt_hooks=[len(getattr(learn.opt, o, ())) for o in opt_hooks if learn.opt],
        global_hooks=[len(getattr(torch_module, o) or ()) for o in hook_tables],
        global_opt_hooks=[len(o) for nm, o in vars(torch_optimizer).items() if nm.startswith('_global_')],
        backward=(torch.Tensor.backward, torch.autograd.backward), step=(optim.SGD.step, optim.Optimizer.step),
        autocast=[(torch.is_autocast_enabled(o), torch.get_autocast_dtype(o)) for o in ('cpu', 'cuda')],
        grad=torch.is_grad_enabled(), anomaly=torch.is_anomaly_enabled(), default=torch.get_default_dtype(),
        deterministic=torch.are_deterministic_algorithms_enabled(), torch_modes=torch_modes(),
        threads=len(threading.enumerate()), log=metrics and vars(metrics).get('_log'),
        attributes_of_learner=sorted(vars(learn)))


def torch_modes(): return torch._C._len_torch_dispatch_stack(), torch._C._len_torch_function_stack()


def compare(before, after, when):
    "Say what was left behind."
    left = [f'{k}: was {v}, is {after[k]}' for k, v in before.items() if v != after[k]]
    assert not left, f'left behind {when}: ' + '; '.join(left)


def tensors(o, depth=4):
    "Tensors inside `o`: lists, dicts and own objects, a few levels down."
    if isinstance(o, torch.Tensor): yield o
    elif depth and isinstance(o, (list, tuple, set)): yield from (t for v in o for t in tensors(v, depth-1))
    elif depth and isinstance(o, dict): yield from (t for v in o.values() for t in tensors(v, depth-1))
    elif depth and type(o).__module__.startswith('miniai.') and not isinstance(o, Learner):
        yield from (t for v in getattr(o, '__dict__', {}).values() for t in tensors(v, depth-1))


def check_rest(learn, cb, when):
    "Model and callback as others want to find them after a fit."
    copy.deepcopy(learn.model)
    pickle.loads(pickle.dumps(learn.model))
    torch.save(learn.model, io.BytesIO())
    assert not any(t.grad_fn is not None for t in tensors(cb)), f'{when}: keeps the graph of a batch'


class Boom(Exception): pass


class Raiser(Callback):
    "Raises `error` at `event`, once: in the second batch or the second pass where there is one."
    def __init__(self, event, error, order):
        self.order, self.raised, self.left = order, False, 1 if 'fit' not in event else 0
        def f(learn):
            if self.left: self.left -= 1
            elif not self.raised:
                self.raised = True
                raise error()
        setattr(self, event, f)


def levels(event):
    "The levels that are running at `event`, which a cancel may end."
    depth = 1 if event.endswith('_fit') else 2 if event.endswith('_epoch') else 3
    return ['fit', 'epoch', 'batch'][:depth - event.startswith('cleanup_')]


# those who do the work are one for each event, so it is disturbed from the events around
watched = [o for o in events[:18] if o not in work_events]   # of the Learner; other tests add levels of their own
few = 'before_fit', 'after_loss', 'cleanup_batch', 'after_epoch'
first_errors = CancelBatchException, CancelFitException, Boom
last_errors = CancelEpochException, CancelFitException, KeyboardInterrupt
slow = dict(AccelerateCB=few, CompileCB=few)   # a tenth of a second for each fit


def disturb(learn, event, error, order):
    "A fit in which somebody raises; what came of it, and what was expected."
    raiser = Raiser(event, error, order)
    try: learn.fit(2, cbs=raiser)
    except (Boom, KeyboardInterrupt, RuntimeError) as e: res = e
    else: res = None
    assert raiser.raised, f'{event} did not come'
    level = cancels(error())
    if level is None: assert isinstance(res, error), res
    elif level in levels(event): assert res is None, res
    else: assert 'ends a level called' in str(res), res


@pytest.fixture(autouse=True, scope='module')
def nothing_of_other_tests():
    "An inspector that another file has left attached takes its hooks off when it is collected; that is to be before these tests."
    gc.collect()


@pytest.fixture(autouse=True)
def no_warnings_of_torch():
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='.*lr_scheduler.step.*before.*optimizer.step')
        warnings.filterwarnings('ignore', message='AccumulateCB: the epoch ended')
        yield


def test_callbacks_are_found():
    assert {'TrainCB', 'MetricsCB', 'ActivationStats', 'InspectorCB', 'CheckpointCB'} <= {o.__name__ for o in found}


@by_callback
def test_defines_known_events_only(cls):
    "A method called like an event is one."
    assert not misspelt(cls.__new__(cls))
    methods = {nm for o in cls.__mro__[:-1] for nm in vars(o)}
    assert not [o for o in methods if o.split('_')[0] in ('before', 'after', 'cleanup') and o not in events]
    assert methods & set(events), 'a callback without events'


@by_callback
def test_has_a_place(cls): assert math.isfinite(cls.order)


@by_callback
def test_is_made_without_a_learner(cls, tmp_path):
    cb = make(cls, tmp_path)
    assert getattr(cb, 'learn', None) is None
    assert not list(tmp_path.iterdir()), 'nothing is written before a fit'


@by_callback
def test_fits_twice_and_leaves_nothing(cls, tmp_path):
    cb = make(cls, tmp_path)
    learn = learner(cb)
    plain = learner(Callback())
    plain.fit(1)
    before = footprint(learn) | dict(attributes_of_learner=sorted(vars(plain)), opt_hooks=[0, 0])
    for kw in {}, {}, dict(train=False), dict(valid=False), dict(reset_opt=False):
        learn.fit(1, **kw)
        after = footprint(learn)
        added = set(after['attributes_of_learner']) - {'metrics'}   # which any MetricsCB sets
        compare(before | dict(attributes_of_learner=None), after | dict(attributes_of_learner=None), f'fit({kw})')
        assert added <= set(before['attributes_of_learner']), f'new on the learner: {added}'
        check_rest(learn, cb, f'fit({kw})')


@by_callback
@pytest.mark.parametrize('order', [-math.inf, math.inf], ids=['first', 'last'])
def test_survives_cancels_and_errors(cls, order, tmp_path):
    "Raised by another callback, before it and after it, in every event; then it fits as if nothing had been."
    cb = make(cls, tmp_path)
    learn = learner(cb)
    if ends_fits(cls): pytest.skip('no second batch in which anybody could raise')
    learn.fit(1)
    before = footprint(learn)
    for event in slow.get(cls.__name__, watched):
        for error in first_errors if order < 0 else last_errors:
            when = f'after {error.__name__} in {event}'
            disturb(learn, event, error, order)
            compare(before, footprint(learn), when)
            assert not any(t.grad_fn is not None for t in tensors(cb)), f'{when}: keeps the graph of a batch'
    check_rest(learn, cb, 'in the end')
    learn.fit(1)
    compare(before, footprint(learn), 'by the fit after all that')


def ends_fits(cls): return cls.__name__ == 'SingleBatchCB'


def rows(history): return {k: len(history.series(k[1], k[2], k[0])) for k in history.keys()}


@by_callback
def test_keeps_out_of_lr_find(cls, tmp_path):
    "Two fits give the same weights with `lr_find` between them, and it writes down nothing."
    weights = []
    for finds in False, True:
        cb = make(cls, tmp_path/str(finds))
        learn = learner(cb)
        learn.fit(1)
        if finds:
            kept, before = getattr(cb, 'history', None), footprint(learn)
            counts = rows(kept) if kept is not None else None
            with pytest.raises(ValueError, match='too few') if ends_fits(cls) else nullcontext():
                learn.lr_find(max_epochs=3, plot=False)
            compare(before, footprint(learn), 'by lr_find')
            assert kept is None or rows(kept) == counts
        learn.fit(1, reset_opt=False)
        weights.append([o.clone() for o in learn.model.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*weights))


reads = dict(LRFinderCB=1)   # to stop in time it must know the loss, and says so


def reads_per_step(learn):
    "Host reads, and their stacks, in the last step of each of two epochs: the first of an epoch is the loader's."
    learn.fit(1, valid=False)
    with CountReads() as counter:
        watch = ReadsPerStep(counter)
        learn.fit(2, valid=False, cbs=watch)
    return list(zip(watch.per_step, watch.stacks))[1::2]


@by_callback
def test_reads_nothing_from_the_device_in_a_step(cls, tmp_path):
    if cls.__name__ == 'CompileCB': pytest.skip('compiled code is not dispatched to the counter')
    for n, stacks in reads_per_step(learner(make(cls, tmp_path))):
        assert n <= reads.get(cls.__name__, 0), f'{n} reads; the first:\n{stacks[0]}'
