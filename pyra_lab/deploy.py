"""From a trained model to one that serves: packed for a CPU, or an ONNX file that needs no PyTorch."""

import copy
import os
from collections import OrderedDict

import torch
import torch.nn as nn

import pyra
from pyra_lab import files
from pyra_lab.methods import fold


class PackedLinear(nn.Module):
    """A frozen linear map on a CPU whose weight has the layout that oneDNN computes in; GELU in the same pass if asked for."""

    def __init__(self, linear, activation="none"):
        super().__init__()
        self.in_features, self.out_features, self.activation = linear.in_features, linear.out_features, activation
        self.bias = linear.bias
        self.packed_bytes = linear.weight.nbytes
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())  # opaque: neither a parameter nor a buffer

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, self.activation, [], "none")


@pyra.on_model
def pack(model):
    """Prepares a model for a CPU, where nn.Linear rearranges its weight at each call: the same logits, to rounding, for less work.

    The last step before inference, after `fold`, `.to(dtype)` and everything that reads weights: packed weights can't be saved,
    moved or exported. Returns the model. Raises ValueError.
    """
    parts = [part for block in model.blocks for part in (*block.attn.children(), *block.mlp.children())]
    if {type(part) for part in parts} != {nn.Linear} or model.pos_embed.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        raise ValueError("pack needs oneDNN and a model on a CPU with plain linear layers: fold LoRA or FacT in first, and pack only once")
    for block in model.blocks:
        block.attn.qkv, block.attn.proj = PackedLinear(block.attn.qkv), PackedLinear(block.attn.proj)
        if block.mlp.act == "gelu":
            block.mlp = nn.Sequential(OrderedDict(fc1=PackedLinear(block.mlp.fc1, "gelu"), fc2=PackedLinear(block.mlp.fc2)))
        else:
            block.mlp.fc1, block.mlp.fc2 = PackedLinear(block.mlp.fc1), PackedLinear(block.mlp.fc2)
    return model.eval()


class FromPixels(nn.Module):
    """uint8 images (b, 3, h, w) -> normalised, float32. mean, std: three numbers each, of pixels scaled to [0, 1]."""

    def __init__(self, mean, std):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(3, 1, 1))

    def forward(self, images):
        return (images.float() / 255 - self.mean) / self.std


@pyra.on_model
def check_export(model, path, mean, std):
    """Raises ValueError for what export_onnx can't write."""
    for name, values in (("mean", mean), ("std", std)):
        if not isinstance(values, (list, tuple)) or len(values) != 3 or not all(isinstance(v, (int, float)) and 0 <= v <= 1 for v in values):
            raise ValueError(f"{name} must be three numbers from 0 to 1, of pixels scaled to [0, 1], not {values!r}")
    if 0 in std:
        raise ValueError(f"std must be greater than 0, not {std!r}")
    if not os.path.isdir(os.path.dirname(os.path.abspath(path))):
        raise ValueError(f"there is no folder for {str(path)!r}")
    if any(isinstance(module, PackedLinear) for module in model.modules()):
        raise ValueError("the model is packed for this CPU: export it before pack")
    for block in model.blocks:
        if getattr(block.reducer, "per_image", False):
            name = type(block.reducer).__name__
            raise ValueError(f"{name} keeps as many tokens as an image needs, but an ONNX graph keeps the same number for every image")


@pyra.on_model
@torch.no_grad()
def export_onnx(model, path, mean, std):
    """Writes the model for serving without PyTorch: one ONNX file, with normalisation, merging and modulation inside, LoRA folded in.

    Input "images": uint8 (b, 3, img_size, img_size), RGB, any b. Output "logits": float32 (b, num_classes).
    mean, std: three numbers each, of pixels scaled to [0, 1], as in training; no default suits every backbone.
    The model stays as it is. Raises ImportError without onnxscript, ValueError.
    """
    check_export(model, path, mean, std)
    try:
        from onnxscript import opset18 as op
    except ImportError as error:
        raise ImportError("export_onnx needs onnxscript: pip install onnxscript") from error

    def stable_sort(x, stable, dim=-1, descending=False):  # the exporter has none, but ONNX's TopK is stable
        return op.TopK(x, op.Gather(op.Shape(x), [dim]), axis=dim, largest=descending)

    def index_add(x, dim, index, y):  # the exporter's own, ScatterND, sometimes loses a sum in onnxruntime with several threads
        assert dim == 0 and len(y.shape) == 2  # as pyra.add_at calls it
        return op.ScatterElements(x, op.Expand(op.Unsqueeze(index, 1), op.Shape(y)), y, axis=0, reduction="add")

    pipeline = nn.Sequential(FromPixels(mean, std), fold(copy.deepcopy(model).float().cpu())).eval()
    images = torch.zeros(2, 3, model.img_size, model.img_size, dtype=torch.uint8)  # two: an axis of length one would be exported as fixed
    program = torch.onnx.export(
        pipeline, (images,), dynamo=True, verbose=False, input_names=["images"], output_names=["logits"], dynamic_shapes=[{0: "b"}],
        custom_translation_table={torch.ops.aten.sort.stable: stable_sort, torch.ops.aten.index_add.default: index_add},
    )
    for node in program.model.graph:
        node.metadata_props.clear()  # stack traces, with paths of this machine
    files.write_atomically(path, lambda partial: program.save(str(partial)))
