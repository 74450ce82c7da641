"The public surface: arguments documented where they are written, annotations that resolve, and types as users' code meets them."
import importlib, inspect, pkgutil, re, subprocess, sys, typing

import pytest
import torch
from torch import nn

import miniai
import typing_surface
from miniai.callback import events
from miniai.datasets import DataLoaders

docments = pytest.importorskip('fastcore.docments').docments
modules = [importlib.import_module(f'miniai.{o.name}') for o in pkgutil.iter_modules(miniai.__path__)
           if not o.name.startswith('_')]
by_module = pytest.mark.parametrize('module', modules, ids=lambda o: o.__name__.split('.')[-1])

protocol = {*events, 'forward', 'extra_repr', 'state_dict', 'load_state_dict', 'callback', 'teardown'}


def is_asked(f):
    "Whether PyTorch or a loop, ours or another library's (`on_...`), has set the arguments and says what it is."
    return f.__name__ in protocol or f.__name__.startswith('on_')


def public(module):
    "Name and object of the functions and classes that a module defines and exports."
    for nm in module.__all__:
        o = getattr(module, nm)
        if getattr(o, '__module__', None) == module.__name__ and (inspect.isfunction(o) or inspect.isclass(o)): yield nm, o


def function(o):
    "The function behind a method or a class method; None if there is none."
    o = getattr(o, '__func__', o)
    return o if inspect.isfunction(o) else None


def callables(module):
    "(name, function, the class it is a method of) for all that a user may call."
    for nm, o in public(module):
        if inspect.isfunction(o):
            yield nm, o, None
            continue
        for k, member in vars(o).items():
            f = function(member)
            if f and (k == '__init__' or not k.startswith('_')) and f.__qualname__ != '__create_fn__.<locals>.__init__':
                yield f'{nm}.{k}', f, o


def generated(f): return not hasattr(f, '__code__') or f.__code__.co_filename == '<string>'   # of a dataclass


def overridden(f, cls):
    "The same method of the classes above."
    found = [function(vars(c).get(f.__name__)) for c in cls.__mro__[1:]] if cls else []
    return [o for o in found if o]


def ours(f): return f.__module__.startswith('miniai.') and not generated(f)


def undocumented(f, cls):
    """Arguments with no comment and not named in the docstring, here, in the class or in a method that this one overrides.

    Nobody reads comments on `*args` and `**kw`; what another library's class asks for, that library has documented.
    """
    above = overridden(f, cls)
    if f.__name__ != '__init__' and not all(map(ours, above)): return []
    wanted = [k for k, v in inspect.signature(f).parameters.items()
              if v.kind not in (v.VAR_POSITIONAL, v.VAR_KEYWORD) and k not in ('self', 'cls', 'learn', 'evidence', 'sums')]   # what callbacks, rules, statistics get
    told = {k for o in (f, *above) if ours(o) for k, v in docments(o, full=True).items() if v.docment}
    text = ' '.join(o.__doc__ or '' for o in (f, *above, cls) if o)
    return [k for k in wanted if k not in told and not re.search(f'`{k}[`(]', text)]


@by_module
def test_arguments_are_documented(module):
    "What each is, its shape or unit: in a comment behind it, or in a docstring that names it."
    missing = [f'{nm}({", ".join(found)})' for nm, f, cls in callables(module)
               if not generated(f) and not is_asked(f) and (found := undocumented(f, cls))]
    assert not missing, f'put `# what it is` behind these arguments: {missing}'


@by_module
def test_methods_are_documented(module):
    bare = [nm for nm, f, cls in callables(module) if not is_asked(f) and f.__name__ != '__init__'
            and not generated(f) and not any((o.__doc__ or '').strip() for o in (f, *overridden(f, cls)))]
    assert not bare


@by_module
def test_annotations_resolve(module):
    for nm, f, _ in callables(module):
        try: typing.get_type_hints(f)
        except NameError as e: pytest.fail(f'{nm}: {e}')


@by_module
def test_defaults_suit_their_annotations(module):
    "Of plain types: `n:int=1`, `name:str=None`; None is always possible."
    wrong = []
    for nm, f, _ in callables(module):
        hints = typing.get_type_hints(f)
        for k, p in inspect.signature(f).parameters.items():
            hint = hints.get(k)
            if p.default in (p.empty, None) or generated(f) or hint not in (int, float, str, bool, list, dict, tuple): continue
            suits = (int, float) if hint is float else hint
            if not isinstance(p.default, suits): wrong.append(f'{nm}({k}: {hint.__name__} = {p.default!r})')
    assert not wrong


def test_users_code_passes_a_type_checker(root):
    "mypy reads the package along with it."
    pytest.importorskip('mypy')
    command = [sys.executable, '-m', 'mypy', '--config-file=', '--ignore-missing-imports', '--follow-imports=silent',
               '--check-untyped-defs', '--cache-dir=/dev/null', 'tests/typing_surface.py']
    res = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert res.returncode == 0, res.stdout + res.stderr


def test_users_code_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)
    x, y = torch.randn(64, 1, 8, 8), torch.randint(10, (64,))
    dl = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 16)
    dls, net = DataLoaders(dl, dl), nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.ReLU())
    assert typing_surface.use_learner(dls, net) > 0
    assert typing_surface.use_more(dls).n_steps == 4
    typing_surface.use_hooks(net, x)
    typing_surface.use_inspector(net, list(dl))
    assert typing_surface.use_lab().config['hidden_sizes'] == [64, 32]
