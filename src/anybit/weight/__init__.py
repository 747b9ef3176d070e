"""What a quantized weight is: an expression tree over stored tensors."""

from anybit.weight.activation import Activation
from anybit.weight.layout import Layout, ModuleInfo
from anybit.weight.nodes import (
    Codebook,
    Codes,
    Columns,
    Crop,
    Grid,
    Masked,
    Node,
    Opaque,
    Permute,
    Rotate,
    Rows,
    Scaled,
    Sparse,
    Stack,
    Sum,
    Transpose,
    Values,
    View,
)
from anybit.weight.weight import Weight

__all__ = [
    "Activation",
    "Codebook",
    "Codes",
    "Columns",
    "Crop",
    "Grid",
    "Layout",
    "Masked",
    "ModuleInfo",
    "Node",
    "Opaque",
    "Permute",
    "Rotate",
    "Rows",
    "Scaled",
    "Sparse",
    "Stack",
    "Sum",
    "Transpose",
    "Values",
    "View",
    "Weight",
]
