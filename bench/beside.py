"""What other packages show and say of one failing run, and of the same run cured: README's table "Beside others" rests on it.

`python bench/beside.py [names] [--steps 100]`; without names, all that are installed.

The run is that of `miniai_demo`: five convolutions as PyTorch initialises them, SGD at learning rate 0.6, the shipped Fashion-MNIST in
batches of 512, in a loop written by hand (`bench/cost.py`). Cured it has Kaiming's initialisation, standardised images and clipped
gradients. Each package is attached as its own README has it, and by `with` where it can be. Said of it are: its version; what it keeps of
outputs, gradients, parameters and loss; what it says in words of either run; the hooks that a KeyboardInterrupt in the loop leaves behind;
and how often a step asks a tensor for its value, or copies one to the CPU, for which a GPU has to be waited for.

Two are missing: traincheck, which rewrites a script instead of joining a loop, and `minai`, which is an empty package on the index.
"""
import argparse, contextlib, importlib.metadata, os, re, subprocess, sys, tempfile, textwrap
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

root = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(root), str(root/'bench')]
os.environ.setdefault('OMP_NUM_THREADS', '1')
import torch
from torch import nn, optim

import cost
from miniai.demo import five_convs
from miniai.init import kaiming_init
from miniai.stats import mean_std


# --- the run ---

@dataclass
class Seen(cost.Attached):
    "What a loop has to call, and, when it is over, what was kept (name of each statistic) and said (sentences)."
    kept: object = lambda: []
    said: object = lambda: []


@lru_cache(1)
def batches(steps): return cost.image_batches(512, steps, cost.standard)


def cured_net():
    model = five_convs()
    kaiming_init(model, torch.zeros(1, 1, 28, 28))
    return model


def clipped_sgd(params, lr):
    "SGD that clips the gradients before each step."
    params = list(params)
    opt = optim.SGD(params, lr)
    def clip(*args): nn.utils.clip_grad_norm_(params, 1.)
    opt.register_step_pre_hook(clip)
    return opt


class Batches:
    "What `by_hand` loops over; with `interrupt`, Ctrl-C comes at that step. Reads are counted from the second step on."
    setup = cost.standard
    def __init__(self, steps, cured=False, counter=None, interrupt=None):
        self.steps, self.cured, self.counter, self.interrupt, self.reads = steps, cured, counter, interrupt, float('nan')

    def __iter__(self):
        mean, std = mean_std(torch.cat([o[0] for o in batches(self.steps)])).tolist()
        with contextlib.ExitStack() as stack:
            for i,(xb,yb) in enumerate(batches(self.steps)):
                if i == self.interrupt: raise KeyboardInterrupt
                if i == 1 and self.counter: stack.enter_context(self.counter)
                xb = (xb-mean)/std if self.cured else xb
                xb.is_batch = yb.is_batch = True
                yield xb, yb
        if self.counter: self.reads = self.counter.reads/(self.steps-1)


def train(tool, steps=100, cured=False, **kw):
    "Train in the loop by hand with a tool attached: what was seen, the model and the batches."
    loop, made = Batches(steps, cured, **kw), []
    with contextlib.ExitStack() as stack:
        def watch(model, loss_fn, opt):
            made.extend([model, hooks_of(model, opt), opt])
            made.append(stack.enter_context(tool(model, loss_fn, opt)))
            return made[-1]
        try: end = cost.by_hand(loop, cured_net if cured else five_convs, .6, clipped_sgd if cured else optim.SGD, watch)
        except KeyboardInterrupt: end = None
        if end: end()
    model, before, opt, seen = made
    return seen, hooks_of(model, opt)-before, loop.reads


def hooks_of(model, opt):
    "How many hooks, and methods put in place of a class's own, there are on modules, parameters and the optimizer."
    hooked = [*model.modules(), *model.parameters(), opt]
    dicts = [v for o in hooked for k,v in vars(o).items() if 'hooks' in k and 'with_kwargs' not in k and isinstance(v, dict)]
    grads = [o for p in model.parameters() for o in (p._backward_hooks, p._post_accumulate_grad_hooks) if o]
    return sum(map(len, dicts + grads)) + sum('forward' in vars(m) for m in model.modules())


class OnHost(torch.Tensor):
    "A tensor that has been copied to the CPU, and all that is computed from it."


class Reads:
    "Counts values asked of a tensor, and copies to the CPU, but nothing of what such a copy is used for."
    asking = 'item', 'tolist', 'cpu', 'to', '__bool__', '__float__', '__int__'
    def __init__(self): self.reads, self.inside = 0, False

    def __enter__(self):
        self.own = {nm: getattr(torch.Tensor, nm) for nm in self.asking}
        for nm in self.own: setattr(torch.Tensor, nm, self.counted(nm))
        return self

    def __exit__(self, *args):
        for nm,f in self.own.items(): setattr(torch.Tensor, nm, f)

    def counted(self, nm):
        f = self.own[nm]
        def method(t, *args, **kw):
            free = self.inside or isinstance(t, OnHost) or hasattr(t, 'is_batch') or nm == 'to' and not to_cpu(*args, **kw)
            if free: return f(t, *args, **kw)
            self.reads, self.inside = self.reads+1, True
            try: res = f(t, *args, **kw)
            finally: self.inside = False
            return res.as_subclass(OnHost) if isinstance(res, torch.Tensor) else res
        return method


def to_cpu(*args, device=None, **kw): return any(isinstance(o, (str, torch.device)) and torch.device(o).type == 'cpu' for o in [*args, device])


# --- the packages ---

@contextlib.contextmanager
def miniai(model, loss_fn, opt):
    from miniai.inspector import Inspector
    with Inspector(visualizer=None).attach(model, optimizer=opt, loss_fn=loss_fn) as inspector:
        yield Seen(end=inspector.tick_epoch, kept=lambda: [stat.split()[0] for _,_,stat in inspector.history.keys()],
                   said=lambda: [f'{o.level}: {o.text}' for o in inspector.diagnose()])


@contextlib.contextmanager
def monitorch(model, loss_fn, opt):
    "Its inspector is no context manager."
    from monitorch.inspector import PyTorchInspector
    from monitorch.visualizer import DummyVisualizer
    lenses = cost.every_lens(loss_fn, opt, 'monitorch.lens')
    inspector = PyTorchInspector(lenses=lenses, module=model, visualizer=DummyVisualizer())
    yield Seen(end=inspector.tick_epoch, kept=lambda: [type(o).__name__ for o in inspector.lenses])


@contextlib.contextmanager
def wandb(model, loss_fn, opt):
    "Offline, in a temporary folder; what it logs is what its run would send."
    import wandb
    logged = []
    with wandb.init(mode='offline', dir=tempfile.mkdtemp(), settings=wandb.Settings(silent=True)) as run:
        run.watch(model, log='all', log_freq=10)
        yield Seen(after_step=lambda loss: (run.log({'loss': loss.item()}), logged.extend(dict(run.summary))), kept=lambda: [o.split('/')[0] for o in logged if o[0] != '_'])


@contextlib.contextmanager
def torchmortem(model, loss_fn, opt):
    from torchmortem import Autopsy
    with Autopsy(model, optimizer=opt) as autopsy:
        yield Seen(after_step=lambda loss: autopsy.step(loss=loss.item()),
                   kept=lambda: [k for o in autopsy.get_report().collector_states.values() for k in o.series],
                   said=lambda: [f'{o.severity.name.lower()}: {o.title}' for o in autopsy.get_report().findings])


@contextlib.contextmanager
def trainscope(model, loss_fn, opt):
    "Its words are those of its command `trainscope report`."
    from trainscope import TrainScope, TrainScopeConfig
    folder = Path(tempfile.mkdtemp())
    def said():
        out = run_command('trainscope', 'report', '--run', folder/'run')
        return re.findall(r'- (.*(?:signal|crossed|explosion|pike).*)', out)
    def kept():
        from trainscope.analysis import read_arrow_sync
        return [k for o in sorted((folder/'run'/'layers').glob('*.arrow'))[:1] for row in read_arrow_sync(o)[:1] for k in row]
    with TrainScope(model, opt, config=TrainScopeConfig(run_dir=str(folder), run_name='run')) as scope:
        yield Seen(before_step=lambda loss: scope.step(loss.item()), kept=kept, said=said)


@contextlib.contextmanager
def torchinstruments(model, loss_fn, opt):
    "By default it takes a sample a minute, so of a short run one: the first step."
    from torchinstruments import inject_observer, remove_observer
    folder = Path(tempfile.mkdtemp())
    def kept():
        import polars
        frame = polars.read_parquet(folder/'history.parquet')
        return [str(o) for c in frame.columns if c in ('metric', 'tensor_kind', 'kind', 'signal') for o in frame[c].unique()] or frame.columns
    inject_observer(model, output_dir=folder)
    try: yield Seen(kept=kept)
    finally: remove_observer(model)


@contextlib.contextmanager
def torch_module_monitor(model, loss_fn, opt):
    "Its statistics are those that one gives it; these are of its README, every tenth step."
    from torch_module_monitor import ModuleMonitor
    monitor, step = ModuleMonitor(monitor_step_fn=lambda step: step % 10 == 0), iter(range(10**9))
    monitor.set_module(model)
    monitor.add_activation_metric('mean', lambda x: x.mean())
    monitor.add_parameter_metric('norm', lambda x: x.norm())
    monitor.add_gradient_metric('norm', lambda x: x.norm())
    def before_step(loss):
        monitor.monitor_parameters()
        monitor.monitor_gradients()
    def after_step(loss):
        monitor.end_step()
        monitor.begin_step(next(step))
    monitor.begin_step(next(step))
    yield Seen(before_step, after_step, kept=lambda: [re.sub('/.*/', ' ', k) for o in monitor.get_all_metrics().values() for k in o])


@contextlib.contextmanager
def neuraldbg(model, loss_fn, opt):
    "What it says without its engine, which is not on the package index."
    from neuraldbg import NeuralDbg
    kinds = 'vanishing_gradients', 'exploding_gradients', 'dead_neurons', 'saturated_activations', 'optimizer_instability', 'data_anomaly'
    with NeuralDbg(model) as dbg:
        def before_step(loss):
            dbg.record_loss(loss.item())
            dbg.step += 1
        yield Seen(before_step, kept=lambda: [o.event_type.value for o in dbg.events],
                   said=lambda: [o.description for kind in kinds for o in dbg.explain_failure(kind)])


@contextlib.contextmanager
def losslint(model, loss_fn, opt):
    "It reads a log of the loss, which the loop has to write."
    losses = []
    def said():
        from losslint.checks import run_all_checks
        from losslint.parsing import load_run
        path = Path(tempfile.mkdtemp())/'run.csv'
        path.write_text('step,loss\n' + '\n'.join(f'{i},{o}' for i,o in enumerate(losses)))
        return [f'{o.severity}: {o.message}' for o in run_all_checks(load_run(path))]
    yield Seen(after_step=lambda loss: losses.append(loss.item()), kept=lambda: ['loss'], said=said)


tools = [miniai, monitorch, wandb, torchmortem, trainscope, torchinstruments, torch_module_monitor, neuraldbg, losslint]


def run_command(*args):
    "What a command beside this Python, of an installed package, prints."
    command = Path(sys.executable).parent/args[0]
    return subprocess.run([str(command), *map(str, args[1:])], capture_output=True, text=True).stdout


# --- what is seen ---

def beside(tool, steps=100):
    "Everything that is seen of one package."
    failing, _, _ = train(tool, steps)
    cured, _, _ = train(tool, steps, cured=True)
    _, left, _ = train(tool, steps, interrupt=3)
    _, _, reads = train(tool, min(steps, 51), counter=Reads())
    return dict(package=tool.__name__, version=importlib.metadata.version(tool.__name__), kept=distinct(failing.kept()),
                failing=distinct(failing.said()), cured=distinct(cured.said()), hooks_left=left, reads_per_step=reads)


def distinct(texts): return list(dict.fromkeys(texts))


def show(row):
    "Print what was seen."
    print(f"\n{row['package']} {row['version']}: {row['hooks_left']} hooks left after Ctrl-C, {row['reads_per_step']:.1f} reads a step")
    for nm in ('kept', 'failing', 'cured'):
        text = '; '.join(row[nm][:12]) + ('; ...' if len(row[nm]) > 12 else '') or 'nothing'
        print(textwrap.fill(f'{nm}, {len(row[nm])}: {text}', 150, initial_indent='    ', subsequent_indent='        '))


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('names', nargs='*', help=', '.join(o.__name__ for o in tools))
    p.add_argument('--steps', type=int, default=100, help='of either run')
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    for tool in tools:
        if args.names and tool.__name__ not in args.names: continue
        if not cost.has(tool.__name__): print(f"\n{tool.__name__} is not installed: pip install {tool.__name__.replace('_', '-')}")
        else: show(beside(tool, args.steps))


if __name__ == '__main__': main()
