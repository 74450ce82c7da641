"All statistics in one kernel: against NumPy in float64, interpreted on the CPU and, where there is one, on a GPU."
import functools, importlib.util, json, math, os, subprocess, sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from miniai import kernels
from miniai.kernels import measure_cuda
from miniai.stats import Bins, empty_row, unit_view

has_triton = importlib.util.find_spec('triton') is not None
linear, log = Bins(8, 0., 4.), Bins(12, 1e-8, 1e4, log=True)


# --- what is measured: name -> (tensor, axis, bins, other) ---

def spread(*shape):
    "Numbers of many sizes and both signs, a third of them zero, as behind a ReLU."
    a = torch.randn(*shape)*10**(torch.rand(*shape)*12 - 9)
    return torch.where(torch.rand(*shape) < .3, 0., a)

def spoilt(*shape):
    a = torch.randn(*shape)
    flat = a.view(-1)
    for i,v in enumerate([torch.nan, torch.inf, -torch.inf, torch.nan, 0., -0., torch.inf]): flat[i*5] = v
    return a

def shapes():
    res = {
        '0-d': (torch.tensor(-2.5), 0, linear), '0-d NaN': (torch.tensor(torch.nan), 0, linear),
        '1-d': (torch.randn(100), 0, linear), '1-d long': (torch.randn(5000), 0, linear),
        '2-d': (torch.randn(20, 7), 1, linear), '2-d wide': (torch.randn(3, 300), 1, linear),
        '2-d tall': (torch.randn(2100, 2), 1, linear), 'axis -1': (torch.randn(4, 5, 6), -1, linear),
        'B,T,F': (torch.randn(3, 9, 33), 2, linear), 'B,T,F split': (torch.randn(2, 70, 64), 2, linear),
        'B,C,L': (torch.randn(3, 5, 17), 1, linear), '4-d': (torch.randn(3, 6, 5, 7), 1, linear),
        '4-d split': (torch.randn(2, 3, 30, 30), 1, linear), '5-d': (torch.randn(2, 3, 4, 5, 6), 2, linear),
        'weight': (torch.randn(10, 3, 3, 3), 0, linear), 'weight split': (torch.randn(20, 300), 0, linear),
        '136 programs': (torch.randn(270, 600), 0, linear), '40 samples split': (torch.randn(40, 300), 1, linear)}
    return {k: (*o, None) for k,o in res.items()}

def strides():
    a = torch.randn(3, 6, 5, 7)
    res = {
        'channels_last': (a.to(memory_format=torch.channels_last), 1, linear),
        'channels_last split': (torch.randn(2, 40, 12, 12).to(memory_format=torch.channels_last), 1, linear),
        'transposed': (torch.randn(7, 20).T, 1, linear), 'a slice': (torch.randn(9, 50)[1:, 3:40:2], 1, linear),
        'expanded': (torch.randn(1, 5, 1).expand(4, 5, 6), 1, linear), 'permuted': (a.permute(2, 0, 3, 1), 2, linear),
        'a graph': (torch.randn(4, 5, requires_grad=True)*2, 1, linear)}
    return {k: (*o, None) for k,o in res.items()}

def numbers():
    res = {str(t): (spoilt(6, 20).to(t), 1, linear) for t in (torch.float16, torch.bfloat16, torch.float64)}
    res |= {f'log {t}': (spread(6, 20).to(t), 1, log) for t in (torch.float16, torch.bfloat16, torch.float64)}
    edges = torch.from_numpy(np.geomspace(1e-8, 1e4, 13).astype(np.float32))
    near = torch.cat([edges, edges.nextafter(torch.tensor(torch.inf)), edges.nextafter(torch.tensor(0.))])
    ends = torch.tensor([0., .5, 1, 1.5, 4, -4, 4.0000005, 3.9999998, -.49999997, .6])
    res |= {
        'spoilt': (spoilt(4, 30), 1, linear), 'spoilt log': (spoilt(4, 30), 1, log),
        'complex': (torch.randn(5, 4, dtype=torch.complex64), 1, linear), 'integers': (torch.arange(-6, 6).view(3, 4), 1, linear),
        'tiny': (torch.randn(5, 8)*1e-30, 1, linear), 'huge': (torch.randn(5, 8).sign()*3e38, 1, linear),
        'subnormal': (torch.tensor([1e-45, -1e-40, 0, 1e-38]), 0, replace(log, lo=1e-37, hi=1.)),
        'huge float64': (torch.randn(4, 5).double()*1e60, 1, linear), 'zeros': (torch.zeros(4, 5), 1, linear),
        'all above': (torch.rand(4, 5) + 5, 1, linear), 'all NaN': (torch.full((4, 5), torch.nan), 1, linear),
        'ends': (ends, 0, linear), 'ends from .5': (ends, 0, replace(linear, lo=.5)), 'ends float64': (ends.double(), 0, replace(linear, hi=.6)),
        'spread': (spread(10, 30), 1, log), 'edges': (near, 0, log), 'edges float64': (near.double(), 0, log),
        'one bin': (torch.randn(9), 0, replace(linear, n=1)), 'many bins': (torch.randn(30, 9), 1, replace(linear, n=2000)),
        'many bins log': (spread(30, 9), 1, replace(log, n=1500)), 'mid bins log': (spread(300, 9), 1, replace(log, n=700))}
    return {k: (*o, None) for k,o in res.items()}

def pairs():
    a, b = spoilt(5, 6, 4), spoilt(5, 6, 4).roll(3, 0)
    image = torch.randn(2, 3, 30, 30)
    return {
        'pair': (torch.randn(5, 40), 1, linear, torch.randn(5, 40)), 'pair spoilt': (a, 1, linear, b),
        'pair of types': (a.half(), 2, log, b.double()), 'pair of weights': (torch.randn(6, 5), 0, log, torch.randn(6, 5)),
        'pair of strides': (image, 1, linear, torch.randn(2, 3, 30, 30).to(memory_format=torch.channels_last)),
        'pair with itself': (image[:1], 1, linear, image[:1])}

@functools.lru_cache
def inputs():
    torch.manual_seed(0)
    return shapes() | strides() | numbers() | pairs()

@functools.lru_cache
def few_inputs():
    "For three programs: each has more than one group of samples, or more than one tile."
    torch.manual_seed(1)
    return {
        'few 1-d': (torch.randn(9000), 0, linear, None), 'few 2-d': (torch.randn(80, 200), 1, linear, None),
        'few 4-d': (torch.randn(5, 3, 25, 25), 1, linear, None), 'few weight': (torch.randn(30, 500), 0, log, None)}


# --- measuring ---

def units(a, axis): return a.shape[axis] if a.ndim > 1 else 1
def new_row(a, axis, bins, device): return empty_row(bins, units(a, axis), device)

def measured(a, axis, bins, other, device='cpu'):
    "The row of `a`, and if `a` is small (the interpreter takes its time) that of `a` measured twice."
    args = a.to(device), axis, new_row(a, axis, bins, device), bins, other if other is None else other.to(device)
    once = measure_cuda(*args).clone()
    return once, measure_cuda(*args) if a.numel() <= 200 else None

def measure_all(device='cpu'):
    res = {k: measured(*o, device=device) for k,o in inputs().items()}
    was = kernels._programs
    kernels._programs = 3
    for f in (kernels._tiles, kernels._scratch): f.cache_clear()
    res |= {k: measured(*o, device=device) for k,o in few_inputs().items()}
    kernels._programs = was
    for f in (kernels._tiles, kernels._scratch): f.cache_clear()
    return res


# --- what NumPy says ---

def as_numpy(a):
    a = a.detach()
    if a.is_complex(): a = a.abs()
    return a.numpy() if a.dtype == torch.float64 else a.float().numpy()

def histogram(x, b):
    bins, lo, hi, log = b.n, b.lo, b.hi, b.log
    m = np.abs(x).ravel()
    kind = m.dtype.type
    if log: edges = np.geomspace(lo, hi, bins+1).astype(np.float32).astype(kind); lo, hi = edges[0], edges[-1]
    lo, hi, per_bin = kind(lo), kind(hi), kind(bins/(hi-lo))
    inside = m[(m >= lo) & (m <= hi)]
    slot = np.searchsorted(edges, inside, 'right') - 1 if log else ((inside - lo)*per_bin).astype(int)
    counts = np.bincount(np.minimum(slot, bins-1), minlength=bins)
    return np.r_[counts, (m < lo).sum(), ((m > hi) & (m < np.inf)).sum(), np.isinf(m).sum(), np.isnan(m).sum()]

def lengths(x, axis, ndim):
    "The norms of the samples."
    x = np.where(np.isfinite(x), x, 0.)
    x = x.reshape(1, -1) if ndim == 0 or (ndim > 1 and axis == 0) else x.reshape(len(x), -1)
    return np.sqrt((x**2).sum(1))

def expected(a, axis, bins, other):
    "The row, and for each item what it may be off by."
    a32, x = as_numpy(a), as_numpy(a).astype(np.float64)
    fine = x[np.isfinite(x)]
    norms = lengths(x, axis, a.ndim)
    row = [x.size, np.isnan(x).sum(), (x == np.inf).sum(), (x == -np.inf).sum(), (x != 0).sum(),
           *((fine**k).sum() for k in (1, 2, 3, 4)), fine.min(initial=np.inf), fine.max(initial=-np.inf),
           norms.sum(), len(norms), 0, 0, 0]
    sizes = [0]*5 + [(np.abs(fine)**k).sum() for k in (1, 2, 3, 4)] + [0, 0, norms.sum(), 0, 0, 0, 0]
    if other is not None:
        y = as_numpy(other).astype(np.float64)
        both = (x*y)[np.isfinite(x) & np.isfinite(y)]
        row[13:15], sizes[13:15] = [both.sum(), (y[np.isfinite(y)]**2).sum()], [np.abs(both).sum(), (y[np.isfinite(y)]**2).sum()]
    by_unit = (np.moveaxis(x, axis, 0).reshape(units(a, axis), -1) if a.ndim > 1 else x.reshape(1, -1)) != 0
    rest = np.r_[histogram(a32, bins), by_unit.sum(1)]
    return np.r_[row, rest], np.r_[sizes, np.zeros(len(rest))]*1e-12

def check(name, o, found):
    once, twice = found[0].cpu(), found[1]
    row, off = expected(*o)
    bad = ~np.isclose(once.numpy(), row, rtol=0, atol=off)
    assert not bad.any(), f'{name}: items {np.flatnonzero(bad)}: {once[bad]}, not {row[bad]}'
    if twice is None: return
    twice, adds = twice.cpu(), [i for i in range(len(once)) if i not in (9, 10)]
    assert torch.equal(twice[adds], once[adds]*2) and torch.equal(twice[9:11], once[9:11])


# --- the tests ---

@pytest.fixture(scope='module')
def interpreted(tmp_path_factory):
    "All rows, by Triton's interpreter. The variable has to be there before Triton is imported."
    if not has_triton: pytest.skip('no Triton on this machine')
    path = tmp_path_factory.mktemp('cuda')/'rows.pt'
    here = os.path.dirname(os.path.abspath(__file__))
    env = {**os.environ, 'TRITON_INTERPRET': '1', 'CUDA_VISIBLE_DEVICES': '', 'PYTHONPATH': os.path.dirname(here)}
    res = subprocess.run([sys.executable, __file__, str(path)], cwd=here, env=env, capture_output=True, text=True)
    assert not res.returncode, res.stderr
    return torch.load(path)

names = [*inputs(), *few_inputs()]

@pytest.mark.parametrize('name', names)
def test_interpreted(interpreted, name): check(name, (inputs() | few_inputs())[name], interpreted[name])

def test_some_are_split():
    "So that all paths of the kernel are among the tests."
    plans = {k: kernels._tiles(unit_view(a.shape, axis)) for k,(a, axis, *_) in inputs().items()}
    assert plans['B,T,F split'][3] > 1 and plans['4-d split'][3] > 1 and plans['weight split'][3] > 1
    assert math.prod(plans['136 programs'][2:]) == 136 and plans['40 samples split'][3] > 1
    assert plans['1-d long'][2] > 1 and plans['2-d wide'][0]['BB'] > 1 and plans['2-d wide'][3] > 1

def test_empty():
    for shape in [(0,), (0, 3), (4, 0), (2, 3, 0)]:
        a = torch.zeros(shape)
        row = new_row(a, 1, linear, 'cpu')
        before = row.clone()
        assert torch.equal(measure_cuda(a, 1, row, linear), before)

@pytest.mark.parametrize('change, told', [
    (dict(row=torch.zeros(5, dtype=torch.float64)), r'float64 \[31\]'), (dict(row=torch.zeros(31)), 'float32'),
    (dict(row=torch.zeros(62, dtype=torch.float64)[::2]), 'contiguous')])
def test_mistakes(change, told):
    args = dict(a=torch.ones(2, 3), axis=1, row=torch.zeros(31, dtype=torch.float64), bins=linear) | change
    with pytest.raises(ValueError, match=told): measure_cuda(**args)

def test_imported_without_triton():
    code = "import sys; sys.modules['triton'] = None; import miniai.kernels, torch; miniai.kernels.measure_cuda(" \
           "torch.ones(0, 1), 1, torch.zeros(22, dtype=torch.float64), miniai.stats.Bins(1))"
    subprocess.run([sys.executable, '-c', code], check=True)

def test_triton_is_not_imported_early():
    code = "import miniai.kernels, sys; assert not [o for o in sys.modules if o.split('.')[0] == 'triton']"
    subprocess.run([sys.executable, '-c', code], check=True)

@pytest.mark.parametrize('shape', [(7,), (64, 10), (1, 3000), (8000, 2), (3, 1, 700), (64, 8, 28, 28), (2, 3, 600, 600)])
def test_plans(shape):
    "All of a tensor is in some tile, and the buffers are large enough."
    for axis in range(len(shape)):
        four = unit_view(shape, axis)
        assert math.prod(four) == math.prod(shape)
        sides, tiles, groups, parts = kernels._tiles(four)
        assert math.prod(sides.values()) == kernels._tile and groups*parts <= kernels._programs
        assert tiles == math.prod(-(-n//sides[k]) for n,k in zip(four[1:], ('BP', 'BC', 'BS')))
        assert parts == 1 or (four[0]*parts <= 16*kernels._programs and groups*sides['BB'] >= four[0])


# --- on a GPU ---

@pytest.mark.gpu
def test_gpu():
    "As interpreted; the same bits again; reading nothing, with deterministic algorithms asked for."
    pytest.importorskip('triton')
    torch.use_deterministic_algorithms(True)
    try: found, again = measure_all('cuda'), measure_all('cuda')
    finally: torch.use_deterministic_algorithms(False)
    for k,o in (inputs() | few_inputs()).items():
        check(k, o, found[k])
        assert torch.equal(found[k][0], again[k][0])

@pytest.mark.gpu
def test_gpu_large_and_unread():
    "Many programs at once, no reads, on two streams."
    pytest.importorskip('triton')
    torch.manual_seed(0)
    a = torch.randn(64, 33, 61, 59).relu()
    o, on_gpu = (a, 1, linear, None), a.cuda()
    rows = [new_row(a, 1, linear, 'cuda') for _ in range(20)]
    measure_cuda(on_gpu, 1, new_row(a, 1, linear, 'cuda'), linear)
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')
    try:
        for i,row in enumerate(rows):
            with torch.cuda.stream(streams[i%2]): measure_cuda(on_gpu, 1, row, linear)
    finally: torch.cuda.set_sync_debug_mode('default')
    torch.cuda.synchronize()
    for row in rows: assert torch.equal(row, rows[0])
    measure_cuda(on_gpu, 1, twice := rows[0].clone(), linear)
    check('large', o, (rows[0], twice))


if __name__ == '__main__':
    torch.use_deterministic_algorithms(True)
    torch.save(measure_all(), sys.argv[1])

def test_the_check_of_a_gpu_does_here_what_a_cpu_can(tmp_path):
    path = tmp_path/'gpu.json'
    parts = [o for nm in ('syncs', 'deterministic', 'bfloat16') for o in ('--part', nm)]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, str(root/'bench'/'gpu_check.py'), '--device', 'cpu', *parts, '--json', str(path)],
                          capture_output=True, text=True, timeout=300)
    found = json.loads(path.read_text())['parts']
    assert done.returncode == 0, found
    assert [found[o]['ok'] for o in ('syncs', 'deterministic', 'bfloat16')] == [None, True, True]   # the first needs a GPU
    assert 'GPU' in found['syncs']['why'] and found['bfloat16']['found']['last'] < found['bfloat16']['found']['first']
