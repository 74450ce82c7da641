# %%
#| default_exp diagnose

# %% [markdown]
# # What is wrong?
#
# > Findings in words, worst first, from what was recorded of a training; the same as a test and as a callback that stops a fit.

# %%
#| export
import inspect, operator, re, warnings

import numpy as np
import torch
from fastcore.basics import patch

from miniai.callback import Callback, CancelFitException
from miniai.case import Chart, Evidence, Facts, Finding, Findings, Param, Track, evidence_of, levels
from miniai.checks import Missing, rule, rules
from miniai.history import History, is_main
from miniai.inspector import Inspector
from miniai.learner import Learner

# %%
#| export
_all_ = ['Chart', 'Evidence', 'Facts', 'Finding', 'Findings', 'Param', 'Track', 'evidence_of', 'Missing', 'rule', 'rules']

# %%
#| hide
import tempfile
from collections import OrderedDict
from functools import partial
from pathlib import Path
import torch.nn.functional as F
from fastcore.test import test_close, test_eq, test_fail, test_warns
from torch import nn
from miniai.activations import ActivationStats
from miniai.datasets import DataLoaders, fashion_mnist
from miniai.device import set_seed
from miniai.gradients import GradientStats, UpdateStats
from miniai.learner import MetricsCB, TrainCB
from miniai.training import accuracy

# %% [markdown]
# Pictures need somebody who can read them. This page turns the table into sentences. Here is a training that goes wrong: one
# layer begins with biases so far below zero that its ReLU lets nothing through.

# %%
dls = DataLoaders.in_memory(fashion_mnist('small'), batch_size=64)

def small_net():
    "Two hidden layers."
    layers = OrderedDict(flatten=nn.Flatten(), fc1=nn.Linear(784, 64), act1=nn.ReLU(), fc2=nn.Linear(64, 64), act2=nn.ReLU(),
                         head=nn.Linear(64, 10))
    return nn.Sequential(layers)

set_seed(1)
model = small_net()
with torch.no_grad(): model.fc2.bias.fill_(-10)
watchers = [ActivationStats(), GradientStats(), UpdateStats()]
learn = Learner(model, dls, F.cross_entropy, lr=.1, cbs=[TrainCB(), MetricsCB(accuracy=accuracy), *watchers])
learn.fit(1)

# %% [markdown]
# ## diagnose
#
# `diagnose` asks every rule of `miniai.checks` about the last run of what it is given. A limit of a rule can be changed by its
# name.

# %%
#| export
def _thresholds(f, given):
    "Those of the thresholds `given` that rule `f` has."
    return {nm: v for nm,v in given.items() if nm in inspect.signature(f).parameters}

def _chosen(names, given):
    "The rules to ask, by name; unknown names are refused."
    names = [names] if isinstance(names, str) else names
    wrong = [nm for nm in names or () if nm not in rules]
    if wrong: raise ValueError(f'diagnose: there is no rule {wrong[0]!r}; there are {", ".join(rules)}')
    known = {nm for f in rules.values() for nm in list(inspect.signature(f).parameters)[1:]}
    wrong = [nm for nm in given if nm not in known]
    if wrong: raise TypeError(f'diagnose: no rule has the limit {wrong[0]!r}; there are {", ".join(sorted(known))}')
    return {nm: rules[nm] for nm in names or rules}

def _asked(nm, f, evidence, given):
    "What one rule finds; and why it could not be asked, if it could not."
    try: return list(f(evidence, **_thresholds(f, given))), None
    except Missing as e: return [], str(e)
    except Exception as e:   # at the end of a long fit the other rules should still be heard
        warnings.warn(f'diagnose: rule {nm!r} failed ({type(e).__name__}: {e})', stacklevel=3)
        return [], f'it failed ({type(e).__name__}: {e})'

def diagnose(
    x,           # History, Learner, Inspector, Watcher, callback, Recording, path of a file; or a list of these
    rules=None,  # name or names of the rules to ask; default all
    **limits     # of the rules, by their names, such as max_dead=.9
) -> Findings: # a list, worst first
    "What is wrong with the last run of `x`, in words."
    evidence, found, unchecked = evidence_of(x), [], {}
    chosen = _chosen(rules, limits)
    for nm,f in chosen.items():
        new, why = _asked(nm, f, evidence, limits)
        found += new
        if why: unchecked[nm] = why
    found.sort(key=lambda o: levels.index(o.level))   # stable: of one level, in the order of the rules
    return Findings(found, [nm for nm in chosen if nm not in unchecked], unchecked, evidence)

# %%
findings = diagnose(learn)
findings

# %% [markdown]
# The first line names the cause, what follows from it comes below. In a notebook a list of findings shows as a table; printed,
# it reads like this:

# %%
print(findings)

# %%
#| hide
test_eq((findings[0].rule, findings[0].layer, findings[0].steps), ('dead_units', 'act2', (0, 93)))
test_eq([o.level for o in findings], sorted((o.level for o in findings), key=levels.index))
assert '<table>' in findings._repr_html_() and 'act2 (ReLU)' in str(findings)
test_eq(findings.to_dict()['findings'][0]['layer'], 'act2')

# %% [markdown]
# Each can draw what it was read from.

# %%
findings[0].plot()

# %% [markdown]
# A limit that no rule has, or a rule that is not there, is refused with what there is.

# %%
test_eq(diagnose(learn, 'dead_units', max_dead=1.), [])
test_fail(lambda: diagnose(learn, max_deaths=1), contains='max_dead')
test_fail(lambda: diagnose(learn, 'dead_unit'), contains='dead_units')
test_fail(lambda: diagnose(3), contains='give a History')

# %% [markdown]
# The same as a method of whatever was trained or watched.

# %%
#| export
_diagnose = diagnose

@patch
def diagnose(self:Learner,
    *args, # as for the function `diagnose`
    **kw   # likewise
) -> Findings:
    "What is wrong with the last fit, in words."
    return _diagnose(self, *args, **kw)

@patch
def diagnose(self:Inspector,
    *args, # as for the function `diagnose`
    **kw   # likewise
) -> Findings:
    "What is wrong with the run that was watched, in words."
    return _diagnose(self, *args, **kw)

# %%
test_eq([o.rule for o in learn.diagnose()], [o.rule for o in findings])

# %% [markdown]
# What was not recorded cannot be judged, and the findings say so: `unchecked` has the reason for each rule. A run is too short,
# a step was not looked at, values are an epoch's means: that is in the caveats of a finding ("but").

# %%
bare = diagnose(learn.history)
print(bare.summary())
bare.unchecked['dead_units']

# %%
#| hide
assert 'ActivationStats' in bare.unchecked['dead_units'] and 'overfitting' in bare.unchecked
test_eq(diagnose(History()).of('error', 'warning'), [])

# %% [markdown]
# A run can be put into a file and judged later, elsewhere.

# %%
with tempfile.TemporaryDirectory() as folder:
    for ending in ('parquet', 'jsonl'):
        findings.evidence.save(Path(folder)/f'run.{ending}')
        again = diagnose(Path(folder)/f'run.{ending}')
        test_eq([o.to_dict() for o in again], [o.to_dict() for o in findings])

# %% [markdown]
# ## A rule of your own
#
# A function from evidence to findings; `@rule` puts it on the list.

# %%
@rule
def loss_is_noisy(evidence, *, max_noise=.5):
    "The loss of one batch differs by more than `max_noise` of the mean from that of the next."
    loss = evidence.loss()
    if len(loss) < 2: raise Missing('no loss was recorded')
    noise = float(np.abs(np.diff(loss.values)).mean()/loss.values.mean())
    if noise < max_noise: return []
    return [Finding('loss_is_noisy', 'note', value=noise, threshold=max_noise, text=f'The loss jumps by {noise:.1%} from batch to batch.',
                    tries=['larger batches'])]

print(diagnose(learn, 'loss_is_noisy', max_noise=.0001))

# %%
#| hide
test_eq(diagnose(learn, 'loss_is_noisy'), [])
rules['loss_is_noisy'] = lambda evidence: 1/0
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter('always')
    assert 'ZeroDivisionError' in diagnose(learn).unchecked['loss_is_noisy']
assert 'loss_is_noisy' in str(told[0].message)
del rules['loss_is_noisy']

# %% [markdown]
# ## assert_healthy
#
# For a test suite: a few steps of a training, and a sentence if they are not healthy.

# %%
#| export
def assert_healthy(
    x,               # as for `diagnose`
    level='warning', # findings of this level and worse fail
    allow=(),        # names of rules that may find something
    **limits         # of the rules, by their names
) -> Findings: # all of them, if none fails
    "An AssertionError that says what is wrong, if anything is."
    if level not in levels: raise ValueError(f'assert_healthy: level is {level!r}; it is one of {", ".join(levels)}')
    findings = diagnose(x, **limits)
    failing = [o for o in findings.of(*levels[:levels.index(level)+1]) if o.rule not in allow]
    if failing: raise AssertionError('The training is not healthy.\n\n' + '\n\n'.join(map(str, failing)))
    return findings

# %%
def fitted(epochs=1, lr=.1, cbs=(), net=small_net):
    "A learner that was fitted, with its watchers."
    set_seed(1)
    watchers = [ActivationStats(), GradientStats(), UpdateStats()]
    metrics = MetricsCB(accuracy=accuracy)
    metrics._log = lambda d: None
    learn = Learner(net(), dls, F.cross_entropy, lr=lr, cbs=[TrainCB(), metrics, *watchers, *cbs])
    learn.fit(epochs)
    return learn

healthy = fitted()
print(assert_healthy(healthy))
test_fail(lambda: assert_healthy(learn), contains='act2 (ReLU) are zero')
test_eq(assert_healthy(learn, allow={o.rule for o in findings}), findings)

# %% [markdown]
# ## StopOnCB
#
# The night is long, and a loss that is NaN at ten in the evening is NaN in the morning. `StopOnCB` ends a fit when one of its
# conditions holds: `'nan'` (the loss was NaN or infinite), a number such as `'loss>20'`, `'dead>0.5'`, `'grad_norm>1e3'` or
# `'std<1e-4'`, of any layer or of one (`'dead>0.5 at act2'`), or the name of a rule. Numbers are those that the watchers among
# the callbacks have recorded last.

# %%
#| export
_comparisons = {'>=': operator.ge, '<=': operator.le, '>': operator.gt, '<': operator.lt}
_pattern = re.compile(r'\s*(\w+)\s*(>=|<=|>|<)\s*(\S+?)(?:\s+at\s+(\S+))?\s*')
_short_names = dict(dead='death_rate')

class _Condition:
    "One condition of `StopOnCB`, from its text."
    def __init__(self, text):
        self.text, self.stat = text, None
        if text == 'nan' or text in rules: return
        found = _pattern.fullmatch(text) if isinstance(text, str) else None
        try: stat, sign, limit, self.layer = found.groups(); self.limit = float(limit)
        except (AttributeError, ValueError):
            raise ValueError(f"StopOnCB: got the condition {text!r}; give 'nan', a number as in 'dead>0.5', 'loss>20' or "
                             f"'grad_norm>1e3 at all', or the name of a rule ({', '.join(rules)})") from None
        self.stat, self.holds = _short_names.get(stat, stat), _comparisons[sign]

    def why(self, learn, bad):
        "What is the case, in words; None if it is not."
        if self.text == 'nan': return 'the loss was NaN or infinite' if bad else None
        if self.stat is None: return next((o.text for o in learn.diagnose(self.text).of('error', 'warning')), None)
        for source,value in _last_values(learn, self.stat, self.layer):
            if self.holds(value, self.limit): return f'{self.stat} of {source} is {value:.3g} ({self.text})'

def _last_values(learn, stat, layer):
    "(who, last number) of each that has the statistic."
    for h in [learn.history, *(o.history for o in learn.cbs if isinstance(getattr(o, 'history', None), History))]:
        for phase,source,what in h.keys():
            if what != stat or phase != 'train' or layer not in (None, source): continue
            last = h.series(source, stat, phase, h.run).values[-1:]
            if np.ndim(last) == 1 and len(last): yield source, float(last[0])

# %% [markdown]
# Nothing is read from the device in a step. Whether a loss was not finite is noted on the device, and looked at every `every`
# steps together with the last rows of the watchers; a bad loss is not missed, only told a little later.

# %%
#| export
class StopOnCB(Callback):
    "Ends the fit, and says why, when one of its conditions holds; looks every `every` training steps."
    order = 1000   # the others have recorded by then
    def __init__(self,
        *conditions, # 'nan', 'dead>0.5', 'loss>20', 'std<1e-4 at act2', or names of rules
        every:int=50 # training steps between two looks, each of which waits for the device
    ):
        if not conditions: raise ValueError("StopOnCB: give a condition, such as 'nan'")
        if not isinstance(every, int) or every < 1:
            raise ValueError(f'StopOnCB: every is {every!r}; it must be 1 or more, a whole number')
        self.conditions, self.every, self.reason = [_Condition(o) for o in conditions], every, None

    def before_fit(self, learn):
        self._bad, self._n, self.reason = None, 0, None
        self._on = not getattr(learn, 'trial', False)   # `lr_find` looks for rates at which it goes wrong

    def after_batch(self, learn):
        if not self._on or not learn.training: return
        bad = ~torch.isfinite(learn.loss.detach()).all()
        self._bad = bad if self._bad is None else self._bad.to(bad.device) | bad
        self._n += 1
        if self._n % self.every == 0: self._look(learn)

    def after_epoch(self, learn):
        if self._on and learn.training and self._n % self.every: self._look(learn)

    def _look(self, learn):
        "Waits for the device: one read of the flag, and a flush of the tables if there is a condition on them."
        bad = self._bad is not None and bool(self._bad)
        reasons = (o.why(learn, bad) for o in self.conditions)
        self.reason = _of_all(next((o for o in reasons if o), None))
        if self.reason is None: return
        if is_main(): print(f'StopOnCB: stopped after {self._n} steps, since {self.reason}')
        raise CancelFitException()

def _of_all(reason):
    "Of several processes the first that has a reason: they stop together."
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized()): return reason
    found = [None]*dist.get_world_size()
    dist.all_gather_object(found, reason)   # waits for the others
    return next((o for o in found if o), None)

# %%
stop = StopOnCB('nan', 'dead>0.5', every=20)
stopped = fitted(lr=30., cbs=[stop])

# %%
#| hide
test_eq(len(stopped.history.series('batch', 'loss')), 20)
assert stop.reason.startswith('death_rate of act1 is 1'), stop.reason
calm = StopOnCB('nan', 'dead>0.9', 'at_chance', every=50)
test_eq((len(fitted(cbs=[calm]).history.series('batch', 'loss')), calm.reason), (94, None))

# %% [markdown]
# A condition that cannot be read is refused at once.

# %%
test_fail(lambda: StopOnCB('dead=0.5'), contains="'dead>0.5'")
test_fail(lambda: StopOnCB('loss>high'), contains="'loss>high'")
test_fail(lambda: StopOnCB(), contains="'nan'")
test_fail(lambda: StopOnCB('nan', every=0), contains='every is 0')

# %% [markdown]
# A NaN that comes between two looks is seen at the next one, though the losses after it were finite.

# %%
def nan_at(step):
    "Cross entropy, which is NaN once."
    calls = iter(range(10**6))
    return lambda preds, targets: F.cross_entropy(preds, targets)*(float('nan') if next(calls) == step else 1)

set_seed(1)
stop = StopOnCB('nan', every=30)
once = Learner(small_net(), dls, nan_at(7), lr=0., cbs=[TrainCB(), stop])
once.fit(1)
test_eq((len(once.history.series('batch', 'loss')), stop.reason), (30, 'the loss was NaN or infinite'))

# %%
#| hide
import nbdev; nbdev.nbdev_export()
