"""What other packages say of the same published faults, repaired runs and healthy controls as our own rules.

`python bench/peers.py [--tools miniai,torchmortem,losslint] [--sets silent,more,controls] [--only id] [--jobs 2]`

`pip install torchmortem==0.1.1 losslint==0.4.1` beside miniai. The cases are those of tests/faults/silent; each tool is set up as its own README says, beside
the one loop that all of them watch. Counted are runs with a finding of its two upper levels: of faulty runs (detected), of repaired ones and controls (alarms).
A package that is not installed is left out, with a word.
"""
import argparse, contextlib, importlib.metadata, importlib.util, json, os, sys, tempfile, types
from pathlib import Path

root = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(root), str(root/'tests'/'faults'/'silent')]
os.environ.setdefault('OMP_NUM_THREADS', '1')
import run
kit = run.kit
from miniai.callback import Callback


def finding(tool, rule, level, text):
    "As the runner reads it; the tool stands before the rule."
    return types.SimpleNamespace(rule=f'{tool}:{rule}', kind=(), level=level, layer='', text=text, causes=[])


def follow(autopsy, loss_fn, opt):
    "Tell an Autopsy of each step and its loss, in a loop that does not."
    last = [float('nan')]
    def on_loss(m, inp, outp): last[0] = float(outp.detach())
    if isinstance(loss_fn, kit.nn.Module): loss_fn.register_forward_hook(on_loss)
    opt.register_step_post_hook(lambda *args: autopsy.step(loss=last[0]))
    return last


class AutopsyCB(Callback):
    "torchmortem in a Learner."
    def __init__(self, keep): self.keep = keep
    def before_fit(self, learn):
        from torchmortem import Autopsy
        self.autopsy = Autopsy(learn.model, optimizer=learn.opt)
        self.autopsy.attach()
        self.keep.append(self.autopsy)
    def after_step(self, learn): self.autopsy.step(loss=float(learn.loss.detach()))


class Run(kit.Run):
    "A run that torchmortem watches, and whose loss curve losslint reads, too."
    def __init__(self, *args):
        super().__init__(*args)
        self.autopsies, self.last = [], []

    @contextlib.contextmanager
    def watch(self, *nets, loss_fn=None):
        if tools & {'torchmortem'}:
            from torchmortem import Autopsy
            for model,opt in nets[:1]:
                autopsy = Autopsy(model, optimizer=opt)
                autopsy.attach()
                self.autopsies.append(autopsy)
                self.last.append(follow(autopsy, loss_fn, opt))
        with super().watch(*nets, loss_fn=loss_fn) as inspector: yield inspector

    def log(self, loss):
        for o in self.last: o[0] = float(loss.detach())
        super().log(loss)

    def fit(self, *args, cbs=(), **kw):
        return super().fit(*args, cbs=[*cbs, *([AutopsyCB(self.autopsies)] if 'torchmortem' in tools else [])], **kw)

    def findings(self):
        found = [finding('miniai', o.rule, o.level, o.text) for o in super().findings()] if 'miniai' in tools else []
        for autopsy in self.autopsies:
            autopsy.detach()
            names = dict(CRITICAL='error', WARNING='warning')
            found += [finding('torchmortem', o.category, names.get(o.severity.name, 'note'), o.title) for o in autopsy._report.findings]
        return found + (self.linted() if 'losslint' in tools else [])

    def linted(self):
        from losslint.checks import run_all_checks
        from losslint.parsing import load_run
        losses = self.losses or (self.inspector.history.series('loss', 'loss').values.tolist() if self.inspector else [])
        if not losses: return []
        path = Path(tempfile.mkdtemp())/'run.csv'
        path.write_text('step,loss\n' + '\n'.join(f'{i},{o}' for i,o in enumerate(losses)))
        return [finding('losslint', o.check, o.severity, o.message) for o in run_all_checks(load_run(path))]


def main():
    p = argparse.ArgumentParser()
    p.add_argument('--tools', default='miniai,torchmortem,losslint')
    a, rest = p.parse_known_args()
    global tools
    tools = {o for o in a.tools.split(',') if importlib.util.find_spec(o)}
    for o in set(a.tools.split(',')) - tools: print(f'{o} is not installed, and is left out')
    path = Path(tempfile.mkdtemp())/'found.json'
    kit.Run, sys.argv = Run, ['run.py', *rest, '--out', str(path)]
    with contextlib.redirect_stdout(sys.stderr): run.main()
    table(json.loads(path.read_text()))


def table(found):
    "Print, for each tool, the faulty runs of admitted cases that it speaks up in, and the alarms."
    admitted = {o['id'] for o in found['cases'] if o.get('admitted')}
    controls = {o['id'] for o in found['cases'] if o['group'] == 'controls'}
    for tool in sorted(tools):
        loud = lambda r: any(o['rule'].startswith(tool + ':') and o['level'] in ('warning', 'error') for o in r.get('findings', ()))
        runs = [o for o in found['runs'] if 'findings' in o]
        groups = dict(faulty=[o for o in runs if o['bad'] and o['id'] in admitted], repaired=[o for o in runs if not o['bad'] and o['id'] not in controls],
                      controls=[o for o in runs if o['id'] in controls])
        version = importlib.metadata.version(tool)
        print(f'{tool} {version}: ' + ', '.join(f'{nm} {sum(map(loud, g))} of {len(g)}' for nm,g in groups.items()))


if __name__ == '__main__': main()
