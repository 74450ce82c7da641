"The activation-function lab: values, networks on disk, the instruments and what they leave behind, training."
import copy, json, os, random

import numpy as np
import pytest
import safetensors
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from shared import CountReads

from miniai import datasets
from miniai.actfns import (ActivationFunction, BaseNetwork, LeakyReLU, act_fn_by_name, compare_act_fns, fashion_splits, get_act_fn,
                           get_grads, load_model, measure_number_dead_neurons, plot_act_fns, save_model, six_act_fns,
                           visualize_activations, visualize_gradients)
from miniai.datasets import DataLoaders, fashion_mnist, idx_folder
from miniai.hooks import count_hooks

realdata = pytest.mark.skipif(bool(datasets.missing_idx(idx_folder)), reason='dataset-fashion-mnist is not installed')
names = list(act_fn_by_name)
by_name = pytest.mark.parametrize('name', names)


@pytest.fixture(scope='module')
def small(): return fashion_splits('small')

@pytest.fixture(scope='module')
def batch(small): return next(iter(small.test))[0][:256], next(iter(small.test))[1][:256]

def seeded(act_fn, seed=42, **kw):
    torch.manual_seed(seed)
    return BaseNetwork(act_fn, **kw)


# --- the functions ---

from math import erfc, exp, expm1, log1p, pi, sqrt, tanh

def sig(x): return 1/(1+exp(-x)) if x >= 0 else exp(x)/(1+exp(x))
def softplus(x): return max(x, 0)+log1p(exp(-abs(x)))
def dmish(x): return tanh(softplus(x)) + x*sig(x)*(1-tanh(softplus(x))**2)
scale, alpha = 1.0507009873554804934193349852946, 1.6732632423543772848170429916717

# value and derivative at one number, in float64, each term of which is finite
refs = dict(
    sigmoid=(sig, lambda x: sig(x)*sig(-x)),
    tanh=(tanh, lambda x: 1/np.cosh(x)**2 if abs(x) < 300 else 0.),
    relu=(lambda x: max(x, 0.), lambda x: float(x > 0)),
    leakyrelu=(lambda x: x if x > 0 else .1*x, lambda x: 1. if x > 0 else .1),
    elu=(lambda x: x if x > 0 else expm1(x), lambda x: 1. if x > 0 else exp(x)),
    swish=(lambda x: x*sig(x), lambda x: sig(x)+x*sig(x)*sig(-x)),
    gelu=(lambda x: x*erfc(-x/sqrt(2))/2, lambda x: erfc(-x/sqrt(2))/2+x*exp(-x*x/2)/sqrt(2*pi)),
    selu=(lambda x: scale*(x if x > 0 else alpha*expm1(x)), lambda x: scale*(1. if x > 0 else alpha*exp(x))),
    mish=(lambda x: x*tanh(softplus(x)), dmish),
    softplus=(softplus, sig),
    hardswish=(lambda x: x*min(max(x+3, 0), 6)/6, lambda x: 0. if x <= -3 else 1. if x >= 3 else (2*x+3)/6))

points = sorted({*np.linspace(-12, 12, 401).round(3), *(s*10.**e for s in (-1, 1) for e in np.arange(-6, 4.01, .25))} - {0., -3., 3.})

def test_a_reference_for_each(): assert list(refs) == names

@by_name
@pytest.mark.parametrize('dtype,tol', [(torch.float64, 1e-8), (torch.float32, 2e-6), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
def test_values_and_gradients_against_float64(name, dtype, tol):
    x = torch.tensor(points, dtype=torch.float64).to(dtype)
    kept = ((x.double()-0).abs() > 0) & ((x.double().abs()-3).abs() > 0)   # kinks, to which half precision may round
    x = x[kept]
    value, slope = refs[name]
    for got,f in ((act_fn_by_name[name]()(x), value), (get_grads(name, x), slope)):
        want = torch.tensor([f(float(o)) for o in x], dtype=torch.float64)
        assert got.dtype == dtype and got.isfinite().all()
        torch.testing.assert_close(got.double(), want, rtol=tol, atol=tol)

@by_name
def test_gradcheck(name):
    x = torch.cat([torch.linspace(-12.04, 12.06, 101), torch.tensor([-1e4, -1e3, -100, 100, 1e3, 1e4])]).double()
    x = x[(x.abs() > 1e-3) & ((x.abs()-3).abs() > 1e-3)].requires_grad_()     # the kinks have no derivative
    assert len(x) > 100 and torch.autograd.gradcheck(act_fn_by_name[name](), (x,))

@by_name
def test_name_config_and_remake(name):
    act = act_fn_by_name[name]()
    assert isinstance(act, ActivationFunction) and act.name.lower() == name and act.config['name'] == act.name
    options = {k: v for k,v in act.config.items() if k != 'name'}
    assert type(act_fn_by_name[act.config['name'].lower()](**options)) is type(act)

def test_unknown_names_list_the_known():
    with pytest.raises(KeyError) as e: act_fn_by_name['rellu']
    assert all(o in str(e.value) for o in ['rellu', *names])
    with pytest.raises(KeyError, match='known are'): BaseNetwork('rellu')
    assert act_fn_by_name.get('rellu') is None and 'rellu' not in act_fn_by_name

def test_any_module_or_callable():
    x = torch.linspace(-2, 2, 9)
    for o in (nn.PReLU, nn.PReLU(), torch.sin, lambda t: t**3, 'ELU', LeakyReLU(.2)):
        assert get_act_fn(o)(x).shape == x.shape and BaseNetwork(o)(torch.zeros(2, 784)).shape == (2, 10)
    with pytest.raises(TypeError, match="got 7"): get_act_fn(7)
    assert get_grads(torch.sign, x).eq(0).all() and get_grads(lambda t: (t > 0).float(), x).isnan().all()

def test_curves():
    fig = plot_act_fns([*names, nn.Hardshrink(), torch.cos])
    axes = [o for o in fig.axes if o.get_visible()]
    assert len(axes) == 13 and axes[3].get_title() == 'LeakyReLU\n(alpha=0.1)' and axes[-1].get_title() == 'cos'
    value, slope = (o for o in axes[1].lines if len(o.get_xdata()) > 1)
    x = torch.as_tensor(value.get_xdata())
    assert np.allclose(value.get_ydata(), x.tanh(), atol=1e-6) and np.allclose(slope.get_ydata(), 1-x.tanh()**2, atol=1e-6)
    assert x[0] == -5 and x[-1] == 5
    assert plot_act_fns('relu', x_range=(-1, 2)).axes[0].lines[0].get_xdata()[0] == -1


# --- the network ---

@pytest.mark.parametrize('sizes', [[512, 256, 256, 128], [], [7]])
@pytest.mark.parametrize('act', ['relu', 'leakyrelu', torch.sin])
def test_parameters_are_those_of_a_plain_stack(act, sizes):
    net, all_sizes = seeded(act, hidden_sizes=sizes), [784, *sizes, 10]
    after = torch.rand(1)
    torch.manual_seed(42)
    stack = [nn.Linear(*o) for o in zip(all_sizes, all_sizes[1:])]
    assert torch.equal(after, torch.rand(1))
    plain = [p for o in stack for p in o.parameters()]
    assert all(torch.equal(p, q) for p,q in zip(net.parameters(), plain, strict=True))
    assert list(net.state_dict()) == [f'layers.{2*i}.{o}' for i in range(len(stack)) for o in ('weight', 'bias')]

def test_network_computes_what_the_stack_does(batch):
    net, x = seeded('tanh'), batch[0]
    a = x.flatten(1)
    for i in range(0, 8, 2): a = torch.tanh(a @ net.layers[i].weight.T + net.layers[i].bias)
    torch.testing.assert_close(net(x), a @ net.layers[8].weight.T + net.layers[8].bias, rtol=1e-5, atol=1e-5)
    assert net.config == dict(act_fn={'name': 'Tanh'}, input_size=784, num_classes=10, hidden_sizes=[512, 256, 256, 128])

def test_each_layer_has_a_function_of_its_own():
    net = BaseNetwork(nn.PReLU(), hidden_sizes=[4, 4])
    assert net.layers[1] is not net.layers[3] and len(list(net.parameters())) == 8


# --- on disk ---

@by_name
def test_round_trip(name, tmp_path, batch):
    net = seeded(name, hidden_sizes=[20, 10])
    save_model(net, tmp_path/'new'/'folder', 'a.b')
    torch.manual_seed(3)
    before = torch.get_rng_state()
    again = load_model(tmp_path/'new'/'folder', 'a.b')
    assert torch.equal(torch.get_rng_state(), before)
    assert again.config == net.config and torch.equal(again(batch[0]), net(batch[0]))
    assert sorted(o.name for o in (tmp_path/'new'/'folder').iterdir()) == ['a.b.config', 'a.b.safetensors']
    assert json.loads((tmp_path/'new'/'folder'/'a.b.config').read_text()) == net.config

def test_alpha_survives(tmp_path):
    save_model(BaseNetwork(LeakyReLU(.37)), tmp_path, 'x')
    net = load_model(str(tmp_path), 'x')
    assert all(net.layers[i].config['alpha'] == .37 for i in (1, 3, 5, 7))
    assert net.layers[1](torch.tensor(-1.)) == pytest.approx(-.37)

def write_pair(folder, config, state, name='old'):
    (folder/f'{name}.config').write_text(config if isinstance(config, str) else json.dumps(config))
    torch.save(state, folder/f'{name}.tar')

def test_pairs_of_config_and_tar(tmp_path, batch):
    "Written here as the tutorial's code writes them: a shared function, `torch.save` of the state dict."
    act = nn.ELU()
    layers = [nn.Linear(784, 512), act, nn.Linear(512, 256), act, nn.Linear(256, 256), act, nn.Linear(256, 128), act, nn.Linear(128, 10)]
    state = {f'layers.{k}': v for k,v in nn.Sequential(*layers).state_dict().items()}
    config = dict(act_fn={'name': 'ELU'}, hidden_sizes=[512, 256, 256, 128], input_size=784, num_classes=10)
    write_pair(tmp_path, config, state)
    assert torch.equal(load_model(tmp_path, 'old')(batch[0]), nn.Sequential(*layers)(batch[0].flatten(1)))
    write_pair(tmp_path, {**config, 'act_fn': {'name': 'LeakyReLU', 'alpha': .25}}, state)
    assert load_model(tmp_path, 'old').layers[1].config['alpha'] == .25

def test_a_tar_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self): return (os.mkdir, (str(tmp_path/'was here'),))
    write_pair(tmp_path, BaseNetwork('relu').config, {'layers.0.weight': Evil()})
    with pytest.raises(ValueError, match='could run code and are refused'): load_model(tmp_path, 'old')
    assert not (tmp_path/'was here').exists()

good = dict(act_fn={'name': 'ReLU'}, hidden_sizes=[4], input_size=6, num_classes=2)

@pytest.mark.parametrize('config,words', [
    ({**good, 'act_fn': {'name': 'rellu'}}, ['rellu', 'known are sigmoid', 'net=']),
    ({**good, 'act_fn': {'name': 'ReLU', 'slope': 1}}, ['slope', 'Expected']),
    ({**good, 'act_fn': {}}, ['Expected', 'act_fn']),
    ({**good, 'act_fn': 'ReLU'}, ['Expected', 'act_fn']),
    ({**good, 'sizes': 3}, ['Expected', 'hidden_sizes', 'num_classes']),
    ('{half', ['{half', 'Expected JSON']),
    ('[]', ['Expected']),
    ({**good, 'hidden_sizes': [5]}, ['size mismatch for layers.0.weight', '[4, 6]', '[5, 6]']),
    ({**good, 'hidden_sizes': [4, 4]}, ['Missing key', 'layers.4.weight']),
    ({**good, 'hidden_sizes': []}, ['Unexpected key', 'layers.2.weight', 'layers.2.bias'])])
def test_every_spoilt_config_says_what_it_is(tmp_path, config, words):
    write_pair(tmp_path, config, BaseNetwork('relu', 6, 2, [4]).state_dict())
    with pytest.raises(ValueError) as e: load_model(tmp_path, 'old')
    for o in ['old.config', *words]: assert o in str(e.value)

def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(FileNotFoundError, match='no weights called.*The folder has no models'): load_model(tmp_path/'none', 'x')
    save_model(BaseNetwork('relu', 6, 2, [4]), tmp_path, 'x')
    with pytest.raises(FileNotFoundError, match=r"no weights called 'y'.*has x"): load_model(tmp_path, 'y')
    weights = (tmp_path/'x.safetensors').read_bytes()
    (tmp_path/'x.safetensors').write_bytes(weights[:-10])
    with pytest.raises(ValueError, match=r'x\.safetensors is damaged'): load_model(tmp_path, 'x')
    (tmp_path/'x.safetensors').write_bytes(weights)
    (tmp_path/'x.config').unlink()
    assert load_model(tmp_path, 'x').layers[1].name == 'ReLU'      # the weights have their config
    assert load_model(tmp_path, 'x', BaseNetwork('tanh', 6, 2, [4])).layers[1].name == 'Tanh'
    torch.save(BaseNetwork('relu').state_dict(), tmp_path/'alone.tar')
    with pytest.raises(FileNotFoundError, match=r'alone\.config'): load_model(tmp_path, 'alone')
    (tmp_path/'t.tar').write_bytes(b'no zip file')
    with pytest.raises(ValueError, match=r't\.tar is damaged'): load_model(tmp_path, 't', BaseNetwork('relu'))
    torch.save([torch.ones(2)], tmp_path/'t.tar')
    with pytest.raises(ValueError, match=r't\.tar is damaged'): load_model(tmp_path, 't', BaseNetwork('relu'))

def test_the_config_beside_the_weights_is_theirs(tmp_path):
    "Whatever the file to read says."
    save_model(BaseNetwork(LeakyReLU(.1), 6, 2, [4]), tmp_path, 'x')
    (tmp_path/'x.config').write_text(json.dumps(BaseNetwork(LeakyReLU(.2), 6, 2, [4]).config))
    assert load_model(tmp_path, 'x').layers[1].config['alpha'] == .1

def test_a_net_that_does_not_fit_is_left_alone(tmp_path):
    save_model(BaseNetwork('relu', 6, 2, [4]), tmp_path, 'x')
    net = BaseNetwork('relu', 6, 3, [4])
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=r'(?s)net \(BaseNetwork\).*size mismatch for layers.2.weight'): load_model(tmp_path, 'x', net)
    assert all(torch.equal(before[k], v) for k,v in net.state_dict().items())

@pytest.mark.parametrize('fails', ['first write', 'second write', 'first rename', 'second rename'])
@pytest.mark.parametrize('there_before', [True, False])
def test_whole_or_not_at_all(tmp_path, monkeypatch, fails, there_before):
    "Whatever goes wrong: the old model or the new one is loaded, never a part of each."
    old, new = BaseNetwork('relu', 6, 2, [4]), BaseNetwork('elu', 6, 2, [5])
    if there_before: save_model(old, tmp_path, 'x')
    calls, rename, sync = [], os.replace, os.fsync
    def failing(f):
        def call(*args):
            calls.append(args)
            if len(calls) == (1 if 'first' in fails else 2): raise KeyboardInterrupt
            f(*args)
        return call
    if 'rename' in fails: monkeypatch.setattr(os, 'replace', failing(rename))
    else: monkeypatch.setattr(os, 'fsync', failing(sync))
    with pytest.raises(KeyboardInterrupt): save_model(new, tmp_path, 'x')
    monkeypatch.undo()
    assert not [o for o in tmp_path.iterdir() if o.suffix not in ('.config', '.safetensors')]
    if 'second' in fails: assert load_model(tmp_path, 'x').config == new.config
    elif there_before: assert load_model(tmp_path, 'x').config == old.config
    else: assert not list(tmp_path.iterdir())
    save_model(new, tmp_path, 'x')
    assert json.loads((tmp_path/'x.config').read_text()) == load_model(tmp_path, 'x').config == new.config

def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(AttributeError, match='Linear has no `config`'): save_model(nn.Linear(2, 2), tmp_path, 'x')
    net = BaseNetwork('relu')
    net.config['more'] = {1, 2}
    with pytest.raises(TypeError): save_model(net, tmp_path, 'x')
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('act', [nn.LeakyReLU(.3), nn.PReLU(), F.relu, lambda x: x])
def test_a_function_that_is_not_ours_needs_a_net(tmp_path, act):
    "Never silently another function of the same name."
    save_model(BaseNetwork(act, 6, 2, [4]), tmp_path, 'x')
    with pytest.raises(ValueError, match='no activation function is called .* pass it as net='): load_model(tmp_path, 'x')
    load_model(tmp_path, 'x', BaseNetwork(act, 6, 2, [4]))

def test_a_function_of_your_own_can_be_made_known(tmp_path, monkeypatch):
    class Cube(ActivationFunction):
        def __init__(self, power=3): super().__init__(); self.config['power'] = power
        def forward(self, x): return x**self.config['power']
    save_model(BaseNetwork(Cube(5), 6, 2, [4]), tmp_path, 'x')
    with pytest.raises(ValueError, match='add its class to act_fn_by_name'): load_model(tmp_path, 'x')
    monkeypatch.setitem(act_fn_by_name, 'cube', Cube)
    assert load_model(tmp_path, 'x').layers[1](torch.tensor(2.)) == 32

def test_tied_and_transposed_weights(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.config = nn.Linear(4, 4), nn.Linear(4, 4), {}
            self.b.weight = self.a.weight
            self.register_buffer('t', torch.arange(6.).reshape(2, 3).T)
    net = Tied()
    save_model(net, tmp_path, 'x', notes={'by': 'me'})
    again = load_model(tmp_path, 'x', Tied())
    assert torch.equal(again.b.weight, net.a.weight) and torch.equal(again.t, net.t)
    with safetensors.safe_open(tmp_path/'x.safetensors', 'pt') as file: assert file.metadata()['by'] == 'me'


# --- gradients at initialisation ---

def test_gradients_of_the_six_on_real_images(batch):
    "Sigmoid's first layer gets next to nothing; the others are level."
    ratios = {}
    for name in six_act_fns:
        net = seeded(name)
        fig, numbers = visualize_gradients(net, batch)
        assert all(p.grad is None for p in net.parameters())
        F.cross_entropy(net(batch[0]), batch[1]).backward()
        grads = [net.layers[i].weight.grad.double() for i in (0, 2, 4, 6, 8)]
        np.testing.assert_allclose(numbers['std'], [g.std().item() for g in grads], rtol=1e-4)
        np.testing.assert_allclose(numbers.norm, [g.norm().item() for g in grads], rtol=1e-4)
        np.testing.assert_allclose(numbers.zeros, [(g == 0).double().mean().item() for g in grads], atol=1e-6)
        axes = [ax for ax in fig.axes if ax.get_visible()]
        assert len(axes) == 5 and all(len(ax.lines) == 1 and len(ax.patches) == 40 for ax in axes)   # density, histogram
        assert [ax.get_title().split('\n')[0] for ax in axes] == numbers.layer.tolist()
        ratios[name] = numbers['std'].iloc[0]/numbers['std'].iloc[-1]
    assert ratios['sigmoid'] < 1e-3
    assert all(.01 < o < 10 for nm,o in ratios.items() if nm != 'sigmoid')

def test_density_line_lies_on_the_histogram(batch):
    fig, _ = visualize_gradients(seeded('relu'), batch)
    for ax in fig.axes[:5]:
        x, y = ax.lines[0].get_data()
        assert (y[1:]+y[:-1]) @ np.diff(x)/2 == pytest.approx(1, abs=.03)
        heights = np.array([o.get_height() for o in ax.patches])
        assert .5 < y.max()/heights.max() < 1.2

def test_frozen_and_unused_weights_are_gaps(batch):
    net = seeded('relu')
    net.layers[2].weight.requires_grad_(False)
    net.idle = nn.Linear(3, 3)
    _, numbers = visualize_gradients(net, batch)
    gaps = numbers.set_index('layer')['std'].isna()
    assert gaps['layers.2.weight'] and gaps['idle.weight'] and gaps.sum() == 2
    with pytest.raises(ValueError, match="called like 'nothing.*layers.0.weight"): visualize_gradients(net, batch, params='nothing')
    with pytest.raises(ValueError, match='no targets'): visualize_gradients(net, batch[0])

def test_saturated_share_stands_beside_the_weight(batch):
    net = seeded('tanh')
    for i in (0, 2, 4, 6): net.layers[i].weight.data *= 6
    _, numbers = visualize_gradients(net, batch)
    a, shares = batch[0].flatten(1), []
    with torch.no_grad():
        for i in (0, 2, 4, 6):
            a = net.layers[i](a).tanh()
            shares.append((a.abs() > .97).double().mean().item())
    np.testing.assert_allclose(numbers.saturated[:4], shares, atol=1e-4)
    assert max(shares) > .3 and np.isnan(numbers.saturated[4])
    np.testing.assert_allclose(visualize_activations(net, batch)[1].saturated, shares, atol=1e-4)


# --- activations ---

defined = dict(sigmoid=lambda x, y: (y < .03) | (y > .97), tanh=lambda x, y: y.abs() > .97, elu=lambda x, y: y < -.97,
               selu=lambda x, y: y < -scale*alpha+.03, softplus=lambda x, y: y < .03, relu=lambda x, y: y > 1e9,
               leakyrelu=lambda x, y: y > 1e9, swish=lambda x, y: (x < -1) & (y > -.03), gelu=lambda x, y: (x < -1) & (y > -.03),
               mish=lambda x, y: (x < -1) & (y > -.03), hardswish=lambda x, y: y > 1e9)

@by_name
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
def test_saturated_by_definition(name, dtype):
    x = (torch.randn(512, 9, generator=torch.Generator().manual_seed(1))*4).to(dtype)
    net = nn.Sequential(nn.Identity(), act_fn_by_name[name]())
    y = net(x)
    row = visualize_activations(net, x, what='1')[1].iloc[0]
    assert row.saturated == pytest.approx(defined[name](x, y).double().mean().item(), abs=1e-6)
    assert row.zeros == pytest.approx((y == 0).double().mean().item(), abs=1e-6)
    assert row['std'] == pytest.approx(y.double().std().item(), rel=1e-4)
    assert row.dead == (y == 0).all(0).double().mean()

def test_what_cannot_be_told_is_a_gap():
    x = torch.randn(8, 6)
    silu, softmax = (visualize_activations(nn.Sequential(o), x)[1].saturated[0] for o in (nn.SiLU(inplace=True), nn.Softmax(1)))
    assert np.isnan(silu) and np.isnan(softmax)
    assert visualize_activations(nn.Sequential(nn.Linear(6, 6)), x)[1].saturated.isna().all()

def test_all_leaves_where_no_layer_is_an_activation_function():
    net = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    assert visualize_activations(net, torch.randn(5, 6))[1].layer.tolist() == ['0', '1']

def test_a_container_is_an_output_of_its_own(batch):
    net = nn.Sequential(nn.Flatten(), nn.Sequential(nn.ReLU(), nn.Tanh()))
    assert visualize_activations(net, batch, what=['1', '1.*'])[1].layer.tolist() == ['1.0', '1.1', '1']
    assert measure_number_dead_neurons(net, [batch], what=['1', '1.*']).samples.tolist() == [256]*3

def test_a_module_of_your_own_says_where_it_settles():
    class Own(nn.Module):
        def forward(self, x): return 2*x.tanh()
    net, x = nn.Sequential(nn.Linear(4, 4), Own()), torch.randn(50, 4)*9
    assert visualize_activations(net, x, what=Own)[1].saturated.isna().all()
    net[1].limits = -2, 2
    assert visualize_activations(net, x, what=Own)[1].saturated[0] == (2-net(x).abs() < .03).double().mean() > 0

def test_constant_and_all_zero_outputs_are_drawn():
    fig, numbers = visualize_activations(nn.Sequential(nn.Threshold(9, 0), nn.Threshold(9, 3)), torch.randn(5, 6))
    assert [ax.texts[0].get_text() for ax in fig.axes[:2]] == ['nothing but zeros', 'all 3']
    fig, numbers = visualize_activations(nn.Sequential(nn.ReLU()), torch.tensor([[torch.nan, torch.inf, 1, 2, 0]]))
    assert numbers['std'].isna().all() and numbers.zeros[0] == pytest.approx(.2)


# --- any model, and no trace of the look ---

class Functional(nn.Module):
    def __init__(self): super().__init__(); self.a, self.b = nn.Linear(784, 12), nn.Linear(12, 10)
    def forward(self, x): return self.b(F.relu(self.a(x.flatten(1))))

class Shared(nn.Module):
    def __init__(self): super().__init__(); self.act, self.a, self.b = nn.ReLU(), nn.Linear(784, 12), nn.Linear(12, 10)
    def forward(self, x): return self.act(self.b(self.act(self.a(x.flatten(1)))))

class Rows(nn.Module):
    "An LSTM over the rows of the image, a transformer-like linear layer on [batch, time, feature], dropout."
    def __init__(self):
        super().__init__()
        self.rnn, self.inner, self.act = nn.LSTM(28, 6, batch_first=True), nn.Linear(6, 9), nn.GELU()
        self.drop, self.head = nn.Dropout(.5), nn.Linear(9, 10)
    def forward(self, x): return self.head(self.drop(self.act(self.inner(self.rnn(x.squeeze(1))[0]))[:, -1]))

models = dict(conv=lambda: nn.Sequential(nn.Conv2d(1, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 10, 13), nn.Flatten()),
              shared=Shared, functional=Functional, rows=Rows, network=lambda: BaseNetwork('elu', hidden_sizes=[20]),
              half=lambda: BaseNetwork(nn.PReLU(), hidden_sizes=[20]).bfloat16())

def state_of(net, loader):
    return (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist(), loader.generator.get_state().tolist(),
            [m.training for m in net.modules()], [p.requires_grad for p in net.parameters()],
            {k: v.float().tolist() for k,v in net.state_dict().items()})

@pytest.mark.parametrize('kind', models)
@pytest.mark.parametrize('grad_mode', [True, False])
def test_nothing_is_left_behind(kind, grad_mode, batch):
    net = models[kind]()
    x, y = batch[0][:40], batch[1][:40]
    if kind == 'half': x = x.bfloat16()
    loader = DataLoader(TensorDataset(x, y), 16, shuffle=True, generator=torch.Generator().manual_seed(3))
    net.train()
    list(net.children())[0].eval()          # modes that differ
    F.cross_entropy(net(x), y).backward()
    grads = [(p.grad, p.grad.clone()) for p in net.parameters()]
    before = state_of(net, loader)
    looks = [lambda: visualize_gradients(net, loader), lambda: visualize_activations(net, loader), lambda: visualize_gradients(net, (x, y)),
             lambda: visualize_activations(net, x), lambda: measure_number_dead_neurons(net, loader, what=list(net.children())),
             lambda: compare_act_fns(['relu', 'tanh'], loader, lambda act: net)]
    with torch.set_grad_enabled(grad_mode):
        for look in looks:
            look()
            assert state_of(net, loader) == before and count_hooks(net) == 0 and torch.is_grad_enabled() == grad_mode
    assert all(p.grad is g and torch.equal(g, old) for p,(g,old) in zip(net.parameters(), grads))

@pytest.mark.parametrize('exc', [ValueError, KeyboardInterrupt])
def test_nothing_is_left_behind_after_an_error(exc, batch):
    class Stops(nn.Module):
        def forward(self, x): torch.rand(1); raise exc('stop')
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 5), nn.ReLU(), Stops())
    before = torch.get_rng_state()
    for look in (visualize_gradients, visualize_activations, measure_number_dead_neurons):
        with pytest.raises(exc): look(net, [batch])
    assert count_hooks(net) == 0 and net.training and torch.equal(torch.get_rng_state(), before)

def test_inside_inference_mode(batch):
    with torch.inference_mode(): assert len(visualize_gradients(seeded_outside, batch)[1]) == 5

seeded_outside = seeded('relu')

def test_a_batch_is_of_many_kinds(batch):
    net, x, y = seeded('relu'), *batch
    want = visualize_gradients(net, (x, y))[1]['std']
    loader = DataLoader(TensorDataset(x, y), 256)
    for o in ([x, y], [(x, y)], loader, iter(loader), DataLoaders(loader, loader).train): assert visualize_gradients(net, o)[1]['std'].equals(want)
    with pytest.raises(ValueError, match='gave no batch'): visualize_gradients(net, [])
    with pytest.raises(TypeError, match='batch is a dict'): visualize_activations(net, [{'x': x}])

def test_two_inputs(batch):
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.lin, self.act, self.out = nn.Linear(784, 5), nn.ReLU(), nn.Linear(5, 10)
        def forward(self, a, b): return self.out(self.act(self.lin(a.flatten(1)+b.flatten(1))))
    b = (batch[0], batch[0], batch[1])
    assert len(visualize_gradients(Two(), b, n_inp=2)[1]) == 2
    assert measure_number_dead_neurons(Two(), [b], n_inp=2).samples[0] == 256


# --- side by side ---

def test_comparison_has_equal_axes_and_the_numbers_of_each(batch):
    fig, table = compare_act_fns([*six_act_fns, nn.Softsign()], batch)
    axs = np.array([o for o in fig.axes if o.get_visible()]).reshape(3, 7)
    for row in axs: assert len({ax.get_ylim() for ax in row}) == 1 and len({ax.get_xlim() for ax in row}) == 1
    assert [o.get_title() for o in axs[0]] == ['Sigmoid', 'Tanh', 'ReLU', 'LeakyReLU\n(alpha=0.1)', 'ELU', 'Swish', 'Softsign']
    for name,shown in (('sigmoid', 'Sigmoid'), ('relu', 'ReLU')):
        mine = table[table.function == shown]
        net = seeded(name)
        np.testing.assert_array_equal(mine.grad_norm, visualize_gradients(net, batch)[1].norm)
        seen = visualize_activations(net, batch)[1]
        for o in ('std', 'dead', 'saturated', 'zeros'): np.testing.assert_array_equal(mine[o][:-1], seen[o])
    norms = table.pivot(index='function', columns='depth', values='grad_norm')
    assert norms.loc['Sigmoid', 1] < norms.loc['Sigmoid', 5]/100 and (norms.drop('Sigmoid').max(axis=1) < 10*norms.drop('Sigmoid').min(axis=1)).all()

def test_comparison_of_networks_of_your_own(batch):
    make = lambda act: nn.Sequential(nn.Conv2d(1, 4, 5, 2), copy.deepcopy(act), nn.Flatten(), nn.Linear(576, 10))
    _, table = compare_act_fns('relu', batch, make)
    assert table.layer.tolist()[:1] == ['1'] and table.weight.tolist() == ['0.weight', '3.weight']
    odd = (torch.randn(20, 3, 5), torch.randint(0, 17, (20,)))
    assert len(compare_act_fns(['relu'], odd)[1]) == 5     # sizes from the batch


# --- dead units ---

def dead_by_hand(net, x):
    "Indices of the units of each ReLU that are zero for all of `x`, by a loop over the layers."
    with torch.no_grad():
        res, a = [], x.flatten(1)
        for i in range(0, len(net.layers)-1, 2):
            a = (a @ net.layers[i].weight.T + net.layers[i].bias).clamp(min=0)
            res.append([u for u in range(a.shape[1]) if a[:, u].max() == 0])
    return res

@realdata
def test_dead_units_over_50_000_images():
    dls = fashion_splits('idx')
    assert (dls.train.n, dls.valid.n, dls.test.n) == (50_000, 10_000, 10_000)
    x, totals = dls.train.columns['image'], []
    for sizes in ([512, 256, 256, 128], [256]*5+[128]*5):
        net = seeded('relu', hidden_sizes=sizes)
        table = measure_number_dead_neurons(net, dls.train_all)
        assert table.indices.tolist() == dead_by_hand(net, x) and (table.samples == 50_000).all()
        assert table.dead.tolist() == [len(o) for o in table.indices] and table.units.tolist() == sizes
        np.testing.assert_allclose(table.fraction, table.dead/table.units)
        totals.append(table)
    four, ten = totals
    assert four.fraction.is_monotonic_increasing and four.dead.iloc[-1] > 0
    assert ten.fraction[:3].max() < .1 < .3 < ten.fraction[5:].max()
    assert ten.fraction.iloc[5:].mean() > 4*ten.fraction.iloc[:5].mean() and ten.dead.sum() > 10*four.dead.sum()

@pytest.mark.parametrize('sizes', [[512, 256, 256, 128], [256]*5+[128]*5])
def test_dead_units_of_the_shipped_images(small, sizes):
    net, x = seeded('relu', hidden_sizes=sizes), small.train.columns['image']
    want = dead_by_hand(net, x)
    for bs in (64, 1111, 5000):      # the last batch is smaller, or the only one
        assert measure_number_dead_neurons(net, DataLoader(TensorDataset(x), bs)).indices.tolist() == want
    assert sum(map(len, want)) > 0

def spotted(*layers, spoil=3):
    "Layers, with a few units of the first that nothing can wake."
    layers[0].bias.data[::spoil] = -1e3
    return nn.Sequential(*layers)

odd_nets = dict(wide=(lambda: spotted(nn.Linear(6, 5000), nn.ReLU()), (6,), 1),
                conv=(lambda: spotted(nn.Conv2d(1, 9, 3), nn.ReLU()), (1, 30, 31), 1),
                padded=(lambda: spotted(nn.Conv1d(1, 9, 3), nn.ConstantPad1d(2, 0.), nn.Dropout(), nn.ReLU()), (1, 20), 1),
                last=(lambda: spotted(nn.Conv2d(2, 9, 3), nn.ReLU6()).to(memory_format=torch.channels_last), (2, 30, 31), 1),
                time=(lambda: spotted(nn.Linear(4, 6), nn.Dropout(), nn.ReLU()), (7, 4), 2),
                tanh=(lambda: spotted(nn.Linear(4, 6), nn.Tanh()), (4,), 1),
                normed=(lambda: spotted(nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 8, 3)), nn.ReLU()), (2, 20), 1),
                half=(lambda: spotted(nn.Linear(40, 30).bfloat16(), nn.Hardswish()), (40,), 1))

@pytest.mark.parametrize('kind', odd_nets)
def test_counts_are_those_of_a_loop_over_the_units(kind):
    make, shape, axis = odd_nets[kind]
    torch.manual_seed(7)
    net = make().eval()
    x = torch.randn(53, *shape).to(next(net.parameters()).dtype)
    with torch.no_grad(): y = torch.cat([net(o) for o in x.split(16)])
    dead = [u for u in range(y.shape[axis]) if not y.select(axis, u).count_nonzero()]
    row = measure_number_dead_neurons(net, DataLoader(TensorDataset(x), 16)).iloc[0]
    assert (row.units, row.dead, row.indices, row.samples) == (y.shape[axis], len(dead), dead, 53)
    assert row.fraction == len(dead)/y.shape[axis] and (kind == 'tanh' or dead)
    if kind == 'tanh': assert row.saturated == ((y.abs()-1).abs() < .03).sum()/y.numel() > 2/6

def test_one_sample_wakes_a_unit():
    net = nn.Sequential(nn.Linear(1, 2), nn.ReLU())
    net[0].weight.data[:], net[0].bias.data[:] = torch.tensor([[1.], [-1.]]), 0
    x = -torch.ones(1001, 1)
    assert measure_number_dead_neurons(net, DataLoader(TensorDataset(x), 100)).indices[0] == [0]
    x[-1] = 1e-30
    assert measure_number_dead_neurons(net, DataLoader(TensorDataset(x), 100)).indices[0] == []
    x[-1] = torch.nan
    assert measure_number_dead_neurons(net, DataLoader(TensorDataset(x), 100)).indices[0] == []

@pytest.mark.parametrize('dim', [1, 2, 3])
def test_convolutions_by_channel(dim):
    layer = getattr(nn, f'Conv{dim}d')(1, 6, 3)
    layer.bias.data[2] = -1e3
    norm = getattr(nn, f'BatchNorm{dim}d')(6)
    norm.bias.data[4] = -1e3
    x = torch.randn(50, 1, *[9]*dim)
    for net,want in ((nn.Sequential(layer, nn.ReLU()), [2]), (nn.Sequential(layer, nn.ReLU(inplace=True)), [2]),
                     (nn.Sequential(layer, nn.Dropout(), norm, nn.Dropout(), nn.ReLU()), [4])):
        row = measure_number_dead_neurons(net, DataLoader(TensorDataset(x), 16)).iloc[0]
        if len(want) and want[0] == 4: assert 4 in row.indices and row.units == 6
        else: assert (row.indices, row.units) == (want, 6)

def test_features_of_a_linear_layer_over_time():
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
    net[0].bias.data[3] = -1e3
    assert measure_number_dead_neurons(net, [torch.randn(10, 7, 4)]).indices[0] == [3]
    row = measure_number_dead_neurons(net, [torch.randn(10, 7, 4)], axis=lambda module, ndim: 1).iloc[0]
    assert row.units == 7

def test_a_shared_function_is_counted_at_each_call(batch):
    net = Shared()
    net.a.bias.data[1] = net.b.bias.data[2] = -1e3
    table = measure_number_dead_neurons(net, [batch, batch])
    assert table.layer.tolist() == ['act', 'act (call 2)'] and table.units.tolist() == [12, 10]
    assert 1 in table.indices[0] and 2 in table.indices[1] and (table.samples == 512).all()

def test_functions_without_exact_zeros_report_saturation(batch, capsys):
    for name in names:
        table = measure_number_dead_neurons(seeded(name, hidden_sizes=[30, 20]), [batch])
        said, zeros = capsys.readouterr().out, name in ('relu', 'hardswish')
        assert (table.report == ('dead' if zeros else 'saturated')).all()
        assert ('Dead units over 256 samples' in said) == zeros
        assert ('saturated fraction' in said and act_fn_by_name[name]().name in said) == (not zeros)
    net = seeded('sigmoid', hidden_sizes=[30])
    net.layers[0].weight.data *= 50
    a = net.layers[1](net.layers[0](batch[0].flatten(1)))
    want = ((a < .03) | (a > .97)).double().mean().item()
    table = measure_number_dead_neurons(net, [batch, (batch[0][:100], batch[1][:100])])
    part = ((a[:100] < .03) | (a[:100] > .97)).double().mean().item()
    assert table.saturated[0] == pytest.approx((256*want+100*part)/356, abs=1e-6) and want > .5

def test_what_cannot_be_counted(batch):
    with pytest.raises(ValueError, match='no activation function as a layer.*what='):
        measure_number_dead_neurons(Functional(), [batch])
    assert measure_number_dead_neurons(Functional(), [batch], what=nn.Linear).units.tolist() == [12, 10]
    with pytest.raises(ValueError, match='gave no samples'): measure_number_dead_neurons(seeded('relu'), [])
    net = nn.Sequential(nn.ReLU())
    with pytest.raises(ValueError, match="'0' had 6 units and now has 7 on axis 1.*axis="):
        measure_number_dead_neurons(net, [torch.randn(2, 6), torch.randn(3, 7)])
    net = Functional()
    net.idle = nn.ReLU()
    with pytest.warns(UserWarning, match='never called: idle'):
        table = measure_number_dead_neurons(net, [batch], what=[nn.Linear, nn.ReLU])
    assert table.layer.tolist() == ['a', 'b']

@pytest.mark.parametrize('act', ['relu', 'tanh'])
def test_counting_reads_nothing_per_batch(act, batch):
    "As many host reads for 40 batches as for 4."
    net, reads = seeded(act, hidden_sizes=[30, 20]), []
    for n in (4, 40):
        with CountReads() as counter: measure_number_dead_neurons(net, [batch]*n, verbose=False)
        reads.append(counter.reads)
    assert reads[0] == reads[1] > 0

def test_a_compiled_model_is_said(batch):
    net = torch.compile(seeded('relu'), backend='eager')
    with pytest.warns(UserWarning, match='already compiled'): table = measure_number_dead_neurons(net, [batch])
    assert table.layer.tolist() == [f'layers.{i}' for i in (1, 3, 5, 7)]
    torch._dynamo.reset()

@pytest.mark.gpu
def test_on_a_gpu(batch):
    net = seeded('relu')
    want = measure_number_dead_neurons(net, [batch]).indices.tolist()
    assert measure_number_dead_neurons(net.cuda(), [batch]).indices.tolist() == want
    assert len(visualize_gradients(net, batch)[1]) == 5


# --- data ---

def test_splits(small):
    images = datasets.DataLoaders.in_memory(fashion_mnist('small'), 256).train.columns['image']
    parts = torch.cat([small.train.columns['image'], small.valid.columns['image']])
    assert parts.shape == (6000, 1, 28, 28) and parts.min() == -1 and parts.max() == 1
    key = lambda t: sorted(map(bytes, ((t+1)*127.5).round().to(torch.uint8).reshape(len(t), -1).numpy()))
    assert key(parts) == sorted(map(bytes, images.reshape(len(images), -1).numpy()))
    order = torch.randperm(6000, generator=torch.Generator().manual_seed(42))
    assert torch.equal(small.train.columns['image'][0], images[order[0]].float()/255*2-1)
    assert len(small.train) == 5000//256 and len(next(iter(small.valid))[0]) == 512

@pytest.mark.parametrize('between', [nn.ConstantPad1d(1, 0.), nn.Upsample(scale_factor=2), nn.MaxPool1d(2)])
def test_channels_are_kept_through_a_change_of_length(between):
    conv = nn.Conv1d(1, 6, 3)
    conv.bias.data[2] = -1e3
    net = nn.Sequential(conv, between, nn.ReLU())
    table = measure_number_dead_neurons(net, torch.randn(20, 1, 9), verbose=False)
    assert table.units[0] == 6 and 2 in table.indices[0]


# --- what goes on, what is paired, what is left alone ---

def test_comparison_pairs_each_function_with_the_matrix_in_front_of_it(batch):
    def make_net(act_fn):
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 20), nn.BatchNorm1d(20), copy.deepcopy(act_fn),
                             nn.Linear(20, 20), nn.Linear(20, 20), copy.deepcopy(act_fn), nn.Linear(20, 10))
    _, table = compare_act_fns(nn.PReLU(), batch, make_net)
    assert table.weight.tolist() == [f'{i}.weight' for i in (1, 4, 5, 7)]
    assert table.layer.fillna('').tolist() == ['3', '', '6', '']
    assert table.grad_norm.notna().all()


def test_inputs_and_targets_in_a_list_are_one_batch(batch):
    net = seeded('relu')
    want = measure_number_dead_neurons(net, [batch], verbose=False)
    table = measure_number_dead_neurons(net, list(batch), verbose=False)
    assert table.indices.tolist() == want.indices.tolist() and table.samples[0] == len(batch[0])


def test_doubles_come_back_as_doubles(tmp_path):
    net = seeded('relu').double()
    save_model(net, tmp_path, 'double')
    back = load_model(tmp_path, 'double')
    for a,b in zip(net.parameters(), back.parameters()): assert a.dtype == b.dtype and torch.equal(a, b)


def test_a_config_of_which_no_network_can_be_made(tmp_path):
    write_pair(tmp_path, {**seeded('relu').config, 'hidden_sizes': 'many'}, seeded('relu').state_dict(), 'odd')
    with pytest.raises(ValueError, match="no network can be made of .*odd.config.*many"): load_model(tmp_path, 'odd')
