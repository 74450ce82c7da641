"""What watching costs, as ratios of paired runs: `python bench/cost.py` prints every table.

    python bench/cost.py --quick               # few steps: does it run?
    python bench/cost.py --table 4             # one table (may be given more than once)
    python bench/cost.py --threads 2           # PyTorch's threads; default one
    python bench/cost.py --device cuda         # on a GPU
    python bench/cost.py --json cost.json      # the tables as numbers, too

Other packages have rows where they can be imported; all three come without what they depend on, which is installed already:

    pip install --no-deps --target /tmp/peers monitorch torchmortem trainscope
    PYTHONPATH=/tmp/peers python bench/cost.py

The variants train side by side, each in a thread of its own, and hand over to the next one after every step (ten
steps or more where they are short). So what else the machine does hits all of them alike, and what is compared are blocks of
steps of the same moment; the tables show the median of their ratios, the quartiles, and the ratio of all steps together, in which
work that is done once in many steps counts as well. A step is measured in processor time of its thread, which other programs
disturb less than the clock on the wall; on a GPU by the clock, waiting for the device at the end of each step.

With `--threads 2` neither would do: that processor time leaves out the second thread, and several threads that each have helpers of
their own get in each other's way. So there a block is a short fit of its own, by the clock on the wall, and the variants follow each other. A budget
is kept by that clock, too, which goes on while others have their turn; so what keeps one is compared in whole fits, one after the other.

Only the public interface of miniai is used. `nbs/explanations/cost.ipynb` runs this file and keeps what it found.
"""
import argparse, contextlib, ctypes, importlib, importlib.metadata, importlib.util, io, itertools, json, logging, os, platform
import shutil, sys, tempfile, threading, time, warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn, optim
from torcheval.metrics import MulticlassAccuracy

import course

import miniai.watch  # noqa: F401  gives the Learner `watch`
from miniai.activations import ActivationStats
from miniai.conv import conv
from miniai.datasets import DataLoaders, fashion_mnist
from miniai.demo import five_convs
from miniai.inspector import Inspector
from miniai.learner import DeviceCB, Learner, MetricsCB, TrainCB
from miniai.loss_stats import LossStats


@dataclass
class Setup:
    "How long to measure, and on what."
    blocks:int = 30            # that are compared
    threads:int = 1            # of PyTorch
    device:str = 'cpu'
    fit_steps:tuple = (100, 2000) # lengths of the fits within a budget
    fits:int = 5               # of each variant, where whole fits are compared
    epochs:tuple = (3, 20)     # of the README's net

    @classmethod
    def quick(cls, **kw): return cls(blocks=2, fit_steps=(20, 40), fits=2, epochs=(1, 2), **kw)

    def part(self, n): return max(2, round(self.blocks*n))
    def by_wall(self): return self.threads > 1 or self.device == 'cuda'

    def now(self):
        "Seconds, see above."
        if self.device == 'cuda': torch.cuda.synchronize()
        return time.perf_counter() if self.by_wall() else time.thread_time()


standard = Setup()


# --- measuring ---

class Turns:
    "Lets `n` threads work by turns."
    def __init__(self, n): self.n, self.now, self.done, self.change = n, 0, set(), threading.Condition()

    def wait(self, i):
        with self.change: self.change.wait_for(lambda: self.now == i)

    def hand_over(self, i, done=False):
        with self.change:
            if done: self.done.add(i)
            following = [(i+k) % self.n for k in range(1, self.n+1)]
            self.now = next((o for o in following if o not in self.done), None)
            self.change.notify_all()


class Clock:
    "A loader that waits for its turn before each batch, where there are turns, and measures from one batch to the next."
    def __init__(self, batches, steps, setup, turn=None, turns=None, i=0):
        self.batches, self.steps, self.turn, self.setup = batches, steps, turn, setup
        self.turns, self.i, self.seconds = turns, i, []

    def __len__(self): return self.steps

    def __iter__(self):
        for step in range(self.steps):
            if self.turns:
                if step and step % self.turn == 0: self.turns.hand_over(self.i)
                self.turns.wait(self.i)
            start = self.setup.now()
            yield self.batches[step % len(self.batches)]
            self.seconds.append(self.setup.now()-start)


def keep_memory():
    "Tell glibc to keep what is freed: else it is by chance which variant fetches its memory anew at every step."
    try: libc = ctypes.CDLL('libc.so.6')
    except OSError: return False
    settings = {-8: 1, -3: 2**25, -1: 2**31-1}   # M_ARENA_MAX, M_MMAP_THRESHOLD (its largest), M_TRIM_THRESHOLD
    return all(libc.mallopt(*o) for o in settings.items())


@contextlib.contextmanager
def quiet():
    "Nobody prints, warns or logs, in any thread."
    for nm in 'torchmortem', 'trainscope': logging.getLogger(nm).setLevel(logging.CRITICAL)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter('ignore')
        yield


def side_by_side(variants, batches, steps, turn, setup):
    """Seconds [variant, step]; each variant is a function of a Clock, and may return what is to be done when all is measured.

    Who allocates first gets other memory (of a net of 50 MB a step then takes a fifth longer), so a copy of the first variant goes
    before all, and is not counted."""
    variants = [next(iter(variants.values())), *variants.values()]
    turns, errors = Turns(len(variants)), []
    clocks = [Clock(batches, steps, setup, turn, turns, i) for i in range(len(variants))]

    def run(i, variant):
        torch.set_num_threads(1)
        turns.wait(i)
        try:
            end = variant(clocks[i])
            if end: end()
        except Exception as e: errors.append(e)
        finally: turns.hand_over(i, done=True)

    threads = [threading.Thread(target=run, args=o, daemon=True) for o in enumerate(variants)]
    with quiet():
        for o in threads: o.start()
        for o in threads: o.join()
    if errors: raise errors[0]
    return np.array([o.seconds for o in clocks[1:]])


def one_by_one(variants, batches, blocks, block, setup, warm_up=3):
    "Seconds a step [variant, block] of short fits that follow each other, the first `warm_up` steps of each not counted."
    torch.set_num_threads(setup.threads)
    found = np.zeros((len(variants), blocks+1))
    with quiet():
        for n,(i,variant) in itertools.product(range(blocks+1), enumerate(variants.values())):
            clock = Clock(batches, warm_up+block, setup)
            end = variant(clock)
            if end: end()
            found[i,n] = np.mean(clock.seconds[warm_up:])
    return found[:, 1:]


def ratios(names, blockwise, over=None):
    "A row for each variant. `blockwise` [variant, block] are seconds a step, `over` tells of a variant which other one it is compared to."
    at = {nm: i for i,nm in enumerate(names)}
    over = {nm: (over or {}).get(nm, names[0]) for nm in names}
    base = blockwise[[at[over[nm]] for nm in names]]
    low, middle, high = np.quantile(blockwise/base, (.25, .5, .75), axis=1)
    return pd.DataFrame({'variant': names, 'ms a step': np.median(blockwise, 1)*1000, 'ratio': middle, '25 %': low, '75 %': high,
                         'all steps': blockwise.sum(1)/base.sum(1), 'over': list(over.values())}).set_index('variant')


def compared(variants, batches, blocks, setup, turn=1, block=10, over=None, fits=5):
    """Variants side by side, `blocks` in all, in several fits with a block each that is not counted.

    Where the memory of a variant happens to lie makes a fit some percent faster or slower; so there are several, and who begins changes."""
    names, found, fits = list(variants), [], min(fits, blocks)
    if setup.threads > 1: return ratios(names, one_by_one(variants, batches, blocks, block, setup), over)
    for fit in range(fits):
        order = [(i+fit) % len(names) for i in range(len(names))]
        seconds = np.zeros((len(names), (-(-blocks//fits)+1)*block))
        seconds[order] = side_by_side({names[i]: variants[names[i]] for i in order}, batches, seconds.shape[1], turn, setup)
        found.append(seconds.reshape(len(names), -1, block)[:, 1:].mean(2))
    return ratios(names, np.concatenate(found, 1), over)


def fit_after_fit(variants, setup):
    """Variants in turns of whole fits, the first of each not counted. A variant returns what fits, which is timed, the number of its steps, and
    its Watcher or None."""
    torch.set_num_threads(setup.threads)
    seconds, sampled, seen = (np.zeros((len(variants), setup.fits+1)) for _ in range(3))
    with quiet():
        for fit,(i,variant) in itertools.product(range(setup.fits+1), enumerate(variants.values())):
            fit_now, steps, watcher = variant()
            start = setup.now()
            fit_now()
            seconds[i,fit] = (setup.now()-start)/steps
            if watcher: cost = watcher.cost(); sampled[i,fit], seen[i,fit] = cost.steps_sampled, cost.steps_seen
    table, fraction = ratios(list(variants), seconds[:, 1:]), np.full(len(variants), np.nan)
    watched = seen[:, 1:].sum(1) > 0
    fraction[watched] = np.median(sampled[watched, 1:]/seen[watched, 1:], axis=1)
    return table.assign(**{'steps sampled': np.median(sampled[:, 1:], 1), 'steps seen': np.median(seen[:, 1:], 1), 'fraction sampled': fraction})


# --- data and nets ---

def image_batches(bs, n, setup):
    "`n` batches of the shipped Fashion-MNIST images."
    torch.manual_seed(1)
    dls = DataLoaders.in_memory(fashion_mnist('small'), bs, device=setup.device, drop_last=True)
    found = []
    while len(found) < n: found += list(dls.train)
    return [tuple(o) for o in found[:n]]


def pixel_batches(bs, n, setup):
    "The same images as 64 numbers each: means over squares, standardised."
    pixels = [(F.adaptive_avg_pool2d(xb, 8).flatten(1), yb) for xb,yb in image_batches(bs, n, setup)]
    mean, std = (getattr(torch.cat([xb for xb,_ in pixels]), o)() for o in ('mean', 'std'))
    return [((xb-mean)/std, yb) for xb,yb in pixels]


def nine_layers():
    "Nine linear layers, 64 wide."
    sizes = [64]*9 + [10]
    layers = [o for ni,nf in zip(sizes, sizes[1:]) for o in (nn.Linear(ni, nf), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def small_cnn():
    "Two convolutions with pooling and dropout, for 28x28 images."
    block = lambda ni, nf: [nn.Conv2d(ni, nf, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(.25)]
    return nn.Sequential(*block(1, 16), *block(16, 32), nn.Flatten(), nn.Linear(32*49, 128), nn.ReLU(), nn.Linear(128, 10))


def readme_net():
    "The net of the README's example."
    return nn.Sequential(conv(1, 8, ks=5), conv(8, 16), conv(16, 32), conv(32, 64), conv(64, 10, act=False), nn.Flatten())


def tower(width, depth):
    "Linear layers and ReLUs for 64 numbers, initialised so that outputs keep their size."
    sizes = [64, *[width]*depth]
    layers = [o for ni,nf in zip(sizes, sizes[1:]) for o in (nn.Linear(ni, nf), nn.ReLU())]
    for o in layers[::2]: nn.init.kaiming_normal_(o.weight, nonlinearity='relu')
    return nn.Sequential(*layers, nn.Linear(width, 10))


# the two nets of tables 4 and 5: net, learning rate, batches, steps before a hand-over
two_nets = {'five convolutions, batch 64': (five_convs, .1, image_batches, 10),
            'nine-layer MLP, batch 64': (nine_layers, .01, pixel_batches, 25)}


# --- variants ---

@dataclass
class Attached:
    "What a watcher wants of a loop written by hand: functions of the loss, and one for the end, whose time is not counted."
    before_step:object = None
    after_step:object = None
    end:object = None


def by_hand(clock, net=five_convs, lr=.1, make_opt=optim.SGD, watch=None):
    "The loop as one writes it by hand: the floor. `watch(model, loss_fn, opt)` may hook what it likes, and return an `Attached`."
    device = clock.setup.device
    torch.manual_seed(1)
    model, loss_fn = net().to(device).train(), nn.CrossEntropyLoss()
    opt = make_opt(model.parameters(), lr)
    kept = watch(model, loss_fn, opt) if watch else None
    attached = kept if isinstance(kept, Attached) else Attached()
    before_step, after_step = attached.before_step, attached.after_step
    for xb,yb in clock:
        xb, yb = xb.to(device), yb.to(device)
        loss = loss_fn(model(xb), yb)
        loss.backward()
        if before_step: before_step(loss)
        opt.step()
        if after_step: after_step(loss)
        opt.zero_grad()
    return attached.end


def learner(loader, device, net=five_convs, lr=.1, cbs=()):
    "A Learner with TrainCB, DeviceCB and `cbs`."
    torch.manual_seed(1)
    return Learner(net(), DataLoaders(loader, loader), nn.CrossEntropyLoss(), lr=lr, cbs=[TrainCB(), DeviceCB(device), *cbs])


def ours(*make_cbs, watch=None, **kw):
    "A Learner with what `make_cbs` make, watched by `learn.watch(**watch)` if that is given."
    def run(clock):
        learn = learner(clock, clock.setup.device, cbs=[make() for make in make_cbs], **kw)
        if watch is not None: learn.watch(**watch)
        learn.fit(1, valid=False)
    return run


def accuracy(): return MetricsCB(accuracy=MulticlassAccuracy())


def by_course(model, loss_fn, opt, kind=None):
    "The stand-in for the course library, hooked onto the loop by hand."
    course.watch_outputs(model, kind)


def lens_list(names, package='miniai.lens'):
    "Lenses of these names, ours or monitorch's."
    lens = importlib.import_module(package)
    return [getattr(lens, nm)() for nm in names]


def every_lens(loss_fn, opt=None, package='miniai.lens'):
    "All lenses but the one that is asked once an epoch and does not scale, the condition number; or monitorch's of these names."
    lens = importlib.import_module(package)
    return [lens.LossMetrics(loss_fn=loss_fn), lens.OutputActivation(), lens.OutputNorm(), lens.OutputGradientGeometry(),
            lens.ParameterGradientActivation(), lens.ParameterGradientGeometry(), lens.ParameterNorm(),
            lens.ParameterUpdateGeometry(opt)]


def by_inspector(model, loss_fn, opt, names=None):
    "Our Inspector, with these lenses or all."
    Inspector(lens_list(names) if names else every_lens(loss_fn), visualizer=None, module=model)


def by_monitorch(model, loss_fn, opt, names=None):
    "monitorch's inspector, with these lenses or all. It draws nothing."
    from monitorch.inspector import PyTorchInspector
    from monitorch.visualizer import DummyVisualizer
    lenses = lens_list(names, 'monitorch.lens') if names else every_lens(loss_fn, opt, 'monitorch.lens')
    return Attached(end=PyTorchInspector(lenses=lenses, module=model, visualizer=DummyVisualizer()).tick_epoch)


def by_torchmortem(model, loss_fn, opt):
    "torchmortem as it comes, with the loss as a number after each step, as its README has it."
    from torchmortem import Autopsy
    autopsy = Autopsy(model, optimizer=opt)
    autopsy.attach()
    return Attached(after_step=lambda loss: autopsy.step(loss=loss.item()), end=autopsy.detach)


def by_trainscope(model, loss_fn, opt):
    "trainscope as it comes, with the loss as a number before each step of the optimizer, as its README has it. It writes to a temporary folder."
    from trainscope import TrainScope, TrainScopeConfig
    folder = tempfile.mkdtemp()
    scope = TrainScope(model, opt, config=TrainScopeConfig(run_dir=folder)).attach()
    def end():
        scope.detach()
        shutil.rmtree(folder)
    return Attached(before_step=lambda loss: scope.step(loss.item()), end=end)


def only_hooks(model, loss_fn, opt):
    "Hooks that do nothing, as many as all lenses need: on layers, and on the outputs of those that are no activations."
    def on_output(m, inp, outp):
        if not isinstance(m, nn.ReLU): outp.register_hook(lambda grad: None)
    for m in model: m.register_forward_hook(on_output)


def one_pass(model, loss_fn, opt):
    "Besides, one norm of each output and gradient, and one product of each gradient with the last: read once, and written nowhere."
    last = {}
    def on_grad(i, grad):
        grad = grad.detach().reshape(-1)
        torch.linalg.vector_norm(grad), torch.dot(grad, last.get(i, grad))
        last[i] = grad
    def on_output(i, m, inp, outp):
        if isinstance(m, (nn.ReLU, nn.Dropout)): torch.linalg.vector_norm(outp.detach())
        if not isinstance(m, nn.ReLU): outp.register_hook(partial(on_grad, i))
    for i,m in enumerate(model): m.register_forward_hook(partial(on_output, i))


def has(package): return importlib.util.find_spec(package) is not None


# --- tables ---

def learner_table(setup=standard):
    "The Learner and its metrics over the plain loop."
    variants = {'plain loop': by_hand, 'Learner': ours(), '+ MetricsCB(accuracy)': ours(accuracy)}
    readme = {'Learner': ours(net=readme_net), '+ what rules ask of the loss (LossStats)': ours(LossStats, net=readme_net)}
    return pd.concat({'batch 64': compared(variants, image_batches(64, 12, setup), setup.part(4), setup, turn=10),
                      'batch 1024': compared(variants, image_batches(1024, 12, setup), setup.part(1), setup),
                      "README's net, batch 128": compared(readme, image_batches(128, 12, setup), setup.part(2), setup, turn=10, block=50)})


def outputs_table(setup=standard):
    "Watching outputs, over the plain loop: ActivationStats in a bare Learner, the others in the plain loop."
    stats = lambda *args, **kw: ours(partial(ActivationStats, *args, **kw))
    hooked = lambda watch, **kw: partial(by_hand, watch=partial(watch, **kw))
    variants = {'plain loop': by_hand, 'Learner': ours(),
                'ActivationStats, convolutions': stats(nn.Conv2d), 'ActivationStats, all leaves': stats(),
                'means and stds, all leaves': stats(stats=('mean', 'std')), 'every=10, all leaves': stats(every=10),
                'course library, convolutions': hooked(by_course, kind=nn.Conv2d), 'course library, all leaves': hooked(by_course)}
    if has('monitorch'): variants['monitorch, activation and norm'] = hooked(by_monitorch, names=('OutputActivation', 'OutputNorm'))
    small = compared(variants, image_batches(64, 12, setup), setup.part(5/3), setup, turn=10)
    large = compared(variants, image_batches(1024, 12, setup), setup.part(2/3), setup)
    return pd.concat({'batch 64, fits of 100 steps': small, 'batch 1024': large})


def lenses_table(setup=standard):
    "All lenses over the plain loop; and what hooks alone, and a single pass over the data, would cost."
    mlp, cnn = (nine_layers, pixel_batches, 64, 32), (small_cnn, image_batches, 256, 1)
    nets = {'nine-layer MLP, batch 64, SGD': (*mlp, optim.SGD), 'nine-layer MLP, batch 64, Adam': (*mlp, optim.Adam),
            'CNN, batch 256, Adam': (*cnn, optim.Adam)}
    watches = {'plain loop': None, 'Inspector, all lenses': by_inspector, 'hooks that do nothing': only_hooks,
               'hooks, one norm and one product': one_pass}
    if has('monitorch'): watches['monitorch, all lenses'] = by_monitorch
    parts = {}
    for name,(net,batches,bs,turn,make_opt) in nets.items():
        variants = {nm: partial(by_hand, net=net, lr=.001, make_opt=make_opt, watch=watch) for nm,watch in watches.items()}
        parts[name] = compared(variants, batches(bs, 12, setup), setup.part(1/2), setup, turn, block=max(2*turn, 10))
    return pd.concat(parts)


three_lenses = 'OutputActivation', 'OutputNorm', 'ParameterGradientGeometry'


def watch_table(setup=standard):
    "`learn.watch(every=1)` over a bare Learner, and the other packages over the plain loop."
    parts = {}
    for name,(net,lr,batches,turn) in two_nets.items():
        hooked = lambda watch, **kw: partial(by_hand, net=net, lr=lr, watch=partial(watch, **kw))
        variants = {'plain loop': partial(by_hand, net=net, lr=lr), 'Learner': ours(net=net, lr=lr),
                    'learn.watch(every=1)': ours(net=net, lr=lr, watch=dict(every=1))}
        if has('monitorch'): variants['monitorch, three lenses'] = hooked(by_monitorch, names=three_lenses)
        if has('torchmortem'): variants['torchmortem'] = hooked(by_torchmortem)
        if has('trainscope'): variants['trainscope'] = hooked(by_trainscope)
        # torchmortem and trainscope do some things every 50 steps: a block has two of these turns
        parts[name] = compared(variants, batches(64, 12, setup), setup.part(1/3), setup, turn, block=100,
                               over={'learn.watch(every=1)': 'Learner'}, fits=2)
    return pd.concat(parts)


def budget_table(setup=standard):
    "`learn.watch()`, plain, which keeps a budget, and at every step, over a bare Learner, in whole fits, ends of epochs included."
    parts = {}
    for (name,(net,lr,batches,_)),steps in itertools.product(two_nets.items(), setup.fit_steps):
        data = batches(64, 12, setup)
        epoch = [data[i % len(data)] for i in range(min(steps, 100))]
        def fit(watch):
            learn = learner(epoch, setup.device, net, lr)
            watcher = None if watch is None else learn.watch(**watch)
            epochs = steps//len(epoch)
            return partial(learn.fit, epochs, valid=False), epochs*len(epoch), watcher
        variants = {'Learner': partial(fit, None), 'learn.watch()': partial(fit, {}),
                    'learn.watch(every=1)': partial(fit, dict(every=1))}
        parts[f'{name}, fits of {steps} steps'] = fit_after_fit(variants, setup)
    return pd.concat(parts)


def inspector_table(setup=standard):
    "Three lenses over the plain loop."
    parts = {}
    for name,(net,lr,batches,_) in two_nets.items():
        hooked = lambda watch: partial(by_hand, net=net, lr=lr, watch=partial(watch, names=three_lenses))
        variants = {'plain loop': partial(by_hand, net=net, lr=lr), 'Inspector, three lenses': hooked(by_inspector)}
        if has('monitorch'): variants['monitorch, three lenses'] = hooked(by_monitorch)
        parts[name] = compared(variants, batches(64, 12, setup), setup.part(1/2), setup, turn=32, block=64)
    return pd.concat(parts)


def growth_table(setup=standard):
    "ActivationStats on all leaves over the plain loop, as the net, the batch or the number of threads grows."
    def row(layers=4, units=64, batch=64, threads=setup.threads):
        at = replace(setup, threads=threads)
        variants = {'plain loop': partial(by_hand, net=partial(tower, units, layers), lr=.001),
                    'watched': ours(ActivationStats, net=partial(tower, units, layers), lr=.001)}
        found = compared(variants, pixel_batches(batch, 4, at), at.part(1/3), at, turn=10 if units*batch < 2**15 else 1)
        plain, watched = found.loc['plain loop'], found.loc['watched']
        return {'layers': layers, 'units': units, 'batch': batch, 'threads': threads,
                'entries a step': (2*layers*units + 10)*batch, 'plain loop, ms': plain['ms a step'], 'watched, ms': watched['ms a step'],
                **watched[['ratio', '25 %', '75 %', 'all steps']]}
    rows = {**{('layers', n): row(layers=n) for n in (4, 16, 64)}, **{('units', n): row(units=n) for n in (64, 512, 2048)},
            **{('batch', n): row(batch=n) for n in (16, 64, 256, 1024)},
            **{('threads', n): row(units=512, batch=1024, threads=n) for n in ((1,) if setup.device == 'cuda' else (1, 2))}}
    torch.set_num_threads(setup.threads)
    return pd.DataFrame(list(rows.values()), pd.MultiIndex.from_tuples(list(rows), names=['what grows', 'value']))


def readme_table(setup=standard):
    "The README's own net and Learner, with validation: which fraction of the steps plain `learn.watch()` samples."
    def fit(epochs, *args, watch=True):
        torch.manual_seed(1)
        dls = DataLoaders.in_memory(fashion_mnist('small'), 128, device=setup.device)
        cbs = [TrainCB(), DeviceCB(setup.device), accuracy()]
        learn = Learner(readme_net(), dls, F.cross_entropy, lr=.2, cbs=cbs)
        watcher = learn.watch(*args) if watch else None
        return partial(learn.fit, epochs), epochs*len(dls.train), watcher
    def variants(n):
        return {'Learner + MetricsCB': partial(fit, n, watch=False), 'learn.watch()': partial(fit, n),
                'learn.watch(nn.ReLU)': partial(fit, n, nn.ReLU)}
    return pd.concat({f'{n} epochs': fit_after_fit(variants(n), setup) for n in setup.epochs})


def epoch_table(setup=standard):
    "Seconds for an epoch over 60,000 images with ActivationStats, by the clock on the wall; needs Debian's dataset-fashion-mnist."
    dd, rows = fashion_mnist('idx'), []
    for nm in 'from_dd', 'in_memory':
        dls = getattr(DataLoaders, nm)(dd, 1024, **({'device': setup.device} if nm == 'in_memory' else {}))
        cbs = [TrainCB(), DeviceCB(setup.device), ActivationStats()]
        learn = Learner(five_convs(), dls, F.cross_entropy, lr=.1, cbs=cbs)
        rows.append({'loader': nm, 'epoch, s': seconds(lambda: learn.fit(1, valid=False)),
                     'loading alone, s': seconds(lambda: [None for _ in dls.train])})
    found = pd.DataFrame(rows).set_index('loader')
    for column in list(found): found[column.replace(', s', ', ratio')] = found[column]/found[column]['in_memory']
    return found


def seconds(job):
    start = time.perf_counter()
    with quiet(): job()
    return time.perf_counter()-start


def memory_table(setup=standard, layers=20):
    "Megabytes held by ActivationStats on `layers` layers after some steps, by its own bill; up to 20,000 steps."
    stats, rows, steps = ActivationStats([nn.Linear, nn.ReLU]), [], 200*setup.blocks//3
    batch = torch.randn(16, 64, device=setup.device), torch.randint(0, 10, (16,), device=setup.device)
    learn = learner([batch]*steps, setup.device, lambda: nn.Sequential(*tower(16, layers//2)[:layers]), .001, [stats])
    def job():
        for epochs in 1, 1, 2, 4, 2: learn.fit(epochs, valid=False); rows.append(stats.cost())
    seconds(job)
    return pd.DataFrame([{'steps': o.steps_seen, 'MB held': o.bytes/1e6} for o in rows]).set_index('steps')


def host_reads(steps=50):
    "Reads of a value by the host in `steps` steps of a fit with metrics and ActivationStats."
    sys.path.append(str(Path(__file__).resolve().parent.parent/'tests'))
    from shared import CountReads, ReadsPerStep
    counter = CountReads()
    per_step = ReadsPerStep(counter)
    learn = learner(image_batches(64, steps, standard), 'cpu', cbs=[accuracy(), ActivationStats(), per_step])
    with counter, quiet(): learn.fit(1, valid=False)
    return sum(per_step.per_step)


tables = {1: ('The Learner', (learner_table,)),
          2: ('Watching outputs', (outputs_table,)),
          3: ('All lenses', (lenses_table,)),
          4: ('learn.watch(every=1), and plain learn.watch() with its budget', (watch_table, budget_table)),
          5: ('An Inspector with three lenses', (inspector_table,)),
          6: ('Growth: ActivationStats on all leaves', (growth_table,)),
          7: ("The README's net", (readme_table,)),
          8: ('Memory, 20 layers', (memory_table,)),
          9: ('An epoch of 60,000 images, all leaves watched', (epoch_table,))}


def has_idx():
    "Whether all 70,000 images are on this machine."
    try: return bool(fashion_mnist('idx'))
    except FileNotFoundError: return False


def table(n, setup=standard):
    "Frames of table number `n`."
    return [measure(setup) for measure in tables[n][1]]


# --- printing ---

def machine(setup=standard):
    "Where and with what this was measured."
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    name = torch.cuda.get_device_name() if setup.device == 'cuda' else _cpu_name()
    clock = 'clock on the wall' if setup.by_wall() else 'processor time'
    peers = [f'{o} {importlib.metadata.version(o)}' if has(o) else f'{o} not installed' for o in ('monitorch', 'torchmortem', 'trainscope')]
    threads = 'one thread' if setup.threads == 1 else f'{setup.threads} threads'
    return (f'{name}, {cores} cores, {platform.system()}, Python {platform.python_version()}, torch {torch.__version__}, '
            f'{threads}, {clock}; {", ".join(peers)}')


def _cpu_name():
    try: lines = open('/proc/cpuinfo').read().splitlines()
    except OSError: return platform.processor() or platform.machine()
    return next((o.split(':')[1].strip() for o in lines if o.startswith('model name')), platform.machine())


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--table', type=int, action='append', choices=list(tables), help='its number; default all')
    p.add_argument('--device', default='cpu', choices=['cpu', 'cuda'])
    p.add_argument('--threads', type=int, default=1, help='of PyTorch')
    p.add_argument('--blocks', type=int, default=Setup.blocks, help='that are compared')
    p.add_argument('--fit-steps', type=int, nargs='+', default=Setup.fit_steps, help='lengths of the fits within a budget')
    p.add_argument('--quick', action='store_true', help='few steps: does it run?')
    p.add_argument('--json', help='a file to write the tables to, too')
    args = p.parse_args(argv)
    about = dict(threads=args.threads, device=args.device)
    setup = Setup.quick(**about) if args.quick else Setup(args.blocks, fit_steps=tuple(args.fit_steps), **about)
    torch.set_num_threads(setup.threads)
    keep_memory()
    print(machine(setup), flush=True)
    found, written = {}, dict(machine=machine(setup), torch=torch.__version__, threads=setup.threads, device=setup.device,
                              quick=args.quick, tables={})
    for n in args.table or tables:
        if n == 9 and not has_idx():
            print('\n9. left out: it needs the Debian package dataset-fashion-mnist', flush=True)
            continue
        found[n] = table(n, setup)
        for frame in found[n]: print(f'\n{n}. {tables[n][0]}\n{frame.round(3).to_string()}', flush=True)
        rows = [json.loads(o.reset_index().to_json(orient='records', double_precision=6)) for o in found[n]]
        written['tables'][n] = dict(title=tables[n][0], frames=rows)
        if args.json:
            with open(args.json, 'w') as f: json.dump(written, f, indent=1)
    return found


if __name__ == '__main__': main(sys.argv[1:])
