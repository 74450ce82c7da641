"Healthy trainings of many kinds, written before it was known what rules say of them, raise neither error nor warning."
import pytest
import torch
from torch import nn, optim
from zoo import zoo

from miniai.diagnose import diagnose, rules
from miniai.history import History
from miniai.inspector import Inspector


@pytest.mark.parametrize('name', zoo)
def test_healthy_run_is_left_alone(name):
    torch.manual_seed(0)
    watched, before, after, most = zoo[name]()
    assert after < most*before, f'{name} does not learn: {before:.3g}, {after:.3g}'
    assert not watched.diagnose().of('error', 'warning')


def facts_of(*opts, model):
    inspector = Inspector().attach(model, loss_fn=nn.MSELoss())
    for o in opts: o.step()
    return inspector.detach().diagnose().evidence.facts


def test_several_optimizers_are_read_together():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    for p in model.parameters(): p.grad = torch.ones_like(p)
    facts = facts_of(optim.SGD(model[0].parameters(), .1), optim.Adam(model[1].parameters(), .3, weight_decay=.2), model=model)
    assert (facts.optimizer, facts.lr, facts.weight_decay) == ('SGD, Adam', .3, .2)
    facts = facts_of(optim.Adam(model.parameters(), .1, weight_decay=.2, decoupled_weight_decay=True), model=model)
    assert facts.optimizer == 'AdamW'


def test_a_rule_that_raises_says_so(monkeypatch):
    def broken(evidence): raise ZeroDivisionError('by design')
    monkeypatch.setitem(rules, 'broken', broken)
    with pytest.warns(UserWarning, match='broken'): found = diagnose(History(), ['broken', 'at_chance'])
    assert 'failed with an error: broken' in found.summary() and 'want of records: at_chance.' in found.summary()
