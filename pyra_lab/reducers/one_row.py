"""PYRA with one row: the modulation's weights are shared by all pairs, so that any number of them may merge."""

import math

import torch
import torch.nn as nn

import pyra
from pyra_lab import budget


class OneRow(pyra.ToMe):
    """PYRA whose W_r is one row for all pairs: r may change from one forward to the next, and is clamped as ToMe's is."""

    def __init__(self, r, dim, s=1, specials=1):
        super().__init__(r, specials)
        self.w_r = nn.Parameter(torch.empty(1, s).uniform_(-1, 1) / math.sqrt(s))
        self.w_d = nn.Parameter(torch.zeros(s, dim))  # zeros: training starts at ToMe
        self.settings = dict(s=s)

    def modulate(self, src, dst):
        r = src.shape[1]
        return pyra.modulate(src, dst, pyra.widen(self.w_r).expand(r, -1) / math.sqrt(r), pyra.widen(self.w_d))

    def extra_repr(self):
        return f"r={self.r}, s={self.w_r.shape[1]}"


@pyra.on_model
def add_one_row(model, r, s=1):
    """PYRA with one row instead of one per pair: W_r = 1 w / sqrt(r), w (1, s) trained, for whatever number r of pairs merges.

    r, s as in pyra.add_pyra, but a block that has too few tokens merges half of them. The channel gate reads the sum of the pairs over
    sqrt(r), so its size doesn't depend on r: one adapter fits every schedule (load it, then set each reducer's r). Not in the paper, whose
    rows are ordered by similarity: two pairs that swap ranks, as rounding makes them, swap rows there; here nothing changes. s = 1 has
    dim + 1 parameters per block.
    Returns the model. Raises ValueError.
    """
    s = pyra.check_integer("s", s)
    entries = pyra.check_schedule(model, r)
    reducers = [OneRow(entry, model.embed_dim, s, model.specials).to(model.pos_embed) if entry else None for entry in entries]
    return pyra.set_reducers(model, reducers)


def add(model, config, plan):
    return add_one_row(model, budget.schedule(config, model), config.s)
