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
from miniai.inspector import Inspector
from miniai.learner import KeywordCB, Learner, MetricsCB, MomentumLearner, ProgressCB, TrainCB, TrainLearner
from miniai.lens import LossMetrics, OutputNorm


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
