"""What a quantized weight is: an expression tree over stored tensors.

Names resolve at first access: method files are read when a backend is selected, which must not cost the whole tree.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from anybit._names import lazy

if TYPE_CHECKING:
    from anybit.weight.activation import Activation
    from anybit.weight.layout import Layout, ModuleInfo
    from anybit.weight.nodes import (
        Codebook,
        Codes,
        Columns,
        Crop,
        Divided,
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
    "Divided",
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

_HOME = {"Activation": "activation", "Layout": "layout", "ModuleInfo": "layout", "Weight": "weight"}
__getattr__, __dir__ = lazy(__name__, {name: f"{__name__}.{_HOME.get(name, 'nodes')}" for name in __all__})
