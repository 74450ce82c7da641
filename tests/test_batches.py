"Batches with names, steps instead of epochs, several optimizers, and what each mean is over."
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from miniai.accel import AccumulateCB, MixedPrecision
from miniai.datasets import DataLoaders
from miniai.device import set_seed
from miniai.learner import KeywordCB, Learner, MetricsCB, MomentumLearner, ProgressCB, TrainCB, TrainLearner


@dataclass
class Output: logits:torch.Tensor; loss:torch.Tensor


class Net(nn.Module):
    "Two inputs; returns an `Output`, with a loss where there are labels."
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(4, 8), nn.ReLU()), nn.Linear(8, 3)
    def forward(self, left, right, labels=None):
        logits = self.head(self.body(torch.cat([left, right], 1)))
        return Output(logits, None if labels is None else F.cross_entropy(logits, labels))


def by_name(samples): return {nm: torch.stack(o) for nm, o in zip(('left', 'right', 'labels'), zip(*samples))}


def loaders(bs=16, collate=by_name):
    set_seed(0)
    x = torch.randn(80, 4)
    ds = TensorDataset(x[:, :2], x[:, 2:], (x.sum(1) > 0).long())
    return DataLoaders(DataLoader(ds, bs, shuffle=True, collate_fn=collate), DataLoader(ds, 2*bs, collate_fn=collate))


def accuracy(preds, labels): return (preds.argmax(1) == labels).float().mean()


class Quiet(MetricsCB):
    def _log(self, d): pass


names = dict(inp_nm=('left', 'right'), lbl_nm='labels', preds_nm='logits')
workers = dict(by_position=lambda: (TrainCB(2, preds_nm='logits'), None), by_name=lambda: (TrainCB(**names), by_name),
               by_keyword=lambda: (KeywordCB(), by_name))


def learner(worker, cbs=(), collate=by_name, **kw):
    dls = loaders(collate=collate)
    set_seed(1)
    return Learner(Net(), dls, F.cross_entropy, lr=.1, cbs=[worker, *cbs], **kw)


@pytest.mark.parametrize('nm', workers)
def test_predictions_for_batches_without_targets(nm):
    "As those for the same batches with targets, whichever way the batches come."
    worker, collate = workers[nm]()
    learn = learner(worker, collate=collate)
    whole = list(learn.dls.valid)
    bare = [{k: v for k, v in o.items() if k != 'labels'} if isinstance(o, dict) else o[:2] for o in whole]
    expected, targets = learn.get_preds(whole)
    preds, none = learn.get_preds(bare)
    assert torch.equal(preds, expected) and len(targets) == len(preds) and not len(none)
    assert learn.loss_func is F.cross_entropy
    with pytest.raises((ValueError, TypeError)): learn.validate(bare)


# --- names ---

@pytest.mark.parametrize('nm', workers)
def test_what_follows_from_the_parts_is_the_same_however_they_are_known(nm):
    "Losses, metrics, batch size, finder, captured predictions, watching and the diagnosis."
    def all_of(worker, collate):
        learn = learner(worker, [Quiet(accuracy=accuracy), ProgressCB()], collate)
        learn.watch(budget=None)
        learn.fit(2)
        found = learn.lr_find(plot=False)
        preds, targets, inputs = learn.capture_preds(inps=True)
        assert preds.shape == (80, 3) and torch.equal(targets, torch.cat([o[2] if isinstance(o, list) else o['labels'] for o in learn.dls.valid]))
        summary = learn.summary()
        assert summary.bs == 16 and summary.macs == 4*8 + 8*3
        facts = learn.diagnose().evidence.facts
        series = {key: learn.history.series(key[1], key[2], key[0]).values.tolist() for key in learn.history.keys()}
        return series, tuple(found), preds, facts.batch_size, sorted(o.rule for o in learn.diagnose())
    mine, first = all_of(*workers[nm]()), all_of(*workers['by_position']())
    assert mine[0] == first[0] and mine[1] == first[1] and torch.equal(mine[2], first[2]) and mine[3:] == first[3:]


def test_a_model_with_its_own_loss_is_not_judged_by_the_default_of_loss_func():
    learn = learner(KeywordCB())
    learn.loss_func = F.mse_loss
    learn.watch()
    learn.fit(2)
    assert 'mse' not in learn.diagnose().evidence.facts.loss


def test_mixed_precision_takes_the_same_names():
    learn = learner(MixedPrecision(dtype='bf16', **names))
    learn.fit(1)
    assert learn.preds.dtype == torch.bfloat16
    learn = learner(MixedPrecision(loss_nm='loss', lbl_nm='labels', preds_nm='logits'))
    learn.fit(1)
    assert learn.preds.dtype == torch.bfloat16 and learn.loss.isfinite()


def test_learners_take_names():
    kw = dict(loss_func=F.cross_entropy, lr=.1, **names)
    for cls, more in (TrainLearner, {}), (MomentumLearner, dict(mom=.9)):
        learn = cls(Net(), loaders(), **kw, **more, cbs=Quiet(accuracy=accuracy))
        learn.fit(1)
        assert learn.preds.shape[1] == 3 and len(learn.history.series('epoch', 'accuracy', 'valid')) == 1


@pytest.mark.parametrize('worker, message', [
    (TrainCB(), r"dict with keys \['left', 'right', 'labels'\].*inp_nm=.*KeywordCB"),
    (TrainCB(inp_nm='x', lbl_nm='labels'), r"the batch has no 'x'; it has \['left', 'right', 'labels'\]"),
    (TrainCB(inp_nm=('left', 'right')), 'lbl_nm is None'),
    (TrainCB(**{**names, 'preds_nm': 'scores'}), r"returned has no 'scores'; it has \['logits', 'loss'\]"),
    (KeywordCB(inp_nm=('left', 'right')), 'the model returned no loss'),
    (KeywordCB(inp_nm=('left', 'x')), "the batch has no 'x'"),
    (KeywordCB(loss_nm='cost'), "returned has no 'cost'")])
def test_a_name_that_is_missing_is_a_clear_error_and_leaves_nothing(worker, message):
    learn = learner(worker)
    with pytest.raises((TypeError, ValueError), match=message): learn.fit(1)
    assert learn.n_steps == 0 and not learn.hold and len(learn.cbs) == 1


# --- weights ---

class Tokens(nn.Module):
    "Scores [B, classes, T] of token numbers [B, T]."
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Embedding(7, 8), nn.Linear(8, 7))
    def forward(self, x): return self.body(x).transpose(1, 2)


def token_loaders(bs):
    "Rows of 5 tokens, of which ever fewer count."
    x = torch.arange(60).reshape(12, 5) % 7
    y = (x*3 + 1) % 7
    for i, row in enumerate(y): row[5-i % 5:] = -100
    return SimpleNamespace(train=DataLoader(TensorDataset(x, y), bs), valid=DataLoader(TensorDataset(x, y), bs))


def right_tokens(preds, y): return (preds.argmax(1) == y)[y != -100].float().mean()


def token_learner(bs, *cbs, worker=TrainCB, loss_func=F.cross_entropy, **kw):
    set_seed(2)
    return Learner(Tokens(), token_loaders(bs), loss_func, lr=.5, cbs=[worker(**kw), Quiet(right=right_tokens), *cbs])


def test_epoch_values_do_not_depend_on_how_tokens_fall_into_batches():
    whole, parts = token_learner(12), token_learner(5)
    for o in whole, parts: o.fit(1, train=False)
    for nm in 'loss', 'right':
        a, b = (o.history.series('epoch', nm, 'valid').values[-1] for o in (whole, parts))
        assert a == pytest.approx(b, rel=1e-6), nm


def own_loss(preds, y): return F.cross_entropy(preds, y)
def n_tokens(batch): return (batch[1] != -100).sum()


def test_weight_of_says_what_a_loss_of_your_own_is_a_mean_over():
    with_it, without, known = (token_learner(5, loss_func=own_loss, weight_of=n_tokens), token_learner(5, loss_func=own_loss),
                               token_learner(5))
    for o in with_it, without, known: o.fit(1, train=False)
    a, b, c = (o.history.series('epoch', 'loss', 'valid').values[-1] for o in (with_it, without, known))
    assert a == pytest.approx(c, rel=1e-6) and abs(b - c) > 1e-4


@pytest.mark.parametrize('kw', [dict(), dict(loss_func=own_loss, weight_of=n_tokens)], ids=['known', 'said'])
def test_accumulated_tokens_are_those_of_one_batch(kw):
    one, many = token_learner(12, **kw), token_learner(5, AccumulateCB(3), **kw)
    for o in one, many: o.fit(2)
    assert one.n_steps == many.n_steps == 2
    for a, b in zip(one.model.parameters(), many.model.parameters()): torch.testing.assert_close(a, b)


@pytest.mark.parametrize('weight_of', [None, lambda batch: (batch[1] != -100).sum()], ids=['number', 'tensor'])
def test_a_step_of_batches_whose_targets_are_all_left_out_changes_nothing(weight_of):
    "What their loss is a mean over is 0."
    learn = token_learner(5, AccumulateCB(3), weight_of=weight_of)
    learn.dls.train.dataset.tensors[1][:] = -100
    before = [p.clone() for p in learn.model.parameters()]
    learn.fit(1, valid=False)
    assert learn.n_steps == 1 and all(torch.equal(a, b) for a, b in zip(before, learn.model.parameters()))


def test_batches_of_processes_whose_targets_are_all_left_out_weigh_nothing(monkeypatch):
    from miniai.accel import count_together
    monkeypatch.setattr(torch.distributed, 'all_reduce', lambda o: o)
    learn = token_learner(5)
    learn.dl, learn.batch, learn.n_processes = SimpleNamespace(), (torch.zeros(2, 5).long(), torch.full((2, 5), -100)), 1
    count_together(learn)
    assert learn.dl.weight == 0


# --- steps ---

class Stream(IterableDataset):
    "Token rows without a length; `n` of them, or without end."
    def __init__(self, n=None): self.n = n
    def __iter__(self):
        i = 0
        while self.n is None or i < self.n:
            x = torch.arange(i, i+5) % 7
            yield x, (x*3 + 1) % 7
            i += 1


def step_learner(cbs=(), n=None, shuffled=False, **kw):
    set_seed(3)
    train = token_loaders(2).train.dataset if shuffled else Stream(n)
    dls = DataLoaders(DataLoader(train, 2, shuffle=shuffled or None), token_loaders(4).valid)
    model = nn.Sequential(*Tokens().body, nn.Dropout(.2), nn.Linear(7, 7))
    return Learner(model, dls, lambda p, y: F.cross_entropy(p.transpose(1, 2), y), lr=.1, opt_func=partial(optim.SGD, momentum=.9),
                   cbs=[TrainCB(), Quiet(), ProgressCB(), *cbs], **kw)


def weights(learn): return torch.cat([o.detach().flatten() for o in learn.model.parameters()])


def validated(learn): return learn.history.series('epoch', 'loss', 'valid').steps.tolist()


def test_steps_end_a_fit_and_epochs_are_numbers_of_batches():
    learn = step_learner(epoch_sz=4)
    learn.fit(max_steps=10)
    assert learn.n_steps == 10 and validated(learn) == [4, 8, 10] and learn.epochs == range(3) and learn.n_epochs == 3
    learn.fit(max_steps=5)             # of this fit
    assert learn.n_steps == 15 and learn.max_steps == 5 and learn._stream is None
    learn.fit(1)
    assert learn.n_steps == 19 and learn.max_steps is None


def test_an_epoch_of_batches_takes_up_the_pass_where_it_stopped():
    "So that many short epochs see the same batches, and make the same steps, as few long ones."
    whole, parts = (step_learner(shuffled=True, epoch_sz=o) for o in (None, 4))   # a pass has six batches
    for o in whole, parts:
        set_seed(4)
        o.fit(max_steps=12, valid=False)
    assert torch.equal(weights(whole), weights(parts)) and (whole.epochs, parts.epochs) == (range(2), range(3))


def test_accumulation_and_schedules_count_steps():
    from miniai.sgd import OneCycleCB, RecorderCB
    learn = step_learner([AccumulateCB(2), OneCycleCB(.5), RecorderCB(lr=lambda cb: cb.pg['lr'])], epoch_sz=5)
    learn.fit(max_steps=9)             # 2+2, and 1 of a single batch, an epoch
    rates = learn.history.series('recorder', 'lr').values
    assert learn.n_steps == 9 and max(rates) == pytest.approx(.5, abs=.01) and rates[-1] < 1e-3
    learn = step_learner([OneCycleCB(.5)], epoch_sz=5)
    learn.fit(2)
    assert learn.n_steps == 10


@pytest.mark.parametrize('shuffled', [False, True])
@pytest.mark.parametrize('stop', [3, 4, 6, 7])
def test_a_fit_by_steps_goes_on_to_the_same_bits(tmp_path, shuffled, stop):
    "Stopped in an epoch and at its end; in a pass, at its end, in the second."
    from miniai.checkpoint import CheckpointCB
    kw = dict(shuffled=shuffled, epoch_sz=4, n=12)
    one = step_learner(**kw)
    one.fit(max_steps=11)
    step_learner([CheckpointCB(tmp_path, every=1, keep=None)], **kw).fit(max_steps=9)
    two = step_learner([CheckpointCB(tmp_path, every=1, keep=None)], **kw)
    for o in tmp_path.glob('step_*'): o.unlink() if int(o.stem[5:]) > stop else None
    set_seed(99)
    two.fit(max_steps=11, resume=tmp_path)
    assert two.n_steps == 11 and torch.equal(weights(one), weights(two)) and validated(one) == validated(two) == [4, 8, 11]
    three = step_learner([CheckpointCB(tmp_path, every=1)], **kw)
    three.fit(max_steps=11, resume=tmp_path)      # nothing is left to do
    assert three.n_steps == 11 and torch.equal(weights(one), weights(three))


def test_a_finished_fit_by_steps_can_be_made_longer(tmp_path):
    from miniai.checkpoint import CheckpointCB
    kw = dict(shuffled=True, epoch_sz=4)
    one = step_learner(**kw)
    one.fit(max_steps=12)
    step_learner([CheckpointCB(tmp_path)], **kw).fit(max_steps=8)
    three = step_learner([CheckpointCB(tmp_path)], **kw)
    three.fit(max_steps=12, resume=tmp_path)
    assert three.epochs_done == 3 and torch.equal(weights(one), weights(three))


@pytest.mark.parametrize('kw, at, message', [(dict(max_steps=0), {}, 'max_steps is 0'), (dict(max_steps=1.5), {}, 'max_steps is 1.5'),
                                             ({}, dict(epoch_sz=0), 'epoch_sz is 0'), (dict(n_epochs=None), {}, 'n_epochs is None')])
def test_counts_that_are_none_are_refused(kw, at, message):
    with pytest.raises(ValueError, match=message): step_learner(**at).fit(**kw)


# --- several optimizers ---

class Muon(optim.Optimizer):
    "Steps of matrices whose singular values are made alike, by five Newton-Schulz iterations (K. Jordan, 2024)."
    def __init__(self, params, lr, momentum=.9): super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group['params']:
                if p.grad is None: continue
                m = self.state[p].setdefault('momentum', torch.zeros_like(p))
                m.mul_(group['momentum']).add_(p.grad)
                x = m/(m.norm() + 1e-7)
                if len(x) > x.shape[1]: x = x.T
                for _ in range(5):
                    a = x@x.T
                    x = 3.4445*x + (-4.7750*a + 2.0315*a@a)@x
                p.add_(x if x.shape == p.shape else x.T, alpha=-group['lr'])


def muon_and_adamw(params, lr):
    params = list(params)
    return dict(matrices=Muon([p for p in params if p.ndim == 2], lr), rest=optim.AdamW([p for p in params if p.ndim < 2], lr/5))


def adam_twice(params, lr):
    params = list(params)
    return [optim.Adam(params[:2], lr), optim.Adam(params[2:], lr)]


class Classes(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU()), nn.Linear(32, 2)
    def forward(self, x): return self.head(self.body(x))


def data(n=640):
    set_seed(5)
    x = torch.randn(n, 8)
    return DataLoaders.from_arrays(x, (x[:, :4].square().sum(1) > x[:, 4:].square().sum(1)).long(), 32)


def opt_learner(opt_func, cbs=(), lr=.02, worker=TrainCB, **kw):
    dls = data()
    set_seed(6)
    return Learner(Classes(), dls, F.cross_entropy, lr=lr, opt_func=opt_func, cbs=[worker(), Quiet(accuracy=accuracy), *cbs], **kw)


def test_two_of_a_kind_are_one():
    "Optimizers that treat each parameter by itself may be divided."
    from miniai.accel import GradClipCB
    from miniai.sgd import OneCycleCB, RecorderCB
    found = []
    for opt_func in optim.Adam, adam_twice:
        learn = opt_learner(opt_func, [GradClipCB(.5), OneCycleCB(), RecorderCB(lr=lambda cb: cb.pg['lr'])])
        learn.watch(budget=None, updates=True)
        learn.fit(2)
        series = {key: learn.history.series(key[1], key[2], key[0]).values.tolist() for key in learn.history.keys() if '[1]' not in key[2]}
        found.append((weights(learn), series, sorted(o.rule for o in learn.diagnose())))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1:] == found[1][1:]


def severe(learn): return [o.rule for o in learn.diagnose() if o.level in ('error', 'warning')]


def test_muon_beside_adamw_learns_watched_without_a_false_finding():
    from miniai.sgd import OneCycleCB, RecorderCB
    learn = opt_learner(muon_and_adamw, [OneCycleCB(), RecorderCB(lr=lambda cb: cb.pg['lr'])])
    watch = learn.watch(updates=True)
    learn.fit(8)
    assert learn.history.series('epoch', 'accuracy', 'valid').values[-1] > .7
    updates = {nm for _, nm, what in watch.updates.history.keys() if 'update' in what or 'ratio' in what}
    assert updates >= {'body.0.weight', 'body.0.bias', 'head.weight', 'head.bias'}
    assert not severe(learn), learn.diagnose()
    assert learn.history.series('recorder', 'lr').values[3] == pytest.approx(5*learn.history.series('recorder', 'lr[1]').values[3])


def test_muon_beside_adamw_goes_on_to_the_same_bits(tmp_path):
    from miniai.checkpoint import CheckpointCB
    from miniai.sgd import OneCycleCB
    make = lambda *cbs: opt_learner(muon_and_adamw, [OneCycleCB(), *cbs], epoch_sz=5)
    one = make()
    one.fit(max_steps=12)
    make(CheckpointCB(tmp_path, every=1, keep=None)).fit(max_steps=12)
    for o in tmp_path.glob('step_*'): o.unlink() if int(o.stem[5:]) > 7 else None
    two = make()
    set_seed(9)
    two.fit(max_steps=12, resume=tmp_path)
    assert torch.equal(weights(one), weights(two))
    with pytest.raises(ValueError, match='Optimizers'): opt_learner(optim.AdamW).fit(max_steps=12, resume=tmp_path)


class Players(nn.Module):
    "A generator and a discriminator of points."
    def __init__(self):
        super().__init__()
        self.g = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 2))
        self.d = nn.Sequential(nn.Linear(2, 32), nn.LeakyReLU(.2), nn.Linear(32, 1))


class GANCB(TrainCB):
    "Two losses: the discriminator tells real from made, the generator is to be taken for real."
    def predict(self, learn):
        real, noise = learn.batch
        learn.preds = learn.model.g(noise)
        self.scores = [learn.model.d(o) for o in (real, learn.preds.detach(), learn.preds)]
    def get_loss(self, learn):
        real, made, fooled = self.scores
        self.losses = F.softplus(-real).mean() + F.softplus(made).mean(), F.softplus(-fooled).mean()
        self.scores, learn.loss = None, sum(self.losses)
    def backward(self, learn):
        for loss, part in zip(self.losses, (learn.model.d, learn.model.g)):
            loss.backward(inputs=list(part.parameters()), retain_graph=True)
        self.losses = None


def gan_learner(*cbs):
    set_seed(7)
    angle = torch.rand(512)*6.28
    real = torch.stack([angle.cos(), angle.sin()], 1)*.5 + 1
    dls = DataLoaders(DataLoader(TensorDataset(real, torch.randn(512, 2)), 64, shuffle=True), ())
    model = Players()
    adam = lambda part, lr: optim.Adam(part.parameters(), lr, betas=(.5, .99))
    return Learner(model, dls, lr=2e-3, cbs=[GANCB(), *cbs], opt_func=lambda _, lr: dict(d=adam(model.d, lr), g=adam(model.g, lr)))


def test_a_gan_has_two_losses_and_two_optimizers(tmp_path):
    from miniai.checkpoint import CheckpointCB
    one = gan_learner()
    one.watch(updates=True)
    one.fit(25, valid=False)
    made = one.model.g(torch.randn(500, 2))
    assert (made.mean(0) - 1).abs().max() < .35 and .1 < made.std() < 1     # the data has mean 1 and deviation .35
    assert {type(o) for o in one.opt.opts.values()} == {optim.Adam} and not severe(one), one.diagnose()
    other = gan_learner()
    other.fit(3, valid=False)
    gan_learner(CheckpointCB(tmp_path, every=5, keep=None)).fit(3, valid=False)
    for o in tmp_path.glob('step_*'): o.unlink() if int(o.stem[5:]) > 15 else None
    two = gan_learner()
    set_seed(99)
    two.fit(3, valid=False, resume=tmp_path)
    assert torch.equal(weights(other), weights(two))


def test_optimizers_that_ask_again():
    from miniai.shortcuts import ClosureCB
    learn = opt_learner(partial(optim.LBFGS, line_search_fn='strong_wolfe'), worker=ClosureCB, lr=1.)
    learn.dls.train.batch_size = 512                    # its curvature is of one loss
    watch = learn.watch(updates=True)
    learn.fit(3)
    losses = learn.history.series('batch', 'loss').values
    assert learn.n_steps == 3 and losses[2] < .5*losses[0]
    assert len(watch.updates.history.series('head.weight', 'update_ratio')) == 3


def test_a_group_that_is_added_later_is_trained_and_saved():
    "As where layers are unfrozen during a fit: it becomes the last optimizer's."
    learn, late = opt_learner(adam_twice), nn.Parameter(torch.ones(3))
    learn.fit(max_steps=1)
    learn.opt.add_param_group(dict(params=[late], lr=.5))
    late.grad = torch.ones(3)
    learn.opt.step()
    assert (late < 1).all() and late in learn.opt.state
    assert learn.opt.param_groups[-1] is [*learn.opt.opts.values()][-1].param_groups[-1]
    assert len(learn.opt.state_dict()['param_groups']) == 3


def test_rates_by_name_are_loaded_and_counted(tmp_path):
    "A new learner whose rates are by name takes up the state of its optimizer; rates are given by name, not by order."
    lr = {'body.*': .01, '*': .02}
    learn, other = opt_learner(optim.AdamW, lr=lr), opt_learner(optim.AdamW, lr=lr)
    learn.fit(max_steps=2)
    learn.save(tmp_path/'run.pt')
    assert [o['lr'] for o in other.load(tmp_path/'run.pt').opt.param_groups] == [.01, .02] and len(other.opt.state) > 1
    with pytest.raises(ValueError, match='one group the rates'): learn.fit(reset_opt=False, lr={'*.weight': .3, '*': .4})
    assert [o['lr'] for o in learn.opt.param_groups] == [.01, .02]
    learn.fit(max_steps=1, reset_opt=False, lr={'head.*': .04, '*': .03})
    assert [o['lr'] for o in learn.opt.param_groups] == [.03, .04]
    learn.opt_func, learn.opt = None, None
    with pytest.raises(ValueError, match='opt_func is None; set `learn.opt`'): learn.load(tmp_path/'run.pt')


def test_rates_and_frozen_layers_by_name():
    learn = opt_learner(optim.SGD, lr={'body.*': .01, '*': .1})
    learn.fit_one_cycle(1)
    assert [o['max_lr'] for o in learn.opt.param_groups] == [.01, .1]
    learn.freeze('body.*')
    before = [o.detach().clone() for o in learn.model.parameters()]
    learn.watch()
    learn.fit(1)
    moved = [not torch.equal(a, b) for a, b in zip(before, learn.model.parameters())]
    assert moved == [False]*4 + [True]*2 and not [o for o in severe(learn) if 'gradient' in o]
    learn.fit(1, lr=.05, reset_opt=False)
    assert [o['lr'] for o in learn.opt.param_groups] == [.05, .05]
    with pytest.raises(ValueError, match='no pattern of .* means head.weight'): learn.fit(1, lr={'body.*': .1})


# --- processes ---

script = '''
import os, sys
import torch
sys.path[:0] = [sys.argv[2]]
from test_batches import Tokens, Quiet, n_tokens, own_loss, right_tokens, token_loaders
from miniai.accel import AccumulateCB, DDPCB
from miniai.device import set_seed
from miniai.distributed import is_main
from miniai.learner import Learner, TrainCB
set_seed(2)
world = int(os.environ.get('WORLD_SIZE', 1))   # each has a batch of every `world`
learn = Learner(Tokens(), token_loaders(4//world), own_loss, lr=.5, epoch_sz=4,
                cbs=[TrainCB(weight_of=n_tokens), Quiet(right=right_tokens), AccumulateCB(2), DDPCB()])
learn.fit(max_steps=5)
values = [learn.history.series('epoch', nm, phase).values.tolist() for nm in ('loss', 'right') for phase in ('train', 'valid')]
if is_main(): torch.save([learn.n_steps, values, [o.detach() for o in learn.model.parameters()]], sys.argv[1])
'''


def test_two_processes_accumulate_tokens_as_one(tmp_path):
    import os, subprocess, sys
    from pathlib import Path
    here, found = Path(__file__).resolve().parent, []
    (tmp_path/'train.py').write_text(script)
    env = {**os.environ, 'PYTHONPATH': f'{here.parent}', 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    for launcher in [], ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2']:
        res = subprocess.run([sys.executable, *launcher, str(tmp_path/'train.py'), str(tmp_path/'out.pt'), str(here)], capture_output=True,
                             text=True, env=env)
        assert res.returncode == 0, res.stderr[-4000:]
        found.append(torch.load(tmp_path/'out.pt', weights_only=False))
    (steps, values, weights), (steps2, values2, weights2) = found
    assert steps == steps2 == 5
    torch.testing.assert_close(values2, values)
    torch.testing.assert_close(weights2, weights)


# --- code as people have it ---

def test_a_language_model_by_name_with_one_flat_import():
    "Dict batches, an output with logits, epochs of so many batches, momentum; metrics without any, a bar given to fit."
    import miniai.all as mi
    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Tokens().body
        def forward(self, x): return SimpleNamespace(logits=self.body(x))
    x = torch.arange(60).reshape(12, 5) % 7
    dl = [dict(inputs=o, labels=(o*3 + 1) % 7) for o in x.split(3)]
    loss = lambda preds, labels: F.cross_entropy(preds.flatten(0, 1), labels.flatten())
    learn = mi.MomentumLearner(Logits(), mi.DataLoaders(dl, dl), loss_func=loss, lr=.1, cbs=[mi.MetricsCB(), mi.DeviceCB('cpu')],
                               inp_nm='inputs', lbl_nm='labels', preds_nm='logits', epoch_sz=6, mom=.9)
    learn.fit(4, cbs=mi.ProgressCB(plot=True))
    valid = learn.history.series('epoch', 'loss', 'valid').values
    assert learn.n_steps == 24 and valid[-1] < .7*valid[0] and learn.preds.shape == (3, 5, 7)


def test_a_worker_with_three_outputs():
    "A variational autoencoder: reconstruction, mean and logarithm of the variance."
    import miniai.all as mi
    class VAE(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.mean, self.log_var, self.out = nn.Linear(8, 16), nn.Linear(16, 2), nn.Linear(16, 2), nn.Linear(2, 8)
        def forward(self, x):
            h = self.body(x).relu()
            mean, log_var = self.mean(h), self.log_var(h)
            return self.out(mean + (.5*log_var).exp()*torch.randn_like(mean)), mean, log_var
    class VAECB(mi.TrainCB):
        def predict(self, learn): learn.preds = learn.model(learn.batch[0])
        def get_loss(self, learn):
            out, mean, log_var = learn.preds
            learn.loss = F.mse_loss(out, learn.batch[0]) - .001*(1 + log_var - mean**2 - log_var.exp()).mean()
    set_seed(8)
    learn = mi.Learner(VAE(), data(), lr=3e-3, opt_func=optim.Adam, cbs=[VAECB(), mi.MetricsCB()])
    learn.watch()
    learn.fit(6)
    preds, _ = learn.capture_preds()
    assert [tuple(o.shape) for o in preds] == [(128, 8), (128, 2), (128, 2)] and not severe(learn), learn.diagnose()


# --- pages ---

def test_the_table_of_callbacks_is_of_all_of_them():
    import re
    from pathlib import Path
    import miniai.all as mi
    from miniai.callback import Callback
    wanted = {nm for nm in dir(mi) if isinstance(getattr(mi, nm), type) and issubclass(getattr(mi, nm), Callback)} - {'Callback'}
    readme = (Path(__file__).resolve().parent.parent/'README.md').read_text(encoding='utf-8')
    rows = dict(re.findall(r'^\| `(\w+)` \| (.+) \|$', readme, re.M))
    assert wanted - set(rows) <= {'PyTorchInspector'}, 'run .ci/pages.py nbs/index.ipynb, and .ci/readme.py'


def test_a_batch_without_a_target_does_not_count():
    "Its loss is NaN, the mean of nothing; that of the epoch is the mean over the targets that there are."
    learn = token_learner(8)
    batches = [*learn.dls.valid]
    empty = batches[0][0], torch.full_like(batches[0][1], -100)
    want, got = learn.validate(batches)['loss'], learn.validate([empty, *batches])['loss']
    assert got == pytest.approx(want, abs=1e-6) and learn.validate([empty])['loss'] != learn.validate([empty])['loss']


class Places(nn.Module):
    "A sum of two embeddings goes into Dropout."
    def __init__(self):
        super().__init__()
        self.token, self.place, self.drop, self.head = nn.Embedding(20, 16), nn.Embedding(8, 16), nn.Dropout(.5), nn.Linear(16, 20)
    def forward(self, x): return self.head(self.drop(self.token(x) + self.place(torch.arange(8)))).transpose(1, 2)


def test_dropout_of_a_sum_of_embeddings_leaves_enough():
    set_seed(0)
    x = torch.randint(0, 20, (64, 8))
    y = torch.where(torch.rand(x.shape) < .6, torch.randint(0, 20, x.shape), x)
    dl = [(x[i:i+8], y[i:i+8]) for i in range(0, 64, 8)]
    learn = Learner(Places(), DataLoaders(dl, dl), F.cross_entropy, .003, [TrainCB(), Quiet()], optim.Adam)
    learn.watch()
    learn.fit(10)
    found = learn.diagnose()
    loss = found.evidence.loss()
    assert loss.late > .5*loss.first and 'dropout_of_most' in found.checked and 'dropout_of_most' not in [o.rule for o in found]


# --- what a loss is a mean over, where nobody says ---

class Words(nn.Module):
    "A language model: its loss is that of the next word, or of the word itself."
    def __init__(self, ahead):
        super().__init__()
        self.ahead, self.net = ahead, nn.Sequential(nn.Embedding(12, 8), nn.Linear(8, 12))
    def forward(self, ids, labels):
        logits = self.net(ids)
        p, y = (logits[:, :-1], labels[:, 1:]) if self.ahead else (logits, labels)
        return Output(logits, F.cross_entropy(p.flatten(0, 1), y.flatten()))


def rows_of_words(n=40, bs=8):
    "Rows of several lengths; in some the first word counts for nothing."
    set_seed(2)
    ids = torch.randint(12, (n, 9))
    labels = ids.where(torch.arange(9) < torch.randint(1, 10, (n, 1)), -100)
    labels[::3, 0] = -100
    return [dict(ids=ids[i:i+bs], labels=labels[i:i+bs]) for i in range(0, n, bs)], dict(ids=ids, labels=labels)


@pytest.mark.parametrize('ahead', [True, False], ids=['next word', 'same word'])
def test_the_first_batch_says_whether_the_loss_is_of_the_next_word(ahead):
    batches, whole = rows_of_words()
    model = Words(ahead)
    learn = Learner(model, DataLoaders(batches, batches), cbs=[KeywordCB(), MetricsCB(), AccumulateCB(5)], lr=0.)
    expected = model(**whole).loss
    assert abs(learn.validate()['loss'] - expected.item()) < 1e-6
    expected.backward()
    grad = model.net[1].weight.grad.clone()
    seen = []
    learn.cbs[0].step = lambda learn: seen.append(model.net[1].weight.grad.clone())
    model.zero_grad()
    learn.fit(1)
    assert len(seen) == 1 and torch.allclose(seen[0], grad, atol=1e-7)


@pytest.mark.parametrize('labels', [torch.randn(8, 5), torch.tensor([[3, 7, -1, 2, -1]]*8), torch.full((8, 5), 90), torch.ones(8, 5).int()],
                         ids=['numbers', 'left out by -1', 'of more classes', 'of 32 bits'])
def test_targets_that_a_cross_entropy_does_not_take_do_not_end_a_fit(labels):
    "The model has its own loss and knows what its targets mean."
    class Own(Words):
        def forward(self, ids, labels):
            p = self.net(ids)
            return Output(p, p.square().mean())
    batches = [dict(ids=torch.randint(12, (8, 5)), labels=labels)]*2
    learn = Learner(Own(False), DataLoaders(batches, batches), cbs=[KeywordCB(), MetricsCB(), AccumulateCB(2)])
    learn.fit(1)
    assert learn.validate()['loss'] > 0


def test_batches_of_a_loss_that_is_a_sum_count_alike():
    "A last batch of few samples has a small sum; the mean over the epoch is that of the batches."
    x, y = torch.randn(20, 3), torch.randn(20, 1)
    batches = [(x[i:i+8], y[i:i+8]) for i in range(0, 20, 8)]
    model = nn.Linear(3, 1)
    for f in partial(F.mse_loss, reduction='sum'), nn.MSELoss(reduction='sum'):
        learn = Learner(model, DataLoaders(batches, batches), f, lr=0., cbs=[TrainCB(), MetricsCB(off=lambda p, y: (p - y).abs().mean())])
        found = learn.validate()
        sums = [F.mse_loss(model(xb), yb, reduction='sum').item() for xb,yb in batches]
        assert abs(found['loss'] - sum(sums)/3) < 1e-5
        assert abs(found['off'] - (model(x) - y).abs().mean().item()) < 1e-6   # a metric is of samples, as ever
