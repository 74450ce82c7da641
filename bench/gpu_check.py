"""What only a machine with a GPU can show, in one run of a few minutes and one JSON file: `python bench/gpu_check.py --json gpu.json`.

    python bench/gpu_check.py                       # all parts, within six minutes
    python bench/gpu_check.py --part syncs --part cost
    python bench/gpu_check.py --device cpu          # those parts that a CPU can do: does the script run?

A part that fails is in the file with its error, and the others go on; one that cannot be done here is there with the reason, and a part
for which no time is left likewise. The exit status is 1 if any has failed.
"""
import argparse, contextlib, json, os, platform, subprocess, sys, tempfile, time, traceback, warnings
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn, optim

from miniai.accel import CompileCB, DDPCB, MixedPrecision
from miniai.callback import Callback
from miniai.datasets import DataLoaders
from miniai.device import set_seed
from miniai.inspector import Inspector
from miniai.learner import DeviceCB, Learner, TrainCB

here = Path(__file__).resolve().parent


class NotHere(Exception):
    "Raised where a part cannot be done on this machine; the text says why."


def net():
    conv = lambda ni, nf: [nn.Conv2d(ni, nf, 3, 2, 1), nn.BatchNorm2d(nf), nn.ReLU()]
    return nn.Sequential(*conv(1, 16), *conv(16, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))

def batches(device, n=12, bs=64):
    made = torch.Generator().manual_seed(0)
    return [(torch.randn(bs, 1, 28, 28, generator=made).to(device), torch.randint(0, 10, (bs,), generator=made).to(device))
            for _ in range(n)]

def learner(device, *cbs, trains=TrainCB, bs=64):
    set_seed(0)
    data = batches(device, bs=bs)
    return Learner(net(), DataLoaders(data, data[:2]), F.cross_entropy, lr=.01, opt_func=optim.Adam,
                   cbs=[trains(), DeviceCB(device), *cbs])

def loss_of(learn): return learn.history.series('batch', 'loss').values

def watched(learn, watcher):
    "Whether every step has its row of finite numbers, of outputs, gradients and updates."
    n = len(loss_of(learn))
    for part,stat in (('activations', 'mean'), ('gradients', 'grad_norm'), ('updates', 'update_norm')):
        h = getattr(watcher, part).history
        keys = [o for o in h.keys() if o[0] == 'train' and o[2] == stat and o[1] != 'all']
        assert keys, f'{part} has recorded nothing'
        for phase,source,_ in keys:
            values = h.series(source, stat, phase).values
            assert len(values) == n and (values == values).all(), f'{source}: {len(values)} rows of {stat} in {n} steps'
    return n


# --- the parts ---

def gpu_tests(device):
    "The tests that are marked `gpu`."
    if device != 'cuda': raise NotHere('these tests are for a GPU')
    done = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-m', 'gpu', 'tests'], cwd=here.parent, capture_output=True, text=True,
                          timeout=200)
    last = (done.stdout.strip().splitlines() or ['nothing'])[-1]
    if done.returncode: raise RuntimeError(f'{last}\n{done.stdout[-3000:]}')
    return last


class NoSyncCB(Callback):
    "Makes each wait for the device an error, from the first event of a training batch to the last."
    order = -1000
    def before_batch(self, learn): torch.cuda.set_sync_debug_mode('error' if learn.training and learn.n_steps > 2 else 'default')
    def cleanup_batch(self, learn): torch.cuda.set_sync_debug_mode('default')

def syncs(device):
    "No step waits for the device: with `learn.watch(every=1)`, and with a plain Inspector in a loop written by hand."
    if device != 'cuda': raise NotHere('torch.cuda.set_sync_debug_mode needs a GPU')
    learn = learner(device, NoSyncCB())
    watcher = learn.watch(every=1)
    learn.fit(2, valid=False)
    model, loss_fn = net().to(device), nn.CrossEntropyLoss()
    opt = optim.Adam(model.parameters(), capturable=True)
    with Inspector(visualizer=None).attach(model, optimizer=opt, loss_fn=loss_fn) as inspector:
        for i,(xb,yb) in enumerate(batches(device)):
            torch.cuda.set_sync_debug_mode('error' if i > 2 else 'default')
            try:
                loss_fn(model(xb), yb).backward()
                opt.step()
                opt.zero_grad()
            finally: torch.cuda.set_sync_debug_mode('default')
        inspector.tick_epoch()
    return dict(steps=watched(learn, watcher), rows=len(inspector.history))

def deterministic(device):
    "Two fits from one seed with deterministic algorithms, one of them watched: the same bits."
    found = []
    try:
        for watch in False, True:
            learn = learner(device)
            set_seed(0, deterministic=True)
            if watch: learn.watch(every=1)
            learn.fit(2, valid=False)
            found.append([loss_of(learn).tolist(), [o.detach().cpu() for o in learn.model.parameters()]])
    finally: set_seed(0, deterministic=False)
    (losses, plain), (seen, same) = found
    assert losses == seen and all(map(torch.equal, plain, same)), 'watching has changed the training'
    return dict(last_loss=losses[-1])

def precision(device, name):
    "A watched fit in 16 bits; in float16 with a scaler, so that gradients are those of the loss."
    if name == 'float16' and device != 'cuda': raise NotHere('float16 is for GPUs')
    learn = learner(device, trains=partial(MixedPrecision, dtype=dict(bfloat16='bf16', float16='fp16')[name]))
    watcher = learn.watch(every=1)
    learn.fit(3, valid=False)
    losses = loss_of(learn)
    assert losses[-4:].mean() < losses[:4].mean(), f'the loss does not fall: {losses[:4]} to {losses[-4:]}'
    return dict(steps=watched(learn, watcher), first=float(losses[0]), last=float(losses[-1]))

def compiled(device):
    "A compiled model, watched in every fourth step; the compiled steps give the losses of the plain ones."
    plain, fast = learner(device), learner(device, CompileCB())
    watcher = fast.watch(every=4)
    for o in plain, fast: o.fit(2, valid=False)
    off = float(abs(loss_of(plain)-loss_of(fast)).max())
    assert off < .05, f'losses differ by {off}'
    return dict(largest_difference=off, cost=str(watcher.cost()))

def cost(device):
    "Step times with and without watching, by the clock, waiting for the device: tables 1, 2 and 4 of bench/cost.py."
    with tempfile.TemporaryDirectory() as folder:
        path, short = Path(folder)/'cost.json', ['--blocks', '6', '--fit-steps', '100'] if device == 'cuda' else ['--quick']
        done = subprocess.run([sys.executable, str(here/'cost.py'), '--device', device, '--table', '1', '--table', '2', '--table', '4', *short,
                               '--json', str(path)], capture_output=True, text=True, timeout=150)
        if not path.exists(): raise RuntimeError(done.stderr[-3000:])
        found = json.loads(path.read_text())
        if done.returncode: found['error'] = done.stderr[-1000:]
        return found

def two_ranks(device):
    "Two processes on one device, by gloo: after a fit both have the same weights, and the losses of one process."
    done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2', str(Path(__file__).resolve()),
                           '--rank-of', device], capture_output=True, text=True, timeout=120)
    lines = [json.loads(o) for o in done.stdout.splitlines() if o.startswith('[')]
    if done.returncode or len(lines) != 1: raise RuntimeError(done.stdout[-1000:] + done.stderr[-2000:])
    alone = learner(device)
    alone.fit(1, valid=False)
    off = float(abs(torch.tensor(lines[0]) - torch.tensor(loss_of(alone))).max())
    assert off < .02, f'losses differ by {off}'   # batch norm has half a batch
    return dict(steps=len(lines[0]), largest_difference=off)

def one_of_two(device):
    "What each of two processes does."
    learn = learner(device, DDPCB(backend='gloo'))
    learn.watch(every=1)
    learn.fit(1, valid=False)
    if int(os.environ['RANK']) == 0: print(json.dumps(loss_of(learn).tolist()))

parts = dict(gpu_tests=gpu_tests, syncs=syncs, deterministic=deterministic, bfloat16=partial(precision, name='bfloat16'),
             float16=partial(precision, name='float16'), compiled=compiled, two_ranks=two_ranks, cost=cost)


# --- running them ---

def run(part, device):
    "What a part has found, and how long it took."
    began = time.perf_counter()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter('ignore')
            found = dict(ok=True, found=parts[part](device))
    except NotHere as e: found = dict(ok=None, why=str(e))
    except Exception as e: found = dict(ok=False, error=f'{type(e).__name__}: {e}', trace=traceback.format_exc()[-3000:])
    return found | dict(seconds=round(time.perf_counter()-began, 1))

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--part', action='append', choices=list(parts), help='default all')
    p.add_argument('--device', default='cuda', choices=['cuda', 'cpu'])
    p.add_argument('--seconds', type=float, default=330, help='no part begins later')
    p.add_argument('--json', help='the file to write; it is written after each part')
    p.add_argument('--rank-of', help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    if args.rank_of: return one_of_two(args.rank_of)
    if args.device == 'cuda' and not torch.cuda.is_available(): sys.exit('gpu_check: PyTorch finds no GPU here; give --device cpu for the other parts')
    began, name = time.perf_counter(), torch.cuda.get_device_name() if args.device == 'cuda' else platform.machine()
    written = dict(device=name, torch=torch.__version__, python=platform.python_version(), parts={})
    for part in args.part or parts:
        late = time.perf_counter()-began > args.seconds
        written['parts'][part] = dict(ok=None, why='no time was left') if late else run(part, args.device)
        shown = {k: v for k,v in written['parts'][part].items() if k != 'trace'}
        print(part, str(shown)[:300], flush=True)
        if args.json: Path(args.json).write_text(json.dumps(written, indent=1))
    return int(any(o['ok'] is False for o in written['parts'].values()))


if __name__ == '__main__': sys.exit(main())
