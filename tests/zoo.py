"""Healthy trainings of many kinds, small and seeded, each written as its users write it and watched through one of the two doors.

`zoo` has them by name; each gives a `Run`: what watched it, and a number of the task (loss or error) before and after training."""
import copy, math
from functools import cache, partial
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn, optim

import miniai.diagnose, miniai.watch  # noqa: F401  (they give the doors `diagnose` and `watch`)
from miniai.datasets import DataLoaders, fashion_mnist
from miniai.inspector import Inspector
from miniai.learner import Learner, MetricsCB, TrainCB, TrainLearner
from miniai.sgd import OneCycleCB

zoo = {}


class Run(NamedTuple):
    watched:object
    before:float
    after:float
    most:float = .7   # of `before`, that may be left


def run(f):
    "Decorator: one of the zoo."
    zoo[f.__name__] = f
    return f


def mean(values): return float(torch.stack([torch.as_tensor(o, dtype=torch.float32) for o in values]).mean())


def fitted(model, data, loss, lr, opt, epochs=4, valid=None, cbs=(), most=.7, **kw):
    "Through a Learner."
    learn = TrainLearner(model, SimpleNamespace(train=data, valid=valid or data[:2]), loss, lr, cbs=[*cbs], opt_func=opt)
    learn.watch(every=1)
    learn.fit(epochs, valid=valid is not None, **kw)
    losses = learn.history.series('batch', 'loss', 'train').values
    n = len(data)
    return Run(learn, float(losses[:max(3, n//8)].mean()), float(losses[-n:].mean()), most)


def looped(model, data, loss_fn, opt, epochs=4, valid=None, each=None, end=None, most=.7, answers=lambda model, batch: (model(*batch[:-1]), batch[-1])):
    "Through a loop by hand; `each` is called before a step, `end` after an epoch."
    inspector, losses = Inspector().attach(model, optimizer=opt, loss_fn=loss_fn), []
    for _ in inspector.range(epochs):
        model.train()
        for batch in data:
            opt.zero_grad()
            loss = loss_fn(*answers(model, batch))
            loss.backward()
            if each: each()
            opt.step()
            losses.append(loss.item())
        if valid:
            model.eval()
            with torch.no_grad():
                for batch in valid: loss_fn(*answers(model, batch))
        if end: end()
    return Run(inspector.detach(), mean(losses[:3]), mean(losses[-len(data):]), most)


def pushed(model, data, loss_of, opts, epochs=4, most=.7, end=None, clip=None):
    "Through a loop by hand whose loss is a function of model and batch."
    opts = opts if isinstance(opts, list) else [opts]
    inspector, losses = Inspector().attach(model, optimizer=opts[0] if len(opts) == 1 else None), []
    for _ in inspector.range(epochs):
        for batch in data:
            loss = loss_of(model, batch)
            for o in opts: o.zero_grad()
            loss.backward()
            if clip: nn.utils.clip_grad_norm_(model.parameters(), clip)
            for o in opts: o.step()
            inspector.push_loss(loss.detach(), train=True)
            losses.append(loss.item())
            if end: end()
    return Run(inspector.detach(), mean(losses[:3]), mean(losses[-len(data):]), most)


# --- data

def batches(*parts, bs=32): return list(zip(*(o.split(bs) for o in parts)))


@cache
def fashion():
    "The small Fashion-MNIST, halved in size: images [N, 1, 14, 14] of mean 0 and deviation 1, and classes."
    dls = DataLoaders.in_memory(fashion_mnist('small'), batch_size=6000)
    torch.manual_seed(0)
    x, y = next(iter(dls.train))
    x = F.avg_pool2d(x, 2)
    return (x - x.mean())/x.std(), y


def images(n=1024, bs=64, start=0):
    x, y = fashion()
    return batches(x[start:start+n], y[start:start+n], bs=bs)


def gaussian(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
def integers(high, *shape, seed=0): return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


@cache
def table(n=768, k=10):
    "Columns of mean 0 and deviation 1, and a smooth function of them, scaled, with a little noise."
    x = gaussian(n, k)
    y = x[:, 0] + (2*x[:, 1]).sin() + x[:, 2]*x[:, 3] + .1*gaussian(n, seed=1)
    return x, ((y - y.mean())/y.std())[:, None]


def mlp(*sizes, act=nn.ReLU):
    layers = [o for a, b in zip(sizes, sizes[1:]) for o in (nn.Linear(a, b), act())]
    return nn.Sequential(*layers[:-1])


def cnn(norm=None, act=nn.ReLU, out=10):
    layers = []
    for a, b in ((1, 8), (8, 16), (16, 32)): layers += [nn.Conv2d(a, b, 3, 2, 1), *([norm(b)] if norm else []), act()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, out))


class Lambda(nn.Module):
    def __init__(self, f): super().__init__(); self.f = f
    def forward(self, *args): return self.f(*args)


# --- images

@run
def image_mlp(): return fitted(nn.Sequential(nn.Flatten(), mlp(196, 64, 32, 10)), images(), F.cross_entropy, 2e-3, optim.Adam, valid=images(256, start=2000))


@run
def image_cnn_learner(): return fitted(cnn(), images(), nn.CrossEntropyLoss(), .1, partial(optim.SGD, momentum=.9), valid=images(256, start=2000))


@run
def image_cnn_batchnorm():
    model = cnn(nn.BatchNorm2d)
    return looped(model, images(), nn.CrossEntropyLoss(), optim.AdamW(model.parameters(), 3e-3, weight_decay=.01), valid=images(256, start=2000))


class Residual(nn.Module):
    def __init__(self, a, b, stride):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU(), nn.Conv2d(b, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b))
        self.short = nn.Sequential(nn.Conv2d(a, b, 1, stride, bias=False), nn.BatchNorm2d(b)) if stride > 1 else nn.Identity()
    def forward(self, x): return F.relu(self.body(x) + self.short(x))


def resnet(): return nn.Sequential(nn.Conv2d(1, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), Residual(8, 8, 1), Residual(8, 16, 2), Residual(16, 32, 2),
                                   nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


@run
def image_resnet_one_cycle(): return fitted(resnet(), images(), F.cross_entropy, .01, optim.AdamW, epochs=3, cbs=[OneCycleCB()])


@run
def image_depthwise_hardswish():
    block = lambda a, b: [nn.Conv2d(a, a, 3, 2, 1, groups=a, bias=False), nn.BatchNorm2d(a), nn.Hardswish(), nn.Conv2d(a, b, 1, bias=False), nn.BatchNorm2d(b), nn.Hardswish()]
    model = nn.Sequential(nn.Conv2d(1, 16, 3, 1, 1), *block(16, 32), *block(32, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(.1), nn.Linear(64, 10))
    return looped(model, images(), nn.CrossEntropyLoss(), optim.RMSprop(model.parameters(), 2e-3))


class ViT(nn.Module):
    def __init__(self, d=32, depth=1):
        super().__init__()
        self.patch, self.cls = nn.Conv2d(1, d, 2, 2), nn.Parameter(torch.zeros(1, 1, d))
        self.place = nn.Parameter(torch.randn(1, 50, d)*.02)
        layer = nn.TransformerEncoderLayer(d, 4, 64, .1, 'gelu', batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, 10)
    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.place
        return self.head(self.norm(self.body(x)[:, 0]))


@run
def image_vit():
    model, n = ViT(), 12*5
    opt = optim.AdamW(model.parameters(), 3e-3, weight_decay=.05)
    sched = optim.lr_scheduler.LambdaLR(opt, lambda i: min(1, (i+1)/10)*.5*(1 + math.cos(math.pi*i/n)))
    return looped(model, images(768), nn.CrossEntropyLoss(), opt, epochs=5, each=sched.step, most=.8)


class Mixer(nn.Module):
    def __init__(self, tokens, d):
        super().__init__()
        self.norms, self.mix, self.feed = nn.ModuleList([nn.LayerNorm(d), nn.LayerNorm(d)]), mlp(tokens, 32, tokens, act=nn.GELU), mlp(d, 64, d, act=nn.GELU)
    def forward(self, x):
        x = x + self.mix(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        return x + self.feed(self.norms[1](x))


@run
def image_mlp_mixer():
    model = nn.Sequential(nn.Conv2d(1, 32, 2, 2), nn.Flatten(2), Lambda(lambda x: x.transpose(1, 2)), Mixer(49, 32), nn.LayerNorm(32), Lambda(lambda x: x.mean(1)), nn.Linear(32, 10))
    return looped(model, images(), nn.CrossEntropyLoss(), optim.AdamW(model.parameters(), 3e-3))


@run
def image_autoencoder():
    x = fashion()[0][:1024]
    x = (x - x.min())/(x.max() - x.min())
    model = nn.Sequential(nn.Flatten(), mlp(196, 64, 16, 64, 196), nn.Sigmoid(), nn.Unflatten(1, (1, 14, 14)))
    return looped(model, batches(x, x, bs=64), nn.MSELoss(), optim.Adam(model.parameters(), 3e-3), epochs=6)


class VAE(nn.Module):
    def __init__(self): super().__init__(); self.enc, self.dec = mlp(196, 64, 16), mlp(8, 64, 196)
    def forward(self, x):
        mu, logvar = self.enc(x.flatten(1)).chunk(2, 1)
        return self.dec(mu + torch.randn_like(mu)*(.5*logvar).exp()), mu, logvar


def elbo(model, batch):
    x, = batch
    out, mu, logvar = model(x)
    rec = F.binary_cross_entropy_with_logits(out, x.flatten(1), reduction='none').sum(1).mean()
    return rec - .5*(1 + logvar - mu**2 - logvar.exp()).sum(1).mean()


@run
def image_vae():
    x = fashion()[0][:1024]
    model = VAE()
    return pushed(model, batches((x - x.min())/(x.max() - x.min()), bs=64), elbo, optim.Adam(model.parameters(), 3e-3), epochs=6)


class Noise(nn.Module):
    "Predicts the noise in an image, given how much of it there is."
    def __init__(self):
        super().__init__()
        self.time, self.down, self.mid, self.up = mlp(1, 16, 16, act=nn.SiLU), nn.Conv2d(1, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 1, 1), nn.ConvTranspose2d(16, 16, 2, 2)
        self.out = nn.Conv2d(17, 1, 3, 1, 1)
    def forward(self, x, t):
        h = F.silu(self.down(x)) + self.time(t)[:, :, None, None]
        h = F.silu(self.up(F.silu(self.mid(h)) + h))
        return self.out(torch.cat([h, x], 1))


@run
def image_denoising_diffusion():
    def loss_of(model, batch):
        x, = batch
        t, eps = torch.rand(len(x), 1), torch.randn_like(x)
        a = (t*math.pi/2).cos()[:, :, None, None]
        return F.mse_loss(model(a*x + (1 - a**2).sqrt()*eps, t), eps)
    model = Noise()
    return pushed(model, batches(fashion()[0][:1024], bs=32), loss_of, optim.AdamW(model.parameters(), 3e-3), epochs=4, clip=1.)


class UNet(nn.Module):
    def __init__(self, out=2):
        super().__init__()
        block = lambda a, b: nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU())
        self.a, self.b, self.c, self.head = block(1, 8), block(8, 16), block(24, 8), nn.Conv2d(8, out, 1)
    def forward(self, x):
        a = self.a(x)
        b = F.interpolate(self.b(F.max_pool2d(a, 2)), scale_factor=2)
        return self.head(self.c(torch.cat([a, b], 1)))


def squares(n=512, size=16):
    "Images of noise with a bright square, and where that is."
    y, x = torch.zeros(n, size, size, dtype=torch.long), gaussian(n, 1, size, size)*.7
    for i, (r, c) in enumerate(integers(size-6, n, 2).tolist()): y[i, r:r+6, c:c+6] = 1
    return (x + y[:, None]).sub(.1), y


@run
def segmentation_unet():
    model = UNet()
    return looped(model, batches(*squares()), nn.CrossEntropyLoss(), optim.Adam(model.parameters(), 3e-3), most=.6)


class Dice(nn.Module):
    def forward(self, out, y):
        p, y = out.sigmoid().flatten(1), y.float().flatten(1)
        return (1 - (2*(p*y).sum(1) + 1)/(p.sum(1) + y.sum(1) + 1)).mean()


@run
def segmentation_dice():
    model = UNet(1)
    return looped(model, batches(*squares(320)), Dice(), optim.Adam(model.parameters(), .01), epochs=6, most=.6)


@run
def gan_on_a_ring():
    "The generator's samples come to the ring."
    a = torch.rand(60*64)*6.28
    data = batches(torch.stack([a.cos(), a.sin()], 1) + .05*gaussian(len(a), 2), bs=64)
    model = nn.ModuleDict(dict(gen=nn.Sequential(nn.Linear(4, 32), nn.LeakyReLU(.2), nn.Linear(32, 32), nn.LeakyReLU(.2), nn.Linear(32, 2)),
                               dis=nn.Sequential(nn.Linear(2, 32), nn.LeakyReLU(.2), nn.Linear(32, 32), nn.LeakyReLU(.2), nn.Linear(32, 1))))
    gen, dis, loss_fn = model['gen'], model['dis'], nn.BCEWithLogitsLoss()
    g_opt, d_opt = (optim.Adam(o.parameters(), 2e-3, betas=(.5, .99)) for o in (gen, dis))
    off = lambda: float((gen(torch.randn(256, 4)).norm(dim=1) - 1).abs().mean())
    inspector, before = Inspector().attach(model, loss_fn=loss_fn), off()
    for _ in inspector.range(3):
        for x, in data:
            one, fake = torch.ones(len(x), 1), gen(torch.randn(len(x), 4))
            d_opt.zero_grad()
            (loss_fn(dis(x), one) + loss_fn(dis(fake.detach()), 0*one)).backward()
            d_opt.step()
            g_opt.zero_grad()
            loss_fn(dis(fake), one).backward()
            g_opt.step()
    return Run(inspector.detach(), before, off())


# --- representations

def views(x): return x + .3*torch.randn_like(x)


class NTXent(nn.Module):
    def forward(self, a, b):
        z = F.normalize(torch.cat([a, b]), dim=1)
        sim = (z @ z.T/.2).masked_fill(torch.eye(len(z)).bool(), -1e9)
        return F.cross_entropy(sim, (torch.arange(len(z)) + len(a)) % len(z))


@run
def contrastive_simclr():
    model = nn.Sequential(cnn(nn.BatchNorm2d, out=32), nn.ReLU(), nn.Linear(32, 16))
    data = batches(fashion()[0][:1024], bs=64)
    return looped(model, data, NTXent(), optim.Adam(model.parameters(), 2e-3), epochs=4,
                  answers=lambda model, batch: model(torch.cat([views(batch[0]), views(batch[0])])).chunk(2))


@run
def contrastive_of_two_towers():
    "Like CLIP: pairs of two kinds of inputs."
    z = gaussian(1024, 8)
    a, b = (z @ gaussian(8, 20, seed=i)/3 + .1*gaussian(1024, 20, seed=i+5) for i in (1, 2))
    class Towers(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b, self.scale = mlp(20, 32, 16), mlp(20, 32, 16), nn.Parameter(torch.tensor(math.log(10.)))
        def forward(self, a, b): return self.scale.exp()*F.normalize(self.a(a), dim=1) @ F.normalize(self.b(b), dim=1).T
    def loss_of(model, batch):
        sim, y = model(*batch), torch.arange(len(batch[0]))
        return (F.cross_entropy(sim, y) + F.cross_entropy(sim.T, y))/2
    model = Towers()
    return pushed(model, batches(a, b, bs=64), loss_of, optim.AdamW(model.parameters(), 3e-3), epochs=5)


@run
def metric_learning_triplet():
    x, y = fashion()[0][:1500], fashion()[1][:1500]
    by = [x[y == c] for c in range(10)]
    torch.manual_seed(1)
    def three():
        c, d = torch.randperm(10)[:2].tolist()
        i, j, k = torch.randint(50, (3,)).tolist()
        return by[c][i], by[c][j], by[d][k]
    data = [tuple(map(torch.stack, zip(*(three() for _ in range(32))))) for _ in range(25)]
    model = nn.Sequential(nn.Flatten(), mlp(196, 64, 16))
    return looped(model, data, nn.TripletMarginLoss(1.), optim.Adam(model.parameters(), 1e-3), answers=lambda model, batch: map(model, batch), most=.5)


@run
def metric_learning_siamese():
    "Pairs: alike or not, by the distance of embeddings."
    x, y = fashion()[0][:1536], fashion()[1][:1536]
    j = torch.arange(len(x)).roll(1)
    for i in range(0, len(x), 2): j[i] = next((k for k in range(i+1, len(x)) if y[k] == y[i]), i-1)
    same = (y == y[j]).float()
    model = nn.Sequential(nn.Flatten(), mlp(196, 64, 8))
    def loss_of(model, batch):
        d = (model(batch[0]) - model(batch[1])).norm(dim=1)
        return (batch[2]*d**2 + (1 - batch[2])*(1 - d).relu()**2).mean()
    return pushed(model, batches(x, x[j], same, bs=64), loss_of, optim.Adam(model.parameters(), 1e-3), epochs=5)


class MoveAway(nn.Module):
    "VICReg: views alike, deviations of 1, no correlation."
    def forward(self, a, b):
        def spread(z):
            c = (z - z.mean(0)).T @ (z - z.mean(0))/(len(z) - 1)
            return (1 - (z.var(0) + 1e-4).sqrt()).relu().mean() + .04*(c - c.diag().diag()).pow(2).sum()/len(c)
        return 5*F.mse_loss(a, b) + 5*(spread(a) + spread(b))


@run
def self_supervised_vicreg():
    model = nn.Sequential(nn.Flatten(), nn.Linear(196, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 16))
    return looped(model, batches(fashion()[0][:1024], bs=64), MoveAway(), optim.Adam(model.parameters(), 2e-3), epochs=5,
                  answers=lambda model, batch: (model(views(batch[0])), model(views(batch[0]))))


# --- sequences

@cache
def waves(n=768, length=48):
    "Noisy waves of four frequencies, and which."
    y, t = integers(4, n), torch.arange(length)/length
    x = (2*math.pi*(2 + 2*y[:, None])*t + 6.28*torch.rand(n, 1, generator=torch.Generator().manual_seed(1))).sin() + .3*gaussian(n, length)
    return x, y


@run
def series_conv1d():
    model = nn.Sequential(nn.Unflatten(1, (1, 48)), nn.Conv1d(1, 16, 5, 2, 2), nn.ReLU(), nn.Conv1d(16, 32, 5, 2, 2), nn.ReLU(), nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Linear(32, 4))
    return fitted(model, batches(*waves())[3:], F.cross_entropy, 3e-3, optim.Adam, valid=batches(*waves())[:3])


@run
def series_dilated_convolutions():
    block = lambda d: [nn.Conv1d(16, 16, 3, padding=d, dilation=d), nn.BatchNorm1d(16), nn.GELU()]
    model = nn.Sequential(nn.Unflatten(1, (1, 48)), nn.Conv1d(1, 16, 1), *block(1), *block(2), *block(4), nn.Flatten(), nn.Linear(16*48, 4))
    return looped(model, batches(*waves()), nn.CrossEntropyLoss(), optim.Adam(model.parameters(), 2e-3), epochs=3)


class LastOf(nn.Module):
    def __init__(self, rnn, head): super().__init__(); self.rnn, self.head = rnn, head
    def forward(self, x): return self.head(self.rnn(x)[0][:, -1])


@run
def series_lstm():
    model = LastOf(nn.LSTM(4, 32, batch_first=True), nn.Linear(32, 4))
    x, y = waves()
    return looped(model, batches(x.reshape(-1, 12, 4), y), nn.CrossEntropyLoss(), optim.Adam(model.parameters(), .01), epochs=4)


@run
def series_gru_forecast():
    "The next value of a wave."
    x, _ = waves(640, 25)
    model = LastOf(nn.GRU(1, 24, batch_first=True), nn.Linear(24, 1))
    return fitted(model, batches(x[:, :24, None], x[:, 24:]), nn.MSELoss(), .01, optim.Adam, epochs=4)


@run
def series_tanh_rnn():
    "The sum of a short sequence."
    x = gaussian(768, 6, 1)
    model = LastOf(nn.RNN(1, 24, batch_first=True), nn.Linear(24, 1))
    return looped(model, batches(x, x.sum(1)/6**.5), nn.MSELoss(), optim.Adam(model.parameters(), 5e-3), epochs=4, each=lambda: nn.utils.clip_grad_norm_(model.parameters(), 1.))


@run
def series_bidirectional_tagger():
    "Each token's class depends on the one before; padded positions are left out."
    x = integers(12, 640, 10) + 1
    y = (x + F.pad(x, (1, 0))[:, :-1]) % 3
    length = integers(6, 640, seed=2) + 5
    pad = torch.arange(10)[None] >= length[:, None]
    x, y = x.masked_fill(pad, 0), y.masked_fill(pad, -100)
    class Tagger(nn.Module):
        def __init__(self): super().__init__(); self.emb, self.rnn, self.head = nn.Embedding(13, 16, padding_idx=0), nn.LSTM(16, 24, batch_first=True, bidirectional=True), nn.Linear(48, 3)
        def forward(self, x): return self.head(self.rnn(self.emb(x))[0]).transpose(1, 2)
    model = Tagger()
    return looped(model, batches(x, y), nn.CrossEntropyLoss(ignore_index=-100), optim.Adam(model.parameters(), .01), epochs=5)


class Encoder(nn.Module):
    "A transformer that classifies by the mean of its tokens."
    def __init__(self, norm_first, d=24, out=4):
        super().__init__()
        self.emb, self.place = nn.Embedding(20, d), nn.Parameter(torch.randn(1, 8, d)*.1)
        self.body = nn.TransformerEncoder(nn.TransformerEncoderLayer(d, 2, 48, .1, batch_first=True, norm_first=norm_first), 1 + norm_first, enable_nested_tensor=False)
        self.head = nn.Linear(d, out)
    def forward(self, x): return self.head(self.body(self.emb(x) + self.place).mean(1))


def tokens(n=1024):
    x = integers(20, n, 8)
    return batches(x, (x < 5).sum(1).clamp(max=3))


@run
def transformer_pre_norm(): return fitted(Encoder(True), tokens()[3:], F.cross_entropy, 3e-3, optim.AdamW, epochs=3, valid=tokens()[:3])


@run
def transformer_post_norm():
    model = Encoder(False)
    opt = optim.AdamW(model.parameters(), 2e-3)
    sched = optim.lr_scheduler.LinearLR(opt, .1, 1., 10)
    return looped(model, tokens(), nn.CrossEntropyLoss(), opt, epochs=3, each=sched.step)


def text(n=512, length=17):
    "A Markov chain over 16 letters whose next letter is one of two."
    g = torch.Generator().manual_seed(0)
    follow, x = torch.randint(16, (16, 2), generator=g), torch.randint(16, (n, 1), generator=g)
    for _ in range(length-1): x = torch.cat([x, follow[x[:, -1], torch.randint(2, (n,), generator=g)][:, None]], 1)
    return batches(x[:, :-1], x[:, 1:])


class Letters(nn.Module):
    def __init__(self): super().__init__(); self.emb, self.rnn, self.head = nn.Embedding(16, 24), nn.GRU(24, 32, batch_first=True), nn.Linear(32, 16)
    def forward(self, x): return self.head(self.rnn(self.emb(x))[0]).transpose(1, 2)


@run
def language_model_gru():
    model = Letters()
    return looped(model, text(), nn.CrossEntropyLoss(), optim.Adam(model.parameters(), 5e-3), epochs=6)


class Causal(nn.Module):
    "A GPT of one layer, its head tied to its embedding."
    def __init__(self, d=32, mask=True):
        super().__init__()
        self.emb, self.place, self.mask = nn.Embedding(17, d), nn.Embedding(16, d), mask
        self.body = nn.TransformerEncoder(nn.TransformerEncoderLayer(d, 2, 64, 0., 'gelu', batch_first=True, norm_first=True), 1, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, 17, bias=False)
        for o in (self.emb, self.place): nn.init.normal_(o.weight, std=.02)
        self.head.weight = self.emb.weight
    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(16) if self.mask else None
        return self.head(self.norm(self.body(self.emb(x) + self.place.weight, mask=mask, is_causal=self.mask)))


@run
def language_model_gpt():
    model, losses = Causal(), []
    opt, loss_fn = optim.AdamW(model.parameters(), 3e-3, betas=(.9, .95), weight_decay=.1), nn.CrossEntropyLoss()
    inspector = Inspector().attach(model, optimizer=opt, loss_fn=loss_fn)
    for _ in inspector.range(5):
        for x, y in text():
            loss = loss_fn(model(x).reshape(-1, 17), y.reshape(-1))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.)
            opt.step()
            opt.zero_grad(set_to_none=True)
            losses.append(loss.item())
    return Run(inspector.detach(), losses[0], losses[-1])


@run
def language_model_masked():
    "A sixth of the letters is hidden, and only these are in the loss."
    model, torch_mask = Causal(mask=False), torch.Generator().manual_seed(3)
    def loss_of(model, batch):
        hide = torch.rand(batch[0].shape, generator=torch_mask) < .17
        return F.cross_entropy(model(batch[0].masked_fill(hide, 16))[hide], batch[0][hide])
    return pushed(model, text(768), loss_of, optim.AdamW(model.parameters(), 5e-3), epochs=4, most=.8)


@run
def seq2seq_reverse():
    "Says a short sequence backwards."
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.emb, self.enc, self.dec, self.head = nn.Embedding(9, 24), nn.GRU(24, 48, batch_first=True), nn.GRU(24, 48, batch_first=True), nn.Linear(48, 8)
        def forward(self, x, before): return self.head(self.dec(self.emb(before), self.enc(self.emb(x))[1])[0])
    x = integers(8, 1024, 4)
    y = x.flip(1)
    model = Net()
    opt, loss_fn = optim.Adam(model.parameters(), .01), nn.CrossEntropyLoss()
    return looped(model, batches(x, F.pad(y, (1, 0), value=8)[:, :-1], y), loss_fn, opt, epochs=4, answers=lambda model, b: (model(b[0], b[1]).transpose(1, 2), b[2]))


@run
def speech_ctc():
    "Frames of noisy one-hot symbols, each held for two to four frames."
    g = torch.Generator().manual_seed(0)
    xs, ys = [], integers(4, 384, 4) + 1
    for y in ys:
        frames = torch.cat([c.repeat(int(torch.randint(2, 5, (1,), generator=g))) for c in y])
        xs.append(F.pad(F.one_hot(frames, 5).float(), (0, 0, 0, 16-len(frames))))
    x = torch.stack(xs) + .2*gaussian(384, 16, 5)
    model = nn.Sequential(Lambda(lambda x: x.transpose(1, 2)), nn.Conv1d(5, 32, 3, padding=1), nn.ReLU(), nn.Conv1d(32, 5, 3, padding=1), Lambda(lambda x: x.permute(2, 0, 1)), nn.LogSoftmax(2))
    loss_fn = nn.CTCLoss()
    return pushed(model, batches(x, ys), lambda model, b: loss_fn(model(b[0]), b[1], torch.full((len(b[0]),), 16), torch.full((len(b[0]),), 4)), optim.Adam(model.parameters(), 5e-3), epochs=8)


# --- tables

@run
def regression_scaled(): return fitted(mlp(10, 64, 32, 1), batches(*table())[3:], nn.MSELoss(), 5e-3, optim.Adam, epochs=6, valid=batches(*table())[:3], most=.4)


@run
def regression_linear_sgd():
    x = gaussian(512, 10)
    y = x @ gaussian(10, 1, seed=3) + 1 + .1*gaussian(512, 1, seed=4)
    return fitted(nn.Linear(10, 1), batches(x, y, bs=16), F.mse_loss, .02, optim.SGD, most=.2)


@run
def regression_squeezed():
    "Targets of one axis, as most tables have them."
    x, y = table()
    model = nn.Sequential(mlp(10, 32, 1), nn.Flatten(0))
    return looped(model, batches(x, y[:, 0]), nn.HuberLoss(), optim.Adam(model.parameters(), .01), epochs=5, most=.5)


@run
def regression_heteroscedastic():
    x, _ = table()
    y = x[:, :1].sin() + .5*x[:, 1:2] + (.1 + .3*x[:, 2:3].sigmoid())*gaussian(len(x), 1, seed=5)
    model = mlp(10, 32, 2)
    loss_fn = nn.GaussianNLLLoss()
    def loss_of(model, batch):
        mu, raw = model(batch[0]).chunk(2, 1)
        return loss_fn(mu, batch[1], F.softplus(raw) + 1e-3)
    return pushed(model, batches(x, y), loss_of, optim.Adam(model.parameters(), .01), epochs=6)


class Pinball(nn.Module):
    def __init__(self, *q): super().__init__(); self.register_buffer('q', torch.tensor(q))
    def forward(self, out, y): return torch.maximum(self.q*(y - out), (self.q - 1)*(y - out)).mean()


@run
def regression_quantiles():
    model = mlp(10, 32, 3)
    return looped(model, batches(*table()), Pinball(.1, .5, .9), optim.Adam(model.parameters(), .01), epochs=5)


@run
def regression_poisson():
    x, _ = table()
    y = torch.poisson((.5*x[:, :1] + .5*x[:, 1:2] + 1).exp(), generator=torch.Generator().manual_seed(0))
    model = mlp(10, 32, 1)
    error = lambda: float(F.mse_loss(model(x).exp(), y).detach())
    before = error()
    watched = looped(model, batches(x, y), nn.PoissonNLLLoss(), optim.Adam(model.parameters(), 5e-3), epochs=5).watched
    return Run(watched, before, error())


@run
def binary_logits():
    x, y = table()
    model = mlp(10, 32, 1)
    return looped(model, batches(x, (y > 0).float())[4:], nn.BCEWithLogitsLoss(), optim.Adam(model.parameters(), .01), epochs=6, valid=batches(x, (y > 0).float())[:4])


@run
def binary_sigmoid():
    x, y = table()
    return fitted(nn.Sequential(mlp(10, 32, 1), nn.Sigmoid()), batches(x, (y > 0).float()), nn.BCELoss(), .01, optim.Adam, epochs=6)


@run
def logistic_regression():
    x = gaussian(512, 10)
    y = (x @ gaussian(10, 1, seed=3) > 0).float()
    return fitted(nn.Linear(10, 1), batches(x, y), F.binary_cross_entropy_with_logits, .5, optim.SGD)


@run
def multi_label():
    x = gaussian(768, 12)
    y = (x @ gaussian(12, 6, seed=1) > 1.5).float()
    model = mlp(12, 48, 6)
    return looped(model, batches(x, y), nn.BCEWithLogitsLoss(), optim.Adam(model.parameters(), .01), epochs=4)


@run
def ordinal_regression():
    "CORAL: one score, and a threshold for each step between grades."
    x, y = table()
    grade = (y[:, 0] > torch.tensor([-1., -.3, .3, 1.])[:, None]).sum(0)
    levels = (grade[:, None] > torch.arange(4)).float()
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.body, self.bias = mlp(10, 32, 1), nn.Parameter(torch.linspace(1, -1, 4))
        def forward(self, x): return self.body(x) + self.bias
    model = Net()
    return looped(model, batches(x, levels), nn.BCEWithLogitsLoss(), optim.Adam(model.parameters(), .01), epochs=6)


class Tabular(nn.Module):
    def __init__(self, out=2):
        super().__init__()
        self.embs = nn.ModuleList([nn.Embedding(n, 4) for n in (7, 12, 3)])
        self.norm = nn.BatchNorm1d(5)
        self.body = nn.Sequential(nn.Linear(17, 48), nn.ReLU(), nn.BatchNorm1d(48), nn.Dropout(.1), nn.Linear(48, out))
    def forward(self, cats, conts): return self.body(torch.cat([*(e(c) for e, c in zip(self.embs, cats.T)), self.norm(conts)], 1))


def rows(n=768):
    cats, conts = torch.stack([integers(k, n, seed=k) for k in (7, 12, 3)], 1), gaussian(n, 5)
    return cats, conts, ((cats[:, 0] > 3).long() + (conts[:, 0] + .5*conts[:, 1] > 0).long() > 1).long()


@run
def tabular_embeddings():
    model = Tabular()
    return looped(model, batches(*rows(), bs=64), nn.CrossEntropyLoss(), optim.AdamW(model.parameters(), .01), epochs=6)


@run
def tabular_two_inputs_learner():
    learn = Learner(Tabular(), SimpleNamespace(train=batches(*rows(), bs=64)[2:], valid=batches(*rows(), bs=64)[:2]), F.cross_entropy, .01, [TrainCB(n_inp=2)], optim.Adam)
    learn.watch(every=1)
    learn.fit(6)
    losses = learn.history.series('batch', 'loss', 'train').values
    return Run(learn, float(losses[0]), float(losses[-10:].mean()))


@run
def matrix_factorisation():
    "Ratings from 1 to 5 of users and items, by the product of their factors and their biases."
    class Factors(nn.Module):
        def __init__(self):
            super().__init__()
            self.u, self.i, self.ub, self.ib, self.mean = nn.Embedding(60, 8), nn.Embedding(40, 8), nn.Embedding(60, 1), nn.Embedding(40, 1), nn.Parameter(torch.tensor(3.))
            for o in (self.u, self.i): nn.init.normal_(o.weight, std=.1)
            for o in (self.ub, self.ib): nn.init.zeros_(o.weight)
        def forward(self, ui):
            u, i = ui.T
            return (self.u(u)*self.i(i)).sum(1) + self.ub(u)[:, 0] + self.ib(i)[:, 0] + self.mean
    ui = torch.stack([integers(60, 3000), integers(40, 3000, seed=1)], 1)
    score = gaussian(60, 1, seed=2)[ui[:, 0]] + gaussian(40, 1, seed=3)[ui[:, 1]] + (gaussian(60, 2, seed=4)[ui[:, 0]]*gaussian(40, 2, seed=5)[ui[:, 1]]).sum(1, keepdim=True)
    model = Factors()
    return looped(model, batches(ui, (3 + .6*score[:, 0]).round().clamp(1, 5), bs=64), nn.MSELoss(), optim.Adam(model.parameters(), .02, weight_decay=1e-5), epochs=5)


@run
def self_normalising():
    model = nn.Sequential(*[o for a, b in ((10, 32), (32, 32), (32, 32)) for o in (nn.Linear(a, b), nn.SELU(), nn.AlphaDropout(.05))], nn.Linear(32, 1))
    for m in model.modules():
        if isinstance(m, nn.Linear): nn.init.kaiming_normal_(m.weight, nonlinearity='linear'); nn.init.zeros_(m.bias)
    return looped(model, batches(*table()), nn.MSELoss(), optim.Adam(model.parameters(), 3e-3), epochs=6)


@run
def two_tasks():
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.body, self.a, self.b = nn.Sequential(mlp(10, 48, 32), nn.ReLU()), nn.Linear(32, 1), nn.Linear(32, 3)
        def forward(self, x): h = self.body(x); return dict(value=self.a(h), kind=self.b(h))
    x, y = table()
    kind = (x[:, 4] > 0).long() + (x[:, 5] > 0).long()
    def loss_of(model, batch):
        out = model(batch[0])
        return F.mse_loss(out['value'], batch[1]) + F.cross_entropy(out['kind'], batch[2])
    model = Net()
    return pushed(model, batches(x, y, kind), loss_of, optim.Adam(model.parameters(), .01), epochs=5)


@run
def survival_cox():
    x, _ = table()
    time = torch.empty(len(x)).exponential_(generator=torch.Generator().manual_seed(0))*(-(x[:, 0] - x[:, 1])).exp()
    def loss_of(model, batch):
        x, t = batch
        score = model(x)[t.argsort(descending=True), 0]
        return (score.logcumsumexp(0) - score).mean()
    def wrong():   # fraction of pairs in the wrong order
        score = model(x)[:, 0].detach()
        return float(((score[:, None] > score) == (time[:, None] > time)).float().mean())
    model = mlp(10, 16, 1)
    before = wrong()
    watched = pushed(model, batches(x, time, bs=64), loss_of, optim.Adam(model.parameters(), 5e-3), epochs=5).watched
    return Run(watched, before, wrong())


class Experts(nn.Module):
    def __init__(self, n=3): super().__init__(); self.gate, self.parts = nn.Linear(10, n), nn.ModuleList([mlp(10, 16, 1) for _ in range(n)])
    def forward(self, x): return (self.gate(x).softmax(1)[:, :, None]*torch.stack([o(x) for o in self.parts], 1)).sum(1)


@run
def mixture_of_experts():
    model = Experts()
    return looped(model, batches(*table()), nn.MSELoss(), optim.Adam(model.parameters(), .01), epochs=5, most=.5)


@run
def sets_deep_sets():
    x = gaussian(768, 6, 3)
    y = x[:, :, 0].amax(1, keepdim=True)
    model = nn.Sequential(mlp(3, 32, 32), Lambda(lambda h: h.amax(1)), mlp(32, 16, 1))
    return looped(model, batches(x, y), nn.MSELoss(), optim.Adam(model.parameters(), .01), epochs=4, most=.5)


@run
def graph_full_batch():
    "Nodes of two communities: one batch an epoch, the graph in the model."
    y = torch.arange(60) % 3
    near = torch.rand(60, 60, generator=torch.Generator().manual_seed(0)) < torch.where(y[:, None] == y, .4, .05)
    adj = ((near | near.T).float() + torch.eye(60))
    adj = adj/adj.sum(1, keepdim=True)
    class GCN(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 3)
        def forward(self, x): return adj @ self.b(F.dropout(F.relu(adj @ self.a(x)), .2, self.training))
    x = gaussian(60, 8) + .7*F.one_hot(y, 8)
    model = GCN()
    return looped(model, [(x, y)], nn.CrossEntropyLoss(), optim.Adam(model.parameters(), .03, weight_decay=5e-4), epochs=50)


@run
def coordinates_siren():
    "An image as a function of place, sines as activations."
    class Sine(nn.Module):
        def __init__(self, a, b, w, first=False):
            super().__init__()
            self.lin, self.w = nn.Linear(a, b), w
            r = 1/a if first else (6/a)**.5/w
            nn.init.uniform_(self.lin.weight, -r, r)
        def forward(self, x): return (self.w*self.lin(x)).sin()
    y = fashion()[0][3].reshape(-1, 1)
    g = torch.linspace(-1, 1, 14)
    x = torch.cartesian_prod(g, g)
    model = nn.Sequential(Sine(2, 32, 10, True), Sine(32, 32, 10), nn.Linear(32, 1))
    return looped(model, [(x, y)], nn.MSELoss(), optim.Adam(model.parameters(), 5e-3), epochs=50, most=.4)


@run
def physics_informed():
    "u' = -u and u(0) = 1, by the derivative of the net."
    model = mlp(1, 24, 24, 1, act=nn.Tanh)
    def loss_of(model, batch):
        x = batch[0].clone().requires_grad_()
        u = model(x)
        du, = torch.autograd.grad(u.sum(), x, create_graph=True)
        return ((du + u)**2).mean() + (model(torch.zeros(1, 1)) - 1).pow(2).mean()
    return pushed(model, batches(torch.rand(32*30, 1)*2), loss_of, optim.Adam(model.parameters(), 3e-3), epochs=4, most=.3)


@run
def normalising_flow():
    class Coupling(nn.Module):
        def __init__(self, flip): super().__init__(); self.net, self.flip = mlp(1, 24, 2), flip
        def forward(self, x, logdet):
            a, b = x.flip(1).chunk(2, 1) if self.flip else x.chunk(2, 1)
            s, t = self.net(a).chunk(2, 1)
            s = s.tanh()
            out = torch.cat([a, b*s.exp() + t], 1)
            return (out.flip(1) if self.flip else out), logdet + s[:, 0]
    class Flow(nn.Module):
        def __init__(self): super().__init__(); self.parts = nn.ModuleList([Coupling(i % 2) for i in range(4)])
        def forward(self, x):
            logdet = x.new_zeros(len(x))
            for o in self.parts: x, logdet = o(x, logdet)
            return x, logdet
    a = gaussian(1024, 1)
    data = torch.cat([a, a**2 + .2*gaussian(1024, 1, seed=1)], 1)
    data = (data - data.mean(0))/data.std(0)
    def loss_of(model, batch):
        z, logdet = model(batch[0])
        return (.5*z**2 + .5*math.log(2*math.pi)).sum(1).mean() - logdet.mean()
    model = Flow()
    return pushed(model, batches(data), loss_of, optim.Adam(model.parameters(), 3e-3), epochs=4)


# --- acting

@run
def q_learning():
    "A walk to the right end of a line, a memory of steps, a target network that follows."
    n, model = 6, mlp(6, 32, 2)
    target, memory, one = copy.deepcopy(model), [], torch.eye(n)
    opt, loss_fn, found = optim.Adam(model.parameters(), 5e-3), nn.SmoothL1Loss(), []
    inspector = Inspector().attach(model, optimizer=opt, loss_fn=loss_fn)
    s = 0
    for i in range(400):
        with torch.no_grad(): a = int(model(one[s:s+1]).argmax()) if torch.rand(()) > max(.1, 1 - i/200) else int(torch.rand(()) > .5)
        after = min(n-1, s+1) if a else max(0, s-1)
        done = after == n-1
        memory.append((s, a, after, float(done)))
        found.append(float(done))
        s = 0 if done else after
        if len(memory) < 64: continue
        b, a, c, r = (torch.tensor(o) for o in zip(*(memory[k] for k in torch.randint(len(memory), (32,)).tolist())))
        with torch.no_grad(): want = r + .9*(1 - r)*target(one[c]).amax(1)
        opt.zero_grad()
        loss_fn(model(one[b]).gather(1, a[:, None])[:, 0], want).backward()
        opt.step()
        for p, q in zip(target.parameters(), model.parameters()): p.data.lerp_(q.data, .05)
    inspector.tick_epoch()
    return Run(inspector.detach(), 1 - mean(found[:100]), 1 - mean(found[-100:]), .95)


def bandit_rewards(x, a): return (a == (x[:, 0] > 0).long() + (x[:, 1] > 0).long()).float()


@run
def policy_gradient():
    model = mlp(4, 32, 3)
    opt = optim.Adam(model.parameters(), .01)
    inspector, rewards = Inspector().attach(model, optimizer=opt), []
    for _ in inspector.range(5):
        for x, in batches(torch.randn(20*64, 4), bs=64):
            dist = torch.distributions.Categorical(logits=model(x))
            a = dist.sample()
            r = bandit_rewards(x, a)
            loss = -(dist.log_prob(a)*(r - r.mean())).mean() - .01*dist.entropy().mean()
            opt.zero_grad()
            loss.backward()
            opt.step()
            inspector.push_loss(loss.detach(), train=True)
            rewards.append(r.mean())
    return Run(inspector.detach(), 1 - mean(rewards[:5]), 1 - mean(rewards[-10:]))


@run
def actor_critic():
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.body, self.act, self.value = nn.Sequential(nn.Linear(4, 48), nn.Tanh()), nn.Linear(48, 3), nn.Linear(48, 1)
        def forward(self, x): h = self.body(x); return self.act(h), self.value(h)[:, 0]
    model, rewards = Net(), []
    opt = optim.RMSprop(model.parameters(), 5e-3)
    inspector = Inspector().attach(model, optimizer=opt)
    for _ in inspector.range(6):
        for x, in batches(torch.randn(20*64, 4), bs=64):
            logits, value = model(x)
            dist = torch.distributions.Categorical(logits=logits)
            a = dist.sample()
            r = bandit_rewards(x, a)
            loss = -(dist.log_prob(a)*(r - value).detach()).mean() + .5*F.mse_loss(value, r) - .01*dist.entropy().mean()
            opt.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), .5)
            opt.step()
            inspector.push_loss(loss.detach(), train=True)
            rewards.append(r.mean())
    return Run(inspector.detach(), 1 - mean(rewards[:5]), 1 - mean(rewards[-10:]))


# --- teachers, transfer, labels

def teacher():
    torch.manual_seed(5)
    model = cnn(nn.BatchNorm2d)
    opt = optim.Adam(model.parameters(), 5e-3)
    for _ in range(2):
        for x, y in images():
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            opt.step()
    return model.eval()


teacher = cache(teacher)


@run
def distillation():
    big, model = teacher(), nn.Sequential(nn.Flatten(), mlp(196, 32, 10))
    def loss_of(model, batch):
        x, y = batch
        with torch.no_grad(): want = big(x)
        out = model(x)
        return .3*F.cross_entropy(out, y) + .7*4*F.kl_div(F.log_softmax(out/2, 1), F.softmax(want/2, 1), reduction='batchmean')
    return pushed(model, images(), loss_of, optim.Adam(model.parameters(), 3e-3), epochs=4)


@run
def self_training():
    "Few labels; the rest are the model's own, where it is sure."
    model = nn.Sequential(nn.Flatten(), mlp(196, 64, 10))
    labelled, rest = images(640, 32), images(640, 32, start=1000)
    opt, losses = optim.Adam(model.parameters(), 2e-3), []
    inspector = Inspector().attach(model, optimizer=opt)
    for _ in inspector.range(4):
        for (x, y), (u, _) in zip(labelled, rest):
            with torch.no_grad(): sure, own = model(u).softmax(1).max(1)
            own_loss = F.cross_entropy(model(u + .2*torch.randn_like(u)), own, reduction='none')
            loss = F.cross_entropy(model(x), y)
            losses.append(loss.item())
            loss = loss + (own_loss*(sure > .9)).mean()
            opt.zero_grad()
            loss.backward()
            opt.step()
            inspector.push_loss(loss.detach(), train=True)
    return Run(inspector.detach(), mean(losses[:3]), mean(losses[-20:]))


@run
def mean_teacher():
    "An average of the weights, in the model, whose answers are targets for what has no labels."
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.student = nn.Sequential(nn.Flatten(), mlp(196, 64, 10))
            self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        def forward(self, x): return self.student(x)
    model = Pair()
    def loss_of(model, batch):
        x, y = batch
        with torch.no_grad(): want = model.teacher(x).softmax(1)
        return F.cross_entropy(model(x), y) + .5*F.mse_loss(model(views(x)).softmax(1), want)
    def follow():
        for p, q in zip(model.teacher.parameters(), model.student.parameters()): p.data.lerp_(q.data, .05)
    return pushed(model, images(), loss_of, optim.Adam(model.student.parameters(), 2e-3), end=follow)


@run
def momentum_teacher_of_a_part():
    "Two views of a sample agree (BYOL): the targets are those of an average of the encoder, which is in the model and less than half of it."
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.head = mlp(16, 64, 16), mlp(16, 32, 16)
            self.target = copy.deepcopy(self.encoder).requires_grad_(False)
        def forward(self, one, other): return self.head(self.encoder(one)), self.target(other)
    model = Pair()
    def loss_of(model, batch): return 2 - 2*F.cosine_similarity(*model(views(batch[0]), views(batch[0]))).mean()
    def follow():
        for p, q in zip(model.target.parameters(), model.encoder.parameters()): p.data.mul_(.98).add_(q.data, alpha=.02)
    trained = [p for p in model.parameters() if p.requires_grad]
    return pushed(model, batches(gaussian(768, 16), bs=64), loss_of, optim.SGD(trained, .1, .9), epochs=5, end=follow)


@run
def meta_learning():
    "A step inside the loss for each of four tasks (MAML), whose gradients are asked for and not added."
    model = mlp(1, 32, 32, 1, act=nn.Tanh)
    def loss_of(model, batch):
        losses = []
        for size, shift in batch[0]:
            x, weights = torch.rand(20, 1)*6 - 3, dict(model.named_parameters())
            y, answer = (size + .5)*torch.sin(x + 3*shift), lambda weights, x: torch.func.functional_call(model, weights, x)
            grads = torch.autograd.grad(F.mse_loss(answer(weights, x[:10]), y[:10]), weights.values(), create_graph=True)
            inner = {nm: p - .05*g for (nm, p), g in zip(weights.items(), grads)}
            losses.append(F.mse_loss(answer(inner, x[10:]), y[10:]))
        return sum(losses)/4
    opt = optim.Adam(model.parameters(), 3e-3)
    return pushed(model, [(torch.rand(4, 2),) for _ in range(40)], loss_of, opt, epochs=5, end=opt.zero_grad)


@run
def clipped_policy():
    "Four steps with each batch of actions (PPO): a loss of both signs, which begins near zero and means little."
    torch.manual_seed(1)
    model, rewards = nn.ModuleDict(dict(body=nn.Sequential(nn.Linear(4, 32), nn.Tanh()), act=nn.Linear(32, 3), value=nn.Linear(32, 1))), []
    opt = optim.Adam(model.parameters(), 3e-3)
    inspector = Inspector().attach(model, optimizer=opt)
    for _ in inspector.range(5):
        for x, in batches(torch.randn(20*64, 4), bs=64):
            with torch.no_grad():
                dist = torch.distributions.Categorical(logits=model.act(model.body(x)))
                a, value = dist.sample(), model.value(model.body(x))[:, 0]
                old, r = dist.log_prob(a), bandit_rewards(x, a)
            for _ in range(4):
                h = model.body(x)
                now = torch.distributions.Categorical(logits=model.act(h))
                ratio = (now.log_prob(a) - old).exp()
                gain = torch.minimum(ratio*(r - value), ratio.clamp(.8, 1.2)*(r - value)).mean()
                loss = .5*F.mse_loss(model.value(h)[:, 0], r) - gain - .01*now.entropy().mean()
                opt.zero_grad()
                loss.backward()
                opt.step()
                inspector.push_loss(loss.detach(), train=True)
            rewards.append(r.mean())
    return Run(inspector.detach(), 1 - mean(rewards[:5]), 1 - mean(rewards[-10:]))


@run
def mixture_density():
    "A loss of one's own that is called as one of PyTorch's, of a density."
    class NLL(nn.Module):
        def forward(self, out, y):
            weight, center, log_width = out.chunk(3, 1)
            return -torch.logsumexp(weight.log_softmax(1) - log_width - .5*((y - center)/log_width.exp())**2, 1).mean()
    x = 2*torch.rand(960, 1) - 1
    y = x*(1 - 2*integers(2, 960, 1)) + .05*gaussian(960, 1)
    return fitted(mlp(1, 32, 32, 12, act=nn.Tanh), batches(x, y), NLL(), 5e-3, optim.Adam, epochs=8)


class LoRA(nn.Module):
    def __init__(self, base, r=4):
        super().__init__()
        self.base, self.a, self.b = base.requires_grad_(False), nn.Parameter(torch.randn(r, base.in_features)/base.in_features**.5), nn.Parameter(torch.zeros(base.out_features, r))
    def forward(self, x): return self.base(x) + 2*x @ self.a.T @ self.b.T


def pretrained():
    torch.manual_seed(6)
    model = nn.Sequential(nn.Flatten(), mlp(196, 64, 32, 10))
    opt = optim.Adam(model.parameters(), 3e-3)
    for _ in range(2):
        for x, y in images():
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            opt.step()
    return model


@run
def lora():
    "A net for the images, turned upside down."
    model = pretrained()
    body = model[1]
    for i in (0, 2, 4): body[i] = LoRA(body[i])
    data = [(x.flip(2), y) for x, y in images(start=1000)]
    return looped(model, data, nn.CrossEntropyLoss(), optim.AdamW([p for p in model.parameters() if p.requires_grad], 5e-3), epochs=5)


@run
def frozen_base_new_head():
    base = nn.Sequential(*list(teacher())[:-1])
    model = nn.Sequential(copy.deepcopy(base).requires_grad_(False), nn.Linear(32, 2))
    data = [(x, (y > 4).long()) for x, y in images(start=1000)]
    opt = optim.Adam(model[1].parameters(), .01)
    return looped(model, data, nn.CrossEntropyLoss(), opt, epochs=5)


@run
def fine_tuned_by_groups():
    "A small rate for the base, a larger one for the new head."
    model = copy.deepcopy(teacher())
    model[-1] = nn.Linear(32, 5)
    opt = optim.AdamW([dict(params=model[:-1].parameters(), lr=1e-4), dict(params=model[-1].parameters(), lr=1e-2)])
    return looped(model, [(x, y//2) for x, y in images(start=1000)], nn.CrossEntropyLoss(), opt, epochs=4)


@run
def unfrozen_later():
    model = copy.deepcopy(teacher())
    model[-1] = nn.Linear(32, 5)
    for p in model[:-1].parameters(): p.requires_grad_(False)
    opt, epoch = optim.Adam(model.parameters(), 3e-3), []
    def end():
        epoch.append(1)
        if len(epoch) == 2: model.requires_grad_(True)
    return looped(model, [(x, y//2) for x, y in images(start=1000)], nn.CrossEntropyLoss(), opt, epochs=5, end=end)


@run
def mixup():
    model = cnn(nn.BatchNorm2d)
    def answers(model, batch):
        x, y = batch
        lam, j = torch.distributions.Beta(.4, .4).sample(), torch.randperm(len(x))
        one = F.one_hot(y, 10).float()
        return model(lam*x + (1 - lam)*x[j]), lam*one + (1 - lam)*one[j]
    return looped(model, images(), nn.CrossEntropyLoss(), optim.Adam(model.parameters(), 5e-3), epochs=5, answers=answers, most=.8)


@run
def label_smoothing(): return fitted(cnn(), images(), nn.CrossEntropyLoss(label_smoothing=.1), 5e-3, optim.Adam, epochs=5)


@cache
def uneven(n=960):
    "Two classes, 90 to 10."
    x = gaussian(n, 10)
    score = x[:, 0] + x[:, 1] + .3*gaussian(n, seed=1)
    return x, (score > score.kthvalue(int(.9*n)).values).long()


@run
def class_weights():
    model = mlp(10, 32, 2)
    return looped(model, batches(*uneven()), nn.CrossEntropyLoss(weight=torch.tensor([.56, 5.])), optim.Adam(model.parameters(), 5e-3), epochs=4, most=.5)


@run
def imbalanced_plain():
    x, y = uneven()
    model = mlp(10, 32, 1)
    return looped(model, batches(x, y[:, None].float())[4:], nn.BCEWithLogitsLoss(), optim.Adam(model.parameters(), 5e-3), epochs=5, valid=batches(x, y[:, None].float())[:4], most=.5)


class Focal(nn.Module):
    def forward(self, out, y):
        logp = F.log_softmax(out, 1).gather(1, y[:, None])[:, 0]
        return (-(1 - logp.exp())**2*logp).mean()


@run
def focal_loss():
    model = mlp(10, 32, 2)
    return looped(model, batches(*uneven()), Focal(), optim.Adam(model.parameters(), 5e-3), epochs=4, most=.5)


@run
def balanced_sampler():
    x, y = uneven()
    sampler = torch.utils.data.WeightedRandomSampler(torch.where(y[192:] == 1, 9., 1.), 960)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x[192:], y[192:]), 32, sampler=sampler)
    return fitted(mlp(10, 32, 2), loader, F.cross_entropy, .01, optim.Adam, epochs=4, valid=batches(x[:192], y[:192]), most=.5)


# --- optimizers

def optimized(make, epochs=4, most=.7):
    "The same net and images by an optimizer."
    model = nn.Sequential(nn.Flatten(), mlp(196, 32, 10))
    return looped(model, images(), nn.CrossEntropyLoss(), make(model.parameters()), epochs, most=most)


for name, make in dict(sgd=lambda p: optim.SGD(p, .1), sgd_nesterov=lambda p: optim.SGD(p, .05, momentum=.9, nesterov=True, weight_decay=5e-4),
                       rmsprop=lambda p: optim.RMSprop(p, 1e-3), adagrad=lambda p: optim.Adagrad(p, .02), radam=lambda p: optim.RAdam(p, .01),
                       nadam=lambda p: optim.NAdam(p, 3e-3), adam_l2=lambda p: optim.Adam(p, 3e-3, weight_decay=1e-4), adamw_decay=lambda p: optim.AdamW(p, 3e-3, weight_decay=.1)).items():
    zoo[f'optimizer_{name}'] = partial(optimized, make)


class Sign(optim.Optimizer):
    "Lion."
    def __init__(self, params, lr=1e-3, betas=(.9, .99)): super().__init__(params, dict(lr=lr, betas=betas))
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group['params']:
                m = self.state[p].setdefault('m', torch.zeros_like(p))
                p.add_(m.lerp(p.grad, 1 - group['betas'][0]).sign(), alpha=-group['lr'])
                m.lerp_(p.grad, 1 - group['betas'][1])


zoo['optimizer_lion'] = partial(optimized, lambda p: Sign(p, 3e-4))


@run
def optimizer_muon():
    "Muon for the matrices of hidden layers, AdamW for the rest."
    model = nn.Sequential(nn.Flatten(), mlp(196, 64, 64, 10))
    hidden = [m.weight for m in list(model[1])[:-1] if isinstance(m, nn.Linear)]
    rest = [p for p in model.parameters() if not any(p is o for o in hidden)]
    opts, loss_fn, losses = [optim.Muon(hidden, lr=.02), optim.AdamW(rest, 3e-3)], nn.CrossEntropyLoss(), []
    inspector = Inspector().attach(model, loss_fn=loss_fn)
    for _ in inspector.range(4):
        for x, y in images():
            loss = loss_fn(model(x), y)
            for o in opts: o.zero_grad()
            loss.backward()
            for o in opts: o.step()
            losses.append(loss.item())
    return Run(inspector.detach(), losses[0], mean(losses[-16:]))


@run
def optimizer_lbfgs():
    x, y = table()
    model, loss_fn, losses = mlp(10, 16, 1, act=nn.Tanh), nn.MSELoss(), []
    opt = optim.LBFGS(model.parameters(), lr=.5, max_iter=4)
    inspector = Inspector().attach(model, optimizer=opt, loss_fn=loss_fn)
    def closure():
        opt.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        losses.append(loss.item())
        return loss
    for _ in inspector.range(25): opt.step(closure)
    return Run(inspector.detach(), losses[0], losses[-1], .3)


@run
def optimizer_sharpness_aware():
    "Two backward passes a step: at the weights, and at a worse place nearby."
    model, loss_fn, losses = cnn(), nn.CrossEntropyLoss(), []
    opt = optim.SGD(model.parameters(), .05, momentum=.9)
    inspector = Inspector().attach(model, optimizer=opt, loss_fn=loss_fn)
    for _ in inspector.range(4):
        for x, y in images():
            loss = loss_fn(model(x), y)
            loss.backward()
            with torch.no_grad():
                norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
                moves = [.02*p.grad/norm for p in model.parameters()]
                for p, e in zip(model.parameters(), moves): p.add_(e)
            opt.zero_grad()
            loss_fn(model(x), y).backward()
            with torch.no_grad():
                for p, e in zip(model.parameters(), moves): p.sub_(e)
            opt.step()
            opt.zero_grad()
            losses.append(loss.item())
    return Run(inspector.detach(), losses[0], mean(losses[-16:]))


# --- schedules, and ways to train

def scheduled(make, every_batch=True, epochs=4):
    model = nn.Sequential(nn.Flatten(), nn.Linear(196, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))
    opt = optim.SGD(model.parameters(), .1, momentum=.9)
    sched = make(opt)
    return looped(model, images(), nn.CrossEntropyLoss(), opt, epochs, **{'each' if every_batch else 'end': sched.step})


for name, make in dict(one_cycle=lambda o: optim.lr_scheduler.OneCycleLR(o, .1, 64), cosine=lambda o: optim.lr_scheduler.CosineAnnealingLR(o, 64),
                       warm_restarts=lambda o: optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 16)).items():
    zoo[f'schedule_{name}'] = partial(scheduled, make)
zoo['schedule_steps'] = partial(scheduled, lambda o: optim.lr_scheduler.StepLR(o, 2, .1), False, 5)


@run
def schedule_on_plateau():
    x, y = table()
    model = mlp(10, 32, 1)
    opt, loss_fn, losses = optim.Adam(model.parameters(), .01), nn.MSELoss(), []
    sched = optim.lr_scheduler.ReduceLROnPlateau(opt, patience=1)
    inspector = Inspector().attach(model, optimizer=opt, loss_fn=loss_fn)
    for _ in inspector.range(10):
        for xb, yb in batches(x[:512], y[:512]):
            opt.zero_grad()
            loss = loss_fn(model(xb), yb)
            loss.backward()
            opt.step()
            losses.append(loss.item())
        with torch.no_grad(): sched.step(loss_fn(model(x[512:]), y[512:]))
    return Run(inspector.detach(), losses[0], mean(losses[-16:]))


@run
def gradient_clipping():
    model = cnn()
    return looped(model, images(), nn.CrossEntropyLoss(), optim.SGD(model.parameters(), .2, momentum=.9), each=lambda: nn.utils.clip_grad_norm_(model.parameters(), .5))


@run
def gradient_accumulation():
    model, loss_fn, losses = cnn(), nn.CrossEntropyLoss(), []
    opt = optim.Adam(model.parameters(), 5e-3)
    inspector = Inspector().attach(model, optimizer=opt, loss_fn=loss_fn)
    for _ in inspector.range(4):
        for i, (x, y) in enumerate(images(bs=16)):
            loss = loss_fn(model(x), y)
            (loss/4).backward()
            losses.append(loss.item())
            if i % 4 == 3:
                opt.step()
                opt.zero_grad()
    return Run(inspector.detach(), losses[0], mean(losses[-64:]))


@run
def autocast_bf16():
    model, loss_fn, losses = nn.Sequential(nn.Flatten(), mlp(196, 64, 32, 10)), nn.CrossEntropyLoss(), []
    opt = optim.AdamW(model.parameters(), 3e-3)
    inspector = Inspector().attach(model, optimizer=opt, loss_fn=loss_fn)
    for _ in inspector.range(4):
        for x, y in images():
            with torch.autocast('cpu', torch.bfloat16): loss = loss_fn(model(x), y)
            opt.zero_grad()
            loss.backward()
            opt.step()
            losses.append(loss.item())
    return Run(inspector.detach(), losses[0], mean(losses[-16:]))


@run
def double_precision():
    x, y = (o.double() for o in table())
    return fitted(mlp(10, 32, 1).double(), batches(x, y), F.mse_loss, .01, optim.Adam)


@run
def batch_of_one():
    x, y = table()
    return fitted(mlp(10, 32, 1), batches(x[:200], y[:200], bs=1), nn.MSELoss(), 5e-3, optim.Adam, epochs=4)


@run
def ragged_last_batch(): return fitted(cnn(nn.BatchNorm2d), images(1024 + 3), F.cross_entropy, 5e-3, optim.Adam, valid=images(131, start=2000))


@run
def one_epoch_of_many(): return fitted(cnn(), images(5000), F.cross_entropy, 5e-3, optim.Adam, epochs=1)


@run
def many_epochs_of_few():
    x, y = table()
    return fitted(mlp(10, 32, 1), batches(x[:96], y[:96], bs=48), F.mse_loss, 5e-3, optim.Adam, epochs=60)


@run
def whole_set_each_step():
    x, y = table()
    model = mlp(10, 32, 1)
    return looped(model, [(x, y)], nn.MSELoss(), optim.Adam(model.parameters(), .02), epochs=50)


@run
def metrics_and_validation():
    from torcheval.metrics import MulticlassAccuracy
    learn = Learner(cnn(), SimpleNamespace(train=images(), valid=images(512, start=2000)), F.cross_entropy, 5e-3, [TrainCB(), MetricsCB(accuracy=MulticlassAccuracy())], optim.Adam)
    learn.watch(every=1)
    learn.fit(5)
    losses = learn.history.series('batch', 'loss', 'valid').values
    return Run(learn, math.log(10), float(losses[-8:].mean()))


@run
def fitted_twice():
    "A second fit that goes on."
    learn = TrainLearner(cnn(), SimpleNamespace(train=images(), valid=images(256, start=2000)), F.cross_entropy, 5e-3, opt_func=optim.Adam)
    learn.watch(every=1)
    learn.fit(3)
    learn.fit(4, reset_opt=False, lr=1e-3)
    losses = learn.history.series('batch', 'loss', 'train').values
    return Run(learn, math.log(10), float(losses[-16:].mean()))


@run
def much_dropout():
    model = nn.Sequential(nn.Flatten(), nn.Dropout(.2), nn.Linear(196, 128), nn.ReLU(), nn.Dropout(.5), nn.Linear(128, 64), nn.ReLU(), nn.Dropout(.5), nn.Linear(64, 10))
    return looped(model, images(), nn.CrossEntropyLoss(), optim.Adam(model.parameters(), 3e-3), epochs=5, valid=images(256, start=2000))


@run
def weight_and_spectral_norm():
    norm, spectral = nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm
    model = nn.Sequential(nn.Flatten(), norm(nn.Linear(196, 64)), nn.ReLU(), spectral(nn.Linear(64, 64)), nn.ReLU(), nn.Linear(64, 10))
    return looped(model, images(), nn.CrossEntropyLoss(), optim.Adam(model.parameters(), 3e-3))


@run
def checkpointed():
    from torch.utils.checkpoint import checkpoint
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b, self.head = (nn.Sequential(nn.Linear(n, 64), nn.ReLU()) for n in (196, 64)), None, nn.Linear(64, 10); self.a, self.b = self.a
        def forward(self, x): return self.head(checkpoint(self.b, checkpoint(self.a, x.flatten(1), use_reentrant=False), use_reentrant=False))
    model = Net()
    return looped(model, images(), nn.CrossEntropyLoss(), optim.Adam(model.parameters(), 3e-3))


@run
def one_hot_targets():
    x, y = fashion()[0][:1024], F.one_hot(fashion()[1][:1024], 10).float()
    return fitted(nn.Sequential(nn.Flatten(), mlp(196, 64, 10)), batches(x, y, bs=64), F.cross_entropy, 3e-3, optim.Adam)


@run
def log_softmax_nll():
    model = nn.Sequential(nn.Flatten(), mlp(196, 64, 10), nn.LogSoftmax(1))
    return looped(model, images(), nn.NLLLoss(), optim.Adam(model.parameters(), 3e-3))


@run
def curriculum():
    "Shorter sums first."
    model = LastOf(nn.GRU(1, 24, batch_first=True), nn.Linear(24, 1))
    data = []
    for length in (2, 4, 6):
        x = gaussian(640, length, 1, seed=length)
        data += batches(x, x.sum(1)/length**.5)
    return looped(model, data, nn.MSELoss(), optim.Adam(model.parameters(), 5e-3), epochs=2)


@run
def augmented():
    "Shifted and mirrored at random."
    model = cnn(nn.BatchNorm2d)
    def answers(model, batch):
        x = batch[0].flip(3) if torch.rand(()) > .5 else batch[0]
        i, j = torch.randint(-1, 2, (2,)).tolist()
        return model(x.roll((i, j), (2, 3))), batch[1]
    return looped(model, images(), nn.CrossEntropyLoss(), optim.Adam(model.parameters(), 5e-3), answers=answers, valid=images(256, start=2000))


@run
def two_optimizers():
    "Embeddings by one, the rest by the other."
    model, loss_fn = Tabular(), nn.CrossEntropyLoss()
    opts = [optim.Adagrad(model.embs.parameters(), .1), optim.SGD([*model.norm.parameters(), *model.body.parameters()], .1, momentum=.9)]
    return pushed(model, batches(*rows(), bs=64), lambda model, b: loss_fn(model(*b[:-1]), b[-1]), opts, epochs=6)
