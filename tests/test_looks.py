"Room 01_looks against plain PyTorch in float64: odd shapes and types, several steps in a buffer, absent tensors, buffers used again."
import pytest
import torch
from shared import CountReads
from torch import nn

from miniai.inspector import Inspector
from miniai.lens import Lens, OutputNorm, ParameterGradientGeometry
from miniai.looks import Look, OutputBuffer, Pool, PoolBuffer, PooledLook, dots, norms, unit_counts

# (shape, axis of the units): 0-d, 1-d, matrices longer and shorter than a row of a pool, convolutions, transposed ones, 3-d to 5-d
shapes = [((), 0), ((1,), 0), ((7,), 0), ((64,), 0), ((65,), 0), ((3, 64), 0), ((3, 65), 0), ((200, 3), 1), ((4, 3, 3, 3), 0),
          ((4, 5, 3, 3), 1), ((2, 6, 5), 1), ((2, 3, 2, 2, 2), 0), ((1, 1), 0)]


def oracle(a, before, axis):
    "Norm, cosine with the one before, share of entries and of dead units, each from one tensor in float64; NaN for a gap."
    nan = float('nan')
    if a is None: return [nan]*4
    a = a.double()
    rows = a.movedim(axis, 0).flatten(1) if a.ndim > 1 else a.reshape(-1, 1)
    norm, cosine = a.square().sum().sqrt(), nan
    if before is not None:
        both = norm*before.double().square().sum().sqrt()
        cosine = float((a*before.double()).sum()/both) if both > 0 else nan
    return [float(norm), cosine, float((a != 0).double().mean()), float((rows == 0).all(1).double().mean())]


def found(look, n):
    "[steps, n, 4]"
    return look.masked(torch.stack([look.norm, look.cosine, *look.activity()])).double().T.reshape(-1, n, 4)


def some_steps(n, dtype, absent=(), seed=0):
    g = torch.Generator().manual_seed(seed)
    def tensor(shape, axis):
        a = torch.randn(shape, generator=g)*(torch.rand(shape, generator=g) > .4)
        if len(shape) > 1: a.select(axis, 0).zero_()   # a dead unit
        return a.to(dtype)
    return [[None if (i, j) in absent else tensor(*o) for j, o in enumerate(shapes)] for i in range(n)]


def expected(steps):
    before = [[None]*len(shapes), *steps[:-1]]
    return torch.tensor([[oracle(a, b, axis) for a, b, (_, axis) in zip(now, old, shapes)] for now, old in zip(steps, before)],
                        dtype=torch.float64)


def same(got, wanted, dtype=torch.float32):
    torch.testing.assert_close(got, wanted, equal_nan=True, rtol=1e-10 if dtype == torch.float64 else 3e-5,
                               atol=1e-10 if dtype == torch.float64 else 3e-5)


def pool_of(tensors, **kw): return Pool(tensors, [axis for _, axis in shapes], **kw)


absences = pytest.mark.parametrize('absent', [(), {(1, 3), (4, 0), (4, 8), (5, 8)}, {(i, 9) for i in range(7)},
                                              {(2, j) for j in range(len(shapes))}],
                                   ids=['all there', 'some absent', 'one never there', 'a step without any'])


@absences
@pytest.mark.parametrize('capacity', [1, 2, 3, 32])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_steps_in_one_buffer(dtype, capacity, absent):
    "Seven steps, measured together as many as there is room for: the numbers of each tensor by itself."
    steps = some_steps(7, dtype, absent)
    buffer, parts = PoolBuffer(pool_of(some_steps(1, dtype)[0]), capacity), []
    for i, tensors in enumerate(steps):
        buffer.append(tensors)
        if len(buffer) == capacity or i == 6:
            parts.append(found(buffer.look(), len(shapes)))
            buffer.clear()
    same(torch.cat(parts), expected(steps), dtype)


@absences
def test_pooled_looks(absent):
    steps = some_steps(7, torch.float32, absent)
    pool, before, parts = pool_of(some_steps(1, torch.float32)[0]), None, []
    for tensors in steps:
        look = PooledLook(pool, tensors, before)
        parts.append(found(look, len(shapes)))
        look.before, before = None, look
    same(torch.cat(parts), expected(steps))


def test_not_by_unit():
    "The other layout of a pool, for gradients by outputs, says the same."
    steps = some_steps(3, torch.float32)
    buffer = PoolBuffer(pool_of(steps[0], by_unit=False), 3)
    for o in steps: buffer.append(o)
    same(found(buffer.look(), len(shapes)), expected(steps))


def test_one_wide_type_makes_all_wide():
    steps = some_steps(2, torch.float32)
    for o in steps: o[5] = o[5].double()
    buffer = PoolBuffer(pool_of(steps[0]), 2)
    for o in steps: buffer.append(o)
    same(found(buffer.look(), len(shapes)), expected(steps), torch.float64)


@pytest.mark.parametrize('shape,axis', shapes)
def test_stack(shape, axis):
    "The look at tensors of one shape."
    if not shape: shape = (1,)   # an inspector makes one entry of it
    g = torch.Generator().manual_seed(1)
    old, new = ([torch.randn(shape, generator=g)*(torch.rand(shape, generator=g) > .5) for _ in range(4)] for _ in range(2))
    new[2].zero_()
    before = Look(torch.stack(old), axis+1)
    same(found(Look(torch.stack(new), axis+1, before), 4)[0],
         torch.tensor([oracle(a, b, axis) for a, b in zip(new, old)], dtype=torch.float64))


def test_nan_and_infinity_stay_with_their_tensor():
    "A tensor that has diverged says so, of itself alone, and for as long as it has."
    steps = some_steps(4, torch.float32)
    steps[1][5][1, 0], steps[1][8][2, 0, 0, 0] = float('nan'), float('inf')
    buffer = PoolBuffer(pool_of(steps[0]), 4)
    for o in steps: buffer.append(o)
    got, wanted = found(buffer.look(), len(shapes)), expected(steps)
    assert got[1, 5, 0].isnan() and got[1, 8, 0].isinf()
    others = [j for j in range(len(shapes)) if j not in (5, 8)]
    same(got[:, others], wanted[:, others])
    same(got[3], wanted[3])
    same(got[1, [5, 8], 2:], wanted[1, [5, 8], 2:])   # neither is zero


def test_empty_tensors():
    "A parameter without entries beside others: its norm is 0, shares of nothing are gaps, and the others keep theirs."
    tensors = [torch.ones(3, 4), torch.empty(0, 4), torch.ones(2), torch.empty(3, 0)]
    buffer = PoolBuffer(Pool(tensors, [0, 0, 0, 0]), 2)
    for _ in range(2): buffer.append(tensors)
    got = found(buffer.look(), 4)
    assert got[1, [1, 3], 0].tolist() == [0, 0] and got[1, [1, 3]][:, 1:].isnan().all()
    same(got[1, [0, 2]], torch.tensor([[12**.5, 1, 1, 0], [2**.5, 1, 1, 0]], dtype=torch.float64))


def test_nothing_is_left_of_what_was_there_before():
    "A place that held a tensor and holds none now has neither its numbers nor a direction to compare with."
    buffer = PoolBuffer(Pool([torch.ones(70), torch.ones(2, 3)], [0, 0]), 2)
    ones = [torch.ones(70), torch.ones(2, 3)]
    parts = []
    for tensors in (ones, ones, [None, ones[1]], ones, [None, None], ones):
        buffer.append(tensors)
        if len(buffer) == 2:
            parts.append(found(buffer.look(), 2))
            buffer.clear()
    cosine = torch.cat(parts)[:, :, 1]
    assert cosine.isnan().tolist() == [[True, True], [False, False], [True, False], [True, False], [True, True], [True, True]]
    same(cosine[[1, 2, 3], 1], torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize('capacity', [1, 3])
@pytest.mark.parametrize('shape,axis', [((5, 6), 1), ((4, 3, 2, 2), 1), ((2, 3, 4), 2)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
def test_outputs(dtype, shape, axis, capacity):
    "Outputs of three layers over five steps, one layer left out now and then."
    g = torch.Generator().manual_seed(2)
    steps = [[torch.randn(shape, generator=g).relu().to(dtype) if (i + j) % 4 else None for j in range(3)] for i in range(5)]
    buffer, parts = OutputBuffer(torch.empty(shape, dtype=dtype), 3, axis, capacity), []
    for i, outputs in enumerate(steps):
        for j, a in enumerate(outputs):
            if a is not None: buffer.put(j, a)
        buffer.end_step()
        if len(buffer) == capacity or i == 4:
            parts.append(found(buffer.look(), 3))
            buffer.clear()
    same(torch.cat(parts), torch.tensor([[oracle(a, None, axis) for a in o] for o in steps], dtype=torch.float64), dtype)


def test_updates():
    "What steps have added: after minus before, with the norm of the parameter before."
    g = torch.Generator().manual_seed(3)
    p = [torch.randn(9, 3, generator=g), torch.randn(3, generator=g)]
    pool = Pool(p, [0, 0])
    start, after, deltas, norms_before = PoolBuffer(pool, 4, False), PoolBuffer(pool, 4), [], []
    for _ in range(4):
        old = [o.clone() for o in p]
        start.append(p)
        p = [o + .1*torch.randn(o.shape, generator=g) for o in p]
        after.append(p)
        deltas.append([a.double() - b.double() for a, b in zip(p, old)])
        norms_before.append([float(o.double().norm()) for o in old])
    look = after.look(start.look())
    same(look.norm.view(4, 2).double(), torch.tensor([[float(o.norm()) for o in d] for d in deltas], dtype=torch.float64))
    same(look.start.norm.view(4, 2).double(), torch.tensor(norms_before, dtype=torch.float64))
    wanted = [[oracle(a, b, 0)[1] for a, b in zip(*two)] for two in zip(deltas[1:], deltas)]
    same(look.cosine.view(4, 2)[1:].double(), torch.tensor(wanted, dtype=torch.float64))


@pytest.mark.parametrize('n', [1, 3])
def test_long_rows(n):
    "A float32 that has grown large takes in nothing small any more; sums of a million entries are right all the same."
    a = torch.full((n, 2**20 + 3), 1e-2)
    a[:, 0] = 1.
    torch.testing.assert_close(norms(a).double(), a.double().norm(dim=1), rtol=1e-5, atol=0)   # in one go: 4e-4
    torch.testing.assert_close(dots(a, a).double(), a.double().square().sum(1), rtol=1e-4, atol=0)


@pytest.mark.parametrize('shape,axis', [((3, 7), 1), ((2, 5, 9), 1), ((2, 5, 9), 2), ((2, 300, 40, 40), 1), ((2, 300, 40, 40), 3)])
def test_unit_counts(shape, axis):
    a = torch.randn(shape, generator=torch.Generator().manual_seed(4)).relu()
    others = [i for i in range(1, len(shape)) if i != axis]
    assert torch.equal(unit_counts(a, axis), (a != 0).sum(others).float() if others else (a != 0).float())


def test_masks_are_made_once():
    "One for each pattern of absences, not one in every step; nothing is read, and patterns without end don't fill the memory."
    pool = Pool([torch.ones(2)]*10, [0]*10)
    with CountReads() as reads:
        for _ in range(5):
            steps = [None, (False,) + (True,)*9]
            mask = pool.masks(steps)
    assert reads.reads == 0 and len(pool.masks.known) == 2
    assert mask.tolist() == [True]*10 + [False] + [True]*9
    for i in range(200): pool.masks([tuple(bool(i >> j & 1) for j in range(10))])
    assert len(pool.masks.known) <= 65


class Branches(nn.Module):
    "Uses its second branch in every other step."
    def __init__(self):
        super().__init__()
        self.a, self.b, self.step = nn.Linear(4, 4), nn.Linear(4, 4), 0

    def forward(self, x):
        self.step += 1
        return self.a(x).relu() + (self.b(x) if self.step % 2 else 0)


def fit(inspector, net, n_epochs=2):
    opt = torch.optim.SGD(net.parameters(), .1)
    with inspector.attach(net):
        for _ in inspector.range(n_epochs):
            for _ in range(6):
                opt.zero_grad(set_to_none=True)
                net(torch.randn(8, 4)).square().mean().backward()
                opt.step()
    return inspector


def test_what_was_not_there_has_no_row():
    "`inplace=False`: a step without a source gives it no row; those that it has are numbers, at the right steps."
    lenses = [OutputNorm(inplace=False, include=nn.Linear), ParameterGradientGeometry(inplace=False, parameters='weight')]
    inspector = fit(Inspector(lenses, visualizer=None), Branches())
    frame = inspector.frame()
    for source, stat in (('a', 'norm'), ('b', 'norm'), ('a.weight', 'grad_norm'), ('b.weight', 'grad_norm')):
        rows = frame[(frame.source == source) & (frame.stat == stat)]
        first = rows.step.iloc[0]
        assert [s - first for s in rows.step] == list(range(0, 12, 2 if source[0] == 'b' else 1)), (source, stat)
        assert rows.value.map(float).notna().all() and rows.epoch.nunique() == 2
        values = inspector.recording().values(source, stat, 'mean')
        means = rows.groupby('epoch').value.apply(lambda o: o.map(float).mean())
        assert values == pytest.approx(means.to_numpy(), rel=1e-5)


class Largest(Lens):
    tap, stats = 'grad', ('largest',)
    def measure(self, look): return look.norm.max()


def test_a_lens_that_gives_the_wrong_shape():
    "Is a gap, told once with what it gave and what it must give; other lenses keep their rows."
    inspector = Inspector([Largest(parameters='weight'), ParameterGradientGeometry(parameters='weight')], visualizer=None)
    with pytest.warns(UserWarning, match=r"measure gave \[\]; it must be a tensor \[1, \d+\], a row for each of \('largest',\)") as told:
        fit(inspector, Branches(), 3)
    assert len([o for o in told if 'largest' in str(o.message)]) == 1
    stats = set(inspector.frame().stat)
    assert 'grad_norm mean' in stats and not any('largest' in o for o in stats)
