"""Adapter: a bottleneck in series after each MLP."""

import torch.nn as nn
import torch.nn.functional as F

import pyra
from pyra_lab.pefts.shared import finish_peft


class Adapter(nn.Module):
    """x + m + adapter(m), where m is the MLP's branch and adapter(m) = W2 dropout(phi(W1 m + b1)) + b2, phi the quick GELU."""

    def __init__(self, dim, hidden, dropout):
        super().__init__()
        self.down, self.up, self.dropout = nn.Linear(dim, hidden), nn.Linear(hidden, dim), dropout
        for linear in (self.down, self.up):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.normal_(linear.bias, std=1e-6)

    def forward(self, tokens, u, branch):
        # the branch comes after drop path: a dropped sample still gets the adapter's biases
        return tokens.x + branch + self.up(F.dropout(pyra.ACTS["quick_gelu"](self.down(branch)), self.dropout, self.training))

    def macs(self, n):
        return 2 * n * self.down.weight.numel()


@pyra.on_model
def add_adapter(model, dim=8, dropout=0.1):
    """Adapter (Houlsby et al., ICML 2019) as NOAH and PYRA use it: one per block, in series after the MLP, with its own skip.

    dim: the bottleneck. dropout: inside it, in training. The weights start as Xavier has it, not at zero, so training does not
    start at the pre-trained model; the published code re-initialises them to a truncated normal, 0.02. Freezes the backbone.
    Returns the model. Raises ValueError.
    """
    pyra.check_peft(model, dropout, dim=dim)
    for block in model.blocks:
        block.peft_mlp = Adapter(model.embed_dim, dim, dropout).to(model.pos_embed)
    return finish_peft(model, "Adapter", dim=dim)


def add(model, config):
    return add_adapter(model, config.peft_dim, config.dropout)
