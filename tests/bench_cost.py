"""What watching costs, as ratios of paired runs: `python tests/bench_cost.py` prints every table (15 minutes, one thread).

    python tests/bench_cost.py --quick         # few steps: does it run?
    python tests/bench_cost.py --device cuda   # on a GPU
    pip install --no-deps monitorch            # to have the peer's rows, too

The variants train side by side, each in a thread of its own, and hand over to the next one after every step (ten
steps where they are short). So what else the machine does hits all of them alike, and what is compared are blocks of ten steps
of the same moment; the tables show the median of their ratios, and the quartiles. On the CPU a step is measured in processor time of its thread, which other
programs disturb less than the clock on the wall; on a GPU by the clock, waiting for the device at the end of each step. The
page `nbs/explanations/cost.ipynb` runs this file and keeps what it found.
"""
import argparse, ctypes, importlib.util, platform, sys, threading, time, tracemalloc, warnings
from functools import partial

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn, optim
from torcheval.metrics import MulticlassAccuracy

from shared import CountReads, ReadsPerStep

from miniai.activations import ActivationStats
from miniai.datasets import DataLoaders, fashion_mnist
from miniai.demo import five_convs
from miniai.gradients import GradientStats, UpdateStats
from miniai.history import History
from miniai.learner import DeviceCB, Learner, MetricsCB, TrainCB
from miniai.stats import abs_hist, layer_stats, mean_std, unit_dead
from miniai.watch import RangeStats


# --- measuring ---

block, warm_up = 10, 1   # steps that are compared as one, blocks that are not counted


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
    "A loader that waits for its turn before each batch and measures from one batch to the next."
    def __init__(self, batches, steps, turn, device, turns, i):
        self.batches, self.steps, self.turn, self.gpu = batches, steps, turn, device == 'cuda'
        self.turns, self.i, self.seconds = turns, i, []

    def now(self):
        if not self.gpu: return time.thread_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def __len__(self): return self.steps

    def __iter__(self):
        for step in range(self.steps):
            if step and step % self.turn == 0: self.turns.hand_over(self.i)
            self.turns.wait(self.i)
            start = self.now()
            yield self.batches[step % len(self.batches)]
            self.seconds.append(self.now()-start)


def keep_memory():
    "Tell glibc to keep what is freed: else it is by chance which variant fetches its memory anew at every step."
    try: libc = ctypes.CDLL('libc.so.6')
    except OSError: return False
    settings = {-8: 1, -3: 2**25, -1: 2**31-1}   # M_ARENA_MAX, M_MMAP_THRESHOLD (its largest), M_TRIM_THRESHOLD
    return all(libc.mallopt(*o) for o in settings.items())


def side_by_side(variants, batches, steps, turn=1, device='cpu'):
    "Seconds [variant, step]; each variant is a function of a Clock."
    turns, errors = Turns(len(variants)), []
    clocks = [Clock(batches, steps, turn, device, turns, i) for i in range(len(variants))]

    def run(i, variant):
        torch.set_num_threads(1)
        turns.wait(i)
        try: variant(clocks[i])
        except Exception as e: errors.append(e)
        finally: turns.hand_over(i, done=True)

    threads = [threading.Thread(target=run, args=o, daemon=True) for o in enumerate(variants.values())]
    for o in threads: o.start()
    for o in threads: o.join()
    if errors: raise errors[0]
    return np.array([o.seconds for o in clocks])


def compared(variants, batches, blocks, turn=1, device='cpu', block=block):
    "A row for each variant: ms a step, the median of its ratios to the first variant, and the quartiles."
    seconds = side_by_side(variants, batches, (blocks+warm_up)*block, turn, device)
    blockwise = seconds.reshape(len(variants), -1, block)[:, warm_up:].mean(2)
    low, middle, high = np.quantile(blockwise/blockwise[0], (.25, .5, .75), axis=1)
    return pd.DataFrame({'variant': list(variants), 'ms a step': np.median(blockwise, 1)*1000, 'ratio': middle,
                         '25 %': low, '75 %': high}).set_index('variant')


# --- variants ---

def plain(clock, net=five_convs, device='cpu', lr=.1, watch=lambda model: None):
    "The loop as one writes it by hand: the floor. `watch` may hook the model."
    torch.manual_seed(1)
    model = net().to(device).train()
    opt = optim.SGD(model.parameters(), lr)
    watcher = watch(model)
    for xb,yb in clock:
        xb, yb = xb.to(device), yb.to(device)
        loss = F.cross_entropy(model(xb), yb)
        loss.backward()
        opt.step()
        opt.zero_grad()
    return watcher


class Quiet(MetricsCB):
    "Metrics that are recorded and not printed."
    def _log(self, d): pass


def accuracy(): return Quiet(accuracy=MulticlassAccuracy())


def ours(*make_cbs, net=five_convs, device='cpu', lr=.1):
    "A Learner with TrainCB, DeviceCB, and what `make_cbs` make."
    def run(clock):
        torch.manual_seed(1)
        cbs = [TrainCB(), DeviceCB(device), *(make() for make in make_cbs)]
        Learner(net(), DataLoaders(clock, clock), F.cross_entropy, lr=lr, cbs=cbs).fit(1, valid=False)
    return run


def monitorch(clock, lenses, **kw):
    "The loop by hand, watched by monitorch."
    from monitorch.inspector import PyTorchInspector
    plain(clock, watch=lambda m: PyTorchInspector(lenses=lenses(), module=m, visualizer='matplotlib'), **kw).tick_epoch()


def output_lenses():
    from monitorch.lens import OutputActivation, OutputNorm
    return [OutputActivation(), OutputNorm()]


def has_monitorch(): return importlib.util.find_spec('monitorch') is not None


# --- tables ---

def image_batches(bs, n, device='cpu'):
    "`n` batches of shipped Fashion-MNIST images."
    dls = DataLoaders.in_memory(fashion_mnist('small'), bs, device=device, drop_last=True)
    found = []
    while len(found) < n: found += list(dls.train)
    return found[:n]


def learner_table(blocks, device='cpu'):
    "The Learner and its metrics over the plain loop."
    parts = {}
    for bs,turn in ((64, 10), (1024, 1)):
        variants = {'plain loop': partial(plain, device=device), 'Learner': ours(device=device),
                    '+ MetricsCB(accuracy)': ours(accuracy, device=device)}
        parts[f'batch {bs}'] = compared(variants, image_batches(bs, 12, device), blocks*turn, turn, device)
    return pd.concat(parts)


def watching_table(blocks, device='cpu'):
    "ActivationStats over the plain loop, batch 1024."
    stats = lambda **kw: ours(accuracy, partial(ActivationStats, **kw), device=device)
    variants = {'plain loop': partial(plain, device=device), 'Learner + MetricsCB': ours(accuracy, device=device),
                'convolutions': stats(mod_filter=nn.Conv2d), 'all leaf modules': stats(), 'all, every=10': stats(every=10),
                'all, means and stds only': stats(stats=('mean', 'std'))}
    if has_monitorch():
        variants['monitorch, activation and norm'] = partial(monitorch, lenses=output_lenses, device=device)
    return compared(variants, image_batches(1024, 12, device), blocks, device=device)


def around_table(blocks, device='cpu'):
    "GradientStats, UpdateStats, RangeStats and learn.watch over the Learner."
    def watched(clock):
        torch.manual_seed(1)
        learn = Learner(five_convs(), DataLoaders(clock, clock), F.cross_entropy, lr=.1, cbs=[TrainCB(), DeviceCB(device)])
        learn.watch(every=10)
        learn.fit(1, valid=False)
    makes = {o.__name__: ours(o, device=device) for o in (GradientStats, UpdateStats, RangeStats, ActivationStats)}
    variants = {'Learner': ours(device=device), **makes, 'learn.watch(every=10)': watched}
    return pd.concat({f'batch {bs}': compared(variants, image_batches(bs, 12, device), blocks*turn, turn, device)
                      for bs,turn in ((64, 10), (512, 1))})


def every_lens(loss_fn, opt=None, package='miniai.lens'):
    "All lenses but the one that is asked once an epoch and does not scale, the condition number; or monitorch's of these names."
    lens = importlib.import_module(package)
    return [lens.LossMetrics(loss_fn=loss_fn), lens.OutputActivation(), lens.OutputNorm(), lens.OutputGradientGeometry(),
            lens.ParameterGradientActivation(), lens.ParameterGradientGeometry(), lens.ParameterNorm(),
            lens.ParameterUpdateGeometry(opt)]


def nine_layers():
    "Nine linear layers, 64 wide."
    sizes = [64]*9 + [10]
    layers = [o for ni,nf in zip(sizes, sizes[1:]) for o in (nn.Linear(ni, nf), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def small_cnn():
    "Two convolutions with pooling and dropout, for 28x28 images."
    block = lambda ni, nf: [nn.Conv2d(ni, nf, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(.25)]
    return nn.Sequential(*block(1, 16), *block(16, 32), nn.Flatten(), nn.Linear(32*49, 128), nn.ReLU(), nn.Linear(128, 10))


def looping(clock, net, make_opt, watch=lambda *_: None, device='cpu'):
    "A loop by hand with a loss module."
    torch.manual_seed(1)
    model, loss_fn = net().to(device).train(), nn.CrossEntropyLoss()
    opt = make_opt(model.parameters(), .001)
    watcher = watch(model, loss_fn, opt)
    for xb,yb in clock:
        loss_fn(model(xb), yb).backward()
        opt.step()
        opt.zero_grad()
    return watcher


def inspected(model, loss_fn, opt):
    from miniai.inspector import Inspector
    return Inspector(every_lens(loss_fn), visualizer=None, module=model)


def inspected_by_monitorch(model, loss_fn, opt):
    from monitorch.inspector import PyTorchInspector
    warnings.filterwarnings('ignore', 'Full backward hook is firing')
    return PyTorchInspector(lenses=every_lens(loss_fn, opt, 'monitorch.lens'), module=model, visualizer='matplotlib')


def only_hooks(model, loss_fn, opt=None):
    "Hooks that do nothing, as many as all lenses need: on layers, and on the outputs of those that are no activations."
    def on_output(m, inp, outp):
        if not isinstance(m, nn.ReLU): outp.register_hook(lambda grad: None)
    return [m.register_forward_hook(on_output) for m in model]


def one_pass(model, loss_fn, opt=None):
    "Besides, one norm of each output and gradient, and one product of each gradient with the last: read once, and written nowhere."
    last = {}
    def on_grad(i, grad):
        grad = grad.detach().reshape(-1)
        torch.linalg.vector_norm(grad), torch.dot(grad, last.get(i, grad))
        last[i] = grad
    def on_output(i, m, inp, outp):
        if isinstance(m, (nn.ReLU, nn.Dropout)): torch.linalg.vector_norm(outp.detach())
        if not isinstance(m, nn.ReLU): outp.register_hook(partial(on_grad, i))
    return [m.register_forward_hook(partial(on_output, i)) for i,m in enumerate(model)]


def lenses_table(blocks, device='cpu'):
    "An Inspector with all lenses over a loop by hand; and what hooks alone, and a single pass over the data, would cost."
    mlp, cnn = (nine_layers, 64, (64,), 32), (small_cnn, 256, (1, 28, 28), 1)
    nets = {'nine linear layers, batch 64, SGD': (*mlp, optim.SGD), 'nine linear layers, batch 64, Adam': (*mlp, optim.Adam),
            'CNN, batch 256, Adam': (*cnn, optim.Adam)}
    watches = {'plain loop': lambda *_: None, 'all lenses': inspected, 'hooks that do nothing': only_hooks,
               'hooks, one norm and one product': one_pass}
    if has_monitorch(): watches['all lenses of monitorch'] = inspected_by_monitorch
    parts = {}
    for name,(net,bs,shape,turn,make_opt) in nets.items():
        batches = [(torch.randn(bs, *shape, device=device), torch.randint(0, 10, (bs,), device=device)) for _ in range(4)]
        variants = {nm: partial(looping, net=net, make_opt=make_opt, watch=watch, device=device) for nm,watch in watches.items()}
        # an inspector measures many small steps together, once in 32: a block holds two such turns
        parts[name] = compared(variants, batches, blocks, turn, device, block=max(2*turn, 10))
    return pd.concat(parts)


def floor_table(shape=(1024, 8, 14, 14), repeats=30):
    "Milliseconds for each statistic of one output, and for the operations it cannot do without."
    a = torch.randn(shape)*3
    flat, slots = a.reshape(-1), torch.randint(0, 44, (a.numel(),), dtype=torch.int8)
    jobs = {'means and stds': lambda: mean_std(a), 'subtract, square, add, add': lambda: ((flat-1).square_().sum(), flat.sum()),
            'histogram': lambda: abs_hist(a),
            'absolute values, scale, clamp, to 8 bits': lambda: flat.abs().mul_(4).clamp_(max=40).to(torch.int8),
            'count 8-bit numbers': lambda: torch.bincount(slots, minlength=44),
            'dead units': lambda: unit_dead(a), 'absolute values, largest of each unit': lambda: a.abs().amax(0),
            'all at once': lambda: layer_stats(a)}
    times = {nm: [] for nm in jobs}
    for _ in range(repeats):
        for nm,job in jobs.items():
            times[nm].append(seconds(job)*1000)
    return pd.DataFrame({'ms, median': {nm: np.median(o) for nm,o in times.items()}})


def budget_table(budgets=(.01, .02, .05), epochs=20, device='cpu'):
    "What share of the time a budget really took, by the clock on the wall."
    rows = []
    for budget in budgets:
        stats = ActivationStats(budget=budget)
        dls = DataLoaders.in_memory(fashion_mnist('small'), 256, device=device)
        cbs = [TrainCB(), DeviceCB(device), stats]
        Learner(five_convs(), dls, F.cross_entropy, lr=.1, cbs=cbs).fit(epochs, valid=False)
        cost = stats.cost()
        rows.append({'budget': budget, 'share taken': cost.share, 'steps seen': cost.steps_seen, 'sampled': cost.steps_sampled})
    return pd.DataFrame(rows).set_index('budget')


def epoch_table(device='cpu'):
    "Seconds for an epoch over 60,000 images with ActivationStats; needs Debian's dataset-fashion-mnist."
    dd, rows = fashion_mnist('idx'), []
    for nm in 'from_dd', 'in_memory':
        dls = getattr(DataLoaders, nm)(dd, 1024, **({'device': device} if nm == 'in_memory' else {}))
        learn = Learner(five_convs(), dls, F.cross_entropy, lr=.1, cbs=[TrainCB(), DeviceCB(device), ActivationStats()])
        rows.append({'loader': nm, 'epoch, s': seconds(lambda: learn.fit(1, valid=False)),
                     'loading alone, s': seconds(lambda: [None for _ in dls.train])})
    table = pd.DataFrame(rows).set_index('loader')
    for column in list(table): table[column.replace(', s', ', ratio')] = table[column]/table[column]['in_memory']
    return table


def seconds(job):
    start = time.perf_counter()
    job()
    return time.perf_counter()-start


def memory_table(layers=20, steps=10_000):
    "Megabytes held after a run, and after four times as many steps."
    tracemalloc.start()
    history, rows = History(), []
    values = {'mean': torch.zeros(()), 'std': torch.zeros(()), 'death_rate': torch.zeros(()),
              'hist': torch.zeros(44, dtype=torch.int32)}
    before = tracemalloc.get_traced_memory()[0]
    for step in range(4*steps):
        for i in range(layers):
            for stat,v in values.items(): history.record(f'layer{i}', stat, v, step=step, samples=64)
        if step+1 in (steps//10, steps, 2*steps, 4*steps):
            history.flush()
            held = tracemalloc.get_traced_memory()[0] - before   # numpy's memory is traced, and so are Python's objects
            rows.append({'steps': step+1, 'MB held': held/1e6, 'History.nbytes, MB': history.nbytes/1e6,
                         'kept of hist': f"1 in {history.thinned().get('hist', 1)}"})
    tracemalloc.stop()
    return pd.DataFrame(rows).set_index('steps')


def host_reads(steps=50):
    "Host reads in `steps` steps of a fit with metrics and ActivationStats."
    counter, batches = CountReads(), image_batches(64, steps)
    per_step = ReadsPerStep(counter)
    cbs = [TrainCB(), DeviceCB('cpu'), accuracy(), ActivationStats(), per_step]
    with counter: Learner(five_convs(), DataLoaders(batches, batches), F.cross_entropy, lr=.1, cbs=cbs).fit(1, valid=False)
    return sum(per_step.per_step)


# --- growth ---

def tower(width, depth):
    "Linear layers and ReLUs for 28x28 images."
    sizes = [784, *[width]*depth]
    layers = [o for ni,nf in zip(sizes, sizes[1:]) for o in (nn.Linear(ni, nf), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(width, 10))


def watching_time(width, depth, bs, steps, device='cpu'):
    "Milliseconds spent watching the linear layers and ReLUs of a tower in one step, by the watcher's own bill."
    stats = ActivationStats([nn.Linear, nn.ReLU])
    xb, yb = torch.randn(bs, 1, 28, 28, device=device), torch.randint(0, 10, (bs,), device=device)
    batches = [(xb, yb)]*steps
    learn = Learner(tower(width, depth), DataLoaders(batches, batches), F.cross_entropy, lr=.01,
                    cbs=[TrainCB(), DeviceCB(device), stats])
    learn.fit(1, valid=False)
    return stats.cost().seconds/steps*1000


def growth_table(repeats, device='cpu'):
    "How the time of a watched step grows; the least of a few runs."
    base = dict(width=256, depth=4, bs=256, steps=20)
    grow = dict(depth=(2, 4, 8, 16), width=(64, 256, 1024, 2048), bs=(64, 256, 1024, 4096), steps=(20, 80, 320))
    rows = []
    for what,values in grow.items():
        for v in values:
            args = {**base, what: v}
            ms = min(watching_time(**args, device=device) for _ in range(repeats))
            n = (2*args['depth']*args['width'] + 10)*args['bs']
            rows.append({'what grows': what, 'value': v, 'activations': n, 'ms a step': ms, 'ns an activation': ms*1e6/n})
    return pd.DataFrame(rows).set_index(['what grows', 'value'])


def machine(device='cpu'):
    "Where and with what this was measured."
    name = torch.cuda.get_device_name() if device == 'cuda' else _cpu_name()
    return f'{name}, {platform.system()}, Python {platform.python_version()}, torch {torch.__version__}, one thread'


def _cpu_name():
    try: lines = open('/proc/cpuinfo').read().splitlines()
    except OSError: return platform.processor() or platform.machine()
    return next((o.split(':')[1].strip() for o in lines if o.startswith('model name')), platform.machine())


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--device', default='cpu')
    p.add_argument('--blocks', type=int, default=30, help='of ten steps each')
    p.add_argument('--quick', action='store_true')
    args = p.parse_args(argv)
    blocks = 2 if args.quick else args.blocks
    torch.set_num_threads(1)
    keep_memory()
    say = lambda title, o: print(f'\n{title}\n{o if not isinstance(o, pd.DataFrame) else o.round(3).to_string()}', flush=True)
    say('Machine', machine(args.device))
    say('The Learner', learner_table(blocks, args.device))
    say('Watching, batch 1024', watching_table(blocks, args.device))
    say('Gradients and updates', around_table(blocks, args.device))
    say('All lenses of an Inspector', lenses_table(blocks, args.device))
    say('Parts of it', floor_table())
    say('Budgets', budget_table(epochs=2 if args.quick else 20, device=args.device))
    say('Host reads in 50 steps', host_reads())
    say('Memory, 20 layers', memory_table(steps=500 if args.quick else 10_000))
    say('Growth', growth_table(1 if args.quick else 5, args.device))
    if not args.quick: say('An epoch of 60,000 images, all leaves watched', epoch_table(args.device))


if __name__ == '__main__': main(sys.argv[1:])
