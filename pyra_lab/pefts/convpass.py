"""Convpass: a convolutional bypass beside attention and another beside the MLP."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

import pyra
from pyra_lab.pefts.shared import check_scale, finish_peft

# What the published code sets for each task: the scale s, and whether the convolution starts as the identity or as Xavier has it.
CONVPASS = {
    "cifar100": (0.1, "identity"), "caltech101": (1.0, "identity"), "dtd": (0.01, "xavier"), "oxford_flowers102": (0.1, "xavier"),
    "oxford_pet": (1.0, "xavier"), "svhn": (100.0, "xavier"), "sun397": (0.1, "identity"), "patch_camelyon": (10.0, "identity"),
    "eurosat": (10.0, "identity"), "resisc45": (10.0, "identity"), "diabetic_retinopathy": (1.0, "identity"),
    "clevr_count": (1.0, "identity"), "clevr_dist": (0.1, "xavier"), "dmlab": (10.0, "identity"), "kitti": (10.0, "xavier"),
    "dsprites_loc": (100.0, "xavier"), "dsprites_ori": (0.1, "xavier"), "smallnorb_azi": (100.0, "xavier"), "smallnorb_ele": (1.0, "xavier"),
}


def convpass_settings(task):
    """add_convpass's scale and init for a task of VTAB-1k, by its name in vtab.VTAB; for any other 1 and "identity"."""
    scale, init = CONVPASS.get(task, (1.0, "identity"))
    return dict(scale=scale, init=init)


class Convpass(nn.Module):
    """x + branch + bypass(u), a bottleneck with a 3x3 convolution over the image: s W_u dropout(phi(conv(phi(W_d u + b_d)))) + s b_u."""

    def __init__(self, dim, hidden, grid, scale, init, dropout, drop_path_rate):
        super().__init__()
        self.down, self.up = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.conv = nn.Conv2d(hidden, hidden, 3, padding=1)
        self.grid, self.scale, self.dropout, self.drop_path_rate = grid, scale, dropout, drop_path_rate
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.zeros_(self.up.weight)  # training starts at the pre-trained model
        nn.init.xavier_uniform_(self.conv.weight) if init == "xavier" else nn.init.dirac_(self.conv.weight)
        for part in (self.down, self.conv, self.up):
            nn.init.zeros_(part.bias)

    def forward(self, tokens, u, branch):
        return tokens.x + branch + pyra.drop_path(self.bypass(u, tokens.source), self.drop_path_rate if self.training else 0.0)

    def bypass(self, x, source):
        """x (b, n, c); source (b, specials + patches), as in pyra.Tokens: which token holds each patch. Returns (b, n, c).

        Merging breaks up the grid, for which Convpass has no rule. Here each patch reads the token that holds it, the
        convolution runs over the whole grid, and a token gets the mean of its patches; nothing merged, it is Convpass.
        A patch whose token is gone (source -1) reads zero, as beyond the border.
        A token without a patch, such as a special one, is an image of 1x1 pixels: it sees the centre of the kernel.
        """
        z = pyra.ACTS["quick_gelu"](self.down(x))  # (b, n, h)
        where = source[:, source.shape[1] - math.prod(self.grid):]
        held, where = where[..., None] >= 0, where.clamp(min=0)
        patches = self.conv(rearrange(torch.where(held, pyra.take(z, where), 0), "b (y x) h -> b h y x", y=self.grid[0]))
        patches = F.pad(rearrange(patches, "b h y x -> b (y x) h").float(), (0, 1), value=1.0) * held  # with a 1 appended, which counts them
        total = pyra.add_at(patches.new_zeros(*x.shape[:2], patches.shape[2]), where, patches)
        total, count = total[..., :-1], total[..., -1:]
        isolated = F.linear(z, self.conv.weight[:, :, 1, 1], self.conv.bias)
        z = torch.where(count > 0, (total / count.clamp(min=1)).to(isolated.dtype), isolated)
        return self.scale * self.up(F.dropout(pyra.ACTS["quick_gelu"](z), self.dropout, self.training))

    def macs(self, n):
        return 2 * n * self.down.weight.numel() + math.prod(self.grid) * self.conv.weight.numel() + n * self.conv.weight[:, :, 1, 1].numel()


@pyra.on_model
def add_convpass(model, dim=8, scale=1.0, init="identity", dropout=0.1):
    """Convpass (Jie & Deng, 2022, arXiv 2207.07039): a convolutional bypass beside attention and another beside the MLP.

    dim: the bottleneck. scale, init ("identity" or "xavier", of the convolution): the paper picks them task by task, see
    `convpass_settings`. dropout: in the bottleneck, in training. Freezes the backbone. Returns the model. Raises ValueError.
    """
    pyra.check_peft(model, dropout, dim=dim)
    check_scale(scale)
    if init not in ("identity", "xavier"):
        raise ValueError(f"init must be 'identity' or 'xavier', not {init!r}")
    for block in model.blocks:
        for name in ("peft_attn", "peft_mlp"):
            bypass = Convpass(model.embed_dim, dim, model.grid, float(scale), init, dropout, block.drop_path_rate)
            setattr(block, name, bypass.to(model.pos_embed))
    return finish_peft(model, "Convpass", dim=dim, scale=float(scale))


def defaults(task):
    return dict(peft_scale=convpass_settings(task)["scale"])


def add(model, config):
    return add_convpass(model, config.peft_dim, config.peft_scale, convpass_settings(config.task)["init"], config.dropout)
