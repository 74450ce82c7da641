"The Learner's loop, its core callbacks, and what they leave behind (nothing)."
import contextlib, copy, io, random, subprocess, sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torcheval.metrics import MulticlassAccuracy

from shared import CountReads

from miniai import callback, learner as module, progress
from miniai.callback import CancelBatchException, CancelEpochException, CancelFitException, events
from miniai.hooks import count_hooks
from miniai.learner import (Callback, DeviceCB, LRFinderCB, Learner, MetricsCB, MomentumLearner, ProgressCB, SingleBatchCB,
                            TrainCB, TrainLearner, with_cbs)
from miniai.device import batch_size

torch.manual_seed(0)
x = torch.randn(80, 4)
y = (x.sum(1) > 0).long()

def get_dls(n_train=48, n_valid=32, bs=16, **kw):
    return SimpleNamespace(train=DataLoader(TensorDataset(x[:n_train], y[:n_train]), bs, **kw),
                           valid=DataLoader(TensorDataset(x[48:48+n_valid], y[48:48+n_valid]), bs))

def get_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))

def get_learner(cbs=(), dls=None, lr=0.1, cls=Learner, train=True, **kw):
    cbs = ([TrainCB()] if train and cls is Learner else []) + list(cbs)
    return cls(get_model(), dls or get_dls(), F.cross_entropy, lr, cbs, **kw)

def accuracy(preds, yb): return (preds.argmax(1) == yb).float().mean()

def same(a, b): return all(torch.equal(p, q) for p,q in zip(a.state_dict().values(), b.state_dict().values()))


# ---- the order of calls

class RecordCB(Callback):
    "Notes every event; raises `error` at the event `at`, the first time only, in the phase `phase`."
    order = 100
    def __init__(self, at=None, error=None, phase='train'): self.at,self.error,self.phase,self.log = at,error,phase,[]
    def __getattr__(self, event):
        if event not in events or event in callback.work_events: raise AttributeError(event)
        return partial(self.note, event)
    def note(self, event, learn):
        self.log.append(event)
        if event == self.at and (learn.phase == self.phase or event.endswith('_fit')):
            self.at = None
            raise self.error

class WorkCB(TrainCB):
    "Does the work and tells it."
    def __init__(self, log): self.n_inp,self.log = 1,log
for nm in callback.work_events:
    def work(self, learn, nm=nm):
        self.log.append(nm)
        getattr(TrainCB, nm)(self, learn)
    setattr(WorkCB, nm, work)

BEGIN = ['before_batch', 'predict', 'after_predict', 'get_loss', 'after_loss']
UPDATE = ['backward', 'after_backward', 'step', 'after_step', 'zero_grad']
TRAIN = BEGIN + UPDATE + ['after_batch', 'cleanup_batch']
VALID = BEGIN + ['after_batch', 'cleanup_batch']
def epoch(*batches): return ['before_epoch', *sum(batches, []), 'after_epoch', 'cleanup_epoch']

def fit_log(at=None, error=None, phase='train', n_epochs=1, **kw):
    cb = RecordCB(at, error, phase)
    Learner(get_model(), get_dls(32), F.cross_entropy, cbs=[WorkCB(cb.log), cb]).fit(n_epochs, **kw)
    return cb.log

def test_order_of_events():
    one = epoch(TRAIN, TRAIN) + epoch(VALID, VALID)
    assert fit_log(n_epochs=2) == ['before_fit', *one, *one, 'after_fit', 'cleanup_fit']

def test_order_of_events_of_one_phase():
    assert fit_log(valid=False) == ['before_fit', *epoch(TRAIN, TRAIN), 'after_fit', 'cleanup_fit']
    assert fit_log(train=False) == ['before_fit', *epoch(VALID, VALID), 'after_fit', 'cleanup_fit']

def until(batch, event): return batch[:batch.index(event)+1]

LEVEL_EVENTS = [o for o in TRAIN if o not in callback.work_events and o != 'cleanup_batch']

@pytest.mark.parametrize('at', LEVEL_EVENTS)
def test_cancelled_batch(at):
    cut = until(TRAIN, at) + ['cleanup_batch']
    assert fit_log(at, CancelBatchException) == ['before_fit', *epoch(cut, TRAIN), *epoch(VALID, VALID), 'after_fit', 'cleanup_fit']

@pytest.mark.parametrize('at', [o for o in LEVEL_EVENTS if o in VALID])
def test_cancelled_validation_batch(at):
    cut = until(VALID, at) + ['cleanup_batch']
    assert fit_log(at, CancelBatchException, 'valid') == ['before_fit', *epoch(TRAIN, TRAIN), *epoch(cut, VALID), 'after_fit', 'cleanup_fit']

@pytest.mark.parametrize('at', LEVEL_EVENTS + ['cleanup_batch'])
def test_cancelled_epoch(at):
    cut = ['before_epoch', *until(TRAIN, at), *(['cleanup_batch'] if at != 'cleanup_batch' else []), 'cleanup_epoch']
    assert fit_log(at, CancelEpochException) == ['before_fit', *cut, *epoch(VALID, VALID), 'after_fit', 'cleanup_fit']

def test_cancelled_epoch_at_its_ends():
    valid = [*epoch(VALID, VALID), 'after_fit', 'cleanup_fit']
    assert fit_log('before_epoch', CancelEpochException) == ['before_fit', 'before_epoch', 'cleanup_epoch', *valid]
    assert fit_log('after_epoch', CancelEpochException) == ['before_fit', *epoch(TRAIN, TRAIN), *valid]

@pytest.mark.parametrize('at', LEVEL_EVENTS)
def test_cancelled_fit(at):
    assert fit_log(at, CancelFitException) == ['before_fit', 'before_epoch', *until(TRAIN, at), 'cleanup_batch', 'cleanup_epoch', 'cleanup_fit']

def test_cancelled_fit_at_its_ends():
    assert fit_log('before_fit', CancelFitException) == ['before_fit', 'cleanup_fit']
    assert fit_log('cleanup_epoch', CancelFitException) == ['before_fit', *epoch(TRAIN, TRAIN), 'cleanup_fit']

@pytest.mark.parametrize('at, error', [('before_epoch', CancelBatchException), ('after_epoch', CancelBatchException),
                                       ('cleanup_batch', CancelBatchException), ('before_fit', CancelEpochException),
                                       ('cleanup_epoch', CancelEpochException), ('cleanup_fit', CancelFitException)])
def test_cancel_at_the_wrong_level_is_a_clear_error(at, error):
    with pytest.raises(RuntimeError, match=f'{error.__name__} ends a level') as info: fit_log(at, error)
    assert isinstance(info.value.__cause__, error)

def test_a_level_added_by_a_user():
    class CancelStepException(Exception): pass
    class StepLearner(TrainLearner):
        @with_cbs('step')
        def step(self): self.opt.step()
    class NoStepCB(Callback):
        def before_step(self): raise CancelStepException
    learn = get_learner([NoStepCB()], cls=StepLearner)
    before = copy.deepcopy(learn.model[0])
    learn.fit(1)
    assert same(before, learn.model[0]) and learn.epoch == 0


# ---- all callbacks: fit twice, cancelled anywhere, failing anywhere, nothing left behind

CALLBACKS = {nm: cls for nm, cls in vars(module).items() if nm in module.__all__
             and isinstance(cls, type) and issubclass(cls, Callback) and nm not in ('Callback', 'KeywordCB')}   # it needs other batches
MAKE = dict(MetricsCB=lambda: MetricsCB(MulticlassAccuracy(), acc=accuracy), DeviceCB=lambda: DeviceCB('cpu'),
            ProgressCB=lambda: ProgressCB(plot=True), LRFinderCB=lambda: LRFinderCB(plot=False))

def test_all_callbacks_are_found(): assert {'TrainCB', 'MetricsCB', 'ProgressCB', 'LRFinderCB', 'SingleBatchCB', 'DeviceCB'} == set(CALLBACKS)

def callbacks_with(name):
    cb = MAKE.get(name, CALLBACKS[name])()
    return [cb] + [o for o in (TrainCB(), MetricsCB(acc=accuracy), ProgressCB()) if type(o) is not type(cb)]

def n_hooks(model): return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())

ENDS = [(at, error) for at in events[:18] if at not in callback.work_events for error in
        (CancelBatchException, CancelEpochException, CancelFitException, ValueError, KeyboardInterrupt)]

@pytest.mark.parametrize('name', CALLBACKS)
def test_every_callback_survives_every_end(name, monkeypatch):
    monkeypatch.setattr(progress, 'in_terminal', lambda: True)   # bars too
    for at,error in ENDS:
        for order in (-100, 100):
            cbs, raiser = callbacks_with(name), RecordCB(at, error)
            raiser.order = order
            learn = get_learner([*cbs, raiser], train=False)
            learn.model[1].eval()
            metrics_log = [vars(cb).get('_log') for cb in cbs]
            with contextlib.suppress(error, RuntimeError): learn.fit(1)
            assert [m.training for m in learn.model.modules()] == [True, True, False, True, True], (name, at, error)
            assert n_hooks(learn.model) == 0 and learn._levels == [] and torch.is_grad_enabled()
            assert [vars(cb).get('_log') for cb in cbs] == metrics_log
            assert all(getattr(cb, '_bar', None) is None for cb in cbs)
            assert learn.dls.train is not None and getattr(learn, 'dl', learn.dls.train) in (learn.dls.train, learn.dls.valid)
            copy.deepcopy(learn.model)
            learn.fit(1)   # and the next fit knows nothing of it
            assert learn.cbs[-1] is raiser and raiser.log[-1] == 'cleanup_fit'

@pytest.mark.parametrize('name', CALLBACKS)
def test_every_callback_fits_twice_alike(name):
    def run(learn):
        torch.manual_seed(0)
        learn.model.load_state_dict(get_model().state_dict())
        learn.fit(1)
        return {k: learn.history.series(*k[1:], k[0]) for k in learn.history.keys()}
    learn = get_learner(callbacks_with(name), train=False)
    run(learn)
    for s in run(learn).values():
        first, second = s.values[s.runs == 0], s.values[s.runs == 1]
        np.testing.assert_array_equal(first, second)

@pytest.mark.parametrize('name', CALLBACKS)
def test_every_callback_says_what_it_does(name): assert CALLBACKS[name].__doc__


# ---- callbacks given

class IterableCB(Callback):
    n = 0
    def __iter__(self): return iter(['conv1', 'conv2'])
    def __len__(self): return 2
    def after_fit(self): self.n += 1

def test_one_iterable_callback_is_not_unpacked():
    cb = IterableCB()
    get_learner(cls=TrainLearner).fit(cbs=cb)
    TrainLearner(get_model(), get_dls(), F.cross_entropy, cbs=cb).fit()
    assert cb.n == 2

def test_the_callers_list_stays_the_callers():
    mine = [TrainCB()]
    learn = Learner(get_model(), get_dls(), F.cross_entropy, cbs=mine)
    learn.cbs.append(IterableCB())
    learn.fit(cbs=[SingleBatchCB()])
    assert len(mine) == 1 and len(learn.cbs) == 2

def test_callbacks_of_one_fit_go_after_errors_too():
    learn = get_learner()
    with pytest.raises(ValueError): learn.fit(cbs=RecordCB('after_loss', ValueError))
    assert len(learn.cbs) == 1

def test_callback_that_is_there_already_runs_once():
    cb = IterableCB()
    learn = get_learner([cb])
    learn.fit(cbs=cb)
    assert cb.n == 1 and learn.cbs[-1] is cb

def test_callbacks_added_during_a_fit_run():
    class AddCB(Callback):
        def before_epoch(self, learn):
            if learn.training: learn.cbs.append(late)
    late = RecordCB()
    learn = get_learner([AddCB()])
    learn.fit()
    assert late.log[0] == 'before_batch' and late.log.count('after_batch') == 5 and late.learn is learn

def test_one_list_for_ten_learners(capsys):
    cbs = [TrainCB(), DeviceCB('cpu'), MetricsCB(accuracy=MulticlassAccuracy()), ProgressCB()]
    learners = [Learner(get_model(), get_dls(), F.cross_entropy, lr=0.1, cbs=cbs) for _ in range(10)]
    for learn in learners: learn.fit(1)
    results = [learn.history.series('epoch', 'accuracy', 'valid').values.tolist() for learn in learners]
    assert all(o == results[0] for o in results) and len(results[0]) == 1
    assert capsys.readouterr().out.count('eval') == 10

def test_lookup_happens_once(monkeypatch):
    calls = []
    real = callback.bind_event
    monkeypatch.setattr(callback, 'bind_event', lambda cbs, event, learn=None: calls.append(event) or real(cbs, event, learn))
    get_learner(dls=get_dls(48, bs=4)).fit(3)
    assert max(map(calls.count, calls)) <= 2   # once to check, once to bind

def test_misspelt_event_is_warned_about_at_fit():
    class TypoCB(Callback):
        def after_bach(self, learn): pass
    with pytest.warns(UserWarning, match='TypoCB.after_bach is never called.*`after_batch`'): get_learner([TypoCB()]).fit()


# ---- who does the work

def test_nobody_predicts():
    with pytest.raises(ValueError, match=r'nothing does `predict`. Add TrainCB\(\) to cbs \(now: ProgressCB\)'):
        Learner(get_model(), get_dls(), cbs=ProgressCB()).fit()

def test_a_part_is_missing():
    class PredictLearner(Learner):
        def predict(self): self.preds = self.model(self.batch[0])
        def get_loss(self): self.loss = F.cross_entropy(self.preds, self.batch[1])
    learn = PredictLearner(get_model(), get_dls())
    learn.fit(train=False)   # which needs no more
    with pytest.raises(ValueError, match='nothing does `backward`'): learn.fit()

def test_two_providers():
    class OtherCB(TrainCB): pass
    with pytest.raises(ValueError, match='`predict` is done by TrainCB and OtherCB'): get_learner([OtherCB()]).fit()

def test_unused_provider_is_warned_about():
    with pytest.warns(UserWarning) as caught: get_learner([TrainCB()], cls=TrainLearner).fit()
    said, = (str(o.message) for o in caught)   # one warning, not one for each event
    assert 'TrainLearner does predict, get_loss, backward, step, zero_grad itself; the methods of TrainCB are not called' in said

def test_subclass_may_override_one_part():
    class SumLearner(Learner):
        def get_loss(self): self.loss = F.cross_entropy(self.preds, self.batch[1], reduction='sum')
    class PartCB(TrainCB): get_loss = None
    learn = get_learner([PartCB()], cls=SumLearner, lr=1e-3)
    learn.fit(1)
    assert learn.n_steps == 3

def test_events_can_be_called_as_methods():
    learn = get_learner()
    learn.batch = x[:4], y[:4]
    learn.predict()
    learn.get_loss()
    assert learn.preds.shape == (4, 2) and learn.loss.ndim == 0
    assert not hasattr(learn, 'nonsense')


# ---- gradients, steps, modes, going on

@pytest.mark.parametrize('at', ['after_backward', 'after_step'])
@pytest.mark.parametrize('error', [CancelBatchException, CancelEpochException, CancelFitException, ValueError])
def test_a_cancelled_batch_leaves_no_gradients(at, error):
    class CheckCB(Callback):
        def before_batch(self, learn): assert all(p.grad is None or not p.grad.any() for p in learn.model.parameters())
    learn = get_learner([RecordCB(at, error), CheckCB()])
    with contextlib.suppress(ValueError): learn.fit(1)
    assert all(p.grad is None or not p.grad.any() for p in learn.model.parameters())

def test_cancelled_batch_equals_a_batch_left_out():
    xb, yb = x[:48].split(16), y[:48].split(16)
    learn = get_learner([RecordCB('after_backward', CancelBatchException)])
    learn.model[1].eval()
    fewer = get_learner(dls=SimpleNamespace(train=list(zip(xb, yb))[1:]))
    learn.fit(valid=False)
    fewer.fit(valid=False)
    assert torch.equal(learn.model[0].weight, fewer.model[0].weight)
    assert learn.n_steps == fewer.n_steps == 2

def test_modes_are_restored():
    learn = get_learner()
    for train in (True, False):
        learn.model.train(train)
        learn.model[1].train(not train)
        learn.fit(1)
        assert (learn.training, learn.model[0].training, learn.model[1].training) == (train, train, not train)

def test_wrapped_model_gets_its_mode_back():
    class WrapCB(Callback):
        def before_fit(self, learn): learn.model = nn.Sequential(learn.model)
    learn = get_learner([WrapCB()])
    learn.fit()
    assert all(m.training for m in learn.model.modules())

def test_a_second_fit_is_a_new_one():
    learn = get_learner(opt_func=partial(optim.SGD, momentum=0.9))
    learn.fit(2)
    opt = learn.opt
    learn.fit(1)
    assert learn.opt is not opt and (learn.epoch, learn.history.run, learn.n_steps) == (0, 1, 9)

def test_two_fits_that_go_on_equal_one():
    momentum = partial(optim.SGD, momentum=0.9)
    for cls in (Learner, MomentumLearner):
        once, twice = get_learner(cls=cls, opt_func=momentum), get_learner(cls=cls, opt_func=momentum)
        once.fit(4)
        twice.fit(2)
        twice.fit(2, reset_opt=False)
        assert same(once.model, twice.model) and once.epoch == twice.epoch == 3
    twice.fit(1, lr=0.5, reset_opt=False)
    assert twice.opt.param_groups[0]['lr'] == 0.5

def test_momentum_of_the_last_fit_does_not_leak():
    a, b = get_learner(cls=MomentumLearner), get_learner(cls=MomentumLearner)
    a.fit(1)
    a.model.load_state_dict(get_model().state_dict())
    a.fit(1); b.fit(1)
    assert same(a.model, b.model)

def test_validation_neither_needs_nor_touches_the_optimizer():
    learn = get_learner(lr=None)
    learn.fit(1, train=False)
    assert learn.opt is None
    with pytest.raises(ValueError, match='no learning rate'): learn.fit(1)

def test_own_optimizer():
    learn = get_learner(opt_func=None)
    with pytest.raises(ValueError, match='set `learn.opt`'): learn.fit()
    learn.opt = opt = optim.Adam(learn.model.parameters(), 1e-3)
    learn.fit()
    assert learn.opt is opt

def test_frozen_and_unused_parameters_with_momentum():
    learn = get_learner(cls=MomentumLearner)
    learn.model[0].requires_grad_(False)
    learn.fit(1)
    assert learn.model[0].weight.grad is None

def test_history():
    learn = get_learner([MetricsCB(acc=accuracy)], dls=get_dls(40))
    learn.fit(2)
    train, valid = learn.history.series('batch', 'loss'), learn.history.series('batch', 'loss', 'valid')
    assert train.steps.tolist() == list(range(6)) and train.epochs.tolist() == [0]*3 + [1]*3
    assert train.samples.tolist() == [16, 16, 8]*2 and len(valid) == 4
    mean = learn.history.series('epoch', 'loss').values
    np.testing.assert_allclose(mean, [np.average(train.values[i:i+3], weights=[16, 16, 8]) for i in (0, 3)], rtol=1e-6)
    assert learn.history.series('epoch', 'acc', 'valid').steps.tolist() == [3, 6]


# ---- data

@pytest.mark.parametrize('dls, text', [((0,), r'dls \(tuple\) has no loader `.train`'),
                                       (SimpleNamespace(train=[]), 'loader `.valid`.*or fit with valid=False'),
                                       (SimpleNamespace(train=[], valid=[]), r'loader for training \(list\) gave no batches')])
def test_bad_loaders(dls, text):
    with pytest.raises(ValueError, match=text): get_learner(dls=dls).fit()

def test_empty_validation_and_dropped_batches():
    with pytest.raises(ValueError, match='loader for validation.*0 items'): get_learner(dls=get_dls(48, 0)).fit()
    with pytest.raises(ValueError, match='3 items. Check batch_size and drop_last'): get_learner(dls=get_dls(3, drop_last=True)).fit()

@pytest.mark.parametrize('batch, text', [({'image': x[:4], 'label': y[:4]}, r"dict with keys \['image', 'label'\].*inp_nm=.*KeywordCB.*as_tuple=True.*override `predict`"),
                                         (x[:4], 'the batch is a Tensor; expected a tuple')])
def test_batches_that_are_no_tuples(batch, text):
    with pytest.raises(TypeError, match=text) as info: get_learner(dls=SimpleNamespace(train=[batch])).fit(valid=False)
    assert 'callback TrainCB at event `predict`, epoch 0, batch 0' in str(info.value) + ''.join(getattr(info.value, '__notes__', []))

def test_dict_batches_with_a_callback_of_ones_own():
    class DictCB(TrainCB):
        def predict(self, learn): learn.preds = learn.model(learn.batch['image'])
        def get_loss(self, learn): learn.loss = learn.loss_func(learn.preds, learn.batch['label'])
    def dict_accuracy(preds, batch): return accuracy(preds, batch['label'])
    batches = [dict(name=['a.png']*n, image=x[:n], label=y[:n]) for n in (8, 24)]
    learn = get_learner([DictCB(), DeviceCB('cpu'), MetricsCB(acc=dict_accuracy)], dls=SimpleNamespace(train=batches), train=False, lr=0.)
    learn.fit(valid=False)
    losses = learn.history.series('batch', 'loss')
    assert losses.samples.tolist() == [8, 24]
    np.testing.assert_allclose(learn.history.series('epoch', 'loss').values, np.average(losses.values, weights=[8, 24]), rtol=1e-6)

def test_two_inputs():
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.lin = nn.Linear(8, 2)
        def forward(self, a, b): return self.lin(torch.cat([a, b], 1))
    dls = SimpleNamespace(train=[(x[:16], x[16:32], y[:16])])
    learn = Learner(Two(), dls, F.cross_entropy, cbs=[TrainCB(n_inp=2), MetricsCB(MulticlassAccuracy(), acc=accuracy)])
    learn.fit(valid=False)
    a, b = (learn.history.series('epoch', nm).values for nm in ('MulticlassAccuracy', 'acc'))
    np.testing.assert_allclose(a, b)

@pytest.mark.parametrize('batch, n', [((x, y), 80), ([[x[:3]], y], 3), ({'a': 'text', 'b': (None, x[:5])}, 5), (torch.tensor(1.), 1), ('text', 1),
                                      ((torch.tensor(1.), x[:7]), 7)])
def test_batch_size(batch, n): assert batch_size(batch) == n

def test_device_cb_moves_the_loss_function():
    class Loss(nn.Module):
        def __init__(self): super().__init__(); self.register_buffer('scale', torch.ones(()))
        def forward(self, preds, yb): return F.cross_entropy(preds, yb)*self.scale
    loss = Loss()
    learn = Learner(get_model(), get_dls(), loss, cbs=[TrainCB(), DeviceCB('meta'), RecordCB('after_loss', CancelFitException)])
    learn.fit(valid=False)   # cancelled before a loss is recorded: a meta tensor has no values to keep
    assert loss.scale.device.type == learn.preds.device.type == 'meta'


# ---- errors

def test_error_in_a_model_names_callback_event_and_batch():
    learn = Learner(nn.Linear(3, 2), get_dls(), F.cross_entropy, cbs=TrainCB())
    with pytest.raises(RuntimeError, match='shape') as info: learn.fit()
    assert 'callback TrainCB at event `predict`, epoch 0, batch 0' in str(info.value) + ''.join(getattr(info.value, '__notes__', []))


# ---- metrics

def test_metric_names():
    with pytest.raises(ValueError, match="two metrics are called 'MulticlassAccuracy'"): MetricsCB(MulticlassAccuracy(), MulticlassAccuracy())
    with pytest.raises(ValueError, match="two metrics are called 'accuracy'"): MetricsCB(accuracy, accuracy=MulticlassAccuracy())
    for nm in ('loss', 'epoch', 'train'):
        with pytest.raises(ValueError, match=f"cannot be called '{nm}'"): MetricsCB(**{nm: accuracy})
    with pytest.raises(TypeError, match='is the class MulticlassAccuracy'): MetricsCB(MulticlassAccuracy)
    assert list(MetricsCB(accuracy, micro=MulticlassAccuracy()).metrics) == ['accuracy', 'micro']

def test_printed_strings(capsys):
    get_learner([MetricsCB(accuracy=MulticlassAccuracy())]).fit(1)
    train, valid = map(eval, capsys.readouterr().out.splitlines())
    assert list(train) == ['accuracy', 'loss', 'epoch', 'train'] and (train['train'], valid['train']) == ('train', 'eval')
    assert len(train['accuracy']) == len('0.812') and train['epoch'] == 0

def test_torchmetrics():
    torchmetrics = pytest.importorskip('torchmetrics')
    theirs = torchmetrics.Accuracy(task='multiclass', num_classes=2)
    learn = get_learner([MetricsCB(tm=theirs, te=MulticlassAccuracy(), f=accuracy)], dls=get_dls(40))
    learn.fit(1)
    a, b, c = (learn.history.series('epoch', nm).values for nm in ('tm', 'te', 'f'))
    np.testing.assert_allclose(a, b, rtol=1e-6)
    np.testing.assert_allclose(a, c, rtol=1e-6)

@pytest.mark.parametrize('broken', ['update', 'compute'])
def test_failing_metric_is_named(broken):
    class Bad:
        def update(self, preds, yb): 1/(broken != 'update')
        def compute(self): return 1/(broken != 'compute')
        def reset(self): pass
    with pytest.raises(ZeroDivisionError) as info: get_learner([MetricsCB(good=accuracy, bad=Bad())]).fit()
    assert f"metric 'bad' (Bad) failed in {broken}" in str(info.value) + ''.join(getattr(info.value, '__notes__', []))

def test_metrics_go_to_the_device_of_the_loss():
    class Placed:
        device = None
        def to(self, device): self.device = torch.device(device)
        def update(self, preds, yb): assert preds.device == yb.device == self.device
        def compute(self): return torch.zeros(10)
        def reset(self): pass
    metric = Placed()
    learn = get_learner([DeviceCB('cpu'), MetricsCB(m=metric)])
    learn.fit()
    assert metric.device.type == 'cpu'
    assert learn.history.series('epoch', 'm').values.shape == (1, 10)   # a vector is data too

def test_metrics_keep_no_graph():
    class Keeps:
        def __init__(self): self.all = []
        def update(self, preds, yb): self.all.append(preds)
        def compute(self): return 0.
        def reset(self): self.all = []
    metric = Keeps()
    get_learner([MetricsCB(m=metric)]).fit(valid=False)
    assert len(metric.all) == 3 and not any(o.requires_grad for o in metric.all)

def test_epoch_without_a_batch_is_a_gap(capsys):
    class SkipCB(Callback):
        def before_batch(self): raise CancelBatchException
    learn = get_learner([SkipCB(), MetricsCB(accuracy=MulticlassAccuracy())])
    learn.fit(1)
    assert len(learn.history) == 0 and "'loss': 'nan'" in capsys.readouterr().out


# ---- host reads

@pytest.mark.parametrize('terminal', [True, False])
def test_two_hundred_steps_without_a_read(terminal, monkeypatch):
    monkeypatch.setattr(progress, 'in_terminal', lambda: terminal)
    monkeypatch.setattr(ProgressCB, 'every', 0.)   # a look at the loss after every batch
    class CheckCB(Callback):
        order = 50
        def after_epoch(self): self.reads = counter.reads
    check, batch = CheckCB(), (x[:16], y[:16])
    cbs = [DeviceCB('cpu'), MetricsCB(MulticlassAccuracy(), acc=accuracy), ProgressCB(), check]
    learn = get_learner(cbs, dls=SimpleNamespace(train=[batch]*200))
    at_epoch_end = []
    real = MetricsCB.after_epoch
    monkeypatch.setattr(MetricsCB, 'after_epoch', lambda self, learn: at_epoch_end.append(counter.reads) or real(self, learn))
    with CountReads() as counter: learn.fit(1, valid=False)
    assert at_epoch_end == [0]          # nothing in 200 steps
    assert check.reads == 3             # one for each number that is printed; what they are means over is known on a CPU
    with CountReads() as counter: learn.loss.item()
    assert counter.reads == 1           # the counter counts


# ---- progress

class FakeTTY(io.StringIO):
    def isatty(self): return True

def test_plain_lines_in_a_log_file(capsys):
    learn = get_learner([MetricsCB(accuracy=MulticlassAccuracy()), ProgressCB(plot=True)])
    learn.fit(2)
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert len(lines) == 5 and lines[0].split() == ['accuracy', 'loss', 'epoch', 'train'] and '\r' not in out and err == ''
    assert [o.split()[-2:] for o in lines[1:]] == [['0', 'train'], ['0', 'eval'], ['1', 'train'], ['1', 'eval']]

def test_plain_lines_without_metrics(capsys):
    learn = get_learner([ProgressCB()], dls=get_dls(40))
    learn.fit(1)
    losses = learn.history.series('batch', 'loss')
    mean = np.average(losses.values, weights=losses.samples)
    assert capsys.readouterr().out.splitlines()[1].split() == [f'{mean:.3f}', '0', 'train']

class Stream(IterableDataset):
    def __iter__(self): return iter(zip(x[:40], y[:40]))

@pytest.mark.parametrize('terminal', [True, False])
def test_loader_without_length(terminal, monkeypatch):
    monkeypatch.setattr(sys, 'stderr', FakeTTY() if terminal else io.StringIO())
    monkeypatch.setattr(ProgressCB, 'every', 0.)
    dls = SimpleNamespace(train=DataLoader(Stream(), 16), valid=DataLoader(Stream(), 16))
    learn = get_learner([MetricsCB(), ProgressCB()], dls=dls)
    learn.fit(1)
    assert learn.n_steps == 3 and learn.dl is dls.valid
    assert ('loss' in sys.stderr.getvalue()) == terminal

def test_print_goes_back_to_metrics(capsys):
    class UserMetricsCB(Callback):
        "As users write it: it prints by itself."
        def _log(self, d): print('mine', d)
        def before_fit(self, learn): learn.metrics = self
        def after_epoch(self, learn): self._log({'epoch': learn.epoch})
    metrics = UserMetricsCB()
    get_learner([metrics, ProgressCB()]).fit(1)
    assert 'mine' not in capsys.readouterr().out
    get_learner([metrics]).fit(1)
    assert capsys.readouterr().out.count('mine') == 2

def test_notebook_display(monkeypatch):
    "One output, replaced: the picture above the table above the bar, which is gone at the end; rows may have other names."
    shown = []
    class Handle:
        def update(self, o, raw): shown.append(o)
    def begin(o, raw, display_id): shown.append(o); return Handle()
    display = pytest.importorskip('IPython.display')
    monkeypatch.setattr(display, 'display', begin)
    monkeypatch.setattr(progress, 'in_notebook', lambda: True)
    monkeypatch.setattr(sys, 'stderr', io.StringIO())
    monkeypatch.setattr(progress.ProgressCB, 'every', 0.)   # a tick at each batch
    import matplotlib.pyplot as plt
    figures = plt.get_fignums()
    learn = get_learner([MetricsCB(accuracy=MulticlassAccuracy()), ProgressCB(plot=True)])
    learn.fit(2)
    html = [o['text/html'] for o in shown]
    assert html[-1].count('<tr>') == 5 and '<th>accuracy</th>' in html[-1] and shown[-1]['text/plain'].count('\n') == 4
    assert html[-1].index('<img') < html[-1].index('<table>') and 'data:image/png;base64,iVBOR' in html[-1]
    n = len(learn.dls.train)
    assert '<progress' not in html[-1] and any(f'epoch 1 train: {n}/{n} loss' in o for o in html) and any('epoch 0 eval: 1/' in o for o in html)
    assert plt.get_fignums() == figures and not sys.stderr.getvalue()
    before = len(html)
    learn.fit(1)   # begins anew
    assert shown[before]['text/html'].count('<tr>') == 0

def test_one_bar_for_the_whole_fit(monkeypatch):
    "It begins anew with each pass, whatever the loader knows of its length, and is gone however the fit ends."
    bars, seen = [], []
    class Bar(progress.tqdm):
        def __init__(self, *args, **kw):
            super().__init__(*args, **kw, file=io.StringIO())
            bars.append(self)
        def close(self):
            if not self.disable: seen.append('gone')
            super().close()
        def reset(self, total=None):
            super().reset(total)
            seen.append((self.desc, self.total, self.n))
    monkeypatch.setattr(progress, 'tqdm', Bar)
    monkeypatch.setattr(progress, 'in_terminal', lambda: True)
    learn = get_learner([ProgressCB()])
    learn.dls.valid = iter_only(learn.dls.valid)
    learn.fit(2)
    n = len(learn.dls.train)
    assert len(bars) == 1
    assert seen == [('epoch 0 eval: ', None, 0), ('epoch 1 train: ', n, 0), ('epoch 1 eval: ', None, 0), 'gone']
    class Stop(Callback):
        def after_batch(self, learn): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=Stop())
    assert len(bars) == 2 and seen[-1] == 'gone' and learn.cbs[-1]._bar is None

class iter_only:
    "A loader that does not know its length."
    def __init__(self, dl): self.dl = dl
    def __iter__(self): return iter(self.dl)

def test_draw_before_and_after():
    cb = ProgressCB(plot=True)
    assert 'call fit first' in cb.draw().axes[0].texts[0].get_text()
    learn = get_learner([cb])
    assert 'call fit first' in cb.draw().axes[0].texts[0].get_text()
    learn.fit(2)
    assert [len(o.get_xdata()) for o in cb.draw().axes[0].lines] == [6, 6, 2]
    learn.fit(1, train=False)   # only the last fit, drawn afresh
    assert [len(o.get_xdata()) for o in cb.draw().axes[0].lines] == [1]


# ---- learning rate finder

class Noisy(nn.Module):
    "Weights, buffers kept and not kept, one replaced at each call, and dropout."
    def __init__(self):
        super().__init__()
        self.net, self.drop, self.scale = get_model(), nn.Dropout(0.5), nn.Parameter(torch.ones(()))
        self.register_buffer('calls', torch.zeros(()))
        self.register_buffer('seen', torch.zeros(()), persistent=False)
        self.register_buffer('last', None)
    def forward(self, xb):
        self.calls += 1
        self.seen = self.seen + 1
        self.last = xb.mean()
        return self.drop(self.net(xb))*self.scale

def state_of(learn):
    gen = learn.dls.train.generator.get_state()
    tensors = [t.clone() for t in (*learn.model.parameters(), *learn.model.buffers(), gen, torch.get_rng_state())]
    grads = [None if p.grad is None else p.grad.clone() for p in learn.model.parameters()]
    opt = [t.clone() for s in learn.opt.state.values() for t in s.values() if isinstance(t, torch.Tensor)] if learn.opt else []
    plain = (learn.epoch, learn.epochs_done, learn.n_steps, len(learn.history), learn.history.run, id(learn.opt), len(learn.cbs),
             [m.training for m in learn.model.modules()], random.getstate(), np.random.get_state()[1].tolist(), sorted(vars(learn)))
    return tensors, grads, opt, plain

def assert_same_state(a, b):
    for p,q in zip(a[:3], b[:3]):
        assert len(p) == len(q)
        for s,t in zip(p, q): assert (s is None) == (t is None) and (s is None or torch.equal(s, t))
    assert a[3] == b[3]

@pytest.mark.parametrize('fitted', [False, True])
@pytest.mark.parametrize('error', [None, ValueError, KeyboardInterrupt, CancelFitException])
@pytest.mark.parametrize('cls', [TrainLearner, MomentumLearner])
def test_lr_find_puts_everything_back(fitted, error, cls):
    dls = get_dls(shuffle=True, generator=torch.Generator().manual_seed(3))
    del dls.valid   # never asked for
    learn = cls(Noisy(), dls, F.cross_entropy, 0.1, opt_func=partial(optim.Adam, weight_decay=0.))
    if fitted: learn.fit(1, valid=False)
    learn.model.net[1].eval()
    class RandomCB(Callback):
        def after_batch(self, learn):
            random.random(); np.random.rand()
            if error and learn.iter == 2: raise error
    learn.cbs.append(RandomCB())
    before = state_of(learn)
    last = learn.model.last
    if error in (None, CancelFitException):
        with contextlib.suppress(ValueError): learn.lr_find(start_lr=1e-3, plot=False)
    else:
        with pytest.raises(error): learn.lr_find(start_lr=1e-3, plot=False)
    assert_same_state(before, state_of(learn))
    assert (learn.model.last is None) == (last is None)

def test_lr_find_changes_nothing_in_what_follows():
    def run(find):
        dls = get_dls(shuffle=True)
        learn = get_learner(dls=dls)
        torch.manual_seed(5)
        if find: learn.lr_find(start_lr=1e-3, plot=False)
        learn.fit(2)
        return learn.model
    assert same(run(True), run(False))

def test_lr_find_suggests_and_draws_on_its_own_axes():
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    fig, mine = plt.subplots()
    found = get_learner().lr_find(start_lr=1e-3)
    assert mine.lines == [] or len(mine.lines) == 0
    assert found._fields == ('steepest', 'valley', 'minimum') and all(1e-4 <= o < 100 for o in found)
    ax, = found.fig.axes
    assert len(ax.lines) == 4 and len(ax.lines[0].get_xdata()) == len(found.lrs)
    assert get_learner().lr_find(start_lr=1e-3, ax=mine).fig is fig and len(mine.lines) == 4
    plt.close('all')

def test_lr_find_takes_the_real_error_out():
    learn = Learner(nn.Linear(3, 2), get_dls(), F.cross_entropy, cbs=TrainCB())
    with pytest.raises(RuntimeError, match='shape'): learn.lr_find()
    with pytest.raises(ValueError, match='finite losses are too few'): get_learner().lr_find(start_lr=1e9, gamma=1e9, max_epochs=1)

def test_lr_finder_as_a_callback_and_negative_losses():
    class NegativeLearner(TrainLearner):
        def get_loss(self): self.loss = F.cross_entropy(self.preds, self.batch[1]) - 5
    finder = LRFinderCB(plot=False)
    get_learner(cls=NegativeLearner).fit(20, lr=1e-4, cbs=finder)
    assert len(finder.lrs) > 10 and finder.losses[0] < 0
    np.testing.assert_allclose(np.diff(np.log(finder.lrs)), np.log(1.3))


# ---- the rest

def test_show_loop(capsys):
    get_learner([MetricsCB(), ProgressCB()]).show_loop()
    out = capsys.readouterr().out.splitlines()
    names = [o.split()[0] for o in out]
    assert names == [o for o in events if o in names]
    assert out[0].split(maxsplit=1)[1] == 'MetricsCB(0), ProgressCB(1)'
    assert not any('nobody' in o for o in out)
    Learner(get_model()).show_loop()
    assert capsys.readouterr().out.count('nobody') == 5
    get_learner(cls=TrainLearner).show_loop()
    assert 'TrainLearner.predict' in capsys.readouterr().out

def test_names_of_the_module():
    ns = {}
    exec('from miniai.learner import *', ns)
    for nm in '''to_cpu Callback CancelFitException CancelBatchException CancelEpochException run_cbs with_cbs Learner TrainLearner
                 MomentumLearner MetricsCB DeviceCB TrainCB ProgressCB SingleBatchCB LRFinderCB'''.split(): assert ns[nm] is not None
    assert 'lr_find' not in ns and 'show_loop' not in ns and None not in [ns[o] for o in module.__all__]

def test_import_is_light():
    code = 'import sys, miniai.learner; print(*[o for o in ("datasets", "matplotlib", "IPython", "torcheval", "pandas") if o in sys.modules])'
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
    assert out.split() == []


def test_record_uses_the_phase_of_the_fit_and_no_graph_stays():
    class Share(Callback):
        def after_loss(self, learn): learn.record('share', 'half', learn.loss/2)
    x, y = torch.randn(8, 3), torch.randn(8, 1)
    learn = TrainLearner(nn.Linear(3, 1), SimpleNamespace(train=[(x, y)]*3, valid=[(x, y)]*2), F.mse_loss, lr=.1, cbs=Share())
    learn.fit(1)
    assert [len(learn.history.series('share', 'half', phase)) for phase in ('train', 'valid')] == [3, 2]
    learn.fit(1, valid=False)
    assert not learn.loss.requires_grad and not learn.preds.requires_grad
    copy.deepcopy(learn.cbs[0])

def test_misplaced_cancel_names_who_raised_it():
    class Late(Callback):
        def after_fit(self, learn): raise CancelBatchException()
    x, y = torch.randn(8, 3), torch.randn(8, 1)
    learn = TrainLearner(nn.Linear(3, 1), SimpleNamespace(train=[(x, y)], valid=[(x, y)]), F.mse_loss, lr=.1, cbs=Late())
    with pytest.raises(RuntimeError, match='raised in callback Late at event `after_fit`'): learn.fit(1)


# ---- refused at once

@pytest.mark.parametrize('inner', ['fit', 'lr_find', 'summary', 'capture_preds'])
def test_a_fit_within_a_fit_is_refused(inner):
    import miniai.augment   # noqa: F401  which gives the Learner `summary` and `capture_preds`
    from miniai.activations import ActivationStats
    class Inner(Callback):
        def after_epoch(self, learn):
            if learn.training: getattr(learn, inner)()
    model, stats = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), ActivationStats(nn.ReLU)
    batches = [(torch.randn(4, 3), torch.randint(0, 2, (4,))) for _ in range(3)]
    learn = Learner(model, SimpleNamespace(train=batches, valid=batches), F.cross_entropy, cbs=[TrainCB(), stats, Inner()])
    with pytest.raises(RuntimeError, match='in a fit'): learn.fit(2)
    assert not learn.trial and len(learn.history.series('batch', 'loss')) == 3 and not count_hooks(model)
    learn.cbs.pop()
    learn.fit(1)   # it is over
    assert len(learn.history.series('batch', 'loss', 'valid')) == 3

@pytest.mark.parametrize('change, text', [(dict(model=lambda x: x), 'the model is .*function.*nn.Module'), (dict(lr='0.1'), r"lr is '0.1' \(str\)"),
                                          (dict(dls=SimpleNamespace(train=[1], valid=None)), 'no loader `.valid`')])
def test_what_cannot_be_fitted(change, text):
    batches = [(torch.randn(4, 3), torch.randint(0, 2, (4,)))]
    learn = Learner(nn.Linear(3, 2), SimpleNamespace(train=batches, valid=batches), F.cross_entropy, cbs=TrainCB())
    vars(learn).update(change)
    with pytest.raises((TypeError, ValueError), match=text): learn.fit(1)


def test_wrong_arguments_are_said():
    def learner(**kw): return Learner(nn.Linear(2, 1), get_dls(), **{'loss_func': F.mse_loss, 'cbs': TrainCB(), **kw})
    for n in '2', 2.5, -1, None:
        with pytest.raises(ValueError, match='fit: n_epochs is'): learner().fit(n)
    with pytest.raises(TypeError, match=r'the class MSELoss; give an instance of it, `MSELoss\(\)`'):
        learner(loss_func=nn.MSELoss).fit(1)
    model = nn.Linear(2, 1)
    with pytest.raises(TypeError, match=r'opt_func is SGD \(SGD\); give what'):
        learner(opt_func=optim.SGD(model.parameters(), .1)).fit(1)
    learner().fit(0)


def test_methods_of_other_rooms_are_there_from_the_start():
    "In a new program, where nobody has imported those; and `help` shows them as they are."
    code = '''
import inspect, sys
from torch import nn
from miniai.learner import Learner
learn = Learner(nn.Linear(1, 1))
assert 'miniai.watch' not in sys.modules and not hasattr(learn, 'nonsense')
for name in 'watch unwatch diagnose report summary show_image_batch capture_preds tta lr_find show_loop'.split():
    assert name in dir(learn), name
    method = getattr(learn, name)
    assert method.__self__ is learn and method.__doc__ and 'args' not in inspect.signature(method).parameters, name
'''
    subprocess.run([sys.executable, '-c', code], check=True)


def test_an_inspector_has_the_methods_of_later_rooms():
    "In a new program, where nobody has imported those."
    code = '''
from miniai.inspector import Inspector
from miniai.lens import OutputNorm
for name in 'diagnose', 'report', 'check': assert getattr(Inspector([OutputNorm()]), name).__func__ is getattr(Inspector, name)
'''
    subprocess.run([sys.executable, '-c', code], check=True)


def test_what_records_is_left_out_of_a_trial():
    class Recorder(Callback):
        in_trial, n = False, 0
        def after_batch(self, learn): self.n += 1
    recorder = Recorder()
    learn = get_learner([recorder])
    learn.lr_find(start_lr=1e-3, plot=False)
    assert recorder.n == 0 and not learn.trial
    learn.fit(1, valid=False)
    assert recorder.n == 3
