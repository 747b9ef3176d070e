"""GPTQ's goldens under all laws."""

from anybit.testing import MethodConformance


class TestGptq(MethodConformance):
    method = "gptq"
    variants = ("w3_g64_sym", "w4_g128_sym", "w5_g64_asym_planar", "w8_gch_sym")
    legal_mutations = {
        ("g_idx", "missing"): "files without act-order may leave g_idx out: groups are then runs of columns, as here",
    }


class TestGptqActOrder(MethodConformance):
    method = "gptq"
    variants = ("w4_g32_asym_desc_act",)
