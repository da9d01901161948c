"""DTEM, in a cheaper form: ToMe whose tokens are compared by a learned metric."""

import torch
import torch.nn as nn
from einops import rearrange

import pyra
from pyra_lab import budget
from pyra_lab.reducers.shared import merge_learned


class DTEM(pyra.ToMe):
    """ToMe that compares a trained linear map of the keys, whose gradient comes straight through the matching."""

    def __init__(self, r, num_heads, head_dim, specials=1):
        super().__init__(r, specials)
        self.metric = nn.Linear(num_heads * head_dim, head_dim)
        with torch.no_grad():
            self.metric.weight.copy_(torch.eye(head_dim).repeat(1, num_heads) / num_heads)  # the mean key: training starts at ToMe
            self.metric.bias.zero_()

    def forward(self, tokens, qkv):
        n, p = tokens.x.shape[1], self.specials
        if self.tokens_after(n) == n:
            return tokens
        keys = qkv.k if qkv.unrotated is None else qkv.unrotated
        with torch.autocast(tokens.x.device.type, enabled=False):
            metric = self.metric(rearrange(keys.detach().to(self.metric.weight.dtype), "b h n d -> b n (h d)"))
        matching = pyra.match(metric, n - self.tokens_after(n), p)
        stay = matching.order[:, :self.tokens_after(n)]
        return merge_learned(tokens, metric, matching, (stay % 2 == 1) & (stay >= p), self.modulate)


@pyra.on_model
def add_dtem(model, r):
    """A learned metric for ToMe, after DTEM (Lee and Hong, NeurIPS 2024, arXiv 2412.10569). r as in pyra.add_tome.

    In evaluation it is DTEM's: ToMe with a linear map of the block's input in place of the mean key; here a linear map of its keys, which are
    one of that input, to as many dimensions as a head has. In training it is cheaper and not the paper's: tokens do merge, as in
    evaluation, and the metric gets FPET's straight-through gradient (see `merge_learned`). DTEM merges softly, so that all tokens stay until
    the end of training: r softmaxes per block, one after the other, and attention over the full length. No gradient reaches the backbone's
    keys. Returns the model. Raises ValueError.
    """
    heads = [block.attn.num_heads for block in model.blocks]  # where channels were pruned, they differ
    widths = [block.attn.proj.in_features // h for block, h in zip(model.blocks, heads)]
    rows = zip(pyra.check_schedule(model, r), heads, widths)
    return pyra.set_reducers(model, [DTEM(entry, h, width, model.specials) if entry else None for entry, h, width in rows])


def add(model, config, plan):
    return add_dtem(model, budget.schedule(config, model))
