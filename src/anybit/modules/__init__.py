"""The layer classes of a packed model."""

from anybit.modules.embedding import QuantEmbedding
from anybit.modules.experts import QuantExperts
from anybit.modules.linear import QuantLinear, TiedLinear
from anybit.modules.packed import PackedWeight, Part

__all__ = ["PackedWeight", "Part", "QuantEmbedding", "QuantExperts", "QuantLinear", "TiedLinear"]
