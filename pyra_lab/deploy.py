"""From a trained model to one that serves: packed for a CPU, or an ONNX file that needs no PyTorch, in float32 or int8."""

import contextlib
import copy
import json
import logging
import os
import tempfile
import warnings
from collections import OrderedDict

import numpy as np
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


LARGEST = 2_000_000_000  # bytes of weights: protobuf takes no message of 2 GiB


@pyra.on_model
def check_export(model, path, mean, std, classes=()):
    """Raises ValueError for what export_onnx can't write."""
    for name, values in (("mean", mean), ("std", std)):
        if not isinstance(values, (list, tuple)) or len(values) != 3 or not all(isinstance(v, (int, float)) and 0 <= v <= 1 for v in values):
            raise ValueError(f"{name} must be three numbers from 0 to 1, of pixels scaled to [0, 1], not {values!r}")
    if 0 in std:
        raise ValueError(f"std must be greater than 0, not {std!r}")
    if len(classes) not in (0, model.num_classes):
        raise ValueError(f"classes must name all of the model's {model.num_classes} classes, not {len(classes)}")
    if not os.path.isdir(os.path.dirname(os.path.abspath(path))):
        raise ValueError(f"there is no folder for {str(path)!r}")
    if (size := 4 * sum(p.numel() for p in model.parameters())) > LARGEST:
        raise ValueError(f"an ONNX file holds at most 2 GB, and the weights take {size / 1e9:.1f}: export with --formats none (formats=() in Python)")
    if any(isinstance(module, PackedLinear) for module in model.modules()):
        raise ValueError("the model is packed for this CPU: export it before pack")
    for block in model.blocks:
        if getattr(block.reducer, "per_image", False):
            name = type(block.reducer).__name__
            raise ValueError(f"{name} keeps as many tokens as an image needs, but an ONNX graph keeps the same number for every image: "
                             "export with --formats none (formats=() in Python), and predict with the run")


def simplify(graph):
    """Simplifies a model of onnxscript's, in place, as its own optimizer does, less a rule that takes nine tenths of the time and never applies here."""
    import onnx_ir.passes.common as passes
    from onnxscript import optimizer, rewriter
    from onnxscript.rewriter.rules import common as rules
    applied = [rules.materialize_reshape_shape_rule, rules.reshape_reshape_rule, rules.no_op_cast_rule, rules.no_op_expand_rule,
               rules.unsqueeze_unsqueeze_rule, rules.collapse_slice_rule, rules.collapse_slice2_rule]
    for _ in range(2):  # one makes work for the other
        optimizer.fold_constants_ir(graph)
        rewriter.rewrite(graph, applied)
    for step in (passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0), passes.DeduplicateInitializersPass(),
                 passes.CommonSubexpressionEliminationPass(), passes.RemoveUnusedNodesPass()):
        step(graph)


@pyra.on_model
@torch.no_grad()
def export_onnx(model, path, mean, std, classes=(), crop=False):
    """Writes the model for serving without PyTorch: one ONNX file, with normalisation, merging and modulation inside, LoRA folded in.

    Input "images": uint8 (b, 3, height, width), RGB, any b. Output "logits": float32 (b, num_classes).
    mean, std: three numbers each, of pixels scaled to [0, 1], as in training; no default suits every backbone.
    classes: names by label, and crop: as in serving.Predictor; both are kept in the file's metadata, where serving.load finds them.
    The model stays as it is. Raises ImportError without onnxscript, ValueError.
    """
    check_export(model, path, mean, std, classes)
    if crop and not isinstance(model.img_size, int):
        raise ValueError(f"crop cuts squares out of images, and the model takes {model.img_size[0]} x {model.img_size[1]} pixels")
    try:
        import onnx_ir
        from onnxscript import opset18 as op
    except ImportError as error:
        raise ImportError("export_onnx needs onnxscript: pip install onnxscript") from error

    def stable_sort(x, stable, dim=-1, descending=False):  # the exporter has none, but ONNX's TopK is stable
        return op.TopK(x, op.Gather(op.Shape(x), [dim]), axis=dim, largest=descending)

    def index_add(x, dim, index, y):  # the exporter's own, ScatterND, sometimes loses a sum in onnxruntime with several threads
        assert dim == 0 and len(y.shape) == 2  # as pyra.add_at calls it
        return op.ScatterElements(x, op.Expand(op.Unsqueeze(index, 1), op.Shape(y)), y, axis=0, reduction="add")

    pipeline = nn.Sequential(FromPixels(mean, std), fold(copy.deepcopy(model).float().cpu())).eval()
    images = torch.zeros(2, 3, *(side * model.patch_size for side in model.grid), dtype=torch.uint8)  # two: an axis of length one would be exported as fixed
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*(LeafSpec|treespec)", FutureWarning)  # PyTorch's own use of what it is about to rename
        program = torch.onnx.export(
            pipeline, (images,), dynamo=True, optimize=False, verbose=False, input_names=["images"], output_names=["logits"], dynamic_shapes=[{0: "b"}],
            custom_translation_table={torch.ops.aten.sort.stable: stable_sort, torch.ops.aten.index_add.default: index_add},
        )
    simplify(program.model)
    for node in program.model.graph:
        node.metadata_props.clear()  # stack traces, with paths of this machine
    program.model.metadata_props.update(classes=json.dumps(list(classes)), crop=str(bool(crop)))
    files.write_atomically(path, lambda partial: onnx_ir.save(program.model, str(partial)))  # program.save would put more than 1.5 GB into a second file


# ---- int8 ------------------------------------------------------------------------------------------------------------


def linear_maps(graph):
    """The matrix products of an ONNX graph with a weight -> [(node, the weight's initializer)]."""
    weights = {tensor.name: tensor for tensor in graph.initializer if len(tensor.dims) == 2}
    return [(node, weights[node.input[1]]) for node in graph.node if node.op_type == "MatMul" and node.input[1] in weights]


def run_onnx(model, names, images):
    """Runs an ONNX model, a ModelProto, on uint8 images (n, 3, h, w), 8 at a time. Yields the values of those names for each 8."""
    import onnxruntime
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for start in range(0, len(images), 8):
        yield session.run(names, {"images": images[start : start + 8]})


def largest_inputs(model, images):
    """The largest absolute value in each input channel of each linear map, over the images: {value's name: (c,)}."""
    import onnx
    probe, largest = onnx.ModelProto(), {}
    probe.CopyFrom(model)
    names = list(dict.fromkeys(node.input[0] for node, _ in linear_maps(probe.graph)))
    probe.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names)
    for values in run_onnx(probe, names, images):
        for name, value in zip(names, values):
            largest[name] = np.maximum(largest.get(name, 0), np.abs(value).reshape(-1, value.shape[-1]).max(axis=0))
    return largest


def smooth(model, largest, alpha):
    """Moves what is hard to quantise from activations to weights, channel by channel, in place: SmoothQuant, arXiv 2211.10438, Eq. (4).

    x w = (x / s) (s w) with s_j = max|x_j|^alpha / max|w_j|^(1 - alpha): the same product, with the outliers of few channels divided.
    """
    import onnx
    scales = {}
    for node, tensor in linear_maps(model.graph):
        w = onnx.numpy_helper.to_array(tensor)  # (c_in, c_out)
        s = np.maximum(largest[node.input[0]], 1e-5) ** alpha / np.maximum(np.abs(w).max(axis=1), 1e-5) ** (1 - alpha)
        tensor.CopyFrom(onnx.numpy_helper.from_array((w * s[:, None]).astype(np.float32), tensor.name))
        scales[node.name] = onnx.numpy_helper.from_array((1 / s).astype(np.float32), f"{node.name}.scale")
    model.graph.initializer.extend(scales.values())
    nodes = list(model.graph.node)
    del model.graph.node[:]
    for node in nodes:
        if node.name in scales:
            scaled = f"{node.name}.scaled"
            model.graph.node.append(onnx.helper.make_node("Mul", [node.input[0], f"{node.name}.scale"], [scaled]))
            node.input[0] = scaled
        model.graph.node.append(node)
    return model


def quantize_onnx(path, out, images=None):
    """Writes a file of export_onnx with its linear maps in int8, for CPUs: a quarter of the size, and faster where the CPU multiplies int8 (VNNI, AMX).

    Weights are rounded per output channel, activations as they come (dynamic quantisation of onnxruntime); the head, sums, softmax and
    merging stay float32. In a batch, a map's activations share one scale, so an image's logits depend a little on its neighbours. images:
    some to calibrate on, uint8 (n, 3, height, width), from those that were trained on. With them the outliers of few channels, which
    ViTs have, are smoothed first (see `smooth`) with the alpha, of a few, whose logits are closest to float32's. Returns how far these
    are: their root mean square difference over that of float32's logits; None without images.
    Raises ImportError without onnxruntime, ValueError.
    """
    try:
        import onnx
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError as error:
        raise ImportError("quantize_onnx needs onnx and onnxruntime: pip install onnx onnxruntime") from error
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    model = onnx.load(path)
    if images is not None:
        images = np.asarray(images)
        shape = tuple(dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim[1:])
        if images.dtype != np.uint8 or images.shape[1:] != shape or not len(images):
            raise ValueError(f"images must be uint8 (n, {', '.join(map(str, shape))}), not {images.dtype} {images.shape}")

    def quantize(source):
        with tempfile.TemporaryDirectory() as folder, quiet_root_logger():  # it reads and writes files
            # unsigned weights: on CPUs with AVX2 or AVX512 but without VNNI, products of signed ones saturate at 16 bits, and logits go wrong
            quantize_dynamic(source, f"{folder}/int8.onnx", op_types_to_quantize=["MatMul"], weight_type=QuantType.QUInt8, per_channel=True)
            return onnx.load(f"{folder}/int8.onnx")

    if images is None:
        best, distance = quantize(model), None
    else:
        expected, largest = np.concatenate([logits for logits, in run_onnx(model, None, images)]), largest_inputs(model, images)
        tried = []
        for alpha in (0.6, 0.75, 0.9):
            smoothed = onnx.ModelProto()
            smoothed.CopyFrom(model)
            quantized = quantize(smooth(smoothed, largest, alpha))
            logits = np.concatenate([logits for logits, in run_onnx(quantized, None, images)])
            tried.append((float(np.sqrt(((logits - expected) ** 2).mean() / (expected**2).mean())), alpha, quantized))
        distance, _, best = min(tried, key=lambda entry: entry[:2])
    best.metadata_props.MergeFrom([entry for entry in model.metadata_props if entry.key not in {known.key for known in best.metadata_props}])
    files.write_atomically(out, lambda partial: onnx.save(best, str(partial)))
    return distance


@contextlib.contextmanager
def quiet_root_logger():
    """Without the advice that onnxruntime logs each time, to optimise first what onnxruntime optimises anyway."""
    logger, level = logging.getLogger(), logging.getLogger().level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
