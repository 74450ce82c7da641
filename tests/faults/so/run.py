"""Trains every case twice, as published and as repaired, and scores what the library says of each.

    python run.py [--only ID,..] [--class S1,R] [--half open|kept] [--seeds 1] [--jobs 2] [--out results.json]
    python run.py --show ID [--fixed] [--seeds 1]     one run, with its findings in full
    python run.py --score results.json                the tables again

Use the python of the environment in which the library under test is installed.
"""
import os
os.environ.setdefault('OMP_NUM_THREADS', '1')
import argparse, collections, contextlib, io, json, math, multiprocessing, sys, time, traceback, warnings
from multiprocessing.connection import wait
from pathlib import Path

here = Path(__file__).resolve().parent
sys.path.insert(0, str(here.parent))
import numpy as np
import torch
from so.case import build
from so.cases_so import cases
from so.parts import fashion

published = json.loads((here/'published.json').read_text())
rules_map = json.loads((here/'rules_map.json').read_text())
classes = 'S1 R K B M H O L N M2 V D U'.split()
loud = 'error', 'warning'

# ---------------------------------------------------------------- one run
def make_learner(run):
    "Learner of a built case, watched; and the callback that keeps its losses."
    from miniai.callback import Callback
    from miniai.learner import Learner, MetricsCB, TrainCB
    import miniai.diagnose, miniai.watch
    class Keep(Callback):
        order = 2000
        def before_fit(self, learn): self.losses, self.first = [], []
        def after_batch(self, learn):
            if not learn.training: return
            self.losses.append(learn.loss.item())
            self.last = learn.batch
    class Loaders: train, valid = run.train, run.valid
    keep = Keep()
    cbs = [TrainCB(), *([MetricsCB(accuracy=run.metric)] if run.metric else []), keep]
    learn = Learner(run.model, Loaders(), run.loss_func, lr=run.lr, cbs=cbs, opt_func=run.opt_func)
    learn.watch(every=1)
    return learn, keep

def probes(run, keep):
    "What the last batch shows, read without the library."
    x, y = keep.last
    run.model.train()
    run.model.zero_grad()
    p = run.model(x)
    run.loss_func(p, y).backward()
    grads = [o.grad.norm().item() for o in run.model.parameters() if o.grad is not None]
    span = lambda a: [round(a.min().item(), 4), round(a.max().item(), 4)]
    return dict(preds=span(p.float()), preds_std=p.float().std(0).mean().item() if len(p) > 1 else None, y=span(run.train.y.float()),
                x=span(run.train.x.float()), y_shape=list(y.shape[1:]), preds_shape=list(p.shape[1:]),
                zero_preds=(p == 0).float().mean().item(), zero_grad=bool(grads) and max(grads) == 0,
                rows=len(run.train.x))

def losses_of(keep, steps_per_epoch):
    a = np.array(keep.losses, float)
    if not len(a): return {}
    epochs = [float(a[i:i+steps_per_epoch].mean()) for i in range(0, len(a), steps_per_epoch)]
    finite = a[np.isfinite(a)]
    return dict(steps=len(a), first=float(a[0]), last=float(a[-max(1, len(a)//10):].mean()), min=float(finite.min(initial=math.inf)),
                max=float(finite.max(initial=-math.inf)), finite=bool(len(finite) == len(a)), epochs=epochs[:6] + epochs[6:][-2:],
                constant=_constant(a, epochs))

def _constant(a, epochs):
    v = np.array(epochs if len(epochs) > 1 else a)
    return bool(np.isfinite(v).all() and np.ptp(v) <= 1e-5*max(abs(v.mean()), 1e-12))

def _inside(e):
    "Where an exception came from: the last frame of the library, and whether it is the innermost."
    frames = traceback.extract_tb(e.__traceback__)
    ours = [o for o in frames if '/miniai/' in o.filename and '.venv' not in o.filename]
    return dict(type=type(e).__name__, text=str(e)[:300], innermost=f'{Path(frames[-1].filename).name}:{frames[-1].lineno}',
                ours=f'{Path(ours[-1].filename).name}:{ours[-1].lineno}' if ours else '', library=bool(ours) and ours[-1] is frames[-1])

def one(id, seed, faulty):
    "Train and diagnose; a dictionary of plain values."
    torch.set_num_threads(1)
    case, start = cases[id], time.time()
    out = dict(id=id, seed=seed, faulty=faulty, findings=[], raised=None, crash=None)
    run = build(case, faulty, seed)
    with warnings.catch_warnings(record=True) as said, contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter('always')
        learn, keep = make_learner(run)
        try: learn.fit(run.epochs)
        except Exception as e: out['raised'] = _inside(e)
        out['fit_seconds'] = round(time.time()-start, 2)
        try:
            found = learn.diagnose()
            out['findings'] = [dict(rule=o.rule, kind=kinds(o), level=o.level, layer=o.layer, value=None if o.value is None else float(o.value), text=o.text,
                                    causes=o.causes, caveats=o.caveats) for o in found]
            out['unchecked'], out['words'] = found.unchecked, str(found)
        except Exception as e: out['crash'] = _inside(e) | dict(where='diagnose', trace=traceback.format_exc()[-1500:])
        out['warnings'] = sorted({f'{o.category.__name__}: {str(o.message)[:160]}' for o in said})
        out['loss'] = losses_of(keep, len(run.train))
        try: out['probes'] = probes(run, keep)
        except Exception as e: out['probes'] = dict(failed=str(e)[:200])
        try: out['metric'] = run.judge(run.model)
        except Exception as e: out['metric'] = math.nan
    out['metric_name'], out['seconds'] = run.metric_name, round(time.time()-start, 2)
    return out

# ---------------------------------------------------------------- many, two at a time
def _child(pipe, job):
    try: pipe.send(one(*job))
    except BaseException as e: pipe.send(dict(zip(('id', 'seed', 'faulty'), job), findings=[], crash=_inside(e) | dict(
        where='build or fit', trace=traceback.format_exc()[-1500:])))
    pipe.close()

def run_all(jobs, n=2, limit=300):
    "Each in a process of its own; one that takes longer than `limit` seconds is ended."
    ctx, left, now, done = multiprocessing.get_context('fork'), list(jobs)[::-1], {}, []
    while left or now:
        while left and len(now) < n:
            job, (mine, its) = left.pop(), ctx.Pipe(False)
            p = ctx.Process(target=_child, args=(its, job))
            p.start(); its.close()
            now[mine] = p, job, time.time()
        ready = wait(list(now), 1)
        for pipe in list(now):
            p, job, since = now[pipe]
            if pipe not in ready and time.time()-since < limit: continue
            blank = dict(zip(('id', 'seed', 'faulty'), job), findings=[])
            try: o = pipe.recv() if pipe in ready else blank | dict(crash=dict(where='time', text=f'more than {limit} s'))
            except EOFError: p.join(); o = blank | dict(crash=dict(where='process', text=f'ended with {p.exitcode}'))
            if pipe not in ready: p.kill()
            p.join(); del now[pipe]
            done.append(o)
            print(f'\r{len(done)}/{len(jobs)} {job[0]} {"faulty" if job[2] else "fixed"}   ', end='', file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return done

# ---------------------------------------------------------------- scores
def kinds(finding):
    "The class or two that a finding says it is of; none where it says nothing."
    o = getattr(finding, 'kind', None) or ()
    return ([o] if isinstance(o, str) else list(o))[:2]

def classes_of(o):
    "Classes of a recorded finding."
    if o.get('kind'): return set(o['kind'])
    c = rules_map.get(o['rule'], o['rule'])
    return set(c if isinstance(c, list) else [c])

def judge(bad, good):
    "Scores of one case and seed."
    accept, said = cases[bad['id']].accept, [o for o in bad['findings'] if o['level'] in loud]
    right = [o for o in said if classes_of(o) & accept]
    a, b = bad.get('metric', math.nan), good.get('metric', math.nan)
    worse = math.isfinite(b) and (not math.isfinite(a) or b-a >= .05)
    loss, ref = bad.get('loss') or {}, good.get('loss') or {}
    stuck = bool(loss) and (loss.get('constant') or not loss.get('finite')) and bool(ref) and ref.get('finite') and not ref.get('constant')
    return dict(id=bad['id'], seed=bad['seed'], cls=cases[bad['id']].cls, admitted=bool(worse or stuck), worse=worse, stuck=bool(stuck), bad=a, good=b,
                detected=bool(said), diagnosed=bool(right), top1=bool(said) and said[0] in right,
                noted=not right and any(classes_of(o) & accept for o in bad['findings']),
                said=[o['rule'] for o in said], alarms=[o['rule'] for o in good['findings'] if o['level'] in loud],
                crash=[o['crash'] for o in (bad, good) if o.get('crash')], raised=[o['raised'] for o in (bad, good) if o.get('raised')])

def scores(results):
    at = {(o['id'], o['seed'], o['faulty']): o for o in results}
    return [judge(at[i, s, True], at[i, s, False]) for i,s,f in at if f and (i, s, False) in at]

_short = dict(DD='DeepDiagnosis', DL='DeepLocalize', NL='NeuraLint', UM='UMLAUT', MU='deepmufl')
def table(rows, title=''):
    "Text: a line for each class of fault; the published verdicts are those on the same ids."
    n_seeds = len({o['seed'] for o in rows})
    lines = [f'{title} ({len({o["id"] for o in rows})} cases, {n_seeds} seed{"s"*(n_seeds != 1)})',
             f'{"class":<6}{"n":>4}{"admitted":>9} |{"detected":>9}{"diagnosed":>10}{"top-1":>6}{"as note":>8} |{"alarms":>7} |'
             + ''.join(f'{o:>4}' for o in _short)]
    def line(name, part):
        k = lambda nm: sum(bool(o[nm]) for o in part)
        tools = ''.join(f'{sum(t in published["caught"][o["id"]] for o in part):>4}' for t in _short)
        return (f'{name:<6}{len(part):>4}{k("admitted"):>9} |{k("detected"):>9}{k("diagnosed"):>10}{k("top1"):>6}{k("noted"):>8} |'
                f'{k("alarms"):>7} |{tools}')
    lines += [line(c, part) for c in classes if (part := [o for o in rows if o['cls'] == c])]
    adm = [o for o in rows if o['admitted']]
    lines += [line('all', rows), line('adm.', adm)]
    return '\n'.join(lines)

def report(results):
    rows, split = scores(results), json.loads((here/'split.json').read_text())
    print(table(rows, 'All'))
    for half in ('open', 'kept'):
        part = [o for o in rows if o['id'] in split[half]]
        if part and len(part) < len(rows): print('\n' + table(part, f'Half: {half}'))
    print('\nPublished on all 109: ' + ', '.join(f'{nm} {sum(t in o for o in published["caught"].values())}' for t,nm in _short.items()))
    not_in = [o for o in rows if not o['admitted']]
    print('Not admitted: ' + (', '.join(f"{o['id']} ({o['cls']}, {o['bad']:.2f} -> {o['good']:.2f})" for o in not_in) or 'none'))
    alarms = collections.Counter(nm for o in rows for nm in set(o['alarms']))
    print('Alarms on repaired versions, by rule: ' + (', '.join(f'{nm} {k}' for nm,k in alarms.most_common()) or 'none'))
    for o in rows:
        for c in o['crash']: print('CRASH', o['id'], c.get('where'), c.get('type', ''), c.get('text', ''))
        for c in o['raised']: print('RAISED', o['id'], c['type'], c['text'][:100], c['innermost'], 'LIBRARY' if c['library'] else '')
    return rows

def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('--only', default=''); a.add_argument('--class', dest='cls', default=''); a.add_argument('--half', default='')
    a.add_argument('--seeds', type=int, default=1); a.add_argument('--jobs', type=int, default=2); a.add_argument('--out', default='results.json')
    a.add_argument('--show', default=''); a.add_argument('--fixed', action='store_true'); a.add_argument('--score', default='')
    a = a.parse_args()
    if a.score: report(json.loads(Path(a.score).read_text())); return
    fashion()
    if a.show:
        o = one(a.show, a.seeds-1, not a.fixed)
        print(cases[a.show].fault, '|', *sorted(cases[a.show].accept))
        print(o.pop('words', ''), '\n')
        print(json.dumps({nm: v for nm,v in o.items() if nm != 'findings'}, indent=1))
        return
    split = json.loads((here/'split.json').read_text())
    ids = [i for i,c in cases.items() if (not a.only or i in a.only.split(',')) and (not a.cls or c.cls in a.cls.split(','))
           and (not a.half or i in split[a.half])]
    jobs = [(i, s, f) for i in ids for s in range(a.seeds) for f in (True, False)]
    import torch._dynamo, miniai.diagnose, miniai.watch   # once, here: the children have them then
    start = time.time()
    results = run_all(jobs, a.jobs)
    Path(a.out).write_text(json.dumps(results, indent=0))
    report(results)
    print(f'{time.time()-start:.0f} s; results in {a.out}')

if __name__ == '__main__': main()
