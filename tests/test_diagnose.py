"Findings: planted faults are named first, healthy runs are left alone; evidence of every kind; nothing is read in a step."
import json, warnings
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from planted import faults, healthy, is_right, mlp, train
from shared import CountReads, HandSGD, ReadsPerStep
from torch import nn, optim

from miniai.activations import ActivationStats
from miniai.callback import Callback
from miniai.compare import compare
from miniai.datasets import DataLoaders, fashion_mnist
from miniai.demo import train_run
from miniai.device import set_seed
from miniai.diagnose import Finding, Findings, StopOnCB, assert_healthy, diagnose, evidence_of, rule, rules
from miniai.gradients import GradientStats, UpdateStats
from miniai.history import History, plain_frame, read_table, write_table
from miniai.hooks import count_hooks
from miniai.inspector import Inspector, InspectorCB
from miniai.learner import Learner, TrainCB
from miniai.lens import LossMetrics, OutputActivation, OutputNorm, ParameterGradientGeometry, ParameterUpdateGeometry
from miniai.visualizer import open_recording
from miniai.watch import Watcher


@pytest.fixture(scope='module')
def dls(): return DataLoaders.in_memory(fashion_mnist('small'), batch_size=64)


@pytest.fixture(scope='module')
def dead(dls): return train(faults['bias -10 before ReLU'], dls)   # read by several tests, changed by none


@pytest.mark.parametrize('name', faults)
def test_planted_fault_comes_first(name, dls):
    "A seed that the page about it does not use."
    findings = diagnose(train(faults[name], dls, seed=11))
    assert is_right(faults[name], findings), findings


@pytest.mark.parametrize('name', ['MLP; Adam', 'CNN; SGD, momentum', 'ResNet, BatchNorm; AdamW', 'LSTM; Adam',
                                  'transformer; SGD, momentum'])
def test_healthy_run_raises_no_alarm(name, dls): assert_healthy(train(healthy[name], dls, seed=11))


def test_the_demos_failing_net():
    "Outputs collapse and the loss jumps, though never far above where it began; the same net cured is left alone."
    dls = DataLoaders.in_memory(fashion_mnist('small'), batch_size=512)
    failing, cured = (train_run(nm, dls, nm == 'cured', cbs=[GradientStats(), UpdateStats()]).learn.diagnose()
                      for nm in ('failing', 'cured'))
    # which of the two comes first depends on rounding, and so on the processor: a collapse needs not come with a jump
    assert failing[0].level == 'error' and failing[0].rule in ('learning_rate_high', 'at_chance')
    assert not cured.of('error', 'warning')


def test_every_rule_has_a_planted_fault_or_is_tested_by_name():
    elsewhere = {'constant_output', 'update_ratio', 'at_chance', 'little_data'}
    elsewhere |= {nm for nm, f in rules.items() if f.__module__ in ('miniai.loss_rules', 'miniai.step_rules')}   # on their page
    assert set(rules) == {o.rule for o in faults.values() if o.rule} | elsewhere


def test_findings_say_where_when_and_by_how_much(dead):
    first = dead.diagnose()[0]
    assert (first.rule, first.level, first.layer, first.steps, first.value) == ('dead_units', 'error', 'act2', (0, 93), 1.)
    assert first.causes and first.tries and 'act2 (ReLU)' in first.text and 'since the first step' in first.text
    assert first.chart.lines['act2'][1].tolist() == [1.]*94
    json.dumps(dead.diagnose().to_dict())   # a file can hold it


def test_worst_first(dead):
    levels = [o.level for o in dead.diagnose()]
    assert levels == sorted(levels, key=['error', 'warning', 'note'].index)


def test_plot_shows_the_limit(dead):
    ax, = dead.diagnose()[0].plot().axes
    assert ax.lines[0].get_ydata().tolist() == [1.]*94 and ax.lines[-1].get_ydata() == [.5, .5]


def test_diagnosis_changes_nothing(dead):
    weights, rng = [p.clone() for p in dead.model.parameters()], torch.get_rng_state()
    before = len(dead.history), dead.n_steps, dead.model.training
    dead.diagnose()
    assert before == (len(dead.history), dead.n_steps, dead.model.training)
    assert all(torch.equal(a, b) for a, b in zip(weights, dead.model.parameters()))
    assert torch.equal(rng, torch.get_rng_state()) and count_hooks(dead.model) == 0


def test_names_are_escaped():
    name = '<script>alert(1)</script>'
    text = Findings([Finding('dead_units', 'error', name, text=f'{name} & co', causes=[name])])._repr_html_()
    assert '<script>' not in text and text.count('&lt;script&gt;') == 3 and '&amp; co' in text


# what it can be asked about

def test_parts_alone_say_what_they_know(dead):
    acts, grads, _ = dead.cbs[-3:]
    assert diagnose(acts)[0].layer == 'act2' and diagnose(acts.history)[0].rule == 'dead_units'
    alone = diagnose(grads)
    assert 'dead_units' in alone.unchecked and 'no_gradient' in alone.checked
    together = diagnose([acts, grads, dead.history])
    assert {'dead_units', 'exploding_gradients', 'learning_rate_high'} <= set(together.checked)


@pytest.mark.parametrize('ending', ['parquet', 'jsonl', 'csv'])
def test_file_says_the_same(dead, ending, tmp_path):
    findings = dead.diagnose()
    findings.evidence.save(tmp_path/f'run.{ending}')
    again = diagnose(tmp_path/f'run.{ending}')
    if ending == 'csv': assert (again[0].rule, again[0].layer) == ('dead_units', 'act2')   # which keeps no facts
    else: assert [o.to_dict() for o in again] == [o.to_dict() for o in findings]


def test_nan_survives_a_file(dls, tmp_path):
    learn = train(faults['NaN at step 40'], dls)
    evidence_of(learn).save(tmp_path/'run.jsonl')
    for line in (tmp_path/'run.jsonl').read_text().splitlines(): json.loads(line, parse_constant=pytest.fail)   # JSON has no NaN
    first = diagnose(tmp_path/'run.jsonl')[0]
    assert (first.rule, first.layer, first.steps[0]) == ('not_finite', 'act2.scale', 40)


@pytest.fixture(scope='module')
def inspected(dls):
    "A loop of one's own, with the bias of -10, and an inspector."
    set_seed(0)
    model, loss_fn = mlp(784, 64, 64, 10), nn.CrossEntropyLoss()
    with torch.no_grad(): model.fc2.bias.fill_(-10)
    opt = optim.SGD(model.parameters(), .1)
    lenses = [LossMetrics(loss_fn=loss_fn), OutputActivation(), OutputNorm(normalize_by_size=True), ParameterGradientGeometry(),
              ParameterUpdateGeometry()]
    inspector = Inspector(lenses, module=model, visualizer=None)
    for _ in inspector.range(2):
        for xb, yb in dls.train:
            loss_fn(model(xb), yb).backward()
            opt.step()
            opt.zero_grad()
    return inspector.detach()


def test_inspector(inspected):
    first = inspected.diagnose()[0]
    assert (first.rule, first.layer) == ('dead_units', 'act2') and any('means over epochs' in o for o in first.caveats)


def test_recording_and_its_file(inspected, tmp_path):
    inspected.to_parquet(tmp_path/'run.parquet')
    for o in (tmp_path/'run.parquet', open_recording(tmp_path/'run.parquet')):
        assert (diagnose(o)[0].rule, diagnose(o)[0].layer) == ('dead_units', 'act2')


def test_inspector_in_a_learner(dls):
    set_seed(0)
    model = mlp(784, 32, 32, 10)
    with torch.no_grad(): model.fc2.bias.fill_(-10)
    lenses = [OutputActivation(inplace=False), ParameterGradientGeometry(inplace=False)]
    learn = Learner(model, dls, F.cross_entropy, cbs=[TrainCB(), InspectorCB(lenses, visualizer=None)])
    learn.fit(1)
    first = learn.diagnose()[0]
    assert (first.rule, first.layer, first.steps) == ('dead_units', 'act2', (0, 93))   # by step, and no mean


def test_watcher(dls):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn = train(faults['layer outside the graph'], dls, watch=lambda learn: learn.watch(every=5))
    watcher = learn.watch()
    assert isinstance(watcher, Watcher)
    for findings in (learn.diagnose(), diagnose(watcher)):
        assert (findings[0].rule, findings[0].layer) == ('no_gradient', 'stem.fc1')


def test_sampled_steps_do_not_name_a_wrong_layer(dls):
    "The NaN is at step 40, which is not looked at; at step 42 every layer is NaN. The loss knows the step."
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn = train(faults['NaN at step 40'], dls, watch=lambda learn: learn.cbs.append(ActivationStats(every=7)))
    first = learn.diagnose()[0]
    assert (first.rule, first.layer, first.steps[0]) == ('not_finite', '', 40)
    dying = train(faults['bias -10 before ReLU'], dls, watch=lambda learn: learn.cbs.append(ActivationStats(every=7)))
    assert any('14 of 94 steps' in o for o in dying.diagnose()[0].caveats)


def test_any_learner(dls):
    "An optimizer without groups, an output that is no tensor, a loss without classes."
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.fc = nn.Linear(784, 1)
        def forward(self, x): return dict(out=self.fc(x.flatten(1)))
    loss = lambda preds, targets: F.mse_loss(preds['out'][:, 0], targets.float())
    learn = Learner(Two(), dls, loss, lr=.001, cbs=[TrainCB(), ActivationStats()], opt_func=HandSGD)
    assert 'little_data' in learn.diagnose().checked   # before any fit
    learn.fit(1)
    assert learn.diagnose().unchecked['at_chance'].startswith('what guessing would cost')


def test_part_of_the_parameters_in_the_optimizer(dls):
    set_seed(0)
    learn = Learner(mlp(784, 32, 10), dls, F.cross_entropy, cbs=[TrainCB(), GradientStats()],
                    opt_func=lambda params, lr: optim.SGD(list(params)[2:], lr))
    learn.fit(1)
    first = learn.diagnose()[0]
    assert (first.rule, first.layer) == ('not_trained', 'fc1') and 'optimizer' in first.text


def test_binary_cross_entropy_has_two_classes(dls):
    loss = lambda preds, targets: F.binary_cross_entropy_with_logits(preds, F.one_hot(targets, 10).float())
    loss.__name__ = 'binary_cross_entropy'
    learn = Learner(mlp(784, 32, 10), dls, loss, cbs=[TrainCB()])
    learn.fit(1)
    assert evidence_of(learn).facts.n_classes == 2


# runs

def two_runs(): # the loss of the first is NaN, of the second fine
    history = History()
    for values in ([2., float('nan')]*40, np.linspace(2., 1., 80)):
        history.start_run()
        for i, v in enumerate(values): history.record('batch', 'loss', float(v), step=history.run*80+i)
    return history


def test_the_last_run_is_judged():
    evidence = evidence_of(two_runs())
    assert not diagnose(evidence) and evidence.n_steps() == 80 and evidence.loss().steps[0] == 80


def test_a_later_validation_does_not_hide_it():
    history = two_runs()
    history.start_run()
    history.record('batch', 'loss', 1., step=160, phase='valid')
    assert len(evidence_of(history).loss()) == 80


def test_unscaled_columns_beside_an_embedding_are_a_cause():
    class Tabular(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.fc = nn.Embedding(4, 3), nn.Linear(5, 8)
            self.head = nn.Sequential(nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        def forward(self, x): return self.head(self.fc(torch.cat([self.emb(x[:, 2].long()), x[:, :2]], 1)))
    X, model = torch.rand(64, 3)*torch.tensor([90., 1e5, 4.]), Tabular()
    inspector, loss_func, opt = Inspector(), nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters())
    with inspector.attach(model, optimizer=opt, loss_fn=loss_func):
        for _ in inspector.range(1):
            for _ in range(5):
                loss_func(model(X), (X[:, 0] > 45).long()).backward()
                opt.step(); opt.zero_grad()
    found = {o.rule: o for o in inspector.diagnose()}['exploding_activations']
    assert found.layer.startswith('fc') and 'unscaled inputs' in found.causes

def test_little_data_is_said(dls):
    learn = Learner(mlp(784, 16, 10), dls, F.cross_entropy, lr=1e-9, cbs=[TrainCB(), StopOnCB('loss>0', every=5)])
    learn.fit(1)
    found = {o.rule: o for o in learn.diagnose()}
    assert found['little_data'].value == 5 and found['at_chance'].level == 'note'


def test_empty_history_is_no_error():
    findings = diagnose(History())
    assert [o.rule for o in findings] == ['little_data'] and not findings.of('error') and findings.unchecked


# stopping

def test_stop_reads_nothing_between_two_looks(dls):
    with CountReads() as counter:
        reads = ReadsPerStep(counter)
        cbs = [TrainCB(), ActivationStats(), StopOnCB('nan', 'dead>0.99', every=10), reads]
        Learner(mlp(784, 16, 10), dls, F.cross_entropy, cbs=cbs).fit(1, valid=False)
    looked = [i for i, n in enumerate(reads.per_step) if n and i]   # before step 0 the loader draws its order
    assert set(looked) <= {9+10*i for i in range(10)} and looked


def test_stop_is_out_of_lr_find(dls):
    stop = StopOnCB('loss>0', every=1)
    learn = Learner(mlp(784, 16, 10), dls, F.cross_entropy, cbs=[TrainCB(), stop])
    learn.lr_find(plot=False)
    assert stop.reason is None
    for _ in range(2):   # and can be fitted twice
        learn.fit(1)
        assert stop.reason.startswith('loss of batch')
    assert len(learn.history.series('batch', 'loss')) == 2


def test_stop_by_a_rule(dls):
    learn = train(faults['lr 30'], dls, watch=lambda learn: learn.cbs.append(StopOnCB('learning_rate_high', every=10)))
    assert len(learn.history.series('batch', 'loss')) == 10 and 'rises' in learn.cbs[-1].reason


def test_stop_at_one_layer(dls):
    watch = lambda at: lambda learn: learn.cbs.extend([ActivationStats(), StopOnCB(f'dead>=1 at {at}', every=10)])
    assert len(train(faults['bias -10 before ReLU'], dls, watch=watch('act2')).history.series('batch', 'loss')) == 10
    assert len(train(faults['bias -10 before ReLU'], dls, watch=watch('act1')).history.series('batch', 'loss')) == 94


@pytest.mark.parametrize('text', ['nam', 'dead', '>3', 'dead>>3', 'dead>x', 3, ''])
def test_stop_refuses_what_it_cannot_read(text):
    with pytest.raises(ValueError, match='StopOnCB: got the condition'): StopOnCB(text)


# a softmax too many

class _SoftmaxInForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = mlp(784, 16, 10)
    def forward(self, x): return F.softmax(self.body(x), 1)


def _few_steps(net, loss=F.cross_entropy):
    learn = Learner(net, DataLoaders.in_memory(fashion_mnist('small'), batch_size=512), loss, lr=.1, cbs=[TrainCB()])
    learn.fit(1)
    return diagnose(learn, 'softmax_before_loss')


def test_softmax_that_is_no_layer_is_seen_by_its_answers():
    first, = _few_steps(_SoftmaxInForward(), nn.CrossEntropyLoss())
    assert (first.level, first.layer) == ('error', '') and 'add up to 1' in first.text


def test_log_softmax_and_plain_logits_are_left_alone():
    for act in nn.Identity(), nn.LogSoftmax(1): assert not _few_steps(nn.Sequential(mlp(784, 16, 10), act))


# causes that are known

def test_strong_weight_decay_is_named(dls):
    learn = Learner(mlp(784, 32, 10), dls, F.cross_entropy, .1, [TrainCB()], partial(optim.SGD, weight_decay=1.))
    learn.fit(1)
    found = {o.rule: o for o in learn.diagnose()}
    assert found['at_chance'].causes[0] == 'weight decay that is too strong (it was 1)', found


def test_findings_above_are_only_spoken_of_if_there_are_any(dls):
    alone = train(faults['labels shuffled'], dls).diagnose()
    assert alone[0].rule == 'at_chance' and 'above' not in str(alone[0])
    found = {o.rule: o for o in train(faults['lr 30'], dls).diagnose()}
    assert 'above' in found['at_chance'].causes[0]


# names that do not exist

@pytest.mark.parametrize('call, near', [
    (lambda x: assert_healthy(x, allow='at_chnce'), 'at_chance'), (lambda x: assert_healthy(x, allow=['dead_unit']), 'dead_units'),
    (lambda x: assert_healthy(x, 'eror'), 'error'), (lambda x: diagnose(x).of('eror'), 'error'), (lambda x: diagnose(x, 'ded_units'), 'dead_units')])
def test_a_wrong_name_is_told_the_nearest(call, near):
    with pytest.raises(ValueError, match=near): call(History())


def test_a_wrong_limit_is_told_the_nearest(dead):
    with pytest.raises(TypeError, match="did you mean 'max_dead'"): dead.diagnose(max_ded=.9)


def test_only_that_name_is_allowed(dead):
    with pytest.raises(AssertionError): assert_healthy(dead, allow='at_chance')


def test_lr_find_is_for_those_who_have_it():
    losses = _losses([1.]*20 + [50.]*20)
    assert 'lr_find' not in str(diagnose(losses, 'learning_rate_high')) and diagnose(losses, 'learning_rate_high')


# rules of one's own

def test_rule_of_ones_own(dead):
    @rule
    def too_long(evidence, *, max_steps=10): return [Finding('too_long', 'error')]*(evidence.n_steps() > max_steps)
    try:
        assert diagnose(dead, 'too_long')[0].rule == 'too_long' and not diagnose(dead, ['too_long'], max_steps=1000)
    finally: del rules['too_long']


def test_assert_healthy(dead):
    with pytest.raises(AssertionError, match='act2'): assert_healthy(dead)
    assert_healthy(dead, allow={o.rule for o in dead.diagnose()})


# side by side

def test_compare_reads_files_too(dead, dls, tmp_path):
    fine = train(healthy['MLP; Adam'], dls)
    evidence_of(fine).save(tmp_path/'fine.parquet')
    table = compare(dict(dead=dead, fine=tmp_path/'fine.parquet'), stats=['death_rate', 'loss']).table.set_index(['layer', 'stat'])
    assert table.loc[('act2', 'death_rate'), 'dead'] == 1 and table.loc[('act2', 'death_rate'), 'fine'] < .5
    assert table.loc[('batch', 'loss'), 'fine/dead'] < .8


def test_compare_leaves_gaps(dead):
    bare = History()
    bare.record('batch', 'loss', 1., step=0)
    table = compare(dict(bare=bare, dead=dead)).table.set_index(['layer', 'stat'])
    assert np.isnan(table.loc[('act2', 'std'), 'bare']) and table.loc[('batch', 'loss'), 'bare'] == 1
    assert table.loc[('act2', 'std'), 'only in'] == 'dead' and table.loc[('batch', 'loss'), 'only in'] == ''
    assert table['only in'].iloc[0] == '' and (table['only in'].iloc[1:] == 'dead').all()   # numbers come first


def test_compare_does_not_rank_noise_around_0():
    runs = {}
    for nm, mean, std in (('a', .0001, 1.), ('b', -.0001, 2.)):
        runs[nm] = History()
        runs[nm].start_run()
        for i in range(40):
            runs[nm].record('fc', 'mean', mean + .01*(-1)**i, step=i)
            runs[nm].record('fc', 'std', std + .01*(-1)**i, step=i)
    assert compare(runs).table.stat.tolist() == ['std', 'mean']


# what is no fault, and what is told apart

def _losses(values, samples=64):
    h = History()
    h.start_run()
    for i, value in enumerate(values): h.record('batch', 'loss', float(value), step=i, phase='train', samples=samples)
    return h


def test_single_losses_over_a_few_samples_vary_by_themselves():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).square().clamp(min=.01)
    values[0] = .5
    assert diagnose(_losses(values, 64), 'learning_rate_high').of('error', 'warning')
    assert not diagnose(_losses(values, 1), 'learning_rate_high')
    assert diagnose(_losses([.4, *values[1:]*50], 1), 'learning_rate_high')[0].level == 'error'


def test_collapse_after_a_rise_of_the_loss_is_an_error_that_comes_before_its_effects():
    h = _losses([2.3, 900., *[2.2]*60])
    for i in range(62): h.record('act', 'death_rate', float(i > 1), step=i, phase='train', samples=64)
    assert [(o.rule, o.level) for o in diagnose(h)][:2] == [('learning_rate_high', 'error'), ('dead_units', 'error')]


def test_a_fall_of_the_gradient_from_the_start_is_no_jump():
    def found(norms):
        h = History()
        h.start_run()
        for i, value in enumerate(norms): h.record('all', 'grad_norm', value, step=i, phase='train')
        for i, value in enumerate(norms): h.record('fc.weight', 'grad_norm', value, step=i, phase='train')
        return diagnose(h, 'exploding_gradients')
    falling = np.geomspace(10, 1e-9, 80).tolist()
    assert not found(falling)
    assert found([1.]*40 + [5e4] + [1.]*40)[0].steps == (40, 40)
    assert found([1.]*10 + [5e4] + falling)[0].steps[0] == 10


def test_loss_comes_before_the_gradients_it_spoils(dls):
    class Spoil(Callback):
        def after_loss(self, learn): learn.loss = learn.loss*(torch.nan if learn.n_steps == 9 else 1.)
    learn = Learner(mlp(784, 16, 10), dls, F.cross_entropy, .1, [TrainCB(), Spoil(), ActivationStats(), GradientStats()])
    learn.fit(1)
    first = learn.diagnose('not_finite')[0]
    assert (first.layer, first.steps[0]) == ('', 9) and 'in the loss' in first.text


@pytest.mark.parametrize('loss,n', [(nn.CrossEntropyLoss(), 10), (nn.CrossEntropyLoss(reduction='sum'), None),
                                    (partial(F.cross_entropy, reduction='sum'), None),
                                    (nn.CrossEntropyLoss(weight=torch.ones(10)), None)])
def test_guessing_is_log_c_for_a_plain_mean_only(loss, n, dls):
    learn = Learner(mlp(784, 16, 10), dls, loss, 1e-3, [TrainCB()])
    learn.fit(1)
    assert evidence_of(learn).facts.n_classes == n


@pytest.mark.parametrize('own,level', [(False, 'error'), (True, 'warning')])
def test_optimizer_of_another_model_is_an_error(own, level, dls):
    net, other = mlp(784, 16, 10), mlp(784, 16, 10)
    learn = Learner(net, dls, F.cross_entropy, .1, [TrainCB(), GradientStats()],
                    lambda params, lr: optim.SGD([*net.fc2.parameters()] if own else other.parameters(), lr))
    learn.fit(1)
    first = learn.diagnose('not_trained')[0]
    assert (first.level, first.layer) == (level, 'fc1')


def test_layers_of_an_earlier_model_are_not_in_the_run(dls):
    learn = Learner(mlp(784, 16, 16, 10), dls, F.cross_entropy, .1, [TrainCB(), ActivationStats(), GradientStats(), UpdateStats()])
    learn.fit(1)
    learn.model = mlp(784, 16, 10)
    learn.fit(1)
    evidence = evidence_of(learn)
    assert evidence.sources('std') == ['flatten', 'fc1', 'act1', 'fc2']
    assert evidence.sources('grad_norm') == evidence.sources('update_ratio') == ['fc1.weight', 'fc1.bias', 'fc2.weight', 'fc2.bias']


@pytest.mark.parametrize('ending', ['parquet', 'jsonl', 'csv'])
def test_files_are_exact(ending, tmp_path):
    h = History()
    for run, value in enumerate([1/3, torch.nan, torch.inf, -torch.inf, 1e-45]):
        h.start_run()
        h.record('batch', 'loss', value, step=run, phase='train', samples=3)
        h.record('a,"b"\n<c>', 'range', torch.tensor([value, 1e30]), step=run, phase='valid')
        h.record('wide', 'dead_epoch', torch.arange(40_000) % 3 == 0, step=run, phase='train')
    write_table(plain_frame(h.flush()), tmp_path/f'table.{ending}')
    again, _ = read_table(tmp_path/f'table.{ending}')
    assert again.keys() == h.keys()
    for phase, source, stat in h.keys():
        old, new = h.series(source, stat, phase), again.series(source, stat, phase)
        assert np.array_equal(old.values.astype(float), new.values.astype(float), equal_nan=True)
        assert all(np.array_equal(getattr(old, o), getattr(new, o)) for o in ('runs', 'steps', 'samples'))
    if ending == 'jsonl':   # JSON has no NaN, in arrays neither
        for line in (tmp_path/'table.jsonl').read_text().splitlines(): json.loads(line, parse_constant=pytest.fail)


def test_learning_rate_in_a_tensor(dls, tmp_path):
    learn = Learner(mlp(784, 16, 10), dls, F.cross_entropy, .5, [TrainCB(), GradientStats()], lambda ps, lr: optim.Adam(ps, torch.tensor(lr)))
    learn.fit(1)
    evidence = evidence_of(learn)
    evidence.save(tmp_path/'run.jsonl')
    assert evidence.facts.lr == evidence_of(tmp_path/'run.jsonl').facts.lr == .5


def test_steps_of_an_inspected_loop_are_its_batches():
    "Whatever the lenses are, and also where they count no steps of an optimizer."
    from miniai.inspector import Inspector
    from miniai.lens import LossMetrics, OutputNorm
    for lenses in ([LossMetrics()], [OutputNorm()], [LossMetrics(), OutputNorm(inplace=False)]):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
        opt = torch.optim.SGD(model.parameters(), .01)
        inspector = Inspector(lenses, module=model, visualizer=None)
        for _ in inspector.range(2):
            for _ in range(20):
                loss = model(torch.randn(8, 4)).square().mean()
                inspector.push_loss(loss, train=True)
                loss.backward(); opt.step(); opt.zero_grad()
        assert evidence_of(inspector).n_steps() == 40


class Attends(nn.Module):
    "One block with queries, keys and values by themselves, drawn as BERT's are: its attention begins nearly uniform."
    def __init__(self, n=32):
        super().__init__()
        self.token, self.place, self.norm = nn.Embedding(50, n), nn.Embedding(16, n), nn.LayerNorm(n)
        self.query, self.key, self.value, self.out, self.head = *(nn.Linear(n, n) for _ in range(4)), nn.Linear(n, 2)
        for o in self.modules():
            if isinstance(o, (nn.Linear, nn.Embedding)): nn.init.normal_(o.weight, std=.02)
    def forward(self, x):
        a = self.norm(self.token(x) + self.place(torch.arange(x.shape[1])))
        mixed = F.scaled_dot_product_attention(self.query(a), self.key(a), self.value(a))
        return self.head((a + self.out(mixed)).mean(1))

def test_a_uniform_attention_is_no_vanishing_gradient():
    "Its queries get next to no gradient, and the embeddings in front of them all they need."
    set_seed(0)
    x = torch.randint(0, 50, (320, 16))
    dls = DataLoaders.from_arrays(x, (x[:, :8].sum(1) > x[:, 8:].sum(1)).long(), 32)
    learn = Learner(Attends(), dls, F.cross_entropy, lr=1e-3, opt_func=optim.Adam, cbs=TrainCB())
    learn.watch(every=1)
    learn.fit(8)
    found = learn.diagnose()
    rms = {nm: found.evidence.track(f'{nm}.weight', 'grad_norm').first/o.weight.numel()**.5 for nm, o in learn.model.named_children()}
    assert rms['query'] < 1e-3*rms['head'] < rms['token']
    assert 'vanishing_gradients' in found.checked and not found.of('error', 'warning')

def test_a_net_that_died_is_not_called_unchanged():
    "Its gradient was there, and is exactly zero now: no step is left out."
    class Kill(Callback):
        def after_step(self, learn):
            if learn.n_steps == 28: learn.model[0].bias.data.fill_(-100.)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(40*16, 8)
    data = [(x[i:i+16], (x[i:i+16, 0] > 0).long()) for i in range(0, len(x), 16)]
    learn = Learner(net, DataLoaders(data, []), F.cross_entropy, .1, [TrainCB(), Kill()])
    learn.watch(every=1)
    learn.fit(1, valid=False)
    found = learn.diagnose()
    assert 'unchanged' in found.checked and 'unchanged' not in {o.rule for o in found}
    assert 'dead_units' in {o.rule for o in found}


def test_a_layer_whose_weight_is_used_without_a_call_is_no_finding():
    "As a table of positions: its weight has a gradient and moves."
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.pos, self.head = nn.Embedding(5, 8), nn.Linear(8, 3)
        def forward(self, x): return self.head((x + self.pos.weight).mean(1))
    torch.manual_seed(0)
    batches = [(torch.randn(32, 5, 8), torch.randint(3, (32,))) for _ in range(4)]
    learn = Learner(Net(), DataLoaders(batches, batches), nn.CrossEntropyLoss(), lr=.1, cbs=[TrainCB()])
    learn.watch(every=1)
    with pytest.warns(UserWarning, match='never called'): learn.fit(3)
    found = learn.diagnose()
    assert 'never_called' in found.checked and 'never_called' not in [o.rule for o in found]


def test_a_layer_that_is_the_model_has_a_name():
    from miniai.evidence import Facts
    assert Facts(layers={'': 'Linear'}).named('') == 'the model (Linear)' and Facts().named('fc') == 'layer fc'


def test_before_any_training_it_says_so():
    "A reader got 51 reasons, none of which was that nothing had been trained."
    for x in (Learner(nn.Linear(2, 2), cbs=TrainCB()), Inspector(visualizer=None)):
        found = x.diagnose()
        assert 'nothing was trained yet' in found.summary() and 'learn.fit' in found.summary()


def test_a_callback_with_an_inspector_of_its_own_kind_is_no_inspector():
    "Its attribute of that name has nothing that the rules could ask."
    class Mine(Callback):
        inspector = None
    x, y = torch.randn(64, 4), torch.randint(0, 2, (64,))
    learn = Learner(nn.Linear(4, 2), DataLoaders.from_arrays(x, y, 16), nn.CrossEntropyLoss(), .1, [TrainCB(), Mine()])
    learn.fit(1)
    assert learn.diagnose().checked
