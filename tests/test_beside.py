"bench/beside.py, which runs what other packages do beside ours, tried with packages of four lines."
import contextlib, sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent/'bench'))
import beside


@contextlib.contextmanager
def tidy(model, loss_fn, opt):
    hook = model.register_forward_hook(lambda *args: None)
    try: yield beside.Seen()
    finally: hook.remove()


@contextlib.contextmanager
def untidy(model, loss_fn, opt):
    model.register_forward_hook(lambda *args: None)
    next(model.parameters()).register_hook(lambda grad: None)
    yield beside.Seen()


@contextlib.contextmanager
def patching(model, loss_fn, opt):
    model.forward = model.forward
    yield beside.Seen()


def reading(read):
    @contextlib.contextmanager
    def tool(model, loss_fn, opt): yield beside.Seen(after_step=read)
    return tool


@pytest.mark.parametrize('tool,left', [(tidy, 0), (untidy, 2), (patching, 1)])
def test_hooks_that_ctrl_c_leaves(tool, left):
    assert beside.train(tool, 3, interrupt=1)[1] == left


@pytest.mark.parametrize('read,reads', [(lambda loss: None, 0), (lambda loss: loss.detach().abs(), 0), (lambda loss: loss.item(), 1),
    (lambda loss: float(loss.detach()), 1), (lambda loss: bool(loss > 0), 1), (lambda loss: loss.detach().cpu().tolist(), 1),
    (lambda loss: (loss.detach().to('cpu').abs().item(), loss.item()), 2)])
def test_reads_of_a_step(read, reads):
    assert beside.train(reading(read), 3, counter=beside.Reads())[2] == reads


def test_cured_run_is_better():
    "What a tool sees of the two runs differs, and it is told of each step."
    seen = {False: [], True: []}
    for cured,losses in seen.items(): beside.train(reading(lambda loss: losses.append(float(loss.detach()))), 12, cured=cured)
    assert len(seen[False]) == len(seen[True]) == 12 and min(seen[False]) > 2 > seen[True][-1]


def test_absent_package_is_said_so(capsys, monkeypatch):
    monkeypatch.setattr(beside.cost, 'has', lambda nm: False)
    beside.main(['torch_module_monitor'])
    assert capsys.readouterr().out.strip() == 'torch_module_monitor is not installed: pip install torch-module-monitor'
