"""HQQ's goldens under all laws: transformers' safetensors, and hqq's own qmodel.pt of versions 0.1 and 0.2."""

from anybit.testing import MethodConformance


class TestHqq(MethodConformance):
    method = "hqq"
    legal_mutations = {
        ("offload_meta", "missing"): "hqq leaves out what is None, and takes a missing one for that",
        ("W_q", "nan"): "with view_as_float the bytes of the codes are viewed as floats, and any byte is a code",
    }
