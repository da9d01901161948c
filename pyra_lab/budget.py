"""Budgets: the operations that a config's rate allows, and how methods that choose their own numbers of tokens are held to them.

ToMe and PYRA merge by a schedule, so their operations are known beforehand. Every other method gets the same number. Those that
decide image by image, or learn how many tokens to keep, are counted (`forward_counted`), trained towards the budget
(`budget_loss`), and brought to it by one number after training (`calibrate`).
"""

from typing import Callable, NamedTuple

import torch

import pyra
from pyra_lab.devices import autocast


def schedule(config, model):
    """Pairs that the config's rate merges in each block of the model: a list of ints. Raises ValueError."""
    if isinstance(config.rate, list):
        return pyra.check_schedule(model, config.rate)
    try:
        return pyra.merge_schedule(config.rate, model=model)
    except ValueError as error:
        raise ValueError(f"rate {config.rate} doesn't suit the model: {error}") from error


@pyra.on_model
def counts_of_schedule(model, r):
    """Tokens before the first block and after each when merging by the schedule r, clamped as ToMe does it: a list of depth + 1 ints."""
    counts = [model.num_patches + model.specials]
    for entry in r:
        counts.append(counts[-1] - min(entry, pyra.most_merges(counts[-1], model.specials)))
    return counts


def target_macs(config, model):
    """Multiply-accumulates of the unpruned model when merged at the config's rate: every other method is held to this number. Raises ValueError."""
    return pyra.macs_of_counts(model, counts_of_schedule(model, schedule(config, model)))


# ---- Counting --------------------------------------------------------------------------------------------------------


def alive_mask(size):
    """(b, n, 1) float: 1 for a living token and 0 for a dead one, with the gradient of `size` (see reducers/shared.py)."""
    number = size.detach()
    return (number > 0).float() + (size - number) / torch.where(number > 0, number, 1)


@pyra.on_model
def learns_budget(model):
    """Whether the model's reducers learn how many tokens to keep."""
    return any(hasattr(block.reducer, "budget_weight") for block in model.blocks)


@pyra.on_model
def depends_on_image(model):
    """Whether the number of tokens depends on the image: such a model has to be counted and timed on real ones."""
    return any(getattr(block.reducer, "per_image", False) for block in model.blocks)


@pyra.on_model
def forward_counted(model, images):
    """images (b, 3, img_size, img_size) -> logits (b, num_classes), counts (depth + 1, b) float32.

    counts: the tokens alive before the first block and after each, special ones included. Where thresholds or rates are
    trained they have a gradient: see `budget_loss`. For evaluation see `mean_macs`.
    """
    tokens = model.embed(images)
    counts = [torch.full((len(images),), float(tokens.x.shape[1]), device=images.device)]
    for block in model.blocks:
        tokens = model.run_block(block, tokens)
        if model.training and hasattr(block.reducer, "tokens_expected"):
            counts.append(block.reducer.tokens_expected(counts[-1]))
        else:
            counts.append(alive_mask(pyra.with_sizes(tokens).size).sum(dim=(1, 2)))
    return model.head(model.pool(pyra.with_sizes(tokens))), torch.stack(counts)


@pyra.on_model
@torch.inference_mode()
def count_tokens(model, batches, dtype=torch.float32):
    """Tokens before the first block and after each, (depth + 1, images), in evaluation.

    Only where they depend on the image are batches of normalised images read; else there is one column that holds for all.
    """
    if not depends_on_image(model):
        return torch.tensor(pyra.token_counts(model))[:, None]
    model.eval()
    counts = []
    for x in batches:
        with autocast(x.device, dtype):
            counts.append(forward_counted(model, x)[1])
    return torch.cat(counts, dim=1) if counts else torch.zeros(len(model.blocks) + 1, 0)  # more processes than images


@pyra.on_model
@torch.inference_mode()
def check_counts(model):
    """Raises ValueError where a block leaves another number of tokens than its reducer's tokens_after says, by which costs are recorded."""
    if depends_on_image(model) or all(block.reducer is None for block in model.blocks):  # nothing to check
        return
    training, model = model.training, model.eval()
    n = model.pos_embed.shape[1]
    tokens = pyra.Tokens(model.pos_embed.detach(), None, torch.arange(n, device=model.pos_embed.device)[None])  # no image is needed
    for i, block in enumerate(model.blocks):
        n, tokens = tokens.x.shape[1], block(tokens)
        left = int(alive_mask(pyra.with_sizes(tokens).size).sum())
        if left != (said := n if block.reducer is None else block.reducer.tokens_after(n)):
            raise ValueError(f"block {i}: tokens_after({n}) of its {type(block.reducer).__name__} says {said} tokens, and {left} are left")
    model.train(training)


@pyra.on_model
def mean_macs(model, counts):
    """Multiply-accumulates of a forward pass, as in pyra.count_macs: the mean over the images of counts (depth + 1, images)."""
    counts = counts.cpu().double()  # Apple's GPUs have no float64
    macs = pyra.macs_of_counts(model, counts)
    for block, n, m in zip(model.blocks, counts, counts[1:]):
        if hasattr(block.reducer, "macs_saved"):
            macs = macs - block.reducer.macs_saved(n, m, block)
    return macs.mean().item()


# ---- Meeting a budget ------------------------------------------------------------------------------------------------


@pyra.on_model
def budget_loss(model, counts, macs):
    """The loss that brings the model to `macs`: weight ((MACs of counts - macs) / MACs of all blocks of the plain model)^2.

    counts: (depth + 1, b) of `forward_counted`; the mean over the batch counts. weight: the reducers' budget_weight.
    Raises ValueError.
    """
    if not learns_budget(model):
        raise ValueError("no reducer of the model learns how many tokens to keep: there is no budget to train")
    weight = next(block.reducer.budget_weight for block in model.blocks if hasattr(block.reducer, "budget_weight"))
    n, depth = model.num_patches + model.specials, len(model.blocks)
    plain = pyra.macs_of_counts(model, [n] * (depth + 1)) - pyra.macs_of_counts(model, [0] * (depth + 1))
    return weight * ((pyra.macs_of_counts(model, counts.mean(dim=1)) - macs) / plain) ** 2


class Dial(NamedTuple):
    """One number for all blocks by which a method is brought to its budget."""

    apply: Callable  # (x) -> the plan that this x makes (JSON), or None; sets the model to it. The operations increase with x
    low: float
    high: float


@torch.no_grad()
def calibrate(dial, model, config, images, dtype=torch.float32, broadcast=lambda x: x):
    """Turns the dial until the model costs the mean operations, over normalised images, that merging would leave it. Returns the plan.

    broadcast: gives every process the first one's x: sums in another order may tip a bisection.
    """
    target, low, high = target_macs(config, model), dial.low, dial.high
    for _ in range(12):  # a threshold to 0.0005: operations are steep in it
        x = (low + high) / 2
        dial.apply(x)
        macs = mean_macs(model, count_tokens(model, images.split(64), dtype))
        low, high = (x, high) if macs < target else (low, x)
    return dial.apply(broadcast(x))
