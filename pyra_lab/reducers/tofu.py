"""ToFu, token fusion: prune in the early blocks, merge with the norms kept in the late ones."""

import torch
import torch.nn.functional as F

import pyra
from pyra_lab import budget
from pyra_lab.reducers.shared import gather_tokens


def mlerp(tokens, matching):
    """Merges by MLERP: a group's mean, each token counting as one, stretched to the largest norm of the group. Tracks no sizes."""
    order, dst = matching
    stay, src = order.split([order.shape[1] - dst.shape[1], dst.shape[1]], dim=1)
    x, x_src = pyra.take(tokens.x, stay), pyra.take(tokens.x, src)
    norm = x.float().norm(dim=-1).scatter_reduce(1, dst, x_src.float().norm(dim=-1), "amax")
    mean = F.normalize(pyra.add_at(pyra.widen(x), dst, pyra.widen(x_src)).float(), dim=-1) * norm[..., None]  # of a sum or a mean, the direction is the same
    unmerged = torch.ones_like(norm).scatter(1, dst, 0) > 0
    place = torch.cat([torch.arange(x.shape[1], device=dst.device).expand(len(dst), -1), dst], dim=1)
    new_index = torch.empty_like(order).scatter(1, order, place)
    size = None if tokens.size is None else pyra.add_at(pyra.take(tokens.size, stay), dst, pyra.take(tokens.size, src))  # of blocks that do track them
    return pyra.Tokens(torch.where(unmerged[..., None], x, mean.to(x.dtype)), size, pyra.follow(tokens.source, new_index))


class ToFu(pyra.ToMe):
    """ToMe's matching, whose sources are pruned in the early blocks and merged by MLERP in the late ones."""

    def __init__(self, r, late, specials=1):
        super().__init__(r, specials)
        self.late = late

    def forward(self, tokens, qkv):
        n = tokens.x.shape[1]
        if self.tokens_after(n) == n:
            return tokens
        matching = self.match(qkv)
        return mlerp(tokens, matching) if self.late else gather_tokens(tokens, matching.order[:, :self.tokens_after(n)])


@pyra.on_model
def add_tofu(model, r):
    """ToFu, token fusion (Kim et al., WACV 2024, arXiv 2312.01026): early blocks prune the r most similar patches, late ones merge them.

    r as in pyra.add_tome. Blocks up to the middle, 0 to 6 of 12, prune: the early layers are far from linear, and an average
    of two tokens means little to them. The others merge by MLERP, which keeps the norms that averaging shrinks. No code of
    the authors is public; ports of it divide by the destination's norm instead of the mean's, so that the norm is not the
    largest of the group as it should be. Sizes are not tracked: there is no proportional attention. Returns the model.
    Raises ValueError.
    """
    middle = len(model.blocks) // 2
    return pyra.set_reducers(model, [ToFu(entry, i > middle, model.specials) if entry else None for i, entry in enumerate(pyra.check_schedule(model, r))])


def add(model, config, plan):
    return add_tofu(model, budget.schedule(config, model))
