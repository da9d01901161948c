"""SNF: a normalizing flow on each of a block's two identity shortcuts."""

import torch
import torch.nn as nn

import pyra
from pyra_lab.pefts.shared import finish_peft


class Flow(nn.Module):
    """flow(x) + branch, where flow maps each token x -> shift + exp(log_scale) x, then `flows` times x -> x + a tanh(w^T x + b)."""

    def __init__(self, dim, flows, affine):
        super().__init__()
        self.dim, self.flows, self.affine = dim, flows, affine
        if affine:
            self.shift, self.log_scale = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        if flows:
            self.w, self.a, self.b = (nn.Parameter(torch.empty(*shape).uniform_(-0.01, 0.01)) for shape in ((flows, dim), (flows, dim), (flows,)))

    def forward(self, tokens, u, branch):
        return self.flow(tokens.x) + branch

    def flow(self, x):
        y = self.shift + self.log_scale.exp() * x if self.affine else x
        for k in range(self.flows):
            y = y + (y @ self.w[k] + self.b[k]).tanh()[..., None] * self.a[k]
        return y.to(x.dtype)

    def macs(self, n):
        return n * self.dim * (self.affine + 2 * self.flows)


@pyra.on_model
def add_snf(model, flows=0, affine=True):
    """SNF (Wang et al., CVPR 2023): a normalizing flow on each of a block's two identity shortcuts.

    flows: planar flows after the affine one. The paper's 0.036 M parameters for ViT-B are those of the affine flow alone,
    the default here (36,864), but also those of one planar flow without it (36,888); the published code's 16 have 627,072.
    The default starts at the pre-trained model. No log-determinant enters the loss. Freezes the backbone. Returns the model.
    Raises ValueError.
    """
    pyra.check_peft(model)
    pyra.check_integer("flows", flows, least=0)
    if not flows and not affine:
        raise ValueError("SNF without affine needs flows of at least 1")
    for block in model.blocks:
        for name in ("peft_attn", "peft_mlp"):
            setattr(block, name, Flow(model.embed_dim, flows, bool(affine)).to(model.pos_embed))
    return finish_peft(model, "SNF", flows=flows, affine=bool(affine))


def add(model, config):
    return add_snf(model)
