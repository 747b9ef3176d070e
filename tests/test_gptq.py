"""GPTQ beyond its goldens: gptqmodel's packer as referee, zero points of every maker, act-order, odd files, overrides."""

import itertools
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import anybit
from anybit import AutoModelForCausalLM, GPTQConfig
from anybit.algorithms import rtn
from anybit.errors import (
    CalibrationNeeded,
    CheckpointError,
    ConfigError,
    CorruptFile,
    InvalidOption,
    MissingTensor,
    NotRepresentable,
    ShapeMismatch,
)
from anybit.methods._gptq_layout import GptqLayout
from anybit.methods._per_module import settings_of
from anybit.methods.gptq import GptqHfQuantizer
from anybit.quantizers import AutoHfQuantizer, AutoQuantizationConfig
from anybit.testing import random_weight
from anybit.weight import ModuleInfo
from anybit.weight.weight import same

VECTORS = Path(__file__).parent / "golden" / "packer_vectors" / "gptq.safetensors"
NAME = "model.layers.0.mlp.up_proj"
GPTQMODEL = {"quantizer": ["gptqmodel:7.6.0"]}


def read_vectors() -> tuple[dict[str, dict[str, Any]], dict[str, torch.Tensor]]:
    with safe_open(VECTORS, "pt") as file:
        return json.loads(file.metadata()["cases"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


CASES, TENSORS = read_vectors()


def case_layout(case: dict[str, Any]) -> GptqLayout:
    """The layout that a quantizer of that configuration chooses, without its wish for multiples of 32."""
    rows, columns = map(int, case["weight"].split("x"))
    options = {name: case[name] for name in ("bits", "group_size", "sym", "format")}
    quantizer = GptqHfQuantizer(GPTQConfig(**options), pre_quantized=False)
    layout = quantizer.layout_for(ModuleInfo(NAME, "linear", (64, 64), "bfloat16"))
    assert isinstance(layout, GptqLayout)
    group_size = columns if case["group_size"] == -1 else case["group_size"]
    return GptqLayout(**{**vars(layout), "shape": (rows, columns), "group_size": group_size})


def stored_of(case: str) -> dict[str, torch.Tensor]:
    return {name: TENSORS[f"{case}.{name}"] for name in ("qweight", "qzeros", "scales", "g_idx")}


def layout_of(
    stored: dict[str, torch.Tensor],
    shape: tuple[int, int],
    config: GPTQConfig,
    told: list[str] | None = None,
    **module: Any,
) -> Any:
    """What the quantizer makes of stored tensors, as the plan would ask it."""
    infos = {
        name: SimpleNamespace(
            name=f"{NAME}.{name}", dtype=str(tensor.dtype).removeprefix("torch."), shape=tuple(tensor.shape)
        )
        for name, tensor in stored.items()
    }
    info = ModuleInfo(**{"name": NAME, "kind": "linear", "shape": shape, "dtype": "float16", **module})
    quantizer = GptqHfQuantizer(config)
    layout = quantizer.layout_of(info, infos, stored.__getitem__)
    if told is not None:
        told += quantizer.decisions
    return layout


def packed(bits: int = 4, **options: Any) -> tuple[GptqLayout, dict[str, torch.Tensor]]:
    """Stored tensors with random contents, and their layout: 32 outputs, 96 inputs in groups of 32."""
    layout = GptqLayout((32, 96), "float16", bits, 32, **options)
    return layout, layout.encode(random_weight(layout.scheme(), bits))


# --- gptqmodel is the referee ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_rounding_to_nearest_gives_gptqmodels_bytes(case: str) -> None:
    weight, layout = TENSORS[f"weight.{CASES[case]['weight']}"], case_layout(CASES[case])
    ours = layout.encode(rtn.quantize(weight, layout.scheme(), **layout.algorithm_options()))  # type: ignore[arg-type]
    for name, theirs in stored_of(case).items():
        assert torch.equal(ours[name], theirs), name


@pytest.mark.parametrize("case", CASES)
def test_gptqmodels_bytes_mean_what_the_format_says(case: str) -> None:
    """Against a plain reader of the format's text: bit by bit, one number at a time."""
    layout, stored = case_layout(CASES[case]), stored_of(case)
    weight = layout.decode(stored)
    for name, again in layout.encode(weight).items():
        assert torch.equal(again, stored[name]), name
    dense, bits = weight.to_dense("float32"), layout.bits
    words, zero_words = (stored[name].numpy().view(np.uint32) for name in ("qweight", "qzeros"))
    if CASES[case]["format"] == "gptq" and bits in (2, 4, 8):
        one = sum(1 << place for place in range(0, 32, bits))
        zero_words = ((zero_words.astype(np.uint64) + one) & 0xFFFFFFFF).astype(np.uint32)
    for row, column in [(0, 0), (1, 31), (2, 32), (5, 33), (6, 63), (7, 71), (30, 17), (31, 5)]:
        group = column // layout.group_size
        zero = plain_code(zero_words[group], row, bits, layout.planar)
        if CASES[case]["format"] == "gptq" and bits not in (2, 4, 8):
            zero = (zero + 1) % (1 << bits)
        code = plain_code(words[:, row], column, bits, layout.planar)
        assert dense[row, column] == stored["scales"][group, row].float() * (code - zero)


def plain_code(words: Any, number: int, bits: int, planar: bool) -> int:
    """Code `number` of a column of words, from single bits."""

    def bit(place: int) -> int:
        return int(words[place // 32]) >> (place % 32) & 1

    if not planar:
        return sum(bit(number * bits + place) << place for place in range(bits))
    code, low, first = 0, 0, number // 32 * 32 * bits
    for width in {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}.get(bits, (bits,)):
        start = first + 32 * low + number % 32 * width
        code |= sum(bit(start + place) << place for place in range(width)) << low
        low += width
    return code


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
def test_encode_and_decode_are_inverse(bits: int, scale_dtype: str) -> None:
    for zeros, index, shape in itertools.product(
        ("v1", "v2"), ("plain", "absent", "unused", "columns"), ((32, 96), (1, 40), (40, 72))
    ):
        if shape[0] % 32 and bits in (5, 6, 7):
            continue  # planes are cut from 32 codes
        layout = GptqLayout(shape, "bfloat16", bits, 32, scale_dtype, zeros, bits in (5, 6, 7), index)
        weight = random_weight(layout.scheme(), 1)
        stored = layout.encode(weight)
        assert same(layout.decode(stored), weight)
        assert layout.specs() == {name: (str(t.dtype)[6:], tuple(t.shape)) for name, t in stored.items()}


def test_negative_scales_are_numbers_like_others() -> None:
    layout, stored = packed()
    stored["scales"] = -stored["scales"]
    assert torch.equal(
        layout.decode(stored).to_dense(), -layout.decode({**stored, "scales": -stored["scales"]}).to_dense()
    )
    assert torch.equal(layout.encode(layout.decode(stored))["scales"], stored["scales"])


# --- zero points ----------------------------------------------------------------------------------------------------------


def auto_gptq_words(zeros: torch.Tensor, bits: int) -> torch.Tensor:
    """Zero points [groups, out] as AutoGPTQ packs them for 2, 4 and 8 bits: z - 1 as uint32, shifted, ORed together."""
    fields = zeros.numpy().astype(np.uint32) - np.uint32(1)
    words = np.zeros((zeros.shape[0], zeros.shape[1] * bits // 32), dtype=np.uint32)
    for column in range(zeros.shape[1]):
        words[:, column * bits // 32] |= fields[:, column] << np.uint32(column * bits % 32)
    return torch.from_numpy(words.astype(np.int32))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_points_of_auto_gptq_read_as_auto_gptq_reads_them(bits: int) -> None:
    top = (1 << bits) - 1
    zeros = torch.randint(1, top, (3, 32), generator=torch.Generator().manual_seed(bits))
    zeros[1, 5] = zeros[2, 31] = 0
    _, stored = packed(bits)
    stored["qzeros"] = auto_gptq_words(zeros, bits)
    told: list[str] = []
    found = layout_of(stored, (32, 96), GPTQConfig(bits, group_size=32, sym=False), told)
    assert found.zeros == "v1_unmasked"
    assert "as AutoGPTQ computes them" in told[0]
    weight = found.decode(stored)
    fields = torch.stack([stored["qzeros"] >> place & top for place in range(0, 32, bits)], -1).flatten(1)
    assert torch.equal(weight.tree.zero.integers().T, fields + 1)  # stored + 1, never masked: up to 2**bits
    assert int(weight.tree.zero.integers().max()) == top + 1
    assert torch.equal(found.encode(weight)["qzeros"], stored["qzeros"])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_points_whose_reading_all_makers_share(bits: int) -> None:
    layout, stored = packed(bits, zeros="v2")
    weight = layout.decode(stored)
    zeros = weight.tree.zero.integers().clamp(min=1).to(torch.int32)  # type: ignore[attr-defined]
    stored["qzeros"] = GptqLayout((32, 96), "float16", bits, 32)._write_zeros(zeros.T)
    for config in (
        GPTQConfig(bits, group_size=32, sym=sym, meta=meta) for sym in (True, False) for meta in (None, GPTQMODEL)
    ):
        found = layout_of(stored, (32, 96), config)
        assert found.zeros == ("v1" if config.meta else "v1_agreed")
        assert torch.equal(found.decode(stored).tree.zero.integers(), zeros)
        assert torch.equal(found.encode(found.decode(stored))["qzeros"], stored["qzeros"])


@pytest.mark.parametrize(
    ("meta", "zeros"),
    [
        ({"quantizer": ["gptqmodel:7.6.0"]}, "v1"),
        ({"quantizer": "gptqmodel:0.9.0"}, "v1"),
        ({"quantizer": ["optimum:1.24.0", "gptqmodel:2.2.0"]}, "v1"),
        ({"quantizer": ["anybit:0.1.0"]}, "v1"),
        ({"quantizer": ["gptqmodel:0.8.9"]}, "v1_unmasked"),
        ({"quantizer": ["auto_gptq:0.7.1"]}, "v1_unmasked"),
    ],
)
def test_the_maker_decides_what_a_zero_point_of_zero_looks_like(meta: Any, zeros: str) -> None:
    _, stored = packed()
    stored["qzeros"] = auto_gptq_words(torch.zeros(3, 32, dtype=torch.int64), 4)  # words of ones
    assert layout_of(stored, (32, 96), GPTQConfig(4, group_size=32, sym=False, meta=meta)).zeros == zeros


def test_zero_points_nobody_can_have_meant_for_sure_are_an_error_with_the_evidence() -> None:
    _, stored = packed(zeros="v2")
    stored["qzeros"] = torch.full((3, 4), 0x7F777777, dtype=torch.int32)  # one field of ones in the middle of each word
    config = GPTQConfig(4, group_size=32, sym=False)
    with pytest.raises(
        CheckpointError, match=r"up_proj\.qzeros' stores 15 .* gptqmodel .* means 0 .*AutoGPTQ 16.*meta.*quantizer"
    ):
        layout_of(stored, (32, 96), config)
    config.meta = {"quantizer": ["auto_gptq:0.7.1"]}  # the cure it names
    assert layout_of(stored, (32, 96), config).zeros == "v1_unmasked"
    with pytest.raises(CorruptFile, match=r"'qzeros' stores 15 .*sym: true"):
        layout_of(stored, (32, 96), GPTQConfig(4, group_size=32)).decode(stored)


def test_a_zero_point_readers_disagree_about_is_not_written() -> None:
    layout, stored = packed(zeros="v2")
    weight = layout.decode({**stored, "qzeros": torch.zeros_like(stored["qzeros"])})
    with pytest.raises(NotRepresentable, match=r"zero point of 0 .*gptq_v2"):
        GptqLayout((32, 96), "float16", 4, 32, zeros="v1_agreed").encode(weight)


# --- g_idx ----------------------------------------------------------------------------------------------------------------

REORDERED = torch.tensor([2, 0, 1] * 32, dtype=torch.int32)


def test_act_order_keeps_every_columns_group() -> None:
    _, stored = packed(index="columns")
    stored["g_idx"] = REORDERED
    found = layout_of(stored, (32, 96), GPTQConfig(4, group_size=32, desc_act=True, meta=GPTQMODEL))
    assert found.index == "columns"
    weight = found.decode(stored)
    plain = (
        GptqLayout((32, 96), "float16", 4, 32)
        .decode({**stored, "g_idx": torch.arange(96, dtype=torch.int32) // 32})
        .tree
    )
    numbers = plain.codes.integers().float()  # type: ignore[attr-defined]
    zero = plain.zero.integers().float()[:, REORDERED.long()]  # type: ignore[attr-defined]
    scale = plain.scale.dense()[:, REORDERED.long()]  # type: ignore[attr-defined]
    assert torch.equal(weight.to_dense("float32"), (numbers - zero) * scale)
    assert torch.equal(found.encode(weight)["g_idx"], REORDERED)


@pytest.mark.parametrize(
    ("index", "kind"),
    [
        (torch.arange(96, dtype=torch.int32) // 32, "plain"),
        (None, "absent"),
        (torch.zeros(96, dtype=torch.int32), "unused"),
    ],
    ids=["plain", "absent", "unused"],
)
def test_an_index_without_act_order_leaves_plain_groups(index: Any, kind: str) -> None:
    layout, stored = packed(index="absent")
    if index is not None:
        stored["g_idx"] = index
    told: list[str] = []
    found = layout_of(stored, (32, 96), GPTQConfig(4, group_size=32, meta=GPTQMODEL), told)
    assert found.index == kind
    assert [what.partition(" ")[0] for what in told] == (["g_idx"] if kind == "unused" else [])
    weight = found.decode(stored)
    assert same(weight, layout.decode(stored))
    assert weight.tree.group_index is None
    assert set(found.encode(weight)) == set(stored)
    for name, tensor in found.encode(weight).items():
        assert torch.equal(tensor, stored[name])


BAD_INDEX: dict[str, tuple[torch.Tensor | None, type[Exception], str]] = {
    "missing": (None, MissingTensor, r"up_proj\.g_idx' is not in the checkpoint"),
    "all zero": (torch.zeros(96, dtype=torch.int32), CorruptFile, r"up_proj\.g_idx' is all zero"),
    "out of range": (REORDERED + 1, CorruptFile, r"'g_idx' names groups 1 to 3, but there are 3"),
    "negative": (REORDERED - 1, CorruptFile, r"'g_idx' names groups -1 to 1, but there are 3"),
    "short": (REORDERED[:-1].clone(), ShapeMismatch, "'g_idx' is int32"),
    "of another dtype": (REORDERED.long(), ShapeMismatch, "'g_idx' is int64"),
}


@pytest.mark.parametrize("case", BAD_INDEX)
def test_a_wrong_index_is_named(case: str) -> None:
    index, error, words = BAD_INDEX[case]
    _, stored = packed(index="absent")
    if index is not None:
        stored["g_idx"] = index
    with pytest.raises(error, match=words):
        layout_of(stored, (32, 96), GPTQConfig(4, group_size=32, desc_act=True, meta=GPTQMODEL)).decode(stored)


def test_static_groups_need_no_index() -> None:
    _, stored = packed(index="absent")
    for extra in ({"static_groups": True}, {"meta": {**GPTQMODEL, "static_groups": True}}):
        config = GPTQConfig.from_dict({"bits": 4, "group_size": 32, "desc_act": True, "meta": GPTQMODEL, **extra})
        assert layout_of(stored, (32, 96), config).index == "absent"


# --- configuration against tensors ------------------------------------------------------------------------------------------


def change(stored: dict[str, torch.Tensor], **changes: Any) -> dict[str, torch.Tensor]:
    changed = {name: changes[name](tensor) if name in changes else tensor for name, tensor in stored.items()}
    return {name: tensor for name, tensor in changed.items() if tensor is not None}


CONTRADICTIONS: dict[str, tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = {
    "width": ({"bits": 8}, {}, ShapeMismatch, r"qweight' is int32 \(12, 32\); qweight holds 4 bits.*8 bits.*\(24, 32\)"),
    "group size": ({"group_size": 48}, {}, ShapeMismatch, r"qzeros' is int32 \(3, 4\); .*scales are of groups of 32.*of 48"),
    "no qweight": ({}, {"qweight": lambda _: None}, MissingTensor, r"up_proj\.qweight' is not in"),
    "no qzeros": ({}, {"qzeros": lambda _: None}, MissingTensor, r"up_proj\.qzeros' is not in"),
    "no scales": ({}, {"scales": lambda _: None}, MissingTensor, r"up_proj\.scales' is not in"),
    "transposed": ({}, {"qweight": lambda t: t.T}, ShapeMismatch, r"up_proj\.qweight' is int32 \(32, 12\)"),
    "one row less": ({}, {"scales": lambda t: t[:-1]}, ShapeMismatch, r"up_proj\.scales' is float16 \(2, 32\)"),
    "words of 64 bits": ({}, {"qweight": lambda t: t.long()}, ShapeMismatch, r"up_proj\.qweight' is int64"),
    "integer scales": ({}, {"scales": lambda t: t.int()}, ShapeMismatch, r"up_proj\.scales' is int32"),
    "dynamic says dense": (
        {"dynamic": {r"-:.*up_proj": {}}}, {}, ShapeMismatch, r"up_proj is stored packed, but .*'dynamic'"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_contradiction_shows_what_the_tensors_are(case: str) -> None:
    options, changes, error, words = CONTRADICTIONS[case]
    _, stored = packed()
    config = GPTQConfig(**{"bits": 4, "group_size": 32, "meta": GPTQMODEL, **options})
    with pytest.raises(error, match=words):
        layout_of(change(stored, **changes), (32, 96), config)


def test_damaged_numbers_are_named() -> None:
    layout, stored = packed()
    for bad in (float("nan"), float("inf")):
        scales = stored["scales"].clone()
        scales[1, 7] = bad
        with pytest.raises(CorruptFile, match=rf"'scales' holds {bad} at \[1, 7\]"):
            layout.decode({**stored, "scales": scales})
    narrow = GptqLayout((30, 90), "float16", 4, 32)
    stored = narrow.encode(random_weight(narrow.scheme()))
    for name, place in (("qweight", (11, 0)), ("qzeros", (0, 3))):
        words = stored[name].clone()
        words[place] ^= -(1 << 31)
        with pytest.raises(CorruptFile, match=f"'{name}' has bits set behind its last code"):
            narrow.decode({**stored, name: words})


def test_what_is_dense_or_of_another_kind_is_not_gptqs() -> None:
    config = GPTQConfig(4, group_size=32)
    assert layout_of({"weight": torch.zeros(32, 96)}, (32, 96), config) is None
    _, stored = packed()
    with pytest.raises(NotRepresentable, match="packed embedding"):
        layout_of(stored, (32, 96), config, kind="embedding")
    with pytest.raises(NotRepresentable, match="Marlin"):
        layout_of({"B": torch.zeros(6, 64), "s": torch.zeros(3, 32)}, (32, 96), config)


def test_a_bias_of_zeros_for_a_layer_without_one() -> None:
    """Files of 2023 store biases for layers that have none."""
    _, stored = packed()
    stored["bias"] = torch.zeros(32, dtype=torch.float16)
    config = GPTQConfig(4, group_size=32, meta=GPTQMODEL)
    layout = layout_of(stored, (32, 96), config)
    encoded = layout.encode(layout.decode(stored))
    assert torch.equal(encoded["bias"], stored["bias"])
    assert encoded["bias"].dtype == torch.float16
    stored["bias"][3] = 1
    with pytest.raises(ShapeMismatch, match=r"up_proj\.bias' holds numbers, but the model's Linear has no bias"):
        layout_of(stored, (32, 96), config)
    with pytest.raises(CorruptFile, match="'bias' has padding that is not zero"):
        layout.decode(stored)


# --- dynamic --------------------------------------------------------------------------------------------------------------

DYNAMIC = {
    r"-:.*\.k_proj": {},
    r"+:model\.layers\.1\..*": {"bits": 8, "group_size": 64, "sym": False},
    r".*down_proj": {"bits": 3, "format": "gptq_v2"},
    r"model\.layers\.1": {"bits": 2},
}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.self_attn.k_proj", None),
        ("model.layers.1.self_attn.k_proj", None),
        ("model.layers.1.mlp.down_proj", (8, 64, False, "gptq")),
        ("model.layers.0.mlp.down_proj", (3, 128, True, "gptq_v2")),
        ("model.layers.10.mlp.up_proj", (2, 128, True, "gptq")),
        ("x.model.layers.1.mlp.up_proj", (4, 128, True, "gptq")),
    ],
)
def test_the_first_matching_pattern_wins(name: str, expected: Any) -> None:
    found = settings_of(GPTQConfig(4, dynamic=DYNAMIC), name)
    assert (found and (found.bits, found.group_size, found.symmetric, found.format)) == expected


@pytest.mark.parametrize(
    ("dynamic", "words"),
    [
        ({".*": {"bits": 9}}, r"dynamic '\.\*': GPTQConfig: bits is 9"),
        ({".*": {"group_size": 0}}, "group_size is 0"),
        ({".*": {"bits": "4"}}, "write the number 4"),
        ({"(": {}}, "not a valid regular expression"),
        ({".*": 4}, "must map patterns"),
        ([".*"], "dynamic is"),
    ],
)
def test_a_wrong_override_is_refused_with_its_pattern(dynamic: Any, words: str) -> None:
    with pytest.raises(InvalidOption, match=words):
        GPTQConfig(4, dynamic=dynamic)
    with pytest.raises(InvalidOption, match=words):
        AutoQuantizationConfig.from_dict({"quant_method": "gptq", "bits": 4, "dynamic": dynamic})


def test_a_pattern_that_would_take_for_ever_does_not() -> None:
    config = GPTQConfig(4, dynamic={"(a+)+(a+)+(a+)+b": {"bits": 8}})
    start = time.perf_counter()
    assert settings_of(config, "a" * 200).bits == 4  # type: ignore[union-attr]
    assert time.perf_counter() - start < 2


# --- configuration --------------------------------------------------------------------------------------------------------

ARGUMENTS: list[dict[str, Any]] = [
    {"bits": 4},
    {
        "bits": 3,
        "group_size": -1,
        "desc_act": True,
        "sym": False,
        "checkpoint_format": "GPTQ_V2",
        "backend": "AUTO_TRAINABLE",
    },
    {"bits": 8, "dataset": "c4", "tokenizer": "x", "block_name_to_quantize": "model.layers", "max_input_length": 4096},
    {"bits": 2, "dataset": ["a", "b"], "meta": GPTQMODEL, "damp_percent": 0.01, "pad_token_id": 3},
]


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_the_configuration_is_transformers(arguments: dict[str, Any]) -> None:
    theirs = transformers.GPTQConfig(**arguments)
    ours = GPTQConfig(**arguments)
    assert ours.to_dict() == theirs.to_dict()
    assert ours.get_loading_attributes() == theirs.get_loading_attributes()
    assert json.loads(ours.to_json_string()) == json.loads(theirs.to_json_string())


def test_dynamic_is_written_back() -> None:
    config = GPTQConfig(4, dynamic=DYNAMIC)
    again = AutoQuantizationConfig.from_dict(json.loads(config.to_json_string()))
    assert again.to_dict()["dynamic"] == DYNAMIC
    assert "dynamic" not in GPTQConfig(4).to_dict()


@pytest.mark.parametrize(
    "stored",
    [
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
        {"quant_method": "marlin", "bits": 4, "group_size": 128},
        {"quant_method": "bitblas", "bits": 4},
        {"quant_method": "gptq", "bits": 4, "is_marlin_format": True},
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "bitblas"},
    ],
)
def test_rearranged_weights_are_refused_before_any_is_read(stored: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"(marlin|bitblas)'.*original GPTQ checkpoint"):
        AutoHfQuantizer.from_config(stored).validate_environment()


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(InvalidOption, match="format is 'gptq_v3'; it must be 'gptq', 'gptq_v2' or 'gptq_p'"):
        AutoHfQuantizer.from_config(GPTQConfig(4, format="gptq_v3")).validate_environment()


def test_asking_for_calibration_is_not_answered_with_rounding() -> None:
    for options in ({"dataset": "c4"}, {"tokenizer": "some/name"}, {"dataset": ["text"], "tokenizer": "some/name"}):
        with pytest.raises(CalibrationNeeded, match=f"asks for calibration .{', '.join(options)}."):
            AutoHfQuantizer.from_config(GPTQConfig(4, **options), pre_quantized=False)
        AutoHfQuantizer.from_config(GPTQConfig(4, **options))  # a finished checkpoint may tell how it was made


# --- creating -------------------------------------------------------------------------------------------------------------


def reason_for(config: GPTQConfig, name: str, kind: str = "linear", shape: tuple[int, ...] = (64, 64)) -> str:
    quantizer = GptqHfQuantizer(config, pre_quantized=False)
    layout = quantizer.layout_for(ModuleInfo(name, kind, shape, "float32"))
    return type(layout).__name__ if layout is not None else quantizer.skip_reasons[name]


@pytest.mark.parametrize(
    ("options", "name", "words"),
    [
        ({}, NAME, "GptqLayout"),
        ({}, "lm_head", "outside the repeated blocks"),
        ({}, "model.layers.0.mlp.gate", "router"),
        ({"dynamic": DYNAMIC}, "model.layers.0.self_attn.k_proj", "'dynamic' leaves it dense"),
        ({"block_name_to_quantize": "model.layers"}, "visual.blocks.0.fc1", "outside 'model.layers'"),
        ({"block_name_to_quantize": "model.layers"}, NAME, "GptqLayout"),
        (
            {"modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.down_proj"]]},
            NAME,
            "modules_in_block_to_quantize",
        ),
        ({"modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.up_proj"]]}, NAME, "GptqLayout"),
    ],
)
def test_which_layers_are_quantized(options: dict[str, Any], name: str, words: str) -> None:
    assert words in reason_for(GPTQConfig(4, group_size=32, **options), name)


def test_what_the_format_cannot_hold_stays_dense() -> None:
    config = GPTQConfig(4, group_size=32)
    assert "32 rows and columns" in reason_for(config, NAME, shape=(64, 72))
    assert "kind 'embedding'" in reason_for(config, "model.layers.0.embed", "embedding")
    assert "kind 'experts'" in reason_for(config, "model.layers.0.mlp.experts.gate_up_proj", "experts", (4, 64, 64))
    assert reason_for(config, "transformer.h.0.attn.c_attn", "conv1d") == "GptqLayout"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with random weights, dense, as transformers writes it; biases in its attention."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attention_bias=True, dtype="bfloat16", tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0, 0.1)
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    return folder


IDS = torch.arange(3, 27).view(2, 12)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits.float()
    return found


OPTIONS: dict[str, dict[str, Any]] = {
    "4 bits": {"bits": 4, "group_size": 32},
    "2 bits, asymmetric": {"bits": 2, "group_size": 32, "sym": False},
    "3 bits, v2": {"bits": 3, "group_size": 64, "sym": False, "format": "gptq_v2"},
    "3 bits, planar": {"bits": 3, "group_size": 32, "format": "gptq_p"},
    "6 bits": {"bits": 6, "group_size": 32, "sym": False},
    "8 bits, whole rows": {"bits": 8, "group_size": -1},
    "mixed": {
        "bits": 4,
        "group_size": 32,
        "dynamic": {"-:.*k_proj": {}, "+:.*down_proj": {"bits": 8, "group_size": 96}},
    },
}


@pytest.mark.parametrize("case", OPTIONS)
def test_a_checkpoint_made_here_loads_with_the_same_numbers(case: str, llama: Path, tmp_path: Path) -> None:
    anybit.quantize(llama, tmp_path / "made", GPTQConfig(**OPTIONS[case]))
    stored = load_file(tmp_path / "made" / "model.safetensors")
    dense = load_file(llama / "model.safetensors")
    names = [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]
    assert len(names) == (12 if case == "mixed" else 14)
    quantizer = GptqHfQuantizer(GPTQConfig(**OPTIONS[case]), pre_quantized=False)
    for name in names:
        weight = dense[f"{name}.weight"]
        layout: Any = quantizer.layout_for(ModuleInfo(name, "linear", tuple(weight.shape), "bfloat16"))
        for part, tensor in layout.encode(rtn.quantize(weight, layout.scheme(), **layout.algorithm_options())).items():
            assert torch.equal(stored[f"{name}.{part}"], tensor), f"{name}.{part}"
    config = json.loads((tmp_path / "made" / "config.json").read_text())["quantization_config"]
    assert config["meta"]["quantizer"] == [f"anybit:{anybit.__version__}"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    loading = AutoModelForCausalLM.from_pretrained(llama, quantization_config=GPTQConfig(**OPTIONS[case]))
    assert torch.equal(logits(model), logits(loading))
    twin = transformers.LlamaForCausalLM.from_pretrained(llama)
    for name in names:
        twin.get_submodule(name).weight.data = model.get_submodule(name).dequantize(torch.bfloat16)
    assert (logits(model) - logits(twin)).abs().max() < 0.05  # bfloat16 products, accumulated differently


def test_the_output_layer_on_request(llama: Path, tmp_path: Path) -> None:
    config = AutoQuantizationConfig.from_dict({"quant_method": "gptq", "bits": 4, "group_size": 32, "lm_head": True})
    anybit.quantize(llama, tmp_path / "made", config)
    assert "lm_head.qweight" in load_file(tmp_path / "made" / "model.safetensors")
    plan = anybit.explain(AutoModelForCausalLM.from_pretrained(tmp_path / "made"))
    assert {entry.slot.module: entry.layout for entry in plan.entries}["lm_head"] == "GptqLayout"


def test_a_folder_as_auto_gptq_wrote_it_in_2023(llama: Path, tmp_path: Path) -> None:
    """No quantization_config in config.json, quantize_config.json beside it, no g_idx, biases of zeros, its own file name."""
    anybit.quantize(llama, tmp_path / "made", GPTQConfig(4, group_size=32))
    old = tmp_path / "old"
    old.mkdir()
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    del config["quantization_config"]
    (old / "config.json").write_text(json.dumps(config))
    legacy = {
        "bits": 4, "group_size": 32, "damp_percent": 0.01, "desc_act": False, "static_groups": False, "sym": True,
        "true_sequential": True, "model_name_or_path": None, "model_file_base_name": "gptq_model-4bit-32g",
    }  # fmt: skip
    (old / "quantize_config.json").write_text(json.dumps(legacy))
    stored = load_file(tmp_path / "made" / "model.safetensors")
    kept = {name: tensor for name, tensor in stored.items() if not name.endswith("g_idx")}
    for name in [name for name in kept if name.endswith("_proj.qweight") and "mlp" in name]:
        rows = kept[name].shape[1]
        kept[name.replace("qweight", "bias")] = torch.zeros(rows, dtype=torch.float16)
    save_file(kept, old / "gptq_model-4bit-32g.safetensors", {"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(old)
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "made")))


def test_conv1d_and_single_experts_are_stored_as_linears(tmp_path: Path) -> None:
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=96, n_embd=64, n_layer=1, n_head=4, n_positions=64, dtype="float32")
    )
    moe = transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            vocab_size=96,
            hidden_size=64,
            intermediate_size=96,
            moe_intermediate_size=32,
            num_experts=4,
            num_experts_per_tok=2,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
        )
    )
    for model, name, shape in (
        (gpt2, "transformer.h.0.attn.c_attn", (8, 192)),
        (moe, "model.layers.0.mlp.experts.3.gate_proj", (8, 32)),
    ):
        folder = tmp_path / type(model).__name__
        model.eval().save_pretrained(folder / "dense")
        anybit.quantize(folder / "dense", folder / "made", GPTQConfig(4, group_size=32))
        stored = load_file(folder / "made" / "model.safetensors")
        assert tuple(stored[f"{name}.qweight"].shape) == shape
        assert not any(name.endswith(("mlp.gate.qweight", "wte.qweight")) for name in stored)
        loaded = AutoModelForCausalLM.from_pretrained(folder / "made")
        twin = anybit.load(folder / "made", dequantize=True)
        assert (logits(loaded) - logits(twin)).abs().max() < 1e-4
