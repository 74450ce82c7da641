"Loggers, the callbacks for Hugging Face's Trainer and for Lightning, and records of others, each with the real library."
import json, subprocess, sys, warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from miniai.all import (DataLoaders, Inspector, Learner, LogCB, LossMetrics, MetricsCB, OutputStats, ParameterGradientGeometry,
                        ParameterUpdateGeometry, TrainCB, diagnose, rules, set_seed)

torch.manual_seed(0)
x = torch.randn(120, 10)
y = (x.sum(1) > 0).long()
batches = [(x[i:i+8], y[i:i+8]) for i in range(0, 120, 8)]
keys = ['run', 'step', 'epoch', 'phase', 'source', 'stat', 'call']


def small_net():
    set_seed(1)
    return nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 2))


def lenses():
    return [OutputStats(), ParameterGradientGeometry(inplace=False, parameters='*'), ParameterUpdateGeometry(inplace=False),
            LossMetrics(loss_fn_inplace=False)]


def loop(inspector, model=None, n=1, prepare=lambda *o: o, backward=torch.Tensor.backward, fail=False):
    "A loop of one's own, watched: `n` epochs of training, each with a validation."
    model = model or small_net()
    model, opt = prepare(model, torch.optim.SGD(model.parameters(), .1, momentum=.9))
    inspector.attach(model)
    for _ in inspector.range(n):
        for xb, yb in batches:
            loss = F.cross_entropy(model(xb), yb)
            inspector.push_loss(loss.detach(), train=True)
            backward(loss)
            opt.step()
            opt.zero_grad()
        model.eval()
        with torch.no_grad():
            for xb, yb in batches: inspector.push_loss(F.cross_entropy(model(xb), yb), train=False)
        model.train()
    inspector.detach()
    return inspector


def values(inspector, drop=()):
    "The table, by what names a row; several rows of one name in their order."
    frame = inspector.frame()
    frame = frame[~frame.source.isin(drop)]
    frame = frame.assign(nth=frame.groupby(keys).cumcount())
    return frame.set_index([*keys, 'nth'])


def assert_same(one, other, drop=()):
    one, other = values(one, drop), values(other, drop)
    assert len(one) > 500 and set(one.index) == set(other.index)
    both = one.assign(value_other=other.value, samples_other=other.samples)
    wrong = [key for key, a, b in zip(both.index, both.value, both.value_other)
             if not np.allclose(np.asarray(a, float), np.asarray(b, float), rtol=1e-4, atol=1e-6, equal_nan=True)]
    assert not wrong
    assert (both.samples == both.samples_other).all()


# --- loggers ---

def fitted(log, n=2):
    learn = Learner(small_net(), DataLoaders(batches, batches), F.cross_entropy, lr=.1, cbs=[TrainCB(), MetricsCB(), log])
    learn.watch(every=1)
    learn.fit(n)
    return learn


def test_a_list_gets_every_step_in_order():
    rows = []
    learn = fitted(LogCB(rows))
    steps = [step for step, _ in rows]
    assert steps == sorted(steps) and set(range(30)) <= set(steps)
    assert [o['train/loss/batch'] for _, o in rows if 'train/loss/batch' in o] == learn.history.series('batch', 'loss').values.tolist()
    norms = learn.cbs[-1].gradients.history.series('0.weight', 'grad_norm').values
    assert [o['train/grad_norm/0.weight'] for _, o in rows if 'train/grad_norm/0.weight' in o] == norms.tolist()
    counts, edges = rows[0][1]['train/hist/0']
    assert counts.sum() == 8*16 and len(edges) == len(counts)+1
    assert 'Rules checked' in rows[-1][1]['findings']   # `miniai.diagnose` is imported here
    assert not learn.history.readers


def test_a_new_run_never_falls_behind():
    rows = []
    log = LogCB(rows, only='train/loss/*')
    fitted(log, 1)
    fitted(log, 1)   # a new learner counts from 0
    steps = [step for step, _ in rows]
    assert steps == sorted(steps) and steps[-1] >= 29


def test_names_are_filtered_and_capped():
    rows = []
    log = LogCB(rows, only=['train/loss/*', '*/std/?'], every=5)
    fitted(log, 1)
    assert {nm.split('/')[1] for _, o in rows for nm in o if nm != 'findings'} == {'loss', 'std'}
    assert {step for step, o in rows if 'train/std/0' in o} == {0, 5, 10}
    log = LogCB([])
    log.max_names = 3
    with pytest.warns(UserWarning, match='has 3 names; more are left out') as told: fitted(log, 1)
    assert len([o for o in told if 'names' in str(o.message)]) == 1 and sum(log.names.values()) == 3


def test_nan_is_a_gap_and_errors_are_told_once():
    rows, net = [], small_net()
    with Inspector(lenses(), visualizer=None, log=rows).attach(net) as inspector:
        for i in range(4):
            net(x[:8])
            inspector.push_loss(float('nan') if i % 2 else float(i), train=True)
            inspector.set_step(None, i+1)
        inspector.tick_epoch()
    assert [(step, o['train/loss/loss']) for step, o in rows if 'train/loss/loss' in o] == [(0, 0.), (2, 2.)]

    def refuse(row, step): raise OSError('disk full')
    with pytest.warns(UserWarning, match='disk full') as told: loop(Inspector(lenses(), visualizer=None, log=refuse), n=2)
    assert len([o for o in told if 'disk full' in str(o.message)]) == 1


def test_no_log_in_other_processes(monkeypatch):
    from miniai import loggers
    monkeypatch.setattr(loggers, 'is_main', lambda: False)
    rows = []
    fitted(LogCB(rows), 1)
    loop(Inspector(lenses(), visualizer=None, log=rows))
    assert rows == []


def test_a_full_table_brings_rows_before_the_epoch_ends():
    rows, seen = [], []
    inspector = Inspector(lenses(), visualizer=None, log=rows)
    net = small_net()
    opt = torch.optim.SGD(net.parameters(), .01)
    inspector.attach(net)
    for _ in range(300):
        loss = F.cross_entropy(net(x[:8]), y[:8])
        loss.backward()
        opt.step()
        seen.append(len(rows))
    assert 0 < seen[-1] < 300
    inspector.tick_epoch()
    inspector.detach()
    steps = [step for step, o in rows if 'train/std/0' in o]
    assert steps == list(range(300))


def test_a_copy_of_a_learner_logs_nothing():
    import copy
    rows = []
    inspector = loop(Inspector(lenses(), visualizer=None, log=rows))
    n, other = len(rows), copy.deepcopy(inspector)
    loop(other)
    assert len(rows) == n and other.log is None


def test_tensorboard_reads_back(tmp_path):
    pytest.importorskip('tensorboard', reason='the package tensorboard is not installed')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter
    with SummaryWriter(str(tmp_path)) as writer: inspector = loop(Inspector(lenses(), visualizer=None, log=writer))
    events = EventAccumulator(str(tmp_path), size_guidance=dict(histograms=0, scalars=0)).Reload()
    found = [o.value for o in events.Scalars('train/loss/loss')]
    assert np.allclose(found, inspector.history.series('loss', 'loss').values)
    assert len(events.Histograms('train/hist/0')) == 15
    # and so does the diagnosis, with statistics of layers and parameters among it
    evidence = diagnose(str(tmp_path)).evidence
    assert len(evidence.track('0.weight', 'grad_norm')) == 15


def test_mlflow_offline(tmp_path, monkeypatch):
    mlflow = pytest.importorskip('mlflow', reason='the package mlflow is not installed')
    monkeypatch.setenv('MLFLOW_ALLOW_FILE_STORE', 'true')
    mlflow.set_tracking_uri(tmp_path.as_uri())
    mlflow.set_experiment('a test')
    with mlflow.start_run() as run: inspector = loop(Inspector(lenses(), visualizer=None, log=LogCB(mlflow, only='*/loss/*')))
    found = mlflow.MlflowClient().get_metric_history(run.info.run_id, 'train/loss/loss')
    assert np.allclose([o.value for o in sorted(found, key=lambda o: o.step)], inspector.history.series('loss', 'loss').values)


def test_accelerator_as_a_logger(tmp_path):
    accelerate = pytest.importorskip('accelerate', reason='the package accelerate is not installed')
    pytest.importorskip('tensorboard', reason='the package tensorboard is not installed')
    accelerator = accelerate.Accelerator(cpu=True, log_with='tensorboard', project_dir=str(tmp_path))
    accelerator.init_trackers('run')
    loop(Inspector(lenses(), visualizer=None, log=LogCB(accelerator, only='*/loss/*')))
    accelerator.end_training()
    assert len(diagnose(str(tmp_path/'run')).evidence.loss()) == 15


def test_a_run_of_wandb_gets_histograms_as_the_module_does(monkeypatch):
    "The real ones, wandb and trackio, are not installed for the tests; this has their form."
    import types
    module, rows = types.ModuleType('wandbish'), []
    class Histogram:
        def __init__(self, np_histogram): self.counts, self.edges = np_histogram
    class Run:
        def log(self, row, step=None): rows.append((step, row))
    Run.__module__, module.Histogram, module.log = 'wandbish.sdk.run', Histogram, Run().log
    monkeypatch.setitem(sys.modules, 'wandbish', module)
    for o in module, Run():
        rows.clear()
        fitted(LogCB(o, only=['train/hist/0', 'train/loss/*']), 1)
        found = [row['train/hist/0'] for _, row in rows if 'train/hist/0' in row]
        assert len(found) == 15 and sum(found[0].counts) == 8*16 and [step for step, _ in rows[:15]] == list(range(15))


def test_what_is_no_logger_is_refused():
    with pytest.raises(TypeError, match='give a function of'): LogCB(3)
    with pytest.raises(ValueError, match='every is 0'): LogCB(print, every=0)


# --- loops of others ---

def test_accelerate_and_fabric_by_the_inspector():
    own = loop(Inspector(lenses(), visualizer=None))
    accelerate = pytest.importorskip('accelerate', reason='the package accelerate is not installed')
    accelerator = accelerate.Accelerator(cpu=True)
    assert_same(own, loop(Inspector(lenses(), visualizer=None), prepare=accelerator.prepare, backward=accelerator.backward))
    pytest.importorskip('lightning', reason='the package lightning is not installed')
    from lightning.fabric import Fabric
    fabric = Fabric(accelerator='cpu', devices=1)
    assert_same(own, loop(Inspector(lenses(), visualizer=None), prepare=fabric.setup, backward=fabric.backward))


def lightning_run(callback, tmp_path, fail=False, epochs=2, ckpt=None, **kw):
    L = pytest.importorskip('lightning', reason='the package lightning is not installed')

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = small_net()

        def training_step(self, batch, i):
            if fail and i == 5: raise KeyError('a fault of the user')
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            self.log('train_loss', loss)
            return loss

        def validation_step(self, batch, i):
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            self.log('val_loss', loss)
            return loss

        def configure_optimizers(self): return torch.optim.SGD(self.parameters(), .1, momentum=.9)

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 8)
    kw = dict(logger=False, enable_checkpointing=False, default_root_dir=str(tmp_path)) | kw
    module = Module()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        trainer = L.Trainer(max_epochs=epochs, accelerator='cpu', devices=1, callbacks=[callback], enable_progress_bar=False,
                            enable_model_summary=False, **kw)
        try: trainer.fit(module, data, data, ckpt_path=ckpt)
        finally: trainer.module = module
    return trainer


def hooks_on(model): return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_lightning_sees_what_a_loop_sees(tmp_path, capsys):
    pytest.importorskip('lightning', reason='the package lightning is not installed')
    from miniai.others import LightningInspector
    callback = LightningInspector(lenses())
    trainer = lightning_run(callback, tmp_path)
    assert_same(loop(Inspector(lenses(), visualizer=None), n=2), callback.inspector)
    assert not hooks_on(trainer.module) and not callback.inspector.attached
    assert callback.findings.summary() in capsys.readouterr().out


def test_lightning_accumulates_clips_and_goes_on(tmp_path):
    pytest.importorskip('lightning', reason='the package lightning is not installed')
    from miniai.others import LightningInspector
    whole, first, rest = (LightningInspector(lenses()) for _ in range(3))
    how = dict(accumulate_grad_batches=2, gradient_clip_val=.3)
    lightning_run(whole, tmp_path, **how)
    saved = lightning_run(first, tmp_path, epochs=1, **how)
    saved.save_checkpoint(tmp_path/'a.ckpt')
    lightning_run(rest, tmp_path, ckpt=str(tmp_path/'a.ckpt'), **how)
    assert_same(whole.inspector, rest.inspector)
    norms = whole.inspector.history.series('0.weight', 'grad_norm').values
    assert len(norms) == 16 and norms.max() <= .3 + 1e-6   # 15 batches make 8 steps; clipped


def test_lightning_lets_go_after_an_error(tmp_path):
    pytest.importorskip('lightning', reason='the package lightning is not installed')
    from miniai.others import LightningInspector
    callback = LightningInspector(lenses())
    with pytest.raises(KeyError, match='a fault of the user'): lightning_run(callback, tmp_path, fail=True)
    assert not callback.inspector.attached and len(callback.inspector.history.series('loss', 'loss')) == 5


class Classifier(nn.Module):
    "As models of transformers are: the loss is in what it returns."
    def __init__(self):
        super().__init__()
        self.net = small_net()

    def forward(self, inputs, labels=None, fail=None):
        logits = self.net(inputs)
        return dict(loss=F.cross_entropy(logits, labels), logits=logits)


def trainer_run(callback, folder, model=None, resume=None, **kw):
    pytest.importorskip('transformers', reason='the package transformers is not installed')
    from transformers import Trainer, TrainingArguments

    class InOrder(Trainer):   # batches as the loop has them
        def _get_train_sampler(self, *args): return torch.utils.data.SequentialSampler(self.train_dataset)
    data = [dict(inputs=a, labels=b) for a, b in zip(x, y)]
    args = dict(per_device_train_batch_size=8, per_device_eval_batch_size=8, max_steps=30, report_to=[], disable_tqdm=True, use_cpu=True,
                learning_rate=.1, optim='sgd', optim_args='momentum=0.9', lr_scheduler_type='constant', eval_strategy='epoch',
                save_strategy='no', logging_steps=5, max_grad_norm=0) | kw
    model = model or Classifier()
    trainer = InOrder(model, TrainingArguments(str(folder), **args), train_dataset=data, eval_dataset=data, callbacks=[callback])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_trainer_sees_what_a_loop_sees(tmp_path, capsys):
    pytest.importorskip('transformers', reason='the package transformers is not installed')
    from miniai.others import TrainerInspector
    callback, own = TrainerInspector(lenses()), loop(Inspector(lenses(), visualizer=None), n=2)
    trainer = trainer_run(callback, tmp_path)
    seen = callback.inspector
    for source, stat, phase in (('0', 'std', 'train'), ('1', 'death_rate', 'train'), ('2', 'mean', 'train'), ('0.weight', 'grad_norm', 'train'),
                                ('2.bias', 'grad_correlation', 'train'), ('0.weight', 'update_ratio', 'train')):
        a, b = own.history.series(source, stat, phase), seen.history.series(f'net.{source}', stat, phase)
        assert len(a) == 30 and np.allclose(a.values, b.values, atol=1e-6, equal_nan=True), stat
        assert (a.steps == b.steps).all() and (a.epochs == b.epochs).all() and (a.samples == b.samples).all()
    for phase in 'train', 'valid':
        a, b = (o.history.series('loss', 'loss', phase) for o in (own, seen))
        assert len(a) == 30 and np.allclose(a.values, b.values, atol=1e-6) and (a.steps == b.steps).all()
    assert not hooks_on(trainer.model) and callback.findings.summary() in capsys.readouterr().out


def test_trainer_goes_on_from_a_checkpoint(tmp_path):
    pytest.importorskip('transformers', reason='the package transformers is not installed')
    from miniai.others import TrainerInspector
    whole, rest = TrainerInspector(lenses()), TrainerInspector(lenses())
    how = dict(save_strategy='epoch', gradient_accumulation_steps=2, max_steps=16)
    trainer_run(whole, tmp_path, **how)
    trainer_run(rest, tmp_path, resume=str(tmp_path/'checkpoint-8'), **how)
    assert_same(whole.inspector, rest.inspector)


def test_trainer_lets_go_of_a_model_after_an_error(tmp_path):
    pytest.importorskip('transformers', reason='the package transformers is not installed')
    from miniai.others import TrainerInspector
    model = Classifier()
    with pytest.raises(ValueError, match='a fault of the user'), TrainerInspector(lenses()) as callback:
        def fail(m, i, o):
            if len(callback.inspector.sampler.seen) and callback.inspector.step == 5: raise ValueError('a fault of the user')
        handle = model.net.register_forward_hook(fail)
        trainer_run(callback, tmp_path, model)
    handle.remove()
    assert not hooks_on(model) and not callback.inspector.attached


@pytest.mark.parametrize('name, package', [('TrainerInspector', 'transformers'), ('LightningInspector', 'lightning')])
def test_without_the_library_there_is_a_clear_word(name, package):
    lines = f"""import sys
import miniai.others as others
assert not {{'transformers', 'lightning', 'pytorch_lightning', 'accelerate', 'tensorboard'}} & set(sys.modules)
sys.modules[{package!r}] = None
try: others.{name}()
except ImportError as e: print(e)"""
    res = subprocess.run([sys.executable, '-c', lines], capture_output=True, text=True)
    assert res.stdout.strip() == f'{name}: it needs {package}; pip install {package}', res.stderr


# --- records of others ---

def command(capsys, *args):
    "Exit code and output of `miniai_diagnose`."
    from miniai.others import main_diagnose
    with pytest.raises(SystemExit) as end: main_diagnose([str(o) for o in args])
    return int(end.value.code or 0), capsys.readouterr()


falling = [2*.97**i + .1 for i in range(120)]
broken = falling[:60] + [float('nan')]*60


def found_in(out): return {o['rule'] for o in json.loads(out)['findings']}


def write_trainer_state(folder, losses):
    pytest.importorskip('transformers', reason='the package transformers is not installed')
    from transformers import TrainerState
    log = [dict(loss=o, grad_norm=1., learning_rate=.01, epoch=i/20, step=i+1) for i, o in enumerate(losses)]
    log += [dict(eval_loss=losses[i-1], eval_runtime=1., epoch=i/20, step=i) for i in range(20, 121, 20)] + [dict(train_loss=.5, train_runtime=3., step=120)]
    TrainerState(log_history=sorted(log, key=lambda o: o['step'])).save_to_json(str(folder/'trainer_state.json'))
    return folder/'trainer_state.json'


def write_lightning(folder, losses):
    pytest.importorskip('lightning', reason='the package lightning is not installed')
    from lightning.pytorch.loggers import CSVLogger
    logger = CSVLogger(str(folder), name='run', version=0)
    for i, o in enumerate(losses):
        logger.log_metrics(dict(train_loss=o, epoch=i//20), i)
        if i % 20 == 19: logger.log_metrics(dict(val_loss=o, epoch=i//20), i)
    logger.save()
    return folder/'run'/'version_0'


def write_tensorboard(folder, losses):
    pytest.importorskip('tensorboard', reason='the package tensorboard is not installed')
    from torch.utils.tensorboard import SummaryWriter
    with SummaryWriter(str(folder)) as writer:
        for i, o in enumerate(losses): writer.add_scalar('Loss/train', o, i)
    return folder


def write_wandb(folder, losses):   # as "Export as CSV" of a chart makes it
    lines = [f'"{i}","{"NaN" if o != o else o}","{o}","{o}"' for i, o in enumerate(losses)]
    (folder/'wandb_export.csv').write_text('\n'.join(['"Step","brisk-sun-3 - train/loss","brisk-sun-3 - train/loss__MIN","brisk-sun-3 - train/loss__MAX"', *lines]))
    return folder/'wandb_export.csv'


def write_ours(folder, losses, name='run.parquet'):
    from miniai.all import Evidence, History
    history = History()
    history.start_run()
    for i, o in enumerate(losses): history.record('batch', 'loss', o, step=i)
    Evidence(history).save(folder/name)
    return folder/name


def write_our_csv(folder, losses): return write_ours(folder, losses, 'run.csv')


writers = write_trainer_state, write_lightning, write_tensorboard, write_wandb, write_ours, write_our_csv


@pytest.mark.parametrize('write', writers, ids=lambda o: o.__name__)
def test_command_on_files_of_six_kinds(write, tmp_path, capsys):
    (tmp_path/'a').mkdir()
    (tmp_path/'b').mkdir()
    code, out = command(capsys, write(tmp_path/'a', falling), '--fail-on', 'warning', '--json')
    assert code == 0 and 'not_finite' not in found_in(out.out)
    code, out = command(capsys, write(tmp_path/'b', broken), '--fail-on', 'warning', '--json')
    assert code == 1 and 'not_finite' in found_in(out.out)
    code, out = command(capsys, tmp_path/'b' if write is write_trainer_state else write(tmp_path/'b', broken), '--fail-on', 'never')
    assert code == 0 and 'not_finite' in out.out


ways = {write_trainer_state: '`TrainerInspector()`', write_lightning: '`LightningInspector()`', write_tensorboard: '`Inspector().attach(',
        write_wandb: '`Inspector().attach(', write_ours: '`learn.watch()`', write_our_csv: "evidence.save('run.parquet')`"}


@pytest.mark.parametrize('write', writers, ids=lambda o: o.__name__)
def test_command_says_what_it_could_not_see(write, tmp_path, capsys):
    "And with what the user of that tool may record it; nothing of ours that there is not in another library."
    _, out = command(capsys, write(tmp_path, broken))
    first, _, rest = out.out.partition('\n\n')
    assert f'of {len(rules)} rules could not be asked' in first and ways[write] in first + rest
    asked = ' '.join(rest.partition('Not asked')[2].split())
    assert 'no grad_norm was recorded' in asked and 'dead_units' in asked and 'what enters the loss is not known' in asked
    if 'our' not in write.__name__: assert 'learn.' not in out.out and 'the Learner' not in out.out and asked.count('watch with') == 1


def test_command_on_a_run_that_could_be_asked_all(tmp_path, capsys):
    learn = fitted(LogCB([]), 5)
    learn.diagnose().evidence.save(tmp_path/'run.parquet')
    _, out = command(capsys, tmp_path/'run.parquet')
    asked = out.out.partition('Not asked:')[2]
    assert 'could not be asked' not in out.out and len(asked.splitlines()) == len(set(learn.diagnose().unchecked.values())) + 1


@pytest.mark.parametrize('name, text, said', [
    ('trainer_state.json', '{"log_history": [', 'it is no JSON, or cut off, at line 1'), ('trainer_state.json', '{"a": 1}', 'no list `log_history`'),
    ('trainer_state.json', '[1, 2]', 'no list `log_history`'), ('trainer_state.json', '{"log_history": ["a"]}', 'no list `log_history`'),
    ('run.jsonl', '{"phase": "train"}', "a row has no 'source'"), ('run.jsonl', '', 'it has no rows'),
    ('metrics.csv', '', 'no loss or metric'), ('metrics.csv', 'wall_time,runtime\n1,2\n', 'but wall_time, runtime'),
    ('export.csv', '"Step","a - loss","b - loss"\n1,2,3\n', 'several runs'), ('run.parquet', 'no parquet', 'cannot be read'),
    ('notes.txt', 'loss 3', "it ends in '.txt'"), ('run.jsonl', '{"phase": ', 'cannot be read')])
def test_damaged_files_are_refused(name, text, said, tmp_path, capsys):
    (tmp_path/name).write_text(text)
    code, out = command(capsys, tmp_path/name, '--json')
    assert code == 2 and said in out.err and name in out.err and not out.out
    assert 'Error' not in out.err and out.err.count('diagnose') == 1 and 'It reads a table of miniai (.parquet, .csv, .jsonl)' in out.err


def test_files_that_are_not_there_or_are_empty(tmp_path, capsys):
    assert command(capsys, tmp_path/'nowhere.csv')[0] == 2
    (tmp_path/'empty').mkdir()
    code, out = command(capsys, tmp_path/'empty')
    assert code == 2 and 'no loss or metric' in out.err


# --- several validations in one epoch ---

def by_hand(inspector, tmp_path, model=None):
    "A loop of one's own, one epoch that validates after each five of its steps."
    model = small_net()
    opt = torch.optim.SGD(model.parameters(), .1, momentum=.9)
    inspector.attach(model)
    for _ in inspector.range(1):
        for i, (xb, yb) in enumerate(batches, 1):
            loss = F.cross_entropy(model(xb), yb)
            inspector.push_loss(loss.detach(), train=True)
            loss.backward()
            opt.step()
            opt.zero_grad()
            if i % 5: continue
            with torch.no_grad():
                for xb, yb in batches: inspector.push_loss(F.cross_entropy(model(xb), yb), train=False)
            inspector.push_metric('half', i/2, train=False)
    inspector.detach()
    return inspector


def by_trainer(inspector, tmp_path):
    from miniai.others import TrainerInspector
    callback = TrainerInspector(inspector.lenses)
    trainer_run(callback, tmp_path, eval_strategy='steps', eval_steps=5, max_steps=15)
    return callback.inspector


def by_lightning(inspector, tmp_path):
    pytest.importorskip('lightning', reason='the package lightning is not installed')
    from miniai.others import LightningInspector
    callback = LightningInspector(inspector.lenses)
    lightning_run(callback, tmp_path, epochs=1, val_check_interval=5)
    return callback.inspector


@pytest.mark.parametrize('kept', [True, False], ids=['each step is kept', 'aggregates only'])
@pytest.mark.parametrize('run', [by_hand, by_trainer, by_lightning], ids=lambda o: o.__name__)
def test_each_validation_of_an_epoch_has_a_row(run, kept, tmp_path):
    seen = run(Inspector([OutputStats(), LossMetrics(loss_fn_inplace=not kept)], visualizer=None), tmp_path)
    every = by_hand(Inspector([LossMetrics(loss_fn_inplace=False)], visualizer=None), tmp_path).history.series('loss', 'loss').values
    train, valid = (seen.history.series('loss', 'loss mean', o) for o in ('train', 'valid'))
    assert train.steps.tolist() == valid.steps.tolist() == [5, 10, 15] and not train.epochs.any() and not valid.epochs.any()
    assert np.allclose(train.values, every.reshape(3, 5).mean(1), atol=1e-6)
    assert valid.values[0] > valid.values[1] > valid.values[2]   # each is of its own
    assert np.allclose(diagnose(seen).evidence.epoch_loss('valid').values, valid.values)
    if run is by_hand:
        assert seen.history.series('half', 'half mean', 'valid').values.tolist() == [2.5, 5, 7.5]


def rising(losses, each):
    "An inspector of one epoch, with a validation after each of some steps."
    inspector = Inspector([LossMetrics()], visualizer=None).attach(nn.Linear(1, 1))
    for i, o in enumerate(losses):
        for step in range(each*i, each*(i+1)):
            inspector.set_step('train', step)
            inspector.push_loss(1/(1+step), train=True)
        inspector.set_step('valid', each*(i+1))
        inspector.push_loss(o, train=False)
    return inspector.detach()


def test_overfitting_within_one_epoch_is_found_and_drawn():
    from miniai.charts import loss_lines
    inspector = rising([.9, .7, .5, *np.linspace(.6, 1.8, 21)], 20)
    first = next(o for o in diagnose(inspector) if o.rule == 'overfitting')
    assert first.level == 'warning' and first.steps == (60, 480) and 'at step 60' in first.text
    lines, per = loss_lines(diagnose(inspector).evidence)
    assert per == 'step' and lines['validation'][0].tolist() == list(range(20, 481, 20))


def test_validations_of_one_batch_each_are_noise_and_no_overfitting():
    "The lowest of a hundred is low, and the last ones are higher, by chance."
    rng = np.random.default_rng(0)
    noisy = [diagnose(rising(1 + .2*rng.standard_normal(100), 1)) for _ in range(10)]
    assert not [o for found in noisy for o in found if o.rule == 'overfitting']


class Broken(Classifier):
    "Its loss is NaN from a step on."
    n, good = 0, 14

    def forward(self, inputs, labels=None):
        self.n += 1
        found = super().forward(inputs, labels)
        return found | dict(loss=found['loss']*(1 if self.n <= self.good else float('nan')))


@pytest.mark.parametrize('steps', [1, 5])
def test_nan_of_a_trainer_is_found_in_its_log(steps, tmp_path, capsys):
    "Its log has 0, or a mean without it, in place of a loss that is NaN."
    from transformers import TrainerCallback
    trainer_run(TrainerCallback(), tmp_path, Broken(), eval_strategy='no', save_strategy='steps', save_steps=30,
                logging_steps=steps, max_grad_norm=1)
    folder = tmp_path/'checkpoint-30'
    log = json.loads((folder/'trainer_state.json').read_text())['log_history']
    assert np.isfinite([o['loss'] for o in log if 'loss' in o]).all()
    capsys.readouterr()
    code, out = command(capsys, folder, '--fail-on', 'warning', '--json')
    first = json.loads(out.out)['findings'][0]
    assert code == 1 and (first['rule'], first['level'], first['steps']) == ('not_finite', 'error', [15, 30])
    assert 'in the gradient' in first['text']


def test_a_gradient_that_a_scaler_leaves_out_is_a_note(tmp_path, capsys):
    path = write_trainer_state(tmp_path, falling)
    state = json.loads(path.read_text())
    state['log_history'][7]['grad_norm'] = float('nan')
    path.write_text(json.dumps(state))
    code, out = command(capsys, path, '--fail-on', 'warning', '--json')
    assert code == 0 and [o['level'] for o in json.loads(out.out)['findings'] if o['rule'] == 'not_finite'] == ['note']


def test_a_record_of_a_trainer_has_both_losses_and_the_rate(tmp_path):
    evidence = diagnose(write_trainer_state(tmp_path, falling)).evidence
    assert np.allclose(evidence.loss().values, falling) and len(evidence.loss('valid')) == 6
    assert evidence.facts.lr == .01 and evidence.loss('valid').epochs.tolist() == list(range(6))
    assert evidence.n_steps() == 120
