"The row of sums: plain, compiled, and by float64 NumPy, the same; every statistic; what may go wrong around the compiler."
import math, os, shutil, subprocess, sys, threading, time
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from shared import CountReads

import miniai
from miniai import kernels
from miniai.collect import OutputTap, Sampler, Told
from miniai.kernels import add_to_row, compiled_loops, plan
from miniai.rows import Rows
from miniai.stats import (Bins, Sums, add_rows, empty_row, empty_rows, grad_bins, measure, output_bins, row_width, scalars,
                          statistics, unit_axis, unit_view, widen)

at = {nm: i for i,nm in enumerate(scalars)}
exact = [at[o] for o in ('n', 'nan', 'posinf', 'neginf', 'nonzero', 'min', 'max', 'samples')]
all_bins = output_bins, grad_bins, Bins(7, 1., 2.)
compiled = pytest.mark.skipif(compiled_loops() is None, reason='no numba')


# --- three ways to one row ---

def slots(m, bins):
    "Counts of absolute values, by the definition of the bins."
    kind = np.float64 if m.dtype == np.float64 and not bins.log else np.float32
    with np.errstate(all='ignore'): x = m.astype(kind)
    lo, hi, there = kind(bins.lo), kind(bins.hi), np.isfinite(m)
    inside = x[there & (x >= lo) & (x <= hi)]
    if bins.log: i = np.searchsorted(bins.edges, inside, 'right') - 1
    else: i = np.floor((inside - lo)*kind(bins.n/(bins.hi - bins.lo))).astype(int)
    outside = (x[there] < lo).sum(), (x[there] > hi).sum(), np.isinf(m).sum(), np.isnan(m).sum()
    return [*np.bincount(np.minimum(i, bins.n - 1), minlength=bins.n), *outside]

def by_numpy(a, axis, bins, other=None, start=None):
    "The row, and the size of what was added up in each entry of it."
    a, other, start = (None if o is None else o.numpy() for o in (a, other, start))
    if a.ndim < 2: a, other, start = (None if o is None else o.reshape(-1, 1) for o in (a, other, start))
    axis = axis % a.ndim if a.ndim > 1 else 1
    finite = np.isfinite(a)
    x = np.where(finite, a, 0).astype(np.float64)
    samples = a.shape[0] if axis else 1
    row = np.zeros(row_width(bins, a.shape[axis]))
    sizes = np.ones_like(row)
    row[:5] = a.size, np.isnan(a).sum(), (a == np.inf).sum(), (a == -np.inf).sum(), (a != 0).sum()
    row[5:9], sizes[5:9] = zip(*(((x**k).sum(), (abs(x)**k).sum()) for k in (1, 2, 3, 4)))
    row[9:13] = a[finite].min(initial=np.inf), a[finite].max(initial=-np.inf), np.sqrt((x**2).reshape(samples, -1).sum(1)).sum(), samples
    sizes[11] = row[11]
    if other is not None: row[13], row[14] = (a.astype(float)*other).sum(), (other.astype(float)**2).sum()
    if start is not None: row[15] = (start.astype(float)**2).sum()
    sizes[13:16] = abs(row[13]) + row[14] + row[6], row[14], row[15]
    row[16:16+len(bins)] = slots(abs(a), bins)
    row[16+len(bins):] = (np.moveaxis(a, axis, 0).reshape(a.shape[axis], -1) != 0).sum(1)
    return row, sizes

def assert_same(got, row, sizes, what):
    got = got.numpy()
    sharp = [*exact, *range(len(scalars), len(row))]
    assert (got[sharp] == row[sharp]).all(), (what, 'counts', got[sharp], row[sharp])
    with np.errstate(invalid='ignore'):   # of infinities
        assert (abs(got - row) <= 1e-9*sizes).all() or np.allclose(got, row, 1e-9, 0, equal_nan=True), (what, got[:16], row[:16])

def spoilt(a, *values):
    a = a.clone()
    for i,v in enumerate(values[:a.numel()]): a.view(-1)[-1-7*i % a.numel()] = v
    return a

contents = dict(normal=lambda a: a, nan=lambda a: spoilt(a, math.nan), inf=lambda a: spoilt(a, math.inf, -math.inf),
                all_inf=lambda a: a*0 + math.inf, tiny=lambda a: a*1e-30, huge=lambda a: a.clamp(-1, 1)*3e38, shifted=lambda a: a + 1e4,
                relu=lambda a: a.relu(), zero=lambda a: a*0, above=lambda a: a.abs() + 2e4)

def as_type(a, dtype): return torch.complex(a, a.flip(0) if a.ndim else a) if dtype == torch.complex64 else a.to(dtype)

def layouts(a, axis):
    "The same numbers as they may lie in memory."
    yield 'contiguous', a
    if a.ndim == 4 and axis == 1: yield 'channels last', a.to(memory_format=torch.channels_last)
    if a.ndim == 5 and axis == 1: yield 'channels last', a.to(memory_format=torch.channels_last_3d)
    if a.ndim > 1:
        yield 'transposed', a.transpose(0, -1).contiguous().transpose(0, -1)
        yield 'every second', a.repeat_interleave(2, -1)[..., ::2]

shapes = [((), 1), ((7,), 1), ((0, 4), 1), ((5, 3), 0), ((5, 3), 1), ((300, 10), 1), ((4, 5, 6), 2), ((4, 5, 6), -2), ((2, 3, 4, 5), 1),
          ((6, 4, 3, 3), 0), ((6, 4, 3, 3), 1), ((2, 3, 4, 3, 2), 1),
          ((5, 450, 4), 1), ((700, 13), 1), ((2, 700, 9), 2),     # above a piece: whole samples, whole blocks of one
          ((2, 2, 65, 66), 1), ((2, 4500), 0),                    # parts of one unit
          ((2, 4500), 1), ((2, 900, 5), 1), ((2, 2, 60, 40), 1)]  # some units of a block
dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2]

@pytest.mark.parametrize('dtype', dtypes, ids=str)
@pytest.mark.parametrize('shape,axis', shapes, ids=str)
def test_plain_compiled_and_numpy_agree(shape, axis, dtype):
    torch.manual_seed(1)
    noise, n_units = torch.randn(shape), unit_view(shape, axis)[2]
    for (kind,f),bins in product(contents.items(), all_bins):
        for layout,a in layouts(as_type(f(noise), dtype), axis):
            row = empty_row(bins, n_units)
            add_to_row(row, a, axis, bins)
            if not a.numel():
                assert torch.equal(row, empty_row(bins, n_units)) and torch.equal(row, measure(a, axis, bins))
                continue
            want = by_numpy(widen(a), axis, bins)
            assert_same(row, *want, (kind, layout, bins, 'compiled'))
            if layout == 'contiguous' or kind == 'inf': assert_same(measure(a, axis, bins), *want, (kind, layout, bins, 'plain'))

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize('shape,axis', [((), 1), ((6, 4), 0), ((5, 7, 3), 1), ((2, 4500), 1), ((3, 70, 90), 1), ((2, 4500), 0)], ids=str)
@pytest.mark.parametrize('kind', ['normal', 'nan', 'shifted', 'zero', 'huge'])
def test_pairs(shape, axis, dtype, kind):
    "The tensor before takes what was measured; what is subtracted is subtracted in float32, or float64."
    a, other, start = (as_type(o, dtype) for o in (contents[kind](torch.randn(shape)), torch.randn(shape), torch.randn(shape)))
    wide = [widen(o) for o in (a, other, start)]
    for with_start,counts in product((False, True), repeat=2):
        taken = wide[0] - wide[2] if with_start else wide[0]
        want = by_numpy(taken, axis, grad_bins, wide[1] if counts else None, wide[2] if with_start else None)
        row, before = empty_row(grad_bins, unit_view(shape, axis)[2]), other.clone()
        add_to_row(row, a, axis, grad_bins, before=before, counts=counts, start=start if with_start else None)
        plain = measure(a, axis, grad_bins, other if counts else None, start if with_start else None)
        for got in (row, plain): assert_same(got, *want, (kind, with_start, counts))
        torch.testing.assert_close(before, taken.to(dtype), rtol=0, atol=0, equal_nan=True)

def test_pairs_of_other_layouts():
    a, other, start = (torch.randn(4, 5, 6, 3) for _ in range(3))
    want = by_numpy(a - start, 1, grad_bins, other, start)
    for f,g in product((lambda o: o, lambda o: o.to(memory_format=torch.channels_last)), repeat=2):
        row, before = empty_row(grad_bins, 5), g(other.clone())
        add_to_row(row, f(a), 1, grad_bins, before=before, start=g(start))
        assert_same(row, *want, 'layouts')
        assert torch.equal(before, a - start)

def test_pairs_of_complex_numbers():
    "Their cosine is that of real and imaginary parts: turned round it is -1."
    z = torch.randn(5, 3, dtype=torch.complex64)
    row, before = empty_row(grad_bins, 5), torch.empty_like(z)
    add_to_row(row, z, 0, grad_bins, before=before, counts=False)
    add_to_row(row := empty_row(grad_bins, 5), -z, 0, grad_bins, before=before)
    assert statistics['correlation'](Sums.of(row, grad_bins))[0] == pytest.approx(-1) and torch.equal(before, -z)

def test_a_sparse_gradient():
    a = torch.randn(6, 4).relu()
    row = empty_row(grad_bins, 4)
    add_to_row(row, a.to_sparse(), 1, grad_bins)
    assert_same(row, *by_numpy(a, 1, grad_bins), 'sparse')

@pytest.mark.parametrize('shape,axis', [((10, 6), 1), ((9, 4, 5), 2), ((10, 3, 40, 41), 1), ((8, 5000), 1)], ids=str)
@pytest.mark.parametrize('kind', contents)
def test_parts_add_up_to_the_whole(shape, axis, kind):
    a = contents[kind](torch.randn(shape))
    n_units = unit_view(shape, axis)[2]
    row, apart, (want, sizes) = empty_row(output_bins, n_units), [], by_numpy(a, axis, output_bins)
    for part in a.split(3):
        add_to_row(row, part, axis)
        apart.append(measure(part, axis))
    total = apart[0]
    for o in apart[1:]: total = add_rows(total, o)
    for got in (row, total): assert_same(got, want, sizes, kind)
    assert np.array_equal(add_rows(apart[0].numpy(), apart[1].numpy()), add_rows(apart[0], apart[1]).numpy(), equal_nan=True)
    nothing = empty_rows(1, len(want))[0]
    assert torch.equal(add_rows(nothing, row), row)

@pytest.mark.parametrize('plain', [False, True])
def test_only_what_is_asked_for(plain, monkeypatch):
    if plain: monkeypatch.setattr(kernels, 'compiled_loops', lambda: None)
    a, first = torch.randn(9, 5).relu(), len(scalars) + len(output_bins)
    for what in range(8):
        row = empty_row(output_bins, 5)
        add_to_row(row, a, what=what)
        assert row[len(scalars):first].any() == bool(what & 1) and row[first:].any() == bool(what & 2)
        assert (row[at['norms']] > 0) == bool(what & 4) and row[at['nonzero']] == (a != 0).sum()
        s = Sums.of(row)
        assert np.isnan(statistics['sample_norm'](s)[0]) == (not what & 4) and np.isnan(statistics['death_rate'](s)[0]) == (not what & 2)
        add_to_row(row, a*torch.nan, what=what)
        assert row[len(scalars):first].any() == bool(what & 1)

def test_float64_beyond_float32_is_above_and_finite():
    a = torch.tensor([[1e39, 1., -1e300]], dtype=torch.float64)
    for bins in all_bins:
        row = empty_row(bins, 3)
        add_to_row(row, a, 1, bins)
        for got in (row, measure(a, 1, bins)):
            hist = got[len(scalars):len(scalars)+len(bins)]
            assert hist[bins.n:].tolist() == [0, 2, 0, 0] and got[at['posinf']] == 0

@compiled
def test_wide_layers_cost_no_more():
    "Units whose block is longer than a piece were once taken one by one, at a hundred times the price."
    def seconds(shape):
        a, row, found = torch.randn(shape), empty_row(output_bins, shape[1]), []
        for _ in range(5):
            began = time.perf_counter()
            add_to_row(row, a)
            found.append(time.perf_counter() - began)
        return min(found)/a.numel()
    assert seconds((32, 5000)) < 10*seconds((32, 4000))


# --- statistics ---

def moments(x, k):
    c = x - x.mean()
    return (c**k).mean()/(c**2).mean()**(k/2)

def per_sample(x): return np.sqrt((x.reshape(len(x), -1)**2).sum(1)).mean()
def finite_only(x, v): return v if np.isfinite(x).all() else np.nan
def edge(o): return lambda x: np.nan if np.isnan(x).any() else o(x)

references = dict(
    mean=np.mean, std=lambda x: finite_only(x, x.std(ddof=1)), skew=lambda x: finite_only(x, moments(x, 3)),
    kurtosis=lambda x: finite_only(x, moments(x, 4)), min=edge(np.min), max=edge(np.max), range=lambda x: [x.min(), x.max()],
    absmax=edge(lambda x: abs(x).max()), norm=lambda x: np.sqrt((x**2).sum()), rms=lambda x: np.sqrt((x**2).mean()),
    sample_norm=per_sample, sample_rms=lambda x: per_sample(x)/np.sqrt(x[0].size), activation_rate=lambda x: (x != 0).mean(),
    death_rate=lambda x: (np.moveaxis(x, 1, 0).reshape(x.shape[1], -1) == 0).all(1).mean(),
    near_zero=lambda x: (abs(x) < .25).sum()/(abs(x) <= 10).sum(), nan_fraction=lambda x: np.isnan(x).mean(),
    inf_fraction=lambda x: np.isinf(x).mean(), hist=lambda x: slots(abs(x).astype(np.float32), output_bins))
others = dict(median=.5, q10=.1, q90=.9, q99=.99), ('correlation', 'ratio', 'start_norm')

def test_a_reference_for_each():
    assert {nm for nm,o in statistics.items() if not o.own} == {*references, *others[0], *others[1]}

@pytest.mark.parametrize('name', references)
@pytest.mark.parametrize('kind', [*contents, 'both_inf', 'minus_inf', 'all_nan'])
@np.errstate(all='ignore')
def test_statistics_against_numpy(name, kind):
    more = dict(both_inf=lambda a: spoilt(a, math.inf, -math.inf, 1.), minus_inf=lambda a: a*0 - math.inf, all_nan=lambda a: a*math.nan)
    a = (contents | more)[kind](torch.randn(6, 5, 7))
    a[:, 2] = a[:, 2] if kind in ('all_inf', 'minus_inf', 'all_nan', 'above', 'shifted') else 0
    rows = torch.stack([measure(a), measure(torch.ones(3, 5, 2))])
    got, want = statistics[name](Sums.of(rows))[0], references[name](a.double().numpy())
    if (name, kind) in (('kurtosis', 'shifted'), ('kurtosis', 'above'), ('skew', 'above')):
        return np.testing.assert_equal(got, np.nan)   # its digits are gone: a gap
    far = kind in ('shifted', 'above')   # a mean of 10,000 or 20,000 deviations
    np.testing.assert_allclose(got, want, 1e-6 if far and name == 'std' else 1e-9, .01 if far and name == 'skew' else 1e-200)

def test_higher_moments_of_a_shifted_tensor():
    "Right, or a gap; constant tensors have none."
    x = torch.randn(1000, 10, dtype=torch.float64)
    for shift in (0, 1, 10, 100, 300, 1e3, 1e4, 1e6, 1e8):
        sums = Sums.of(measure(x + shift))
        for nm,k in (('skew', 3), ('kurtosis', 4)):
            got = statistics[nm](sums)[0]
            assert np.isnan(got) if shift > 1e5 else np.isnan(got) and shift > 300 or abs(got - moments(x.numpy(), k)) < .02, (nm, shift, got)
    for value in (.1, 3., 1e-20, -1e5):
        sums = Sums.of(measure(torch.full((50, 7), value)))
        assert np.isnan(statistics['skew'](sums)) and np.isnan(statistics['kurtosis'](sums)) and statistics['std'](sums) <= 1e-7*abs(value)

@pytest.mark.parametrize('name', others[0])
def test_quantiles_are_within_a_bin(name):
    x = torch.randn(400, 50)
    want = np.quantile(x.abs().numpy(), others[0][name])
    got, coarse = (statistics[name](Sums.of(measure(x, bins=b), b))[0] for b in (output_bins, grad_bins))
    assert abs(got - want) < .25 and want/2.2 < coarse < want*2.2
    assert np.isnan(statistics[name](Sums.of(measure(x*0, bins=grad_bins), grad_bins))[0])     # below the bins
    assert np.isnan(statistics['median'](Sums.of(measure(x + 99)))[0])      # above them

def test_statistics_of_pairs():
    a, other, start = (torch.randn(6, 4) for _ in range(3))
    sums = Sums.of(measure(a, 0, grad_bins, other, start), grad_bins)
    u, v, w = (o.double().numpy() for o in (a - start, other, start))
    assert statistics['correlation'](sums)[0] == pytest.approx((u*v).sum()/np.linalg.norm(u)/np.linalg.norm(v))
    assert statistics['ratio'](sums)[0] == pytest.approx(np.linalg.norm(u)/np.linalg.norm(w))
    assert statistics['start_norm'](sums)[0] == pytest.approx(np.linalg.norm(w))
    for o in (other*0, None): assert np.isnan(statistics['correlation'](Sums.of(measure(a, 0, grad_bins, o), grad_bins))[0])
    tiny = Sums.of(measure(a*1e-30, 0, grad_bins, a*2e-30), grad_bins)
    assert statistics['correlation'](tiny)[0] == pytest.approx(1)      # no eps: two small vectors of one direction

def test_an_empty_row_is_a_gap():
    sums = Sums.of(empty_row(output_bins, 3))
    for nm,f in statistics.items():
        if nm != 'hist': assert np.isnan(f(sums)).all(), nm

def test_half_precision_is_counted_in_full():
    ones = torch.ones(10, 1000, dtype=torch.bfloat16)
    row = empty_row(output_bins, 1000)
    add_to_row(row, ones)
    assert statistics['hist'](Sums.of(row))[0][4] == 10_000 and row[at['s1']] == 10_000

def test_a_scaled_loss_kills_nothing():
    grad = torch.randn(8, 5)*1e-30
    assert statistics['death_rate'](Sums.of(measure(grad, 0, grad_bins), grad_bins))[0] == 0

@pytest.mark.parametrize('net,x,axes', [
    (lambda: [nn.Conv1d(2, 8, 3), nn.ConstantPad1d(1, 0.), nn.ReLU()], (4, 2, 9), [1, 1, 1]),
    (lambda: [nn.Linear(5, 6), nn.ReLU(), nn.Dropout()], (4, 7, 5), [2, 2, 2]),
    (lambda: [nn.Embedding(9, 6), nn.Tanh()], None, [2, 2]), (lambda: [nn.ConvTranspose2d(2, 3, 3), nn.GELU()], (1, 2, 5, 5), [1, 1])])
def test_axis_is_inherited_where_the_type_says_nothing(net, x, axes):
    a, before, found = torch.zeros(2, 3, dtype=torch.long) if x is None else torch.randn(x), None, []
    for o in net():
        shape, a = a.shape, o(a)
        found.append(unit_axis(o, a.ndim, before if a.shape == shape else None))
        before = found[-1]
    assert found == axes


# --- nothing is read ---

def test_nothing_is_read_from_the_device(monkeypatch):
    for shape in ((), (7,), (5, 3), (2, 3, 4)):
        a = torch.empty(shape, device='meta')
        for bins in all_bins:
            row = measure(a, -1, bins, other=a, start=a)
            assert row.is_meta and row.shape == (row_width(bins, unit_view(shape, -1)[2]),)
            add_to_row(row, a, -1, bins, before=a)
    monkeypatch.setattr(kernels, 'compiled_loops', lambda: None)
    with CountReads() as counter: add_to_row(empty_row(grad_bins, 3), torch.randn(5, 3), 1, grad_bins, before=torch.randn(5, 3), start=torch.ones(5, 3))
    assert counter.reads == 0

def test_what_has_no_memory_is_not_read():
    assert not kernels.readable(torch._efficientzerotensor(2, 3))
    row = empty_row(output_bins, 3)
    add_to_row(row, torch._efficientzerotensor(2, 3))
    assert row[at['n']] == 6 and row[at['nonzero']] == 0
    rows, relu = Rows(), nn.ReLU()
    tap = OutputTap(rows, Sampler(), Told('test'))
    tap.attach([('relu', relu)])
    tap.listen(True)
    for a in (torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 3, device='meta')):   # of one shape
        rows.open('train', 0, 0, 0, new=True)
        tap.begin()
        relu(a)
        tap.end()
    tap.detach()
    assert rows.cells['relu'].rows.device.type == 'meta' and next(iter(rows.chunks['train', 'relu'])).arrays[0][:, at['n']].tolist() == [6, 6]

def test_in_inference_mode():
    with torch.inference_mode():
        row, a = empty_row(output_bins, 3), torch.randn(4, 3)
        add_to_row(row, a)
    add_to_row(row, a)
    assert row[0] == 24


# --- around the compiler ---

def some_rows():
    "Rows of a few tensors, for comparison between processes."
    gen, res = torch.Generator().manual_seed(5), []
    for (shape,axis),bins in product([((), 1), ((30, 7), 1), ((2, 3, 9, 8), 1), ((3, 5000), 1), ((6, 4), 0)], all_bins):
        a, before, start = (torch.randn(shape, generator=gen) for _ in range(3))
        a = spoilt(a, math.nan, math.inf) if a.ndim == 4 else a
        row = empty_row(bins, unit_view(shape, axis)[2])
        add_to_row(row, a, axis, bins), add_to_row(row, a.bfloat16(), axis, bins)
        add_to_row(row, a, axis, bins, before=before, start=start), add_to_row(row, a, axis, bins, before=before)
        res.append(row)
    return torch.cat(res)

def assert_close(one, two): torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9, equal_nan=True)

def test_without_the_loops(monkeypatch):
    want = some_rows()
    monkeypatch.setattr(kernels, 'compiled_loops', lambda: None)
    assert_close(some_rows(), want)

def in_a_process(before, tmp_path, **env):
    "The rows of a fresh process that first runs `before`, and what it says of its speed."
    code = f'import sys, torch; sys.path[:0] = {[str(Path(__file__).parent), str(tmp_path)]}; torch.set_num_threads(1); {before}\n' \
           'import test_sums; torch.save(test_sums.some_rows(), "rows.pt"); print(test_sums.kernels.slow_reason)'
    run = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True, env=os.environ | env, timeout=300)
    assert run.returncode == 0, run.stderr
    return torch.load(tmp_path/'rows.pt'), run.stdout

def test_without_numba(tmp_path):
    rows, said = in_a_process('sys.modules["numba"] = None', tmp_path)
    assert_close(rows, some_rows())
    assert 'numba' in said and 'Error' in said

def test_a_cache_that_cannot_be_written(tmp_path):
    "An install folder, a home and a cache folder in which nothing can be made; root could write anywhere but into a file."
    package = tmp_path/'miniai'
    shutil.copytree(Path(miniai.__file__).parent, package, ignore=shutil.ignore_patterns('__pycache__'))
    (package/'__pycache__').write_text('')
    nowhere = str(package/'__pycache__'/'none')
    rows, said = in_a_process('import miniai; assert miniai.__file__.startswith(sys.path[1])',
                              tmp_path, NUMBA_CACHE_DIR=nowhere, HOME=nowhere, XDG_CACHE_HOME=nowhere, PYTHONDONTWRITEBYTECODE='1')
    assert_close(rows, some_rows())
    assert said.strip() == '{}'   # compiled all the same

def collated(batch):
    "What a worker does: measure, too."
    a = torch.stack(batch)
    row = empty_row(output_bins, a.shape[1])
    add_to_row(row, a)
    return a, row

@compiled
def test_beside_forked_workers():
    data, total = torch.randn(40, 6), empty_row(output_bins, 6)
    some_rows()   # compiled before the fork
    for a,row in DataLoader(data, 8, num_workers=2, collate_fn=collated, multiprocessing_context='fork'):
        mine = empty_row(output_bins, 6)
        add_to_row(mine, a), add_to_row(total, a)
        assert torch.equal(mine, row)
    assert_same(total, *by_numpy(data, 1, output_bins), 'all')

@compiled
def test_two_threads_at_once():
    "Compiled loops let go of the interpreter; each call has its own work space, and plans of new bins are made once."
    many = [Bins(5, 0., 1. + i) for i in range(200)]
    xs, found = [torch.randn(64, 300) + i for i in range(2)], {}
    def work(k): found[k] = [add(xs[k], b) for b in many]
    def add(a, bins):
        row = empty_row(bins, 300)
        add_to_row(row, a, 1, bins)
        return row
    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for o in threads: o.start()
    for o in threads: o.join()
    for k in range(2): assert all(torch.equal(row, add(xs[k], b)) for row,b in zip(found[k], many))
    addresses = {plan(b, torch.float32).address for b in many}
    assert len(addresses) == 200 and addresses == {plan(b, torch.float32).address for b in many}


@compiled
@pytest.mark.parametrize('bins', [Bins(1700, 1e-3, 1e3, True), Bins(1, 1e-12, 1e4, True), Bins(53, 2.**-40, 2.**13, True)], ids=str)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_borders_of_logarithmic_bins_count_as_defined(bins, dtype):
    "Many bins, one, and borders that are powers of two; entries at borders, and next to them, and negative ones."
    e = torch.from_numpy(bins.edges)
    a = torch.cat([e, e.nextafter(torch.tensor(0.)), -e.nextafter(torch.tensor(torch.inf)), torch.zeros(3), torch.rand(5000)*2]).to(dtype)[:, None]
    row = empty_row(bins, 1)
    add_to_row(row, a, 1, bins)
    first = len(scalars)
    assert torch.equal(row[first:first+len(bins)], measure(a, 1, bins)[first:first+len(bins)])


def test_bins_that_the_upper_bits_do_not_tell_apart_are_refused():
    with pytest.raises(ValueError, match='give wider bins'): Bins(2000, 1e-3, 1e3, True)


def test_what_waits_for_a_flush_may_empty_the_rows():
    "A gradient that waits has another number of units than those before it: its source gets another cell."
    rows = Rows('output_grad')
    def add(step, units):
        add_to_row(rows.cell('x', units).rows[rows.i], torch.full((2, units), float(step)), 1, rows.bins)
    def late():
        rows.settle = lambda: None
        add(3, 5)
    for i in range(4):
        rows.open('train', 0, i, 0, 2)
        if i < 3: add(i, 3)
    rows.settle = late
    rows.flush().close()
    facts, means = rows.flush().series('train', 'x', 'output_grad_mean')
    assert facts[:, 1].tolist() == means.tolist() == [0, 1, 2, 3]
