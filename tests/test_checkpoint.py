"Checkpoints: killed at any moment and resumed to the same bits; files that are damaged; fits that fail."
import errno, hashlib, io, os, random, shutil, signal, subprocess, sys, time, traceback, warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader
from torcheval.metrics import MulticlassAccuracy

from shared import ClosureCB, HandSGD

from miniai import checkpoint, files
from miniai.accel import AccumulateCB, GradClipCB, MixedPrecision
from miniai.activations import ActivationStats
from miniai.callback import Callback, events
from miniai.checkpoint import CheckpointCB, CheckpointError, checkpoints, load_state, load_weights, save_state
from miniai.datasets import DataLoaders, MemoryLoader
from miniai.device import set_seed
from miniai.hooks import count_hooks
from miniai.init import BatchTransformCB
from miniai.learner import Learner, MetricsCB, MomentumLearner, TrainCB, TrainLearner
from miniai.sgd import BatchSchedCB, EMACB, EpochSchedCB, OneCycleCB, RecorderCB
from miniai.training import accuracy

root = Path(__file__).resolve().parent.parent
work_events = ['predict', 'get_loss', 'backward', 'step', 'zero_grad']


# ---- learners of many kinds

class Noisy:
    "A data set that draws random numbers of all three kinds for each sample."
    def __init__(self, n=44):
        g = torch.Generator().manual_seed(0)
        self.x, self.y = torch.randn(n, 6, generator=g), torch.randint(0, 3, (n,), generator=g)
    def __len__(self): return len(self.x)
    def __getitem__(self, i):
        return self.x[i] + .1*torch.randn(6) + .1*random.random() + .1*float(np.random.rand()), self.y[i]

def memory_dls(bs=8):
    data = Noisy()
    cols = dict(x=data.x, y=data.y)
    return DataLoaders(MemoryLoader(None, cols, bs, shuffle=True), MemoryLoader(None, cols, bs))

def generator_dls(bs=8, **kw):
    data = Noisy()
    return DataLoaders(DataLoader(data, bs, shuffle=True, generator=torch.Generator().manual_seed(3), **kw), DataLoader(data, bs))

def global_dls(bs=8): return DataLoaders(DataLoader(Noisy(), bs, shuffle=True), DataLoader(Noisy(), bs))

def net(): return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(.3), nn.Linear(12, 3))

class Silent(MetricsCB):
    def _log(self, d): pass

kinds = dict(
    memory=dict(dls=memory_dls, opt_func=optim.AdamW, cbs=lambda: [OneCycleCB(), EMACB(.9), RecorderCB(lr=lambda cb: cb.pg['lr'])]),
    generator=dict(dls=generator_dls, opt_func=partial(optim.SGD, momentum=.9),
                   cbs=lambda: [GradClipCB(.5), BatchSchedCB(partial(lr_scheduler.CosineAnnealingLR, T_max=18))]),
    random_everywhere=dict(dls=global_dls, opt_func=optim.RMSprop, cbs=lambda: [EpochSchedCB(partial(lr_scheduler.ReduceLROnPlateau, patience=0))]),
    accumulate=dict(dls=memory_dls, opt_func=optim.Adam, cbs=lambda: [AccumulateCB(4), EMACB(.5)]),
    bf16=dict(dls=memory_dls, worker=MixedPrecision, opt_func=optim.Adam, cbs=lambda: []),
    momentum=dict(dls=memory_dls, cls=MomentumLearner, cbs=lambda: []))

def learner(kind='memory', *cbs):
    o = kinds[kind]
    set_seed(7)
    cls = o.get('cls', Learner)
    worker = [] if cls is MomentumLearner else [o.get('worker', TrainCB)()]
    watching = [Silent(share=accuracy, accuracy=MulticlassAccuracy()), ActivationStats(nn.ReLU, on_valid=True)]
    return cls(net(), o['dls'](), F.cross_entropy, lr=.02, opt_func=o.get('opt_func', optim.SGD), cbs=[*worker, *watching, *o['cbs'](), *cbs])

def flat(o, at=''):
    "Everything inside `o` by its place, tensors and arrays as bytes."
    if isinstance(o, dict): return {k2: v2 for k, v in o.items() for k2, v2 in flat(v, f'{at}/{k}').items()}
    if isinstance(o, (list, tuple)): return {k2: v2 for k, v in enumerate(o) for k2, v2 in flat(v, f'{at}/{k}').items()}
    if isinstance(o, torch.Tensor): return {at: (str(o.dtype), o.shape, o.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())}
    if isinstance(o, np.ndarray): return {at: (str(o.dtype), o.shape, o.tobytes())}
    return {at: repr(o)}

def everything(learn):
    "All that must be the same to the bit."
    cbs = {f'{type(cb).__name__} {i}': cb.state_dict() for i, cb in enumerate(learn.cbs) if hasattr(cb, 'state_dict') and not isinstance(cb, CheckpointCB)}
    rng = torch.get_rng_state(), random.getstate(), np.random.get_state()[1:3]
    return flat(dict(model=learn.model.state_dict(), opt=learn.opt.state_dict(), history=learn.history.state_dict(),
                     steps=(learn.n_steps, learn.epochs_done), cbs=cbs, rng=rng))

def same(one, two):
    assert one.keys() == two.keys()
    times = '/sampler/seconds', '/sampler/run_seconds'   # what watching has cost is measured, not computed
    different = [k for k in one if one[k] != two[k] and not k.endswith(times)]
    assert not different, different[:10]

# ---- killed

def in_child(f):
    "Run `f` in a process of its own; its exit status (negative: the signal that ended it)."
    pid = os.fork()
    if not pid:
        try: f()
        except BaseException: traceback.print_exc(); os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def die(): os.kill(os.getpid(), signal.SIGKILL)

class KillAt(Callback):
    "SIGKILL at the n-th time of an event."
    def __init__(self, event, n, order=50):
        self.left, self.order = n, order
        setattr(self, event, self._go)
    def _go(self, learn):
        self.left -= 1
        if self.left < 0: die()

def uninterrupted(kind, folder, every, n_epochs=3):
    learn = learner(kind, CheckpointCB(folder, every=every))
    learn.fit(n_epochs)
    return everything(learn)

def resumed(kind, folder, every, n_epochs=3):
    learn = learner(kind, CheckpointCB(folder, every=every))
    if checkpoints(folder): set_seed(99)   # what the random state is before must not matter
    learn.fit(n_epochs, resume=folder)
    return everything(learn)

def at_end(state):
    "Of a fit that was saved at its end, where schedulers wait for the next one to be made."
    return {k: v for k, v in state.items() if 'SchedCB' not in k and 'OneCycleCB' not in k}

positions = [('before_fit', 0), ('before_epoch', 3), ('before_batch', 0), ('after_predict', 13), ('after_loss', 7), ('after_backward', 4),
             ('after_step', 11), ('after_batch', 1), ('after_batch', 8), ('cleanup_batch', 20), ('after_epoch', 1), ('after_epoch', 2), ('cleanup_epoch', 5),
             ('after_fit', 0), ('cleanup_fit', 0)]

@pytest.mark.parametrize('every', [1, 4, 'epoch'])
@pytest.mark.parametrize('kind', kinds)
def test_killed_anywhere_and_resumed(tmp_path, kind, every):
    whole = uninterrupted(kind, tmp_path/'whole', every)
    for i, (event, n) in enumerate(positions):
        if kind == 'accumulate' and event in ('after_backward', 'after_step'): n = n//4
        folder = tmp_path/str(i)
        def killed(): learner(kind, CheckpointCB(folder, every=every), KillAt(event, n)).fit(3)
        assert in_child(killed) == -signal.SIGKILL, (event, n)
        same(*(at_end(o) if event == 'cleanup_fit' else o for o in (whole, resumed(kind, folder, every))))

@pytest.mark.parametrize('moment', ['half written', 'before the rename', 'after the rename', 'while deleting'])
@pytest.mark.parametrize('n', [0, 1, 4])
def test_killed_while_saving(tmp_path, moment, n):
    whole = uninterrupted('memory', tmp_path/'whole', 2)
    def killed():
        left = [n]
        def now():
            left[0] -= 1
            return left[0] < 0
        write, replace, unlink = files._write, os.replace, Path.unlink
        def half(file, data):
            if now():
                file.write(data[:len(data)//2]); file.flush()
                die()
            write(file, data)
        def renamed(a, b):
            if moment == 'before the rename' and now(): die()
            replace(a, b)
            if moment == 'after the rename' and now(): die()
        def deleted(self, **kw):
            unlink(self, **kw)
            if now(): die()
        if moment == 'half written': files._write = half
        if 'rename' in moment: os.replace = renamed
        if moment == 'while deleting': Path.unlink = deleted
        learner('memory', CheckpointCB(tmp_path/'run', every=2)).fit(3)
    status = in_child(killed)
    assert status == -signal.SIGKILL
    for path in checkpoints(tmp_path/'run'): load_state(path)   # every file there is is whole
    same(whole, resumed('memory', tmp_path/'run', 2))
    assert not list((tmp_path/'run').glob('.*'))                # the half one is gone

def test_killed_again_and_again_at_any_time(tmp_path):
    "By the clock, from outside, until it comes to its end."
    whole, rng, kills = uninterrupted('memory', tmp_path/'whole', 1, 8), random.Random(0), 0
    def go():
        learn = learner('memory', CheckpointCB(tmp_path/'run', every=1, keep=2))
        learn.fit(8, resume=tmp_path/'run')
        torch.save(everything(learn), tmp_path/'out.pt')
    for _ in range(200):
        pid = os.fork()
        if not pid:
            try: go()
            except BaseException: traceback.print_exc(); os._exit(1)
            os._exit(0)
        time.sleep(.02 + rng.random()*.1)
        os.kill(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status in (0, -signal.SIGKILL)
        kills += status != 0
        if status == 0: break
    if not (tmp_path/'out.pt').exists(): assert in_child(go) == 0
    assert kills >= 2
    # killed after its last checkpoint, the last process only finds that all is done: its schedule is not made
    same(at_end(whole), at_end(torch.load(tmp_path/'out.pt', weights_only=False)))

script = '''
import os, signal, sys, torch
sys.path.insert(0, sys.argv[1])
from test_checkpoint import *
folder, step = Path(sys.argv[2]), int(sys.argv[3])
cbs = [CheckpointCB(folder/'run', every=2)] + ([KillAt('after_batch', step)] if step else [])
learn = learner('generator', *cbs)
learn.fit(3, resume=None if step else folder/'run')
torch.save(everything(learn), folder/'out.pt')
'''

def test_resumed_in_a_new_program(tmp_path):
    (tmp_path/'go.py').write_text(script)
    env = {**os.environ, 'PYTHONPATH': str(root)}
    def go(step): return subprocess.run([sys.executable, tmp_path/'go.py', root/'tests', tmp_path, str(step)], env=env, capture_output=True, text=True)
    assert go(13).returncode == -signal.SIGKILL
    res = go(0)
    assert res.returncode == 0, res.stderr
    same(uninterrupted('generator', tmp_path/'whole', 2), torch.load(tmp_path/'out.pt', weights_only=False))

def test_saving_changes_nothing(tmp_path):
    plain, saving = learner(), learner('memory', CheckpointCB(tmp_path, every=1))
    for learn in (plain, saving):
        set_seed(3)
        learn.fit(2)
    same({k: v for k, v in everything(plain).items()}, everything(saving))

def test_workers(tmp_path):
    "Batches made by other processes come in the same order, with the same random numbers."
    kinds['workers'] = dict(dls=lambda: generator_dls(num_workers=2), cbs=lambda: [])
    try:
        whole = uninterrupted('workers', tmp_path/'whole', 3, 2)
        class Stop(Callback):
            def after_batch(self, learn):
                if learn.training and learn.n_steps == 8: raise ConnectionError
        with pytest.raises(ConnectionError): learner('workers', CheckpointCB(tmp_path/'run', every=3), Stop()).fit(2)
        same(whole, resumed('workers', tmp_path/'run', 3, 2))
    finally: del kinds['workers']


# ---- epochs, fits, folders

def test_more_epochs_and_none(tmp_path):
    whole = learner('momentum')
    set_seed(1); whole.fit(5)
    learn = learner('momentum', CheckpointCB(tmp_path))
    set_seed(1); learn.fit(3)
    more = learner('momentum', CheckpointCB(tmp_path))
    more.fit(5, resume=tmp_path)
    same({k: v for k, v in everything(whole).items()}, everything(more))
    done = learner('momentum', CheckpointCB(tmp_path))
    done.fit(5, resume=tmp_path)
    same(everything(more), everything(done))
    assert done.n_steps == more.n_steps

def test_second_fit_goes_on_counting(tmp_path):
    def two_fits(folder, stop=None):
        learn = learner('memory', CheckpointCB(folder, every=3), *([stop] if stop else []))
        learn.fit(2)
        learn.fit(2, reset_opt=False, lr=.01)
        return learn
    whole = two_fits(tmp_path/'whole')
    class Stop(Callback):
        def after_batch(self, learn):
            if learn.training and learn.n_steps == 20: raise ConnectionError
    with pytest.raises(ConnectionError): two_fits(tmp_path/'run', Stop())
    learn = learner('memory', CheckpointCB(tmp_path/'run', every=3))
    learn.fit(2, resume=tmp_path/'run')
    same(everything(whole), everything(learn))
    assert learn.epochs == range(2, 4)

def test_keep_and_monitor(tmp_path):
    losses = []
    class Watch(Callback):
        order = 1
        def after_epoch(self, learn):
            if not learn.training: losses.append(float(learn.metrics.loss.compute()))
    learn = learner('momentum', CheckpointCB(tmp_path, keep=2, monitor='loss'), Watch())
    learn.lr = .5
    learn.fit(6)
    assert len(checkpoints(tmp_path)) == 2 and (tmp_path/'best.pt').exists()
    best = load_weights(tmp_path/'best.pt', net())
    other = learner('momentum', CheckpointCB(tmp_path/'other', keep=None))
    other.lr = .5
    other.fit(6)
    files = checkpoints(tmp_path/'other')
    assert len(files) == 6
    expected = load_weights(files[int(np.argmin(losses))], net())
    assert all(torch.equal(a, b) for a, b in zip(best.state_dict().values(), expected.state_dict().values()))
    with pytest.raises(ValueError, match="monitor is 'f1'.*accuracy"): learner('memory', CheckpointCB(tmp_path/'f1', monitor='f1')).fit(2)

def test_a_folder_in_use_is_not_mixed(tmp_path):
    learner('memory', CheckpointCB(tmp_path)).fit(1)
    with pytest.raises(FileExistsError, match='fresh=True'): learner('memory', CheckpointCB(tmp_path)).fit(1)
    learner('memory', CheckpointCB(tmp_path, fresh=True)).fit(2)
    assert len(checkpoints(tmp_path)) == 2

@pytest.mark.parametrize('kw', [dict(every=0), dict(every='batch'), dict(every=1.5), dict(keep=0), dict(mode='up')])
def test_arguments_are_checked(tmp_path, kw):
    with pytest.raises(ValueError, match=next(iter(kw))): CheckpointCB(tmp_path, **kw)

def test_lr_find_writes_nothing(tmp_path):
    learn = learner('momentum', CheckpointCB(tmp_path/'run', every=1))
    learn.lr_find(plot=False)
    assert not (tmp_path/'run').exists()
    learn.fit(1)
    assert checkpoints(tmp_path/'run')

def test_fit_without_training_is_refused(tmp_path):
    with pytest.raises(ValueError, match='train=False'): learner('memory', CheckpointCB(tmp_path)).fit(1, train=False, resume=tmp_path)
    with pytest.raises(FileNotFoundError, match='no checkpoint at'): learner().fit(1, resume=tmp_path/'nowhere')


# ---- damaged and foreign files

def damaged(data, how):
    return dict(empty=b'', cut=data[:len(data)//2], short=data[:-1], header=data[:200] + b'X' + data[201:], bit=data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
                text=b'a text', longer=data + b'more')[how]

@pytest.mark.parametrize('how', ['empty', 'cut', 'short', 'header', 'bit', 'text', 'longer'])
def test_damaged_files_are_refused(tmp_path, how):
    whole = uninterrupted('memory', tmp_path, 3)
    old, new = checkpoints(tmp_path)[-2:]
    new.write_bytes(damaged(new.read_bytes(), how))
    learn = learner('memory', CheckpointCB(tmp_path, every=3))
    before = everything_but_opt(learn)
    with pytest.raises(CheckpointError, match='damaged') as e: learn.fit(3, resume=new)
    assert str(old) in str(e.value) and everything_but_opt(learn) == before
    with pytest.warns(UserWarning, match='the one before it'): same(whole, resumed('memory', tmp_path, 3))
    for path in checkpoints(tmp_path): path.write_bytes(b'')
    with pytest.raises(CheckpointError, match='none of its 3 checkpoints is whole'): learner('memory', CheckpointCB(tmp_path)).fit(3, resume=tmp_path)

def everything_but_opt(learn): return flat(dict(model=learn.model.state_dict(), n=learn.n_steps, hooks=count_hooks(learn.model)))

def test_foreign_files_are_refused(tmp_path):
    learner('accumulate', CheckpointCB(tmp_path)).fit(1)
    path = checkpoints(tmp_path)[-1]
    other = learner('accumulate')
    other.model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))
    with pytest.raises(CheckpointError, match=r'another model: 0.bias is \(12,\) of torch.float32 in the file and \(9,\)'): other.fit(2, resume=path)
    with pytest.raises(CheckpointError, match='optimizer Adam; this is SGD'): learner('momentum').fit(2, resume=path)
    pickled = tmp_path/'model.pt'
    torch.save(net(), pickled)
    with pytest.raises(CheckpointError, match='damaged, or no checkpoint'): learner().fit(1, resume=pickled)
    state = load_state(path)
    short, one_batch = learner('accumulate'), memory_dls()
    one_batch.train = MemoryLoader(None, {nm: o[:8] for nm,o in one_batch.train.columns.items()}, 8, shuffle=True)
    state['batches'] = 5
    save_state(tmp_path/'changed.pt', state)
    for dls,text in (memory_dls(44), 'which are no whole number of 44'), (one_batch, 'gives only 1'):
        short.dls = dls
        with pytest.raises(CheckpointError, match=text), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            short.fit(3, resume=tmp_path/'changed.pt')
    with pytest.warns(UserWarning, match='callbacks differ'): learner('accumulate').fit(2, resume=path)

def test_reading_runs_no_code(tmp_path):
    "Not even of a file whose checksum is right."
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'evil'),)
    path, data = tmp_path/'evil.pt', io.BytesIO()
    torch.save(dict(miniai=2, state=Evil()), data)
    path.write_bytes(data.getvalue() + hashlib.sha256(data.getvalue()).digest())
    with pytest.raises(CheckpointError, match='is no checkpoint'): load_state(path)
    assert not (tmp_path/'evil').exists()

def test_files_of_the_first_version_are_refused(tmp_path):
    from safetensors.torch import save_file
    save_file({'model/0.weight': torch.ones(2)}, tmp_path/'step_000000001.safetensors', dict(miniai='{}', sum='0'))
    with pytest.raises(CheckpointError, match='first version.*load_file'): load_state(tmp_path/'step_000000001.safetensors')
    with pytest.warns(UserWarning, match='first version'), pytest.raises(CheckpointError, match='none of its 1 checkpoints'):
        learner('momentum', CheckpointCB(tmp_path)).fit(1, resume=tmp_path)

def test_what_cannot_be_saved_is_named(tmp_path):
    class Odd(Callback):
        def state_dict(self): return dict(f=[1, lambda: 0])
        def load_state_dict(self, state): pass
    with pytest.raises(TypeError, match='processes/0/callbacks/Odd/f/1'): learner('memory', Odd(), CheckpointCB(tmp_path)).fit(1)
    assert not list(tmp_path.iterdir())

def test_states_of_any_form(tmp_path):
    shared = torch.arange(4.)
    state = {'a': {1: (2, 3), 'x': None}, 'b': [float('inf'), 10**30, True, 'é"\n'], 't': shared, 'u': shared[1:], 'scalar': torch.tensor(3),
             'empty': torch.zeros(0, 3), 'half': torch.ones(2, dtype=torch.float16), 'n': np.float32(1.5), 'i': np.arange(3, dtype=np.uint32), '$odd': 1, 'd': {}}
    save_state(tmp_path/'s', state)
    back = load_state(tmp_path/'s')
    assert flat(back) == flat({**state, 'n': np.array(np.float32(1.5))})


# ---- to the bit

def pictures():
    g = torch.Generator().manual_seed(0)
    cols = dict(x=torch.randn(44, 3, 8, 8, generator=g), y=torch.randint(0, 3, (44,), generator=g))
    return DataLoaders(MemoryLoader(None, cols, 8, shuffle=True), MemoryLoader(None, cols, 8))

def picture_net():
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.Flatten(), nn.Linear(512, 3)).to(memory_format=torch.channels_last)

class DoubleCB(Callback):
    def before_fit(self, learn): learn.model.double()
    def before_batch(self, learn): learn.batch = learn.batch[0].double(), learn.batch[1]

class MasterSGD(optim.SGD):
    "Half weights, and whole ones in its state."
    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]['params']:
            state = self.state[p]
            if not state: state['whole'] = p.float()
            p.copy_(state['whole'].sub_(p.grad.float(), alpha=.01))

def warm_then_drop(opt):
    return lr_scheduler.SequentialLR(opt, [lr_scheduler.LinearLR(opt, total_iters=10), lr_scheduler.MultiStepLR(opt, [2, 3])], [10])

exact = dict(
    lbfgs=lambda: Learner(net(), memory_dls(), F.cross_entropy, lr=.02, opt_func=optim.LBFGS, cbs=ClosureCB()),
    nadam_double=lambda: Learner(net(), memory_dls(), F.cross_entropy, lr=.02, opt_func=optim.NAdam, cbs=[TrainCB(), DoubleCB()]),
    master=lambda: Learner(nn.Linear(6, 3).bfloat16(), memory_dls(), F.cross_entropy, lr=.02, opt_func=MasterSGD,
                           cbs=[TrainCB(), BatchTransformCB(lambda b: (b[0].bfloat16(), b[1]))]),
    channels_last=lambda: MomentumLearner(picture_net(), pictures(), F.cross_entropy, lr=.02, cbs=GradClipCB(.05)),
    schedules=lambda: Learner(net(), memory_dls(), F.cross_entropy, lr=.02, cbs=[TrainCB(), BatchSchedCB(warm_then_drop)]),
    two_generators=lambda: Learner(net(), DataLoaders(generator_dls().train, DataLoader(Noisy(), 8, shuffle=True, generator=torch.Generator().manual_seed(5))),
                                   F.cross_entropy, lr=.02, cbs=[TrainCB(), Silent(accuracy=accuracy)]))

@pytest.mark.parametrize('kind', exact)
def test_nothing_is_rounded_or_laid_out_otherwise(tmp_path, kind):
    def make(*cbs):
        set_seed(7)
        learn = exact[kind]()
        learn.cbs += list(cbs)
        return learn
    whole = make()
    whole.fit(3)
    with pytest.raises(ConnectionError): make(CheckpointCB(tmp_path, every=4), RaiseAt('after_batch', ConnectionError(), 16)).fit(3)
    assert load_state(checkpoints(tmp_path)[-1])['batches']   # in the middle of an epoch
    again = make()
    set_seed(99)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)   # no CheckpointCB here
        again.fit(3, resume=tmp_path)
    same(everything(whole), everything(again))

def test_what_is_read_lies_where_pytorch_would_put_it(tmp_path):
    save_state(tmp_path/'s', {str(i): torch.randn(i) for i in range(1, 12)})
    at = torch.empty(5).data_ptr() % 64
    assert all(o.data_ptr() % 64 == at for o in load_state(tmp_path/'s').values())

def test_every_bit_counts(tmp_path):
    save_state(tmp_path/'s', {'a': torch.arange(2.), 'e': torch.zeros(0, 3), 'n': 1})
    data, path = (tmp_path/'s').read_bytes(), tmp_path/'t'
    for i in range(len(data)*8):
        path.write_bytes(data[:i//8] + bytes([data[i//8] ^ 1 << i%8]) + data[i//8+1:])
        with pytest.raises(CheckpointError): load_state(path)

def test_tensors_of_one_name_and_of_no_kind(tmp_path):
    from collections import Counter
    state = {'a/b': torch.zeros(1), 'a': {'b': torch.ones(1)}, 'm': {1: torch.zeros(2), '1': torch.ones(2)}, '__metadata__': torch.ones(3), 'c': Counter({'x': 2})}
    save_state(tmp_path/'s', state)
    back = load_state(tmp_path/'s')
    assert flat(back) == flat(state) and isinstance(back['c'], Counter)
    for odd in (torch.ones(2, device='meta'), np.zeros(2, [('x', 'f4')]), np.array([None])):
        with pytest.raises(TypeError, match='checkpoint: at/odd is .* cannot be saved'): save_state(tmp_path/'s', {'at': {'odd': odd}})
    assert flat(load_state(tmp_path/'s')) == flat(state)
    for kept in (torch.eye(2).to_sparse(), torch.ones(2, dtype=torch.complex128), torch.zeros(3, 0).half()):
        save_state(tmp_path/'s', [kept])
        back, = load_state(tmp_path/'s')
        assert (back.layout, back.dtype, back.shape) == (kept.layout, kept.dtype, kept.shape) and torch.equal(back.to_dense(), kept.to_dense())

def test_what_a_second_fit_finds(tmp_path):
    "After a fit that was resumed at its end or near it, the next one begins as it would have."
    kinds['second'] = dict(dls=memory_dls, cbs=lambda: [OneCycleCB(), EMACB(.9)])
    try:
        for i, stop in enumerate((None, 10)):
            learners = []
            for resumed in (False, True):
                folder = tmp_path/f'{i} {resumed}'
                learn = learner('second', CheckpointCB(folder, every=3), *([RaiseAt('after_batch', ConnectionError(), stop+6)] if resumed and stop else []))
                if resumed and stop:
                    with pytest.raises(ConnectionError): learn.fit(2)
                else: learn.fit(2)
                if resumed:
                    learn = learner('second', CheckpointCB(folder, every=3))
                    learn.fit(2, resume=folder)
                set_seed(3)
                learn.fit(2)
                learners.append(everything(learn))
            same(*learners)
    finally: del kinds['second']


# ---- folders

def test_one_callback_for_two_learners(tmp_path):
    cb = CheckpointCB(tmp_path, every=2, keep=2)
    learner('momentum', cb).fit(3)
    before = checkpoints(tmp_path)
    with pytest.raises(FileExistsError): learner('momentum', cb).fit(1)
    assert checkpoints(tmp_path) == before

def test_going_on_from_an_older_one(tmp_path):
    learner('momentum', CheckpointCB(tmp_path, every=2, keep=None)).fit(3)
    old, newest = checkpoints(tmp_path)[1], checkpoints(tmp_path)[-1]
    learn = learner('momentum', CheckpointCB(tmp_path, every=2, keep=1), RaiseAt('before_batch', ConnectionError(), 4))
    with pytest.warns(UserWarning, match=f'{newest.name} is newer than {old.name}'), pytest.raises(ConnectionError): learn.fit(3, resume=old)
    assert 'step_000000008.pt' in [o.name for o in checkpoints(tmp_path)] and not old.exists()

def test_a_folder_that_goes_away_is_made_again(tmp_path):
    class Rm(Callback):
        def before_epoch(self, learn):
            if learn.epoch == 1 and learn.training: shutil.rmtree(tmp_path/'run')
    with pytest.warns(UserWarning, match='made again'): learner('momentum', CheckpointCB(tmp_path/'run'), Rm()).fit(2)
    assert len(checkpoints(tmp_path/'run')) == 2

def test_best_is_of_this_fit_and_complete(tmp_path, monkeypatch):
    learn = learner('momentum', CheckpointCB(tmp_path/'a', monitor='loss'))
    learn.fit(1)
    learn.fit(1, valid=False)
    trained = learn.history.series('epoch', 'loss', 'train').values[-1]
    assert learn.cbs[-1].best == trained
    def killed():   # between the two names of a file
        monkeypatch.setattr(checkpoint, '_link', lambda *args: die())
        learner('momentum', CheckpointCB(tmp_path/'b', monitor='loss')).fit(3)
    assert in_child(killed) == -signal.SIGKILL
    learn = learner('momentum', CheckpointCB(tmp_path/'b', monitor='loss', keep=None))
    learn.fit(3, resume=tmp_path/'b')
    whole = learner('momentum', CheckpointCB(tmp_path/'c', monitor='loss', keep=None))
    whole.fit(3)
    assert learn.cbs[-1].best == whole.cbs[-1].best
    assert (tmp_path/'b'/'best.pt').read_bytes() in [o.read_bytes() for o in checkpoints(tmp_path/'b')]

def test_other_fits_are_refused_before_anything_is_changed(tmp_path):
    learner('momentum', CheckpointCB(tmp_path/'run')).fit(1)
    path = checkpoints(tmp_path/'run')[-1]
    save_state(tmp_path/'own', dict(a=1))
    each = lambda params, lr: optim.SGD([dict(params=[p]) for p in params], lr)
    others = [('no checkpoint of a fit: it has no epoch', tmp_path/'own', {}), ('float32 in the file and .* of torch.float64 in the model', path, dict(model=net().double())),
              ('another loss function: weight', path, dict(loss_func=nn.CrossEntropyLoss(torch.ones(3)))), (r'groups of \[6\]', path, dict(opt_func=each))]
    for text, file, kw in others:
        learn = learner('momentum')
        vars(learn).update(kw)
        before = flat(learn.model.state_dict())
        with pytest.raises(CheckpointError, match=text): learn.fit(2, resume=file)
        assert flat(learn.model.state_dict()) == before
    with pytest.raises(CheckpointError, match='no checkpoint of a fit'): load_weights(tmp_path/'own', net())

def test_a_schedule_that_is_new(tmp_path):
    "What it has put into the groups of the optimizer is not lost when the file's are loaded."
    learner('momentum', CheckpointCB(tmp_path)).fit(1)
    learn = learner('momentum', OneCycleCB(), CheckpointCB(tmp_path))
    with pytest.warns(UserWarning, match="without a saved state: .'OneCycleCB'"): learn.fit(3, resume=tmp_path)
    assert learn.opt.param_groups[0]['max_lr'] == .02

def test_workers_that_stay_are_said(tmp_path):
    kinds['stay'] = dict(dls=lambda: generator_dls(num_workers=1, persistent_workers=True), cbs=lambda: [])
    try:
        learner('stay', CheckpointCB(tmp_path)).fit(1)
        with pytest.warns(UserWarning, match='persistent_workers'): learner('stay', CheckpointCB(tmp_path)).fit(2, resume=tmp_path)
    finally: del kinds['stay']


# ---- fits that fail

class RaiseAt(Callback):
    def __init__(self, event, e, n=0, order=500):
        self.order, self.e, self.n = order, e, n
        setattr(self, event, self._go)
    def _go(self, learn):
        self.n -= 1
        if self.n < 0: raise self.e

def said(e): return ''.join(traceback.format_exception(e))   # what is printed

@pytest.mark.parametrize('event', [o for o in events[:18] if o not in work_events])   # other tests add more
def test_ctrl_c_in_every_event(tmp_path, event):
    whole = uninterrupted('memory', tmp_path/'whole', 2)
    learn = learner('memory', CheckpointCB(tmp_path/'run', every=2), RaiseAt(event, KeyboardInterrupt(), n=0 if 'fit' in event else 1))
    with pytest.raises(KeyboardInterrupt) as e: learn.fit(3)
    assert f'RaiseAt at event `{event}`' in said(e.value)
    assert not count_hooks(learn.model) and not learn.hold and learn._resume is None
    for path in checkpoints(tmp_path/'run'): load_state(path)
    same(*(at_end(o) if event == 'cleanup_fit' else o for o in (whole, resumed('memory', tmp_path/'run', 2))))

@pytest.mark.parametrize('event', work_events)
def test_ctrl_c_in_the_work(tmp_path, event):
    def now(self, learn): raise KeyboardInterrupt
    worker = type('Worker', (TrainCB,), {event: now})()
    learn = learner('memory', CheckpointCB(tmp_path, every=2))
    learn.cbs[0] = worker
    with pytest.raises(KeyboardInterrupt) as e: learn.fit(3)
    assert f'Worker at event `{event}`' in said(e.value) and not count_hooks(learn.model)

def test_nan_weights_are_not_saved(tmp_path):
    class Nan(Callback):
        def after_loss(self, learn):
            if learn.training and learn.n_steps == 7: learn.loss = learn.loss*float('nan')
    learn = learner('memory', CheckpointCB(tmp_path, every=2), Nan())
    with pytest.raises(FloatingPointError, match='0.weight is not finite') as e: learn.fit(3)
    last = checkpoints(tmp_path)[-1]
    assert last.name == 'step_000000006.pt' and str(last) in str(e.value)
    assert 'CheckpointCB at event `after_batch`' in said(e.value) and not count_hooks(learn.model)
    assert all(o.isfinite().all() for o in load_state(last)['model'].values())

def test_a_loader_that_raises(tmp_path):
    class Broken(Noisy):
        left = 60
        def __getitem__(self, i):
            self.left -= 1
            if self.left < 0: raise OSError('image 7 cannot be read')
            return super().__getitem__(i)
    kinds['broken'] = dict(dls=lambda: DataLoaders(DataLoader(Broken(), 8, shuffle=True), DataLoader(Noisy(), 8)), cbs=lambda: [])
    kinds['mended'] = dict(dls=global_dls, cbs=lambda: [])
    try:
        learn = learner('broken', CheckpointCB(tmp_path/'run', every=1))
        with pytest.raises(OSError, match='image 7'): learn.fit(3)
        assert not count_hooks(learn.model)
        same(uninterrupted('mended', tmp_path/'whole', 1), resumed('mended', tmp_path/'run', 1))
    finally: del kinds['broken'], kinds['mended']

def test_disk_full(tmp_path, monkeypatch):
    whole, write, left = uninterrupted('memory', tmp_path/'whole', 2), files._write, [3]
    def full(file, data):
        left[0] -= 1
        if left[0] >= 0: return write(file, data)
        file.write(data[:1000])
        raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(files, '_write', full)
    learn = learner('memory', CheckpointCB(tmp_path/'run', every=2))
    with pytest.raises(OSError, match='was not written: No space left on device') as e: learn.fit(3)
    assert e.value.errno == errno.ENOSPC and 'CheckpointCB at event `after_batch`' in said(e.value)
    assert not count_hooks(learn.model) and not list((tmp_path/'run').glob('.*')) and len(checkpoints(tmp_path/'run')) == 3
    monkeypatch.undo()
    same(whole, resumed('memory', tmp_path/'run', 2))

def test_a_file_that_really_cannot_grow(tmp_path):
    "The system itself refuses to write, by the limit on the size of files."
    import resource
    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        try: learner('memory', CheckpointCB(tmp_path/'run', every=2)).fit(1)
        except OSError as e: assert 'was not written' in str(e)
        else: raise AssertionError('no error')
    assert in_child(limited) == 0
    assert not list((tmp_path/'run').iterdir())

def test_an_optimizer_without_state_is_said(tmp_path):
    learn = TrainLearner(net(), memory_dls(), F.cross_entropy, lr=.1, opt_func=HandSGD, cbs=CheckpointCB(tmp_path))
    with pytest.warns(UserWarning, match='HandSGD has no state_dict'): learn.fit(1)

def test_tied_weights_and_a_loss_with_weights(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            self.b.weight = self.a.weight
            self.out = nn.Linear(6, 3)
        def forward(self, x): return self.out(self.b(self.a(x)))
    learn = TrainLearner(Tied(), memory_dls(), nn.CrossEntropyLoss(weight=torch.tensor([1., 2, 3])), lr=.1, cbs=CheckpointCB(tmp_path))
    learn.fit(1)
    other = load_weights(checkpoints(tmp_path)[-1], Tied())
    assert torch.equal(other.a.weight, learn.model.a.weight) and other.a.weight is other.b.weight


# ---- several processes

many_script = '''
import os, signal, sys, torch
sys.path.insert(0, sys.argv[1])
from test_checkpoint import *
from miniai.accel import DDPCB
from miniai.distributed import is_main
folder, step, name = Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
cbs = [DDPCB(), CheckpointCB(folder/name, every=2)] + ([KillAt('after_batch', step)] if step else [])
learn = learner('memory', *cbs)
learn.fit(3, resume=folder/name)
if is_main(): torch.save(everything(learn), folder/f'{name}.pt')
'''

def test_two_processes_resumed(tmp_path):
    (tmp_path/'go.py').write_text(many_script)
    env = {**os.environ, 'PYTHONPATH': str(root), 'CUDA_VISIBLE_DEVICES': ''}
    def go(step, name):
        return subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2', tmp_path/'go.py', root/'tests', tmp_path,
                               str(step), name], env=env, capture_output=True, text=True)
    assert go(0, 'whole').returncode == 0
    assert go(7, 'run').returncode != 0
    res = go(0, 'run')
    assert res.returncode == 0, res.stderr[-3000:]
    assert len(checkpoints(tmp_path/'run')) == 3
    whole = torch.load(tmp_path/'whole.pt', weights_only=False)
    same(whole, torch.load(tmp_path/'run.pt', weights_only=False))
    assert go(0, 'run').returncode == 0   # it was over, and nothing is merged again
    same(at_end(whole), at_end(torch.load(tmp_path/'run.pt', weights_only=False)))
