"End a fit that gets no better, and keep the weights of its best epoch: whatever ends it, and when it goes on."
import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from miniai.checkpoint import CheckpointCB
from miniai.datasets import DataLoaders
from miniai.learner import Callback, Learner, MetricsCB, TrainCB
from miniai.stopping import EarlyStoppingCB, SaveBestCB


def net(): return nn.Sequential(nn.Linear(784, 8), nn.ReLU(), nn.Linear(8, 10))


class Says(Callback):
    "Validation accuracies as written."
    def __init__(self, values): self.values = values
    def after_epoch(self, learn):
        if not learn.training: learn.record('epoch', 'accuracy', self.values[learn.epoch])

class Keeps(Callback):
    order = -1
    def before_fit(self, learn): self.seen = []
    def after_epoch(self, learn):
        if not learn.training: self.seen.append(copy.deepcopy(learn.model.state_dict()))

def tiny_learner(*cbs):
    x, y = torch.randn(64, 4), torch.randint(0, 2, (64,))
    dl = DataLoader(TensorDataset(x, y), 32)
    return Learner(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)), DataLoaders(dl, dl), F.cross_entropy, .1, [TrainCB(), *cbs])

@pytest.mark.parametrize('values,patience,epochs,best', [
    ([.1, .2, .3, .2, .1, .1, .9], 3, 6, 2), ([.1]*9, 7, 8, 0), ([.5, .4, .6, .1], 9, 4, 2), ([.1, .2, .3], 1, 3, 2), ([np.nan, .2, np.nan, np.nan], 2, 4, 1)])
def test_patience_and_the_best_epoch(values, patience, epochs, best):
    keeps, cb = Keeps(), SaveBestCB('accuracy')
    learn = tiny_learner(Says(values), keeps, cb, EarlyStoppingCB('accuracy', patience))
    for _ in range(2):      # a callback can be fitted twice
        learn.fit(len(values))
        assert len(keeps.seen) == epochs and (cb.best_epoch, cb.best) == (best, pytest.approx(values[best]))
        for k,v in learn.model.state_dict().items(): assert torch.equal(v, keeps.seen[best][k])

def test_best_epoch_of_a_loss_after_an_error_and_in_a_trial():
    class Breaks(Callback):
        order = 100
        def after_epoch(self, learn):
            if learn.epoch == 2: raise RuntimeError('stop')
    keeps, cb = Keeps(), SaveBestCB('loss')
    metrics = MetricsCB()
    metrics._log = lambda row: None
    learn = tiny_learner(metrics, keeps, cb)
    with pytest.raises(RuntimeError): learn.fit(5, cbs=Breaks(), lr=50.)
    losses = learn.history.series('epoch', 'loss', 'valid').values
    assert cb.best == pytest.approx(losses.min())
    for k,v in learn.model.state_dict().items(): assert torch.equal(v, keeps.seen[losses.argmin()][k])
    before = copy.deepcopy(learn.model.state_dict())
    learn.lr_find(max_epochs=9, plot=False)
    for k,v in learn.model.state_dict().items(): assert torch.equal(v, before[k])
    assert cb.best == pytest.approx(losses.min()) and cb.best_epoch == losses.argmin()    # a trial does not count
    with pytest.raises(ValueError, match="monitor is 'auc'"): tiny_learner(SaveBestCB('auc')).fit(1)

def test_best_epoch_is_kept_when_a_fit_goes_on(tmp_path):
    class Scripted(Callback):
        def after_epoch(self, learn):
            if not learn.training: learn.record('epoch', 'accuracy', [.9, .5, .4, .95][learn.epoch])
    class Stop(Callback):
        def before_epoch(self, learn):
            if learn.epoch == 2: raise KeyboardInterrupt
    dl = DataLoader(TensorDataset(torch.rand(256, 784), torch.randint(0, 10, (256,))), 64)
    def learner(*cbs):
        torch.manual_seed(1)
        best, patience = SaveBestCB('accuracy'), EarlyStoppingCB('accuracy', 3)
        learn = Learner(net(), DataLoaders(dl, dl), F.cross_entropy, lr=.1,
                        cbs=[TrainCB(), Scripted(), best, patience, CheckpointCB(tmp_path), *cbs])
        return learn, best, patience
    learn, *_ = learner(Stop())
    with pytest.raises(KeyboardInterrupt): learn.fit(3)
    learn, best, patience = learner()
    learn.fit(3, resume=tmp_path)
    assert (best.best_epoch, round(best.best, 4), patience.waited) == (0, .9, 2)
    torch.manual_seed(1)
    once = Learner(net(), DataLoaders(dl, dl), F.cross_entropy, lr=.1, cbs=TrainCB())
    once.fit(1)
    for a,b in zip(learn.model.parameters(), once.model.parameters()): assert torch.equal(a, b)   # of epoch 0
    learn.fit(1, reset_opt=False)
    assert (best.best_epoch, round(best.best, 4)) == (3, .95)
