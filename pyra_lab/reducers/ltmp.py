"""LTMP, learned thresholds token merging and pruning: two thresholds per block decide for each image how many tokens stay."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

import pyra
from pyra_lab.budget import Dial, alive_mask
from pyra_lab.reducers.shared import attend_with_gradient, attention_rows, gather_tokens, size_with_gradient, straight_through

TEMPERATURE = 0.1


def step_above(value, threshold):
    """1 where the value is above the threshold, else 0; with the gradient of a sigmoid."""
    return straight_through((value > threshold).float(), ((value - threshold) / TEMPERATURE).sigmoid())


class LTMP(nn.Module):
    """Merges tokens that are more similar than one learned threshold, then prunes those less important than another."""

    per_image = True
    lrs = {"merge_threshold": 5e-3, "prune_threshold": 5e-6}  # an importance is about 1 / n, and so is the threshold for it
    budget_weight = 10.0

    def __init__(self, specials=1):
        super().__init__()
        self.specials = specials
        self.merge_threshold = nn.Parameter(torch.tensor(0.9))  # at 1 only pruning would be learned
        self.prune_threshold = nn.Parameter(torch.tensor(0.0))

    def tokens_after(self, n):
        raise ValueError("LTMP keeps as many tokens as each image needs: count them with budget.forward_counted, their cost with budget.mean_macs")

    @torch.no_grad()
    def after_step(self):
        self.merge_threshold.clamp_(0, 1)
        self.prune_threshold.clamp_(0, 1)

    @torch.no_grad()
    def similarity(self, qkv, dead):
        """For each even token its highest similarity to an odd one, -inf where it must not merge, and the index of that one: (b, a) each."""
        scores = pyra.similarities(qkv.metric(), self.specials)
        return scores.masked_fill(dead[:, ::2, None] | dead[:, None, 1::2], -math.inf).max(dim=-1)

    @torch.no_grad()
    def importance(self, qkv, size):
        """The mean attention that a token gets from living ones, (b, n). Infinite for what is not to be pruned: special tokens, dead ones, which are gone
        already, and the most important patch, since a model may have nothing else to classify."""
        rows, alive, dead = attention_rows(qkv, size).mean(dim=1), (size > 0).float(), size[..., 0] == 0
        importance = (rows * alive).sum(dim=1) / alive.sum(dim=1)
        top = importance.masked_fill(dead, -1)[:, self.specials:].argmax(dim=1, keepdim=True) + self.specials
        importance[:, :self.specials] = math.inf
        return importance.masked_fill(dead, math.inf).scatter(1, top, math.inf)

    def forward(self, tokens, qkv):
        x, size, source = pyra.with_sizes(tokens._replace(x=pyra.widen(tokens.x)))
        (b, n, _), p = x.shape, self.specials
        if n <= max(p, 1):  # one patch alone has no partner, and is not to be pruned
            return tokens
        alive, dead = alive_mask(size), size[..., 0] == 0
        number = torch.where(dead[..., None], 1, size.detach())
        best, partner = self.similarity(qkv, dead)
        importance = self.importance(qkv, size.detach())

        # merging: a source is averaged into its partner, which becomes as important as the most important of the group
        merges = step_above(best, self.merge_threshold)  # (b, a)
        gone = merges.detach()[..., None]
        weight = number[:, ::2] * gone
        total = pyra.add_at(number[:, 1::2], partner, weight)
        x_odd = pyra.add_at(x[:, 1::2] * number[:, 1::2].to(x.dtype), partner, x[:, ::2] * weight.to(x.dtype)) / total.to(x.dtype)
        given = importance[:, ::2].masked_fill(gone[..., 0] == 0, -math.inf)
        importance = torch.cat([importance[:, ::2], importance[:, 1::2].scatter_reduce(1, partner, given, "amax")], dim=1)
        x, number = torch.cat([x[:, ::2], x_odd], dim=1), torch.cat([number[:, ::2], total], dim=1)
        alive = torch.cat([alive[:, ::2] * (1 - merges[..., None]), alive[:, 1::2]], dim=1)
        evens, place = partner.shape[1], torch.arange(n, device=x.device)
        new_index = source.new_empty(b, n)
        new_index[:, ::2] = torch.where(gone[..., 0] > 0, evens + partner, place[:evens])
        new_index[:, 1::2] = place[evens:]

        # pruning; then dead tokens go last, so that the next block pairs the others as if the dead weren't there
        alive = alive * step_above(importance, self.prune_threshold)[..., None]
        size = size_with_gradient(number, alive)
        key = (size.detach()[..., 0] == 0).int() + 1
        key[:, :(p + 1) // 2] = place[:p:2] - p  # special tokens in front, in their order
        key[:, evens:evens + p // 2] = place[1:p:2] - p
        order = key.argsort(dim=1, stable=True)
        if not self.training:
            order = order[:, :F.pad((key < 2).sum(dim=1), (0, 1), value=p).amax()]  # a batch may be empty
        return gather_tokens(pyra.Tokens(x.to(tokens.x.dtype), size, pyra.follow(source, new_index)), order)


@pyra.on_model
def add_ltmp(model):
    """LTMP, learned thresholds token merging and pruning (Bonnaerens & Dambre, TMLR 2023, arXiv 2307.10780), two thresholds per block.

    Even tokens whose keys are more similar to an odd token's than merge_threshold merge into it, as in ToMe; then tokens
    whose mean attention, of all heads and queries, is no more than prune_threshold go. In training nothing is removed: dead
    tokens have size 0 (see `attend_with_gradient`), and a straight-through sigmoid gives the thresholds their gradient. In
    evaluation a batch is cut to its longest image. Train with the logits and counts of `budget.forward_counted`,
    `budget.budget_loss` for a budget, and `after_step` after each step.

    The published code leaves the dead where they are in training, so that blocks pair other tokens than in evaluation,
    and evaluates images one by one. Returns the model. Raises ValueError.
    """
    return pyra.set_reducers(model, [LTMP(model.specials) for _ in model.blocks], attend=attend_with_gradient)


@pyra.on_model
def dial(model, config):
    """What is added to the learned merging thresholds, in all blocks alike. There is no plan: thresholds are in the adapter."""
    thresholds = [(block.reducer.merge_threshold, block.reducer.merge_threshold.item()) for block in model.blocks]

    def apply(x):
        for threshold, learned in thresholds:
            threshold.fill_(min(max(learned + x, 0), 1))

    return Dial(apply, -1, 1)


def add(model, config, plan):
    return add_ltmp(model)
