"""A stand-in for the `ActivationStats` of the course library, to have its price beside ours.

This is not fast.ai's code. It was written from memory, in our own words, and does as little as the course's notebooks do: a
forward hook for each chosen module copies the output to the CPU and appends its mean, its standard deviation and a histogram of
its absolute values, 40 bins from 0 to 10, to three lists. The course's callback around it, its Learner and its plots are left out, so
what is timed here is the least that the course library can cost."""
from collections.abc import Mapping
from functools import partial

import torch


def to_cpu(x):
    "The tensors in `x`, off the graph and on the CPU, half precision as float32."
    if isinstance(x, Mapping): return {k: to_cpu(v) for k,v in x.items()}
    if isinstance(x, (list, tuple)): return type(x)(map(to_cpu, x))
    x = x.detach().cpu()
    return x.float() if x.dtype == torch.float16 else x


class OutputHook:
    "Appends statistics of each output of `m` to `stats`, three lists."
    def __init__(self, m):
        self.stats = [], [], []
        self.handle = m.register_forward_hook(partial(append_stats, self))

    def remove(self): self.handle.remove()


def append_stats(hook, m, inp, outp):
    "What the course's hook does in training mode."
    if not m.training: return
    acts = to_cpu(outp)
    means, stds, hists = hook.stats
    means.append(acts.mean())
    stds.append(acts.std())
    hists.append(acts.abs().histc(40, 0, 10))


def watch_outputs(model, kind=None):
    "A hook on each module of that `kind`, default all leaves."
    chosen = [m for m in model.modules() if (isinstance(m, kind) if kind else not list(m.children()))]
    return [OutputHook(m) for m in chosen]
