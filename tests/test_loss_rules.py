"What enters the loss is recorded without a read of the device, and tells faults between head, loss and targets."
import gc, math, warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from shared import CountReads, ReadsPerStep
from torch import nn

from miniai.datasets import DataLoaders
from miniai.device import set_seed
from miniai.diagnose import diagnose
from miniai.evidence import Evidence, Facts, likened
from miniai.history import History
from miniai.inspector import Inspector
from miniai.learner import Learner, TrainCB, TrainLearner
from miniai.lens import LossMetrics, ParameterGradientGeometry, ParameterUpdateGeometry
from miniai.loss_stats import LossStats, entry_stats, fraction_right, is_affine, marks_of, padding_that_counts, samples_of
from miniai.sgd import BatchSchedCB


class Loaders:
    "Batches of 32 of 20 columns and of what `f` makes of them."
    def __init__(self, f, bs=32, n=512):
        x = torch.randn(n, 20, generator=torch.Generator().manual_seed(0))
        self.train = self.valid = list(zip(x.split(bs), f(x).split(bs)))


def fitted(head, f, loss, lr=.05, epochs=8):
    set_seed(0)
    learn = Learner(nn.Sequential(nn.Linear(20, 32), nn.ReLU(), *head), Loaders(f), loss, lr, [TrainCB(), LossStats()])
    learn.fit(epochs)
    return {o.rule for o in learn.diagnose().of('error', 'warning')}


side = lambda x: (x[:, :1] > 0).float()
corner = lambda x: (x[:, 0] > 0).long() + 2*(x[:, 1] > 0).long()


@pytest.mark.parametrize('rule,head,f,loss', [
    ('one_unit_softmax', [nn.Linear(32, 1), nn.Softmax(1)], side, nn.BCELoss()),
    ('class_ids', [nn.Linear(32, 1)], lambda x: corner(x)[:, None].float(), nn.BCEWithLogitsLoss()),
    ('shapes_differ', [nn.Linear(32, 1)], lambda x: x[:, 0], nn.MSELoss()),
    ('head_range', [nn.Linear(32, 1), nn.Sigmoid()], lambda x: 5*x[:, :1], nn.MSELoss()),
    ('loss_input', [nn.Linear(32, 4), nn.ReLU()], corner, nn.CrossEntropyLoss()),
    ('exclusive_classes', [nn.Linear(32, 4)], lambda x: F.one_hot(corner(x), 4).float(), nn.BCEWithLogitsLoss())])
def test_fault_is_named(rule, head, f, loss):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')   # PyTorch warns of shapes
        assert rule in fitted(head, f, loss)


@pytest.mark.parametrize('head,f,loss', [
    ([nn.Linear(32, 1), nn.Sigmoid()], side, nn.BCELoss()), ([nn.Linear(32, 1)], side, nn.BCEWithLogitsLoss()),
    ([nn.Linear(32, 4)], corner, nn.CrossEntropyLoss()), ([nn.Linear(32, 4), nn.LogSoftmax(1)], corner, nn.NLLLoss()),
    ([nn.Linear(32, 4), nn.LogSoftmax(1)], corner, nn.CrossEntropyLoss()), ([nn.Linear(32, 1)], lambda x: x[:, :1], nn.MSELoss()),
    ([nn.Linear(32, 1), nn.Tanh()], lambda x: x[:, :1].tanh(), nn.MSELoss())])
def test_right_heads_are_left_alone(head, f, loss): assert not fitted(head, f, loss)


def test_nothing_is_read_in_a_step():
    with CountReads() as counter:
        reads = ReadsPerStep(counter)
        learn = Learner(nn.Linear(20, 1), Loaders(lambda x: x[:, :1]), F.mse_loss, .01, [TrainCB(), LossStats(), reads])
        learn.fit(1, valid=False)
    assert not any(reads.per_step), reads.per_step


def test_a_model_that_is_tried_stays_as_it_is():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(.5), nn.Linear(4, 2))
    before, rng = {nm: o.clone() for nm, o in model.state_dict().items()}, torch.get_rng_state()
    assert is_affine(model, torch.randn(3, 4, generator=torch.Generator().manual_seed(1))) and model.training
    assert torch.equal(rng, torch.get_rng_state()) and all(torch.equal(o, before[nm]) for nm, o in model.state_dict().items())


def test_a_file_says_the_same(tmp_path):
    set_seed(0)
    learn = Learner(nn.Sequential(nn.Linear(20, 1), nn.Softmax(1)), Loaders(side), nn.BCELoss(), .05, [TrainCB(), LossStats()])
    learn.fit(4)
    found = learn.diagnose()
    found.evidence.save(tmp_path/'run.jsonl')
    assert [o.to_dict() for o in diagnose(tmp_path/'run.jsonl')] == [o.to_dict() for o in found]


def test_inputs_that_cannot_be_measured_are_a_gap():
    "A sparse batch: one warning, the fit goes on, and the other parts are recorded."
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.weight = nn.Parameter(torch.randn(4, 1))
        def forward(self, x): return torch.sparse.mm(x, self.weight)
    stats = LossStats()
    batches = [(torch.randn(6, 4).relu().to_sparse(), torch.randn(6, 1))]*3
    learn = TrainLearner(Net(), DataLoaders(batches, batches[:1]), cbs=[stats])
    with pytest.warns(UserWarning, match="LossStats: 'inputs' could not be measured"): learn.fit(1)
    assert {nm for _, nm, _ in stats.history.keys()} == {'predictions', 'targets'} and learn.n_steps == 3


class Hidden(nn.Module):
    "Has its first layer in a list."
    def __init__(self): super().__init__(); self.parts, self.out = [nn.Linear(20, 16)], nn.Linear(16, 4)
    def forward(self, x): return self.out(F.relu(self.parts[0](x)))


def looped(model=None, f=corner, zero=True, anew=False, train=True, loss=None, n=3, lr=.05, sort=False, decay=0.):
    "Rules with an error or a warning in a loop of one's own, watched by an inspector."
    set_seed(0)
    model = model or nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Dropout(.1), nn.Linear(32, 4))
    loss, make = loss or nn.CrossEntropyLoss(), lambda: torch.optim.Adam(model.parameters(), lr, weight_decay=decay)
    x, opt = torch.randn(640, 20, generator=torch.Generator().manual_seed(0)), make()
    if sort: x = x[f(x).argsort()]
    inspector = Inspector(visualizer=None).attach(model, optimizer=None if anew else opt, loss_fn=loss)
    for _ in inspector.range(n):
        model.train(train)
        for xb, yb in zip(x.split(32), f(x).split(32)):
            if anew: opt = make()
            if zero: opt.zero_grad()
            loss(model(xb), yb).backward()
            if zero == 'late': opt.zero_grad()
            opt.step()
    return {o.rule for o in inspector.detach().diagnose().of('error', 'warning')}


@pytest.mark.parametrize('rule,kw', [
    ('gradients_added_up', dict(zero=False)), ('gradients_added_up', dict(zero='late')), ('optimizer_is_new', dict(anew=True)), ('wrong_mode', dict(train=False)),
    ('sorted_batches', dict(sort=True)), ('weight_decay_high', dict(decay=3.)), ('weights_barely_moved', dict(lr=1e-6)),
    ('summed_loss', dict(loss=nn.CrossEntropyLoss(reduction='sum'), lr=1.))])
def test_fault_of_a_loop_is_named(rule, kw): assert rule in looped(**kw)


@pytest.mark.parametrize('head,found', [(nn.Softmax(1), True), (nn.LogSoftmax(1), False)])
def test_a_divergence_of_probabilities_is_named(head, found):
    "KLDivLoss wants their logarithms; without, it is below zero."
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 4), head)
    assert ('loss_input' in looped(model, lambda x: (2*x[:, :4]).softmax(1), loss=nn.KLDivLoss(reduction='batchmean'))) == found


def test_gradients_that_are_set_by_hand_are_gradients():
    model, loss_fn = nn.Linear(8, 1), nn.MSELoss()
    opt = torch.optim.Adam(model.parameters(), .05)
    inspector = Inspector(visualizer=None).attach(model, optimizer=opt, loss_fn=loss_fn)
    for x in torch.randn(30, 32, 8, generator=torch.Generator().manual_seed(0)):
        for p, grad in zip(model.parameters(), torch.autograd.grad(loss_fn(model(x), x[:, :1]), [*model.parameters()])): p.grad = grad
        opt.step()
        opt.zero_grad()
    assert not inspector.detach().diagnose('gradients_added_up')


def weak(apart):
    "Numbers that are mostly noise, more of it in validation; or whose targets there are of other samples."
    set_seed(3)
    x, noise = torch.randn(1600, 8), torch.randn(1600, 1)
    noise[1200:] *= 1.15
    y = .6*x[:, :1] + noise
    if apart: y[1200:] = .6*x[1200:, :1].roll(1, 0) + noise[1200:]
    parts = [[*zip(x[o].split(40), y[o].split(40))] for o in (slice(1200), slice(1200, None))]
    learn = Learner(nn.Linear(8, 1), SimpleNamespace(train=parts[0], valid=parts[1]), F.mse_loss, .02, [TrainCB()])
    learn.watch(every=1)
    learn.fit(6)
    return [o.rule for o in learn.diagnose('learned_by_heart')]


def test_validation_is_measured_by_its_own_targets():
    assert not weak(False)
    assert weak(True) == ['learned_by_heart']


def test_what_guessing_costs_is_known_as_well_as_it_was_recorded():
    "Nothing is learned; the variance of the targets seems larger in training, and smaller in validation, by chance."
    def plateau(train):
        history = History()
        for step in range(24):
            for phase,std in dict(train=1.02, valid=.99).items():
                row = [dict(mean=0., std=std).get(o, 0.) for o in entry_stats]
                history.record('targets', 'entries', torch.tensor(row).numpy(), step=step, phase=phase, samples=64)
        for epoch in range(6):
            for phase,loss in dict(train=train, valid=1.).items(): history.record('epoch', 'loss', loss, step=4*epoch+3, epoch=epoch, phase=phase)
        return diagnose(Evidence(history, Facts(loss='mse_loss', shapes=dict(targets=((64, 1), 'float32')))), 'learned_by_heart')
    assert not plateau(1.)
    assert 'gives 1.04' in plateau(.7)[0].text


def test_inputs_that_hold_nan_are_named_first():
    set_seed(0)
    x = 100*torch.randn(640, 8)
    for at in None, 2:
        data = Split(x, x[:, :1]/100)
        if at: data.train[at] = (torch.full((32, 8), torch.nan), data.train[at][1])
        found = through('learner', nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1)), data, nn.MSELoss(), epochs=2)
        assert ('input_scale' in found, 'not_finite' in found) == (not at, bool(at)), found


class Words(nn.Module):
    "Words to scores of words at each place, [B, classes, T]; `f` of (module, [B, T, 16]) is between."
    def __init__(self, f, part): super().__init__(); self.table, self.part, self.head, self.f = nn.Embedding(12, 16), part, nn.Linear(16, 12), f
    def forward(self, x): return self.head(self.f(self.part, self.table(x))).transpose(1, 2)


def attend(part, o, causal): return part(o, src_mask=nn.Transformer.generate_square_subsequent_mask(o.shape[1]) if causal else None)
def convolve(part, o, left): return part(F.pad(o.transpose(1, 2), (left, 2-left))).transpose(1, 2)
def recur(part, o): return part(o)[0]


def transformer(causal): return Words(partial(attend, causal=causal), nn.TransformerEncoderLayer(16, 2, 32, batch_first=True))
def recurrent(both): return Words(recur, nn.LSTM(16, 8 if both else 16, batch_first=True, bidirectional=both))
def convolution(left): return Words(partial(convolve, left=left), nn.Conv1d(16, 16, 3))


@pytest.mark.parametrize('door', ['learner', 'loop'])
@pytest.mark.parametrize('make,good,bad', [(transformer, True, False), (recurrent, False, True), (convolution, 2, 1)])
def test_a_language_model_that_sees_later_words_is_named(door, make, good, bad):
    "Only where they are the targets: not of words that are masked, of a tag for each, nor of the words themselves."
    set_seed(0)
    text = torch.randint(12, (256, 17))
    x, y, loss = text[:, :-1], text[:, 1:], nn.CrossEntropyLoss()
    masked = x.masked_fill(torch.rand(x.shape) < .15, 0)
    asked = lambda model, *data: 'sees_ahead' in through(door, model, Split(*data), loss, epochs=1)
    assert asked(make(bad), x, y)
    assert not asked(make(good), x, y)
    for data in (masked, x), (x, x % 3), (x, x): assert not asked(make(bad), *data)


def test_a_loss_within_the_model_says_nothing_of_what_it_sees():
    class Within(nn.Module):
        def __init__(self): super().__init__(); self.words = transformer(False)
        def forward(self, x): return F.cross_entropy(self.words(x)[:, :, :-1], x[:, 1:])
    set_seed(0)
    model = Within()
    opt, inspector = torch.optim.Adam(model.parameters(), .01), Inspector()
    with inspector.attach(model, optimizer=opt):
        for x in torch.randint(12, (12, 32, 16)):
            opt.zero_grad()
            model(x).backward()
            opt.step()
    assert 'sees_ahead' not in [o.rule for o in inspector.diagnose()]


def test_layer_in_a_list_is_named(): assert 'unregistered' in looped(Hidden())
def test_right_loop_is_left_alone(): assert not looped()


def test_an_optimizer_that_is_gone_is_known():
    "A loop in a function: its optimizer held other parameters, and is gone when somebody asks."
    def train():
        net, loss_fn = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), nn.CrossEntropyLoss()
        opt = torch.optim.SGD(net.parameters(), .1)
        for m in net[::2]: m.weight, m.bias = (nn.Parameter(o.detach().clone()) for o in (m.weight, m.bias))
        with Inspector(visualizer=None).attach(net, optimizer=opt, loss_fn=loss_fn) as inspector:
            for x,y in zip(torch.randn(60, 16, 8), torch.randint(3, (60, 16))):
                loss_fn(net(x), y).backward()
                opt.step()
        return inspector
    inspector = train()
    gc.collect()   # the model, too
    found = inspector.diagnose('not_trained')
    assert [(o.level, o.layers) for o in found] == [('error', ('0', '2'))]
    assert (found.evidence.facts.optimizer, found.evidence.facts.lr) == ('SGD', .1)


@pytest.mark.parametrize('softmax', [True, False])
@pytest.mark.parametrize('door', ['learner', 'loop'])
def test_softmax_before_a_loss_of_ones_own_is_named(softmax, door):
    "Of [B, T, classes], as language models have them, whose loss is a function around PyTorch's."
    torch.manual_seed(0)
    x = torch.randint(12, (256, 7))
    y = (x + 1) % 12
    model = nn.Sequential(nn.Embedding(12, 16), nn.Linear(16, 12), *[nn.Softmax(-1)]*softmax)
    loss_func = lambda preds, targets: F.cross_entropy(preds.flatten(0, 1), targets.flatten())
    batches = [(x[i:i+32], y[i:i+32]) for i in range(0, 256, 32)]
    if door == 'learner':
        learn = Learner(model, DataLoaders(batches, batches), loss_func, lr=.1, cbs=[TrainCB()])
        learn.watch(every=1)
        learn.fit(8)
        found = learn.diagnose()
    else:
        inspector, opt = Inspector(), torch.optim.SGD(model.parameters(), .1)
        with inspector.attach(model, optimizer=opt):
            for _ in inspector.range(8):
                for xb, yb in batches:
                    preds = model(xb)
                    loss = loss_func(preds, yb)
                    inspector.push_loss(loss, train=True, preds=preds, targets=yb)
                    loss.backward()
                    opt.step()
                    opt.zero_grad()
        found = inspector.diagnose()
    named = [o.rule for o in found if o.level != 'note']
    assert named[:1] == ['softmax_before_loss']*(softmax and door == 'learner'), found   # a loop's function is not known


class Split:
    "Batches of 32; those of validation are others, or some of these."
    def __init__(self, x, y, leak=False):
        batches = list(zip(x.split(32), y.split(32)))
        self.train, self.valid = batches[4:], batches[4*leak:4*leak+4]


class Net(nn.Module):
    "A head on top of a layer, with `f` of (module, output) between them."
    def __init__(self, f, n=8, out=3, first=None): super().__init__(); self.first, self.head, self.f, self.kept = first or nn.Linear(n, 16), nn.Linear(16, out), f, 0.
    def forward(self, x): return self.head(self.f(self, self.first(x)))


def through(door, model, data, loss, epochs=3, lr=5e-3):
    set_seed(0)
    if door == 'learner':
        learn = TrainLearner(model, data, loss, lr, opt_func=torch.optim.Adam)
        learn.watch(every=1)
        learn.fit(epochs)
        return [o.rule for o in learn.diagnose().of('error', 'warning')]
    opt = torch.optim.Adam(model.parameters(), lr)
    inspector = Inspector().attach(model, optimizer=opt, loss_fn=loss)
    for _ in inspector.range(epochs):
        model.train()
        for xb,yb in data.train:
            opt.zero_grad()
            loss(model(xb), yb).backward()
            opt.step()
        model.eval()
        with torch.no_grad():
            for xb,yb in data.valid: loss(model(xb), yb)
    return [o.rule for o in inspector.detach().diagnose().of('error', 'warning')]


def carried(m, o):
    m.kept = .5*m.kept + o.mean().detach()
    return o + m.kept


def fine(m, o): return F.dropout(o.relu(), .2, m.training)
def turned(m, o): return F.normalize(o, dim=0)
def dropping(m, o): return F.dropout(o.relu(), .2)


def data_of(leak=False, same=False, sequences=False):
    x = torch.randn(640, *((6, 8) if sequences else (8,)), generator=torch.Generator().manual_seed(0))
    data = Split(x, (x.flatten(1)[:, :2] > 0).sum(1), leak)
    if same: data.train = [data.train[0]]*16
    return data


@pytest.mark.parametrize('door', ['learner', 'loop'])
@pytest.mark.parametrize('rule,f,given', [
    ('dropout_always_on', dropping, {}), ('samples_mixed', turned, {}), ('state_carried', carried, {}), ('shared_samples', fine, dict(leak=True)),
    ('same_batch', fine, dict(same=True)), ('', fine, {})])
def test_fault_of_data_or_forward_is_named(door, rule, f, given):
    found = through(door, Net(f), data_of(**given), nn.CrossEntropyLoss())
    new = {'dropout_always_on', 'samples_mixed', 'state_carried', 'shared_samples', 'same_batch', 'padding_counts', 'always_wrong'}
    assert new & {*found} == {*[rule]*bool(rule)}, found


@pytest.mark.parametrize('door', ['learner', 'loop'])
def test_recurrent_net_that_takes_the_batch_for_time_is_named(door):
    for batch_first in (True, False):
        rnn = nn.GRU(8, 16, batch_first=batch_first)
        found = through(door, Net(lambda m, o: o[0][:, -1], first=rnn), data_of(sequences=True), nn.CrossEntropyLoss())
        assert ('samples_mixed' in found) is not batch_first


@pytest.mark.parametrize('door', ['learner', 'loop'])
def test_padding_that_counts_is_named(door):
    set_seed(0)
    x = torch.randint(1, 9, (640, 12))
    x[torch.arange(12) > torch.randint(3, 9, (640, 1))] = 0
    for ignored in (-100, 0):
        model = nn.Sequential(nn.Embedding(9, 16), nn.Linear(16, 9), Turn())
        assert ('padding_counts' in through(door, model, Split(x, x), nn.CrossEntropyLoss(ignore_index=ignored))) is (ignored < 0)


class Turn(nn.Module):
    def forward(self, x): return x.transpose(1, 2)


def test_tensor_that_is_no_parameter_is_named():
    class Plain(nn.Module):
        def __init__(self, kind): super().__init__(); self.w, self.head = kind(torch.randn(8, 16)), nn.Linear(16, 3)
        def forward(self, x): return self.head((x@self.w).relu())
    for kind in (torch.Tensor.requires_grad_, nn.Parameter):
        found = through('learner', Plain(kind), data_of(), nn.CrossEntropyLoss())
        assert ('unregistered' in found) is (kind is not nn.Parameter)


@pytest.mark.parametrize('rule,act,f,loss', [
    ('head_range', torch.sigmoid, lambda x: 5*x[:, :1], nn.MSELoss()), ('head_range', F.relu, lambda x: 5*x[:, :1], nn.L1Loss()),
    ('loss_input', torch.tanh, lambda x: (x[:, 0] > 0).long(), nn.CrossEntropyLoss()),
    ('head_range', lambda o: o, lambda x: (x[:, :4] > 0).float(), nn.CrossEntropyLoss())])
def test_head_without_a_module_is_named(rule, act, f, loss):
    x = torch.randn(640, 8, generator=torch.Generator().manual_seed(0))
    y = f(x)
    class Head(Net):
        def forward(self, x): return act(super().forward(x))
    out = y.shape[1] if y.is_floating_point() else 2
    assert rule in through('learner', Head(fine, out=out), Split(x, y), loss, epochs=12, lr=.02)


def test_a_model_of_several_processes_is_not_called(monkeypatch):
    "One process that asks, of a model whose parts others have, would wait for them."
    learn = Learner(nn.Sequential(nn.Linear(20, 4)), Loaders(corner), nn.CrossEntropyLoss(), .1, [TrainCB(), LossStats()])
    learn.fit(1)
    calls = []
    def forward(self, x):
        calls.append(x)
        return nn.functional.linear(x, self.weight, self.bias)
    monkeypatch.setattr(nn.Linear, 'forward', forward)
    diagnose(learn)
    assert calls
    calls.clear()
    monkeypatch.setattr('miniai.evidence.world_size', lambda: 2)
    assert diagnose(learn).evidence.facts.mixes is None and not calls


def test_targets_that_are_left_out_are_not_said_to_be_answered_wrong():
    p = torch.eye(9).repeat(100, 1)
    y = p.argmax(1)
    assert fraction_right(p, y) == 1 and fraction_right(p, (y+1) % 9) == 0
    assert fraction_right(p, torch.where(torch.arange(900) < 870, -100, y)) is None        # too few
    assert fraction_right(p, torch.where(torch.arange(900) < 800, -100, y)) == 1


def test_rows_that_turn_from_one_of_two_classes_to_the_other_have_no_padding():
    set_seed(0)
    begins = torch.arange(20) >= torch.randint(2, 18, (16, 1))
    assert padding_that_counts(nn.CrossEntropyLoss(), torch.randn(16, 2, 20), begins.long()) == 0
    words = torch.randint(1, 5, (16, 20)).where(~begins, 0)
    assert padding_that_counts(nn.CrossEntropyLoss(), torch.randn(16, 5, 20), words) > .3


def test_small_numbers_are_not_taken_for_the_same():
    set_seed(0)
    for size in (1e-12, 3e-9, 1., 1e6):
        a, b = torch.randn(2, 200, 10)*size
        found = samples_of(dict(train=[marks_of(a)], valid=[marks_of(torch.cat([a[:50], b]))]))
        assert found == dict(train=200, train_distinct=200, valid=250, valid_distinct=250, shared=50)


def test_samples_that_were_seen_are_known_after_a_resume():
    "Else the one batch that was seen since would be all that there is."
    set_seed(0)
    first, then = LossStats(), LossStats()
    for o in first, then: o.before_fit()
    for i in range(12): first.record(dict(inputs=torch.randn(8, 4)), step=i, epoch=0, phase='train')
    state = first.state_dict()
    then.load_state_dict(state)
    then.record(dict(inputs=torch.randn(8, 4)), step=12, epoch=1, phase='train')
    assert then.facts()['samples']['train_distinct'] == 13*8 and first.facts()['samples']['train_distinct'] == 12*8
    assert len(state['marks']['train']) == 12


def test_losses_are_compared_on_the_cpu(monkeypatch):
    "A GPU is lost to the process after classes or probabilities that a kernel does not take."
    seen = []
    class Here(torch.Tensor):
        def cpu(self): return self.as_subclass(torch.Tensor)
    for nm in 'cross_entropy', 'binary_cross_entropy': monkeypatch.setattr(F, nm, lambda *args: seen.extend(map(type, args)) or math.nan)
    def own(p, y): return 3*(p - y).square().mean()
    p, y = (torch.randn(4, 2).as_subclass(Here) for _ in range(2))
    assert likened('own', own, p, p, y) == 'own' and {*seen} == {torch.Tensor} and len(seen) == 4


class Points(nn.Module):
    "Learns from derivatives at points that it keeps."
    def __init__(self):
        super().__init__()
        self.net, self.points = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1)), torch.linspace(0, 1, 50)[:, None].requires_grad_()
    def forward(self, x):
        with torch.enable_grad(): slopes, = torch.autograd.grad(self.net(self.points).sum(), self.points, create_graph=True)
        self.off = (slopes-1).square().mean()
        return self.net(x)


def test_points_at_which_derivatives_are_taken_are_no_error():
    set_seed(0)
    x, model = torch.rand(256, 1), Points()
    learn = TrainLearner(model, Split(x, x), lambda p, y: F.mse_loss(p, y) + model.off, .01)
    learn.watch(every=1)
    learn.fit(3)
    assert not learn.diagnose().of('error')


@pytest.mark.parametrize('n', [512, 64], ids=['16 batches', '2 batches'])
def test_a_rate_that_swings_within_epochs_is_named(n):
    "A schedule of 10 epochs of few steps swings in as few."
    sched = BatchSchedCB(partial(torch.optim.lr_scheduler.CosineAnnealingWarmRestarts, T_0=10))
    learn = TrainLearner(nn.Linear(20, 4), Loaders(corner, n=n), nn.CrossEntropyLoss(), .1, cbs=[sched])
    learn.watch(every=1)
    learn.fit(64*32//n)
    assert ('rate_falls_early' in [o.rule for o in learn.diagnose()]) is (n == 512)


@pytest.mark.parametrize('anew', [False, True])
def test_optimizers_of_parts_are_each_new_once(anew):
    set_seed(0)
    model, data, loss_fn = nn.Sequential(*[nn.Linear(20, 20), nn.Tanh()]*3, nn.Linear(20, 4)), Loaders(corner), nn.CrossEntropyLoss()
    make = lambda: [torch.optim.Adam([p], .005) for p in model.parameters()]
    opts, inspector = make(), Inspector()
    inspector.attach(model, loss_fn=loss_fn)
    for _ in inspector.range(4):
        if anew: opts = make()
        for xb,yb in data.train:
            model.zero_grad()
            loss_fn(model(xb), yb).backward()
            for o in opts: o.step()
    assert ('optimizer_is_new' in [o.rule for o in diagnose(inspector)]) is anew


def test_asking_a_model_leaves_the_generators_of_other_devices_alone(monkeypatch):
    from miniai.loss_stats import in_eval_mode
    def refuse(*args): raise AssertionError('seeds every device')
    monkeypatch.setattr(torch, 'manual_seed', refuse)
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Dropout(.5)), torch.randn(8, 4)
    before = torch.get_rng_state()
    assert in_eval_mode(model, x)['drops'] == 0
    assert torch.equal(before, torch.get_rng_state())


class OfPairs(nn.Module):
    "A loss of two views [N, 2, units] that does not use the numbers of classes that it gets."
    def forward(self, preds, y):
        a, b = F.normalize(preds, dim=2).unbind(1)
        return F.cross_entropy(a @ b.T/.2, torch.arange(len(a)))

@pytest.mark.parametrize('head,f,loss', [([nn.Linear(32, 16), nn.Unflatten(1, (2, 8))], corner, OfPairs())])
def test_a_loss_without_targets_compares_with_none(head, f, loss): assert 'shapes_differ' not in fitted(head, f, loss)


@pytest.mark.parametrize('n', [2, 6])
@pytest.mark.parametrize('head,loss', [([nn.Linear(32, 1), nn.Sigmoid()], nn.BCELoss()), ([nn.Linear(32, 6), nn.LogSoftmax(1)], nn.NLLLoss())])
def test_a_last_batch_with_one_sample_of_a_class_is_no_softmax_over_samples(head, loss, n):
    "All answers are right: those of a class add up to 1."
    set_seed(0)
    x, y = torch.randn(514, 20), torch.arange(514) % (2 if n == 2 else 6)
    x[:, :6] += 9*F.one_hot(y, 6)
    if len(head) == 2 and isinstance(loss, nn.BCELoss): y = (y == 1).float()[:, None]
    batches = list(zip(x[:-2].split(32), y[:-2].split(32))) + [(x[:n], y[:n])]
    learn = Learner(nn.Sequential(nn.Linear(20, 32), nn.ReLU(), *head), DataLoaders(batches, batches), loss, .2, [TrainCB(), LossStats()])
    learn.fit(10)
    assert learn.loss < .02 and 'softmax_before_loss' not in {o.rule for o in learn.diagnose()}


@pytest.mark.filterwarnings('error:diagnose')
def test_gradients_that_are_all_zero_are_no_failure_of_a_rule():
    "Their norm before and after clipping is 0, of which clipping leaves no fraction."
    model, loss = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3, bias=False)), nn.CrossEntropyLoss()
    nn.init.constant_(model[0].bias, -100.)
    opt = torch.optim.SGD(model.parameters(), .1)
    inspector = Inspector([LossMetrics(), ParameterGradientGeometry(before_clipping=True), ParameterUpdateGeometry()])
    inspector.attach(model, optimizer=opt, loss_fn=loss)
    for x, y in zip(torch.randn(40, 16, 6), torch.randint(0, 3, (40, 16))):
        opt.zero_grad()
        loss(model(x), y).backward()
        opt.step()
    inspector.tick_epoch()
    assert not [o for o in diagnose(inspector).unchecked.values() if 'failed' in o]
