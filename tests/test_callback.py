"The event list, both callback styles, errors that name their callback, and cancel exceptions at every level."
import functools, subprocess, sys, warnings
from types import SimpleNamespace

import pytest

from miniai.callback import (Callback, CancelBatchException, CancelEpochException, CancelFitException, as_cbs, bind_event,
                             events, misspelt, run_cbs, warn_misspelt, with_cbs)

DESIGN = '''before_fit before_epoch before_batch predict after_predict get_loss after_loss backward after_backward step
            after_step zero_grad after_batch cleanup_batch after_epoch cleanup_epoch after_fit cleanup_fit'''.split()

def test_the_event_list_is_the_designed_one():
    code = 'from miniai.callback import events; print(*events)'
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
    assert out.split() == DESIGN   # in a process of its own: `with_cbs` in other tests adds levels

def test_with_cbs_registers_its_three_events_once():
    for _ in range(2): with_cbs('trial')
    assert [events.count(o) for o in ('before_trial', 'after_trial', 'cleanup_trial')] == [1, 1, 1]


def logged(f):
    @functools.wraps(f)
    def _f(*args, **kwargs): return f(*args, **kwargs)
    return _f

class StylesCB(Callback):
    def __init__(self): self.seen = []
    def before_fit(self, learn): self.seen.append(learn)
    def before_epoch(self): self.seen.append(self.learn)
    def before_batch(self, learn=None): self.seen.append(learn)
    def after_batch(self, *args): self.seen += args
    @logged
    def after_epoch(self, learn): self.seen.append(learn)
    @logged
    def after_fit(self): self.seen.append(self.learn)

@pytest.mark.parametrize('event', ['before_fit', 'before_epoch', 'before_batch', 'after_batch', 'after_epoch', 'after_fit'])
def test_every_way_to_write_a_method(event):
    cb, learn = StylesCB(), SimpleNamespace()
    run_cbs([cb], event, learn)
    assert cb.seen == [learn]

def test_without_a_learner():
    cb = StylesCB()
    run_cbs([cb], 'before_fit')
    assert cb.seen == [None]

def test_two_needed_arguments_are_refused():
    class WideCB(Callback):
        def after_batch(self, learn, batch): pass
    with pytest.raises(TypeError, match='takes `learn` or nothing'): run_cbs([WideCB()], 'after_batch', SimpleNamespace())

def test_attributes_that_are_no_methods_are_no_events():
    class StepCB(Callback):
        step = 0
        predict = None
    assert bind_event([StepCB()], 'step') == bind_event([StepCB()], 'predict') == []

def test_sorted_by_order_and_stable():
    class CB(Callback):
        def __init__(self, order): self.order = order
        def after_fit(self): pass
    a, b, c, d = CB(1), CB(0), CB(-5), CB(0)
    assert [cb for cb,_ in bind_event([a, b, c, d], 'after_fit')] == [c, b, d, a]


class IterableCB(Callback):
    def __iter__(self): return iter([1, 2])
    def __len__(self): return 0   # false as a truth value, like one that has not seen a layer yet

def test_iterable_callback_is_one_callback():
    cb = IterableCB()
    assert as_cbs(cb) == as_cbs([cb]) == as_cbs((cb,)) == as_cbs(o for o in [cb]) == [cb]

def test_a_callback_needs_no_base_class():
    class Duck:
        def after_fit(self, learn): pass
    duck = Duck()
    assert as_cbs(duck) == [duck] and len(bind_event([duck], 'after_fit')) == 1

@pytest.mark.parametrize('bad, text', [(IterableCB, r'pass an instance, `IterableCB\(\)`'), ([IterableCB], 'the class IterableCB'),
                                       (3, 'got 3'), ('TrainCB', "got 'TrainCB'"), ([None], 'got None')])
def test_what_is_no_callback_is_refused(bad, text):
    with pytest.raises(TypeError, match=text): as_cbs(bad)


class OwnError(Exception):
    def __init__(self, code, *, place): super().__init__(f'{code} at {place}'); self.code = code

def unicode_error(): return UnicodeDecodeError('utf8', b'x', 0, 1, 'bad')

ERRORS = [lambda: ValueError('too big'), lambda: KeyError('loss'), lambda: OSError(2, 'gone', 'a.png'), lambda: OwnError(7, place='x'),
          unicode_error, lambda: StopIteration(3), lambda: AssertionError()]

@pytest.mark.parametrize('make', ERRORS)
def test_error_names_callback_and_event_and_keeps_its_type(make):
    class BadCB(Callback):
        def after_loss(self, learn): raise error
    error = make()
    with pytest.raises(type(error)) as info: run_cbs([BadCB()], 'after_loss', SimpleNamespace(epoch=2, iter=5))
    assert 'callback BadCB at event `after_loss`, epoch 2, batch 5' in info.value.__notes__[0] and info.value is error

@pytest.mark.parametrize('cls', [CancelFitException, CancelEpochException, CancelBatchException])
def test_cancels_pass_untouched(cls):
    class CancelCB(Callback):
        def after_loss(self): raise error
    error = cls()
    with pytest.raises(cls) as info: run_cbs([CancelCB()], 'after_loss', SimpleNamespace())
    assert info.value is error and not getattr(error, '__notes__', [])

@pytest.mark.parametrize('error', [ValueError('x'), CancelBatchException(), CancelFitException()])
def test_every_cleanup_runs_whatever_the_others_do(error):
    class BadCB(Callback):
        def cleanup_batch(self): raise error
    class TidyCB(Callback):
        order, tidy = 1, False
        def cleanup_batch(self): self.tidy = True
    tidy = TidyCB()
    with pytest.raises(type(error)): run_cbs([BadCB(), tidy], 'cleanup_batch', SimpleNamespace())
    assert tidy.tidy


class CancelInnerException(Exception): pass
class CancelTwoWordsException(Exception): pass
class EnoughException(CancelInnerException): pass

class Nested:
    "A user's own object with levels."
    def __init__(self, raising): self.raising, self.log = raising, []
    def callback(self, event): self.log.append(event)
    @with_cbs('outer')
    def outer(self, x):
        self.inner()
        self.two_words()
        return x
    @with_cbs('inner')
    def inner(self):
        if self.raising: raise self.raising
    @with_cbs('two_words')
    def two_words(self): raise CancelTwoWordsException

@pytest.mark.parametrize('error', [CancelInnerException, EnoughException])
def test_levels_of_ones_own(error):
    o = Nested(error)
    assert o.outer(3) == 3
    assert o.log == ['before_outer', 'before_inner', 'cleanup_inner', 'before_two_words', 'cleanup_two_words',
                     'after_outer', 'cleanup_outer']

def test_cancel_of_a_level_that_does_not_run():
    with pytest.raises(RuntimeError, match=r'"batch", but none is running \(running: outer\)') as info:
        Nested(CancelBatchException).outer(3)
    assert isinstance(info.value.__cause__, CancelBatchException)

def test_errors_go_through_levels_and_clean_up():
    o = Nested(ZeroDivisionError)
    with pytest.raises(ZeroDivisionError): o.outer(3)
    assert o.log[-2:] == ['cleanup_inner', 'cleanup_outer'] and o._levels == []

def test_with_cbs_keeps_name_and_docstring():
    assert Nested.outer.__name__ == 'outer'


class TypoCB(Callback):
    def befor_batch(self, learn): pass
    def after_bach(self, learn): pass
    def before_fits(self, learn): pass
    def zero_grads(self, learn): pass
    def _after_bach(self): pass
    def plot(self): pass
    def get_losses(self): pass
    def steps(self): pass
    def batch_size(self): pass
    def epoch_end_lr(self): pass

class InheritedTypoCB(TypoCB): pass

@pytest.mark.parametrize('cls', [TypoCB, InheritedTypoCB])
def test_misspelt_events_are_named_helpers_are_not(cls):
    assert misspelt(cls()) == dict(befor_batch='before_batch', after_bach='after_batch', before_fits='before_fit',
                                   zero_grads='zero_grad')

def test_a_warning_names_callback_method_and_event():
    with pytest.warns(UserWarning) as caught: warn_misspelt([TypoCB()])
    assert len(caught) == 4
    assert 'TypoCB.after_bach is never called' in str(caught[0].message) and '`after_batch`' in str(caught[0].message)

def test_levels_of_ones_own_are_no_misspellings():
    class InnerCB(Callback):
        def before_inner(self): pass
        def cleanup_two_words(self): pass
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        warn_misspelt([InnerCB()])
