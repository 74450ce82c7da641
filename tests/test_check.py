"One batch tried out before a fit: ten wrong set-ups are named, ten right ones left alone, and nothing is changed."
import copy
from functools import partial
from types import SimpleNamespace

import pytest
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset

import miniai.check  # noqa: F401  (gives the doors `check`)
from miniai.accel import AccumulateCB
from miniai.callback import Callback, CancelEpochException, CancelFitException
from miniai.checkpoint import CheckpointCB
from miniai.device import set_seed
from miniai.hooks import count_hooks
from miniai.inspector import Inspector, InspectorCB
from miniai.learner import Learner, LRFinderCB, MetricsCB, ProgressCB, SingleBatchCB, TrainCB, TrainLearner
from miniai.loggers import LogCB
from miniai.report import ReportCB
from miniai.sgd import EMACB, BatchSchedCB, EpochSchedCB, OneCycleCB
from miniai.shortcuts import CSVLogCB, ShortEpochCB
from miniai.stopping import EarlyStoppingCB, SaveBestCB
from shared import ClosureCB

x = torch.randn(256, 20, generator=torch.Generator().manual_seed(0))
side, corner = (x[:, :1] > 0).float(), (x[:, 0] > 0).long() + 2*(x[:, 1] > 0).long()
pictures = torch.randn(256, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def mlp(*head, out=4): return nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, out), *head)
def data(*parts): return SimpleNamespace(train=list(zip(*(o.split(64) for o in parts))), valid=[parts])


def learner(model, *parts, loss=F.cross_entropy, lr=1e-2, opt=optim.Adam, n_inp=1, cbs=()):
    return Learner(model, data(*parts), loss, lr, [TrainCB(n_inp), *cbs], opt)


class Cut(nn.Module):
    def __init__(self): super().__init__(); self.a, self.b = nn.Linear(20, 16), nn.Linear(16, 4)
    def forward(self, x): return self.b(F.relu(self.a(x).detach()))


class Listed(nn.Module):
    def __init__(self): super().__init__(); self.parts, self.out = [nn.Linear(20, 16)], nn.Linear(16, 4)
    def forward(self, x): return self.out(F.relu(self.parts[0](x)))


class NoStepCB(TrainCB):
    def step(self, learn): pass


def early_optimizer():
    "The optimizer is made, then the head is another one."
    model = mlp()
    learn = TrainLearner(model, data(x, corner), F.cross_entropy, opt_func=None)
    learn.opt = optim.Adam(model.parameters(), 1e-2)
    model[2] = nn.Linear(32, 4)
    return learn


def dead():
    model = mlp()
    with torch.no_grad(): model[0].bias.fill_(-10)
    return learner(model, x, corner)


wrong = dict(
    one_unit_softmax=(lambda: learner(mlp(nn.Softmax(1), out=1), x, side, loss=nn.BCELoss()), {'one_unit_softmax'}),
    more_classes_than_units=(lambda: learner(mlp(out=3), x, corner), {'does_not_run'}),
    class_ids_for_one_unit=(lambda: learner(mlp(out=1), x, corner[:, None].float(), loss=nn.BCEWithLogitsLoss()), {'class_ids'}),
    softmax_before_cross_entropy=(lambda: learner(mlp(nn.Softmax(1)), x, corner), {'softmax_before_loss'}),
    optimizer_made_too_early=(early_optimizer, {'not_trained'}),
    detached_layer=(lambda: learner(Cut(), x, corner), {'no_gradient'}),
    layers_in_a_list=(lambda: learner(Listed(), x, corner), {'unregistered'}),
    rate_of_zero=(lambda: learner(mlp(), x, corner, lr=0.), {'unchanged', 'learning_rate_low'}),
    no_step=(lambda: Learner(mlp(), data(x, corner), F.cross_entropy, .01, NoStepCB()), {'unchanged', 'learning_rate_low'}),
    stretched_shapes=(lambda: learner(mlp(out=1), x, x[:, 0] + x[:, 1], loss=nn.MSELoss()), {'shapes_differ'}),
    inputs_of_bytes=(lambda: learner(mlp(), (x*50 + 128).clamp(0, 255).round(), corner), {'input_scale'}),
    targets_unscaled=(lambda: learner(mlp(out=1), x, 1e5 + 3e4*x[:, :1], loss=nn.MSELoss()), {'target_scale'}),
    dead_at_the_start=(dead, {'dead_units'}),
    constant_inputs=(lambda: learner(mlp(), 0*x + .5, corner), {'constant_output', 'repeated_samples'}))


@pytest.mark.filterwarnings('ignore')   # PyTorch's own, of shapes
@pytest.mark.parametrize('name', wrong)
def test_wrong_set_up_is_named(name):
    set_seed(0)
    make, names = wrong[name]
    found = make().check()
    assert names & {o.rule for o in found.of('error', 'warning')}, found


class Recurrent(nn.Module):
    def __init__(self): super().__init__(); self.rnn, self.head = nn.LSTM(4, 32, batch_first=True), nn.Linear(32, 4)
    def forward(self, x): return self.head(self.rnn(x.view(-1, 5, 4))[0][:, -1])


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.head = nn.Embedding(9, 16), nn.Linear(16, 4)
        self.body = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, .1, batch_first=True), 2, enable_nested_tensor=False)
    def forward(self, x): return self.head(self.body(self.emb(x)).mean(1))


class Tabular(nn.Module):
    def __init__(self): super().__init__(); self.emb, self.body = nn.Embedding(9, 4), nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.BatchNorm1d(32), nn.Linear(32, 4))
    def forward(self, cat, cont): return self.body(torch.cat([self.emb(cat), cont], 1))


def frozen_base():
    base = nn.Sequential(nn.Linear(20, 64), nn.ReLU()).requires_grad_(False)
    return learner(nn.Sequential(base, nn.Linear(64, 4)), x, corner)


ids = torch.randint(9, (256, 6), generator=torch.Generator().manual_seed(2))
right = dict(
    mlp=lambda: learner(mlp(), x, corner),
    cnn_batchnorm=lambda: learner(nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(),
                                                nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)), pictures, corner, opt=partial(optim.SGD, momentum=.9), lr=.05),
    regression=lambda: learner(mlp(out=1), x, x[:, :1] + x[:, 1:2].sin(), loss=nn.MSELoss()),
    binary=lambda: learner(mlp(out=1), x, side, loss=nn.BCEWithLogitsLoss()),
    lstm=lambda: learner(Recurrent(), x, corner),
    transformer=lambda: learner(Attends(), ids, corner, lr=1e-3, opt=optim.AdamW),
    frozen_base=frozen_base,
    tabular_embeddings=lambda: learner(Tabular(), ids[:, 0], x, corner, n_inp=2),
    log_softmax=lambda: learner(mlp(nn.LogSoftmax(1)), x, corner, loss=nn.NLLLoss()),
    dropout=lambda: learner(nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Dropout(.5), nn.Linear(64, 4)), x, corner))


@pytest.mark.parametrize('name', right)
def test_right_set_up_is_left_alone(name):
    set_seed(0)
    found = right[name]().check()
    assert not found.of('error', 'warning'), found


@pytest.mark.parametrize('name', right)
def test_by_hand_it_is_the_same(name):
    set_seed(0)
    learn = right[name]()
    opt, n = learn.opt_func(learn.model.parameters(), learn.lr), learn.cbs[0].n_inp
    found = Inspector().check(learn.model, learn.dls.train[0], learn.loss_func, opt, steps=50)
    assert not found.of('error', 'warning') and not opt.state and n == len(learn.dls.train[0]) - 1
    assert set(found.ledger.changed) == {True} or name == 'frozen_base'


def state_of(learn):
    parts = [*learn.model.state_dict().values(), *(p.grad for p in learn.model.parameters()), torch.get_rng_state(), learn.dls.train.generator.get_state()]
    return copy.deepcopy([None if o is None else o.clone() for o in parts])


class CountsCB(Callback):
    def __init__(self): self.n = 0
    def after_batch(self, learn): self.n += 1


def test_nothing_is_changed():
    set_seed(0)
    model = nn.Sequential(nn.Linear(20, 16), nn.BatchNorm1d(16), nn.Dropout(.2), nn.Linear(16, 4))
    loader = DataLoader(TensorDataset(x, corner), 64, shuffle=True, generator=torch.Generator().manual_seed(3))
    counts = CountsCB()
    learn = TrainLearner(model, SimpleNamespace(train=loader, valid=loader), F.cross_entropy, .1, [MetricsCB(), ProgressCB(), counts])
    learn.watch()
    learn.fit(1, valid=False)
    model.eval()
    model[0].weight.grad = torch.ones(16, 20)
    before, opt, n, rows, attrs = state_of(learn), copy.deepcopy(learn.opt.state_dict()), counts.n, len(learn.history), dict(vars(learn))
    hooks = count_hooks(model)
    found = learn.check()
    assert all(a is None and b is None or torch.equal(a, b) for a, b in zip(before, state_of(learn), strict=True))
    assert opt == learn.opt.state_dict() and not model.training and (counts.n, len(learn.history), count_hooks(model)) == (n, rows, hooks)
    assert {nm: id(o) for nm, o in vars(learn).items()} == {nm: id(o) for nm, o in attrs.items()}
    assert 'Left out: MetricsCB, ProgressCB' in str(found) and len(found.ledger) == 6


class Dies(Callback):
    def after_batch(self, learn):
        if learn.n_steps == 6: raise KeyboardInterrupt


class EndsEpochs(Callback):
    "As one might write a short epoch."
    def before_batch(self, learn):
        if learn.iter == 3: raise CancelEpochException()


def interrupted(learn, folder):
    with pytest.raises(KeyboardInterrupt): learn.fit(2, valid=False, cbs=Dies())


def resumed(learn, folder):
    learn.fit(2, valid=False, cbs=[save := CheckpointCB(folder, every=2)])
    learn.cbs.append(save)
    learn.fit(3, valid=False, resume=folder)


def held(*cbs): return lambda learn, folder: learn.cbs.extend(cbs)
def with_files(make):
    def before(learn, folder):
        learn.cbs.append(make(folder))
        learn.fit(1)
    return before


before = dict(
    watched=lambda learn, folder: learn.watch(),
    watched_each_step=lambda learn, folder: learn.watch(every=1),
    watched_and_fitted=lambda learn, folder: (learn.watch(every=1, ranks=True), learn.fit(2, valid=False)),
    no_more_watched=lambda learn, folder: (learn.watch(every=1), learn.fit(1, valid=False), learn.unwatch()),
    fitted=lambda learn, folder: learn.fit(3, valid=False),
    fitted_so_many_steps=lambda learn, folder: learn.fit(max_steps=3, valid=False),
    checked=lambda learn, folder: learn.check(steps=3),
    interrupted=interrupted, resumed=resumed,
    epochs_of_a_size=lambda learn, folder: setattr(learn, 'epoch_sz', 3),
    epochs_of_a_size_fitted=lambda learn, folder: (setattr(learn, 'epoch_sz', 3), learn.fit(2, valid=False)),
    short_epochs=held(ShortEpochCB(.1)), epochs_of_two=held(ShortEpochCB(2)), epochs_that_end=held(EndsEpochs()),
    accumulated=held(AccumulateCB(3)), one_batch=held(SingleBatchCB()), finder=held(LRFinderCB(plot=False)),
    stopping=held(EarlyStoppingCB(patience=1), SaveBestCB()), averaged=held(EMACB()),
    schedules=held(BatchSchedCB(partial(optim.lr_scheduler.StepLR, step_size=1, gamma=0.)), EpochSchedCB(partial(optim.lr_scheduler.StepLR, step_size=1)), OneCycleCB()),
    inspected=held(InspectorCB()), inspected_and_fitted=lambda learn, folder: (learn.cbs.append(InspectorCB()), learn.fit(1, valid=False)),
    logs_of_dicts=held(LogCB(print)), metrics=held(MetricsCB(), ProgressCB()),
    reports=with_files(lambda folder: ReportCB(folder/'report.html')), checkpoints=with_files(lambda folder: CheckpointCB(folder, every=1)),
    logs=with_files(lambda folder: CSVLogCB(folder/'log.csv')))


def told(found):
    lines = [o for o in found.tried if not o.startswith('Left out')]
    return [lines[0].split(',')[0], *lines[1:]], [(o.rule, o.level, o.layers, o.text) for o in found], found.checked, found.ledger.values.tolist()


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('name', before)
def test_it_does_not_count_what_was_before_or_how_long_an_epoch_is(name, tmp_path, capsys):
    "All of it, and the right numbers where it does not learn."
    def make():
        set_seed(0)
        return learner(mlp(), x, corner, lr=1e-9, opt=optim.SGD)
    learn, fresh = make(), make()
    before[name](learn, tmp_path)
    fresh.model.load_state_dict(learn.model.state_dict())
    files, rows, attrs, opt = {o: o.read_bytes() for o in tmp_path.rglob('*') if o.is_file()}, len(learn.history), dict(vars(learn)), copy.deepcopy(learn.opt and learn.opt.state_dict())
    weights, tables, cbs = state_of_model(learn), {nm: len(o) for nm, o in learn.histories.items()}, list(learn.cbs)
    capsys.readouterr()
    found, wanted = learn.check(steps=40), fresh.check(steps=40)
    assert told(found) == told(wanted) and found.tried[0].startswith('40 steps with one batch') and 'asked for' not in found.tried[0]
    assert {'unchanged', 'weights_barely_moved', 'one_batch_not_learned', 'learning_rate_low'} & {o.rule for o in found} and len(found.checked) > 40
    assert {o: o.read_bytes() for o in tmp_path.rglob('*') if o.is_file()} == files and not capsys.readouterr().out
    assert vars(learn).keys() == attrs.keys() and all(o is attrs[nm] for nm, o in vars(learn).items()) and len(learn.history) == rows
    assert {nm: len(o) for nm, o in learn.histories.items()} == tables and list(learn.cbs) == cbs and (learn.opt and learn.opt.state_dict()) == opt
    assert all(torch.equal(a, b) for a, b in zip(weights, state_of_model(learn), strict=True)) and count_hooks(learn.model) == 0


def state_of_model(learn): return [o.clone() for o in learn.model.state_dict().values()]


def test_a_learner_that_learns_learns_while_it_is_watched_in_short_epochs():
    set_seed(0)
    learn = learner(mlp(), x, corner, cbs=[ShortEpochCB(.1)])
    learn.watch(every=1)
    learn.fit(2)
    found = learn.check()
    assert not found.of('error', 'warning') and set(found.ledger.changed) == {True} and set(found.ledger.gradient) == {'non-zero'}
    assert found.tried[0].startswith('100 steps') and found.evidence.loss().steps.tolist() == list(range(100))


def test_accumulation_is_part_of_it():
    learn = learner(mlp(), x, corner, cbs=[AccumulateCB(3)])
    found = learn.check(steps=21)
    assert found.tried[0].startswith('21 steps') and len(found.evidence.loss()) == 63


@pytest.mark.parametrize('event', ['before_batch', 'after_batch'])
def test_a_callback_that_ends_the_fit_is_told(event):
    def ends(learn):
        if learn.n_steps == 5: raise CancelFitException()
    cb = Callback()
    setattr(cb, event, ends)
    found = learner(mlp(), x, corner, cbs=[cb]).check(steps=20)
    assert '20 were asked for, but a callback ended the fit' in found.tried[0] and found.tried[0].startswith(f'{5 + (event == "after_batch")} steps')


def test_an_inspector_that_is_attached_is_left_alone():
    model, inspector = mlp(), Inspector()
    inspector.attach(model)
    opt = optim.SGD(model.parameters(), .1)
    F.cross_entropy(model(x), corner).backward()
    opt.step()
    step, rows = inspector.step, len(inspector.history)
    assert told(inspector.check(model, (x, corner), F.cross_entropy, opt, steps=20)) == told(Inspector().check(model, (x, corner), F.cross_entropy, opt, steps=20))
    assert (inspector.step, len(inspector.history)) == (step, rows) and inspector.attached
    inspector.detach()


def test_an_optimizer_that_knows_the_model_steps_the_copy_only():
    "Its function ignores the parameters it is given."
    model = mlp()
    before = model[0].weight.detach().clone()
    learn = learner(model, x, corner, opt=lambda params, lr: optim.Adam(model.parameters(), lr))
    found = learn.check()
    assert not found.of('error', 'warning') and torch.equal(before, model[0].weight) and model[0].weight.grad is None
    assert set(found.ledger.changed) == {True}


def test_an_optimizer_of_closures():
    learn = Learner(mlp(out=1), data(x, side), nn.MSELoss(), .5, ClosureCB(), optim.LBFGS)
    found = learn.check(steps=10)
    assert set(found.ledger.changed) == {True} and not found.of('error'), found


class Broken(nn.Module):
    def __init__(self): super().__init__(); self.lin = nn.Linear(20, 4)
    def forward(self, x): raise RuntimeError('out of order')


def test_a_model_that_raises_is_a_finding():
    found = learner(Broken(), x, corner).check()
    assert found[0].rule == 'does_not_run' and 'forward pass fails: RuntimeError: out of order' in found[0].text and not found.ledger.changed.any()
    assert 'Inputs: [64, 20] torch.float32' in str(found) and 'does_not_run' in found._repr_html_()


def test_a_callback_that_cannot_be_copied_is_left_out():
    class Holds(Callback):
        def __init__(self): self.file = open(__file__)
    cb = Holds()
    try: assert 'Left out: Holds.' in str(learner(mlp(), x, corner, cbs=[cb]).check(steps=3))
    finally: cb.file.close()


def test_its_time_is_bounded():
    found = learner(mlp(), x, corner).check(steps=10**6, seconds=.2)
    assert 1 <= len(found.evidence.loss()) < 10**4 and '1000000 were asked for, but the time was over' in found.tried[0]


def test_a_batch_that_is_changed_in_place_is_whole_in_each_step():
    class Adds(nn.Module):
        def __init__(self): super().__init__(); self.lin = nn.Linear(20, 4)
        def forward(self, x): return self.lin(x.add_(100.))
    own = x[:64].clone()
    found = TrainLearner(Adds(), SimpleNamespace(train=[(own, corner[:64])]), F.cross_entropy, 1e-4).check(steps=20)
    assert torch.equal(own, x[:64]) and found.evidence.track('inputs', 'entries').values[:, 1].max() < 110


@pytest.mark.parametrize('dls,text', [
    (SimpleNamespace(train=[]), 'dls.train, a list, has no batch'), (SimpleNamespace(train=iter([(x, corner)])), 'give `batch=`'),
    (SimpleNamespace(valid=[]), 'give `batch=`'), (None, 'give `batch=`')])
def test_without_a_batch_it_says_so(dls, text):
    with pytest.raises(ValueError, match=text): TrainLearner(mlp(), dls, F.cross_entropy, .1).check()


def test_a_learner_in_a_bad_state_says_so():
    with pytest.raises(TypeError, match='must be an nn.Module'): TrainLearner(mlp, data(x, corner), F.cross_entropy, .1).check()
    with pytest.raises(ValueError, match='no learning rate'): TrainLearner(mlp(), data(x, corner), F.cross_entropy, None).check()
    with pytest.raises(ValueError, match='nothing does `predict`'): Learner(mlp(), data(x, corner), F.cross_entropy, .1).check()
    with pytest.raises(TypeError, match='loss is the class'): learner(mlp(), x, corner, loss=nn.MSELoss).check()
    with pytest.raises(TypeError, match='give an nn.Module'): Inspector().check(mlp, (x, corner), F.cross_entropy, None)
    class Nested(Callback):
        def after_batch(self, learn): learn.check()
    with pytest.raises(RuntimeError, match='is in a fit'): learner(mlp(), x, corner, cbs=[Nested()]).fit(1)


def test_a_note_about_the_first_loss_says_what_to_try():
    from miniai.check import judged_losses
    from miniai.evidence import Track
    steps = np.arange(3)
    for first, cause in ((9., 'too large'), (.1, 'trained before')):
        note, = judged_losses(Track(steps, steps, steps, np.array([first, .1, .1])), dict(guessing=1.))
        assert cause in note.causes[0] and note.tries
