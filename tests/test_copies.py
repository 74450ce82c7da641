"A learner that is watched and logged is copied and pickled at any moment, and numbers that no type holds are kept as what they are."
import copy, pickle, warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from miniai.all import Callback, DataLoaders, Learner, LogCB, MetricsCB, TrainCB
from miniai.history import History
from miniai.lens import summary


class Copies(Callback):
    def __init__(self): self.found = []
    def after_batch(self, learn):
        if learn.training and learn.iter == 2: self.found.append(copy.deepcopy(learn))


def learner(*cbs):
    torch.manual_seed(0)
    x = torch.randn(32, 4)
    dl = [(x[i:i+8], (x[i:i+8, 0] > 0).long()) for i in range(0, 32, 8)]
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    return Learner(model, DataLoaders(dl, dl), F.cross_entropy, .1, [TrainCB(), MetricsCB(), *cbs])


def test_a_copy_made_in_a_fit_logs_its_own_fits():
    copies, rows = Copies(), []
    learn = learner(LogCB(rows), copies)
    learn.fit(1)
    twin, n = copies.found[0], len(rows)
    log = next(o for o in twin.cbs if isinstance(o, LogCB))
    twin.fit(1)
    assert len(rows) == 2*n and log.logged is False and not log.histories and not twin.history.readers


def test_a_watched_learner_is_pickled_after_a_fit():
    learn = learner()
    learn.watch(every=1)
    learn.fit(1)
    twin = pickle.loads(pickle.dumps(learn))
    for o in (twin, learn): o.fit(1)
    one, two = (o.history.series('batch', 'loss').values for o in (learn, twin))
    assert len(one) == 8 and np.array_equal(one, two)


def test_a_number_beyond_float32_is_infinite_and_says_nothing():
    h = History()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for step,o in enumerate((1., 1e300, -1e300)): h.record('batch', 'loss', o, step=step)
        values = h.series('batch', 'loss').values
    assert values.tolist() == [1., np.inf, -np.inf] and values.dtype == np.float32


@pytest.mark.parametrize('values', ([-np.inf, 0., 1.], [0., 1., np.inf], [-np.inf, -np.inf, 2., 3.], [0., np.inf]))
def test_quartiles_beside_an_infinite_value_are_infinite(values):
    "Between an infinite and a finite value lies an infinite one; elsewhere they are NumPy's."
    got, o = summary(np.array(values), np.ones(len(values)))[3:6], np.sort(values)
    for q,mine in zip((.25, .5, .75), got):
        at = q*(len(o)-1)
        two = o[int(at)], o[int(np.ceil(at))]
        assert mine == two[0] if two[0] == two[1] else np.isclose(mine, two[0]*(1 - at % 1) + two[1]*(at % 1))
