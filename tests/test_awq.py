"""AWQ beyond its goldens: AutoAWQ's, gptqmodel's and auto-round's packers as referees, contradictions, creation."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import anybit
from anybit import AutoModelForCausalLM, AwqConfig
from anybit.algorithms import rtn
from anybit.errors import (
    CalibrationNeeded,
    CorruptFile,
    InvalidOption,
    MissingTensor,
    NotRepresentable,
    ShapeMismatch,
    UnexpectedTensor,
)
from anybit.methods._awq_layout import AwqGemmLayout, AwqGemvFastLayout, AwqGemvLayout
from anybit.methods.awq import AwqBackend, AwqFormat, AwqQuantizer
from anybit.quantizers import AutoHfQuantizer, AutoQuantizationConfig
from anybit.testing import random_weight
from anybit.weight import ModuleInfo
from anybit.weight.weight import same

VECTORS = Path(__file__).parent / "golden" / "packer_vectors" / "awq.safetensors"
NAME = "model.layers.0.mlp.up_proj"
# nibble n of a gemm word holds output ORDER[n] of eight
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def read_vectors() -> tuple[dict[str, dict[str, Any]], dict[str, torch.Tensor]]:
    with safe_open(VECTORS, "pt") as file:
        return json.loads(file.metadata()["cases"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


CASES, TENSORS = read_vectors()
WEIGHT = TENSORS["weight"]


def stored_of(case: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(f"{case}."): tensor for name, tensor in TENSORS.items() if name.startswith(f"{case}.")}


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def layout_of(stored: dict[str, torch.Tensor], shape: tuple[int, int], config: AwqConfig, **module: Any) -> Any:
    """What the quantizer makes of stored tensors, as the plan would ask it."""
    infos = {
        name: SimpleNamespace(
            name=f"{NAME}.{name}", dtype=str(tensor.dtype).removeprefix("torch."), shape=tuple(tensor.shape)
        )
        for name, tensor in stored.items()
    }
    info = ModuleInfo(**{"name": NAME, "kind": "linear", "shape": shape, "dtype": "float16", **module})
    return AwqQuantizer(config).layout_of(info, infos, stored.__getitem__)


def packed(
    form: str = "gemm", shape: tuple[int, int] = (64, 128), **options: Any
) -> tuple[Any, dict[str, torch.Tensor]]:
    """Stored tensors with random contents, and their layout; groups of 32."""
    config = AwqConfig(**{"format": form, "group_size": 32, **options})
    layout = AwqQuantizer(config, pre_quantized=False).layout_for(ModuleInfo(NAME, "linear", shape, "float16"))
    assert layout is not None
    return layout, layout.encode(random_weight(layout.scheme(), 1))


# --- the vendors are the referees ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_rounding_to_nearest_gives_the_vendors_bytes(case: str) -> None:
    quantizer = AwqQuantizer(AwqConfig(**CASES[case]), pre_quantized=False)
    layout: Any = quantizer.layout_for(ModuleInfo(NAME, "linear", tuple(WEIGHT.shape), "bfloat16"))
    ours = layout.encode(rtn.quantize(WEIGHT, layout.scheme(), **layout.algorithm_options()))
    theirs = stored_of(case)
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(raw(ours[name]), raw(tensor)), name


@pytest.mark.parametrize("case", CASES)
def test_the_vendors_bytes_mean_what_the_format_says(case: str) -> None:
    """Against a plain reader of the format's text, one number at a time."""
    stored, options = stored_of(case), CASES[case]
    layout = layout_of(stored, (64, 128), AwqConfig(**options))
    weight = layout.decode(stored)
    for name, tensor in layout.encode(weight).items():
        assert torch.equal(raw(tensor), raw(stored[name])), name
    dense = weight.to_dense("float32")
    for output, inner in [(0, 0), (5, 3), (6, 14), (7, 127), (33, 31), (34, 32), (35, 77), (63, 96)]:
        assert dense[output, inner] == plain_weight(stored, options, output, inner), (output, inner)


def bits_of(words: torch.Tensor, first: int, count: int) -> int:
    """`count` bits of a row of 16- or 32-bit words, from bit `first`."""
    size = 8 * words.element_size()
    return sum(
        (int(words[place // size]) >> place % size & 1) << place - first for place in range(first, first + count)
    )


def plain_weight(stored: dict[str, torch.Tensor], options: dict[str, Any], output: int, inner: int) -> torch.Tensor:
    bits, group = options["bits"], inner // options["group_size"]
    scales = stored["scales"].float()
    if options["format"] == "gemm":
        place = output // 8 * 8 + ORDER.index(output % 8) if bits == 4 else output
        code = bits_of(stored["qweight"][inner], place * bits, bits)
        return (code - bits_of(stored["qzeros"][group], place * bits, bits)) * scales[group, output]
    if options["format"] == "gemv":
        code = bits_of(stored["qweight"][output], 4 * inner, 4)
        return (code - bits_of(stored["qzeros"][output], 4 * group, 4)) * scales[output, group]
    j = inner % 32
    a, b, c = j // 8, j % 8 // 2, j % 2
    place = 64 * (output % 4) + 32 * (inner % 64 // 32) + 8 * b + 4 * c + a
    code = bits_of(stored["qweight"][output // 4], 4 * (256 * (inner // 64) + place), 4)
    zeros = stored["scaled_zeros" if options["format"] == "llm-awq" else "qzeros"].float()
    return code * scales[group, output] + zeros[group, output]


@pytest.mark.parametrize("bits", [5, 6, 7])
def test_auto_round_interleaves_other_widths_too(bits: int) -> None:
    codes, words = (TENSORS[f"auto_round-{bits}.{name}"] for name in ("codes", "qweight"))
    config = AwqConfig.from_dict({"bits": bits, "group_size": 32, "zero_point": True, "provider": "auto-round"})
    zeros = torch.zeros(2, bits, dtype=torch.int32)
    stored = {"qweight": words, "qzeros": zeros, "scales": torch.ones(2, 32, dtype=torch.float16)}
    layout = layout_of(stored, (32, 64), config)
    assert layout.interleaved
    assert torch.equal(layout.decode(stored).tree.codes.integers(), codes.T)
    assert torch.equal(layout.encode(layout.decode(stored))["qweight"], words)
    assert not layout_of(stored, (32, 64), AwqConfig(bits, 32)).interleaved


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
def test_encode_and_decode_are_inverse(bits: int, scale_dtype: str) -> None:
    layouts: list[Any] = [AwqGemmLayout((40, 96), "float16", bits, 32, scale_dtype, interleaved=bits == 4)]
    if bits == 4:
        layouts += [AwqGemvLayout((9, 320), "float16", 4, size, scale_dtype) for size in (16, 32, 64, 320)]
        layouts += [
            AwqGemvFastLayout((12, 320), "float16", 4, size, scale_dtype, zeros_name=name)
            for size, name in [(32, "qzeros"), (64, "scaled_zeros"), (320, "qzeros")]
        ]
    for layout in layouts:
        weight = random_weight(layout.scheme(), 2)
        stored = layout.encode(weight)
        assert same(layout.decode(stored), weight)
        assert layout.specs() == {name: (str(t.dtype)[6:], tuple(t.shape)) for name, t in stored.items()}


def test_a_short_last_word_of_three_bit_codes() -> None:
    layout = AwqGemmLayout((40, 64), "float16", 3, 32, interleaved=False)
    assert layout.specs()["qweight"] == ("int32", (64, 4))  # 120 bits
    stored = layout.encode(random_weight(layout.scheme()))
    stored["qweight"][5, 3] ^= -(1 << 31)
    with pytest.raises(CorruptFile, match="'qweight' has bits set behind its last code"):
        layout.decode(stored)


# --- damage and contradictions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [form.value for form in AwqFormat])
def test_scales_that_are_no_numbers_are_named(form: str) -> None:
    layout, stored = packed(form)
    for name in [name for name, tensor in stored.items() if tensor.is_floating_point()]:
        damaged = stored[name].clone()
        damaged[1, 1] = float("nan")
        with pytest.raises(CorruptFile, match=rf"'{name}' holds nan at \[1, 1\]"):
            layout.decode({**stored, name: damaged})


def test_padding_must_be_zero() -> None:
    for form, name, place in (
        ("gemv", "scales", (0, 31)),
        ("gemv", "qzeros", (0, 3)),
        ("gemv_fast", "qzeros", (31, 0)),
    ):
        layout, stored = packed(form)
        assert stored[name].shape[form == "gemv"] * (8 if name == "qzeros" and form == "gemv" else 1) == 32, (
            "of 4 groups"
        )
        damaged = stored[name].clone()
        damaged[place] = 1
        with pytest.raises(CorruptFile, match=f"'{name}' has (padding that is not zero|bits set behind)"):
            layout.decode({**stored, name: damaged})


def test_tensors_of_another_format_than_the_configuration_names() -> None:
    for stored_as in ("gemm", "gemv", "gemv_fast", "llm-awq"):
        _, stored = packed(stored_as)
        for named in ("gemm", "gemv", "gemv_fast", "llm-awq"):
            config = AwqConfig(group_size=32, version=named)
            if named == stored_as:
                assert (
                    layout_of(stored, (64, 128), config).encode(random_weight(packed(named)[0].scheme())).keys()
                    == stored.keys()
                )
                continue
            with pytest.raises((ShapeMismatch, MissingTensor), match=f"the tensors are arranged as '{stored_as}'"):
                layout_of(stored, (64, 128), config)


CONTRADICTIONS: dict[str, tuple[dict[str, Any], Any, type[Exception], str]] = {
    "group size": ({"group_size": 64}, None, ShapeMismatch, r"up_proj\.qzeros' is int32 \(4, 8\).*groups of 64"),
    "a group size that does not divide": ({"group_size": 48}, None, ShapeMismatch, r"128 inputs .* no whole .* groups of 48"),
    "width": ({"bits": 8}, None, ShapeMismatch, r"up_proj\.qweight' is int32 \(128, 8\).*8 bits.*\(128, 16\)"),
    "no scales": ({}, "scales", MissingTensor, r"up_proj\.scales' is not in the checkpoint"),
    "no qweight": ({}, "qweight", MissingTensor, r"up_proj\.qweight' is not in the checkpoint"),
    "no qzeros": ({}, "qzeros", MissingTensor, r"up_proj\.qzeros' is not in the checkpoint"),
    "dynamic says dense": ({"dynamic": {"-:.*up_proj": {}}}, None, NotRepresentable, "'dynamic' of the configuration"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_contradiction_shows_what_the_tensors_are(case: str) -> None:
    options, missing, error, words = CONTRADICTIONS[case]
    _, stored = packed()
    stored.pop(missing, None)
    with pytest.raises(error, match=words):
        layout_of(stored, (64, 128), AwqConfig(**{"group_size": 32, **options}))


def test_what_is_dense_or_of_another_kind_is_not_awqs() -> None:
    assert layout_of({"weight": torch.zeros(64, 128)}, (64, 128), AwqConfig()) is None
    with pytest.raises(NotRepresentable, match="packed embedding"):
        layout_of(packed()[1], (64, 128), AwqConfig(group_size=32), kind="embedding")


# --- configuration --------------------------------------------------------------------------------------------------------

ARGUMENTS: list[dict[str, Any]] = [
    {},
    {
        "bits": 8,
        "group_size": 64,
        "zero_point": False,
        "backend": "marlin",
        "modules_to_not_convert": ["lm_head", "mlp.gate"],
    },
    {"version": "GEMV"},
    {"format": "gemv_fast", "group_size": 32},
    {"format": "gemm", "version": "gemv"},
    {"backend": "llm-awq"},
    {"backend": "autoawq", "desc_act": True},
    {"backend": "EXLLAMA_V2", "sym": False, "dataset": ["text"], "tokenizer": "some/name"},
]


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_the_configuration_is_transformers(arguments: dict[str, Any]) -> None:
    theirs, ours = transformers.AwqConfig(**arguments), AwqConfig(**arguments)
    assert ours.to_dict() == theirs.to_dict()
    assert ours.get_loading_attributes() == theirs.get_loading_attributes()
    assert json.loads(ours.to_json_string()) == json.loads(theirs.to_json_string())
    again = AutoQuantizationConfig.from_dict(json.loads(ours.to_json_string()))
    assert type(again) is AwqConfig
    assert again.to_dict() == ours.to_dict()


def test_positions_and_names_are_transformers() -> None:
    assert (
        AwqConfig(4, 64, False, "auto", ["x"]).to_dict()
        == transformers.AwqConfig(4, 64, False, "auto", ["x"]).to_dict()
    )
    assert [form.value for form in AwqFormat] == [f.value for f in transformers.utils.quantization_config.AwqFormat]
    assert [b.value for b in AwqBackend] == [b.value for b in transformers.utils.quantization_config.AwqBackend]
    assert AwqConfig(backend=AwqBackend.MARLIN, format=AwqFormat.GEMV).format == "gemv"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 9}, "bits is 9"),
        ({"bits": "4"}, "write the number 4"),
        ({"group_size": 0}, "group_size is 0"),
        ({"zero_point": "yes"}, "zero_point is 'yes'"),
        ({"version": "marlin"}, "format is 'marlin'; it must be 'gemm', 'gemv', 'gemv_fast' or 'llm-awq'"),
        ({"backend": "trition"}, "backend is 'trition'"),
        ({"bits": 8, "format": "gemv"}, "'gemv' holds 4 bits"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert is 'lm_head'"),
        ({"zero_pont": True}, "no option 'zero_pont'; did you mean 'zero_point'"),
        ({"dynamic": {"(": {}}}, "not a valid regular expression"),
    ],
)
def test_a_wrong_option_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidOption, match=words):
        AwqConfig(**options)


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "GEMM"}, ("gemm", 128)),
        ({"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMV"}, ("gemv", 64)),
        ({"quant_method": "awq", "bits": 4, "version": "gemv", "backend": "llm-awq"}, ("llm-awq", 128)),
        ({"quant_method": "awq", "bits": 4, "format": "gemv_fast", "version": None}, ("gemv_fast", 128)),
        (
            {"quant_method": "awq", "bits": 4, "checkpoint_format": "gemm", "method": "awq", "format": "gemm"},
            ("gemm", 128),
        ),
        (
            {"quant_method": "awq", "bits": 4, "do_fuse": True, "fuse_max_seq_len": 512, "zero_point": None},
            ("gemm", 128),
        ),
    ],
)
def test_dictionaries_found_in_files(stored: dict[str, Any], expected: tuple[str, int]) -> None:
    config = AutoQuantizationConfig.from_dict(stored)
    assert (type(config), config.format, config.group_size) == (AwqConfig, *expected)  # type: ignore[attr-defined]
    kept = config.to_dict()
    for name in {"checkpoint_format", "method", "do_fuse", "fuse_max_seq_len"} & set(stored):
        assert kept[name] == stored[name]


def test_asking_for_calibration_is_not_answered_with_rounding() -> None:
    with pytest.raises(CalibrationNeeded, match=r"asks for calibration \(dataset\)"):
        AutoHfQuantizer.from_config(AwqConfig(dataset="c4"), pre_quantized=False)
    assert not AwqQuantizer.requires_calibration


# --- whole models -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with random weights, dense, as transformers writes it; biases in its attention."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attention_bias=True, dtype="bfloat16", tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0, 0.1)
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(3, 27).view(2, 12)).logits.float()
    return found


# --- scaled activations -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def falcon(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(folder of AWQ with act.scales, folder of the dense model): columns behind the activation were multiplied by scales."""
    torch.manual_seed(0)
    config = transformers.FalconConfig(
        vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, alibi=False, dtype="float32"
    )
    model, folder = transformers.FalconForCausalLM(config), tmp_path_factory.mktemp("falcon")
    scales = {}
    for number, block in enumerate(model.transformer.h):
        scales[f"transformer.h.{number}.mlp.act.scales"] = torch.rand(256, dtype=torch.float16) + 0.5
        block.mlp.dense_4h_to_h.weight.data *= scales[f"transformer.h.{number}.mlp.act.scales"].float()
    model.save_pretrained(folder / "dense")
    anybit.quantize(folder / "dense", folder / "awq", AwqConfig(group_size=32))
    stored = load_file(folder / "awq" / "model.safetensors")
    save_file({**stored, **scales}, folder / "awq" / "model.safetensors", {"format": "pt"})
    return folder / "awq"


def test_scales_behind_an_activation_function_are_applied(falcon: Path, tmp_path: Path) -> None:
    """AutoAWQ's falcon, gpt_neox, bloom and others divide the output of the MLP's activation by act.scales."""
    model = AutoModelForCausalLM.from_pretrained(falcon)
    stored = load_file(falcon / "model.safetensors")
    twin = transformers.FalconForCausalLM(model.config)
    kept = {name: t for name, t in stored.items() if not name.endswith(("qweight", "qzeros", "scales"))}
    twin.load_state_dict(kept, strict=False)
    packed = [name for name, module in model.named_modules() if type(module).__name__.startswith("Quant")]
    for name in packed:
        twin.get_submodule(name).weight.data = model.get_submodule(name).dequantize(torch.float32)
    plain = logits(twin)
    for number, block in enumerate(twin.transformer.h):
        block.mlp.dense_4h_to_h.weight.data /= stored[f"transformer.h.{number}.mlp.act.scales"].float()
    wanted = logits(twin)
    assert (plain - wanted).abs().max() > 0.01, "the scales matter"
    assert (logits(model) - wanted).abs().max() < 1e-5
    model.save_pretrained(tmp_path / "saved")
    again = load_file(tmp_path / "saved" / "model.safetensors")
    assert set(again) == set(stored)
    assert all(torch.equal(again[name], tensor) for name, tensor in stored.items())
    model.dequantize()
    assert (logits(model) - wanted).abs().max() < 1e-5
    assert not any(name.endswith("scales") for name in model.state_dict())
    anybit.dequantize(falcon, tmp_path / "dense")
    dense = transformers.FalconForCausalLM.from_pretrained(tmp_path / "dense")
    assert (logits(dense) - wanted).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("scales", "error", "words"),
    [
        (torch.ones(255), UnexpectedTensor, r"h\.0\.mlp\.act\.scales' divides 255 outputs .* has 0 layers"),
        (torch.zeros(256), CorruptFile, r"h\.0\.mlp\.act\.scales' holds zero, NaN"),
        (torch.full((256,), float("nan")), CorruptFile, r"h\.0\.mlp\.act\.scales' holds zero, NaN"),
        (torch.ones(16, 16), CorruptFile, r"h\.0\.mlp\.act\.scales' is torch.float32 \(16, 16\)"),
    ],
    ids=["too few", "zero", "NaN", "a matrix"],
)
def test_wrong_scales_of_an_activation_function(
    scales: Any, error: Any, words: str, falcon: Path, tmp_path: Path
) -> None:
    for file in falcon.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    stored = {**load_file(falcon / "model.safetensors"), "transformer.h.0.mlp.act.scales": scales}
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(error, match=words):
        anybit.load(tmp_path)


def test_scales_of_an_activation_function_the_model_does_not_have(llama: Path, tmp_path: Path) -> None:
    anybit.quantize(llama, tmp_path / "made", AwqConfig(group_size=32))
    stored = load_file(tmp_path / "made" / "model.safetensors")
    stored["model.layers.0.mlp.act.scales"] = torch.ones(128)
    save_file(stored, tmp_path / "made" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnexpectedTensor, match=r"layers\.0\.mlp\.act\.scales' .* belongs to no weight"):
        anybit.load(tmp_path / "made")


# --- creating -------------------------------------------------------------------------------------------------------------


def reason_for(config: AwqConfig, name: str = NAME, kind: str = "linear", shape: tuple[int, ...] = (64, 128)) -> str:
    quantizer = AwqQuantizer(config, pre_quantized=False)
    layout = quantizer.layout_for(ModuleInfo(name, kind, shape, "float32"))
    return type(layout).__name__ if layout is not None else quantizer.skip_reasons[name]


def test_which_layers_are_quantized() -> None:
    assert reason_for(AwqConfig(group_size=32)) == "AwqGemmLayout"
    assert reason_for(AwqConfig(group_size=-1, format="gemv")) == "AwqGemvLayout"
    assert reason_for(AwqConfig(group_size=64, format="llm-awq")) == "AwqGemvFastLayout"
    assert "outside the repeated blocks" in reason_for(AwqConfig(), "lm_head")
    assert "router" in reason_for(AwqConfig(), "model.layers.0.mlp.gate")
    assert "kind 'experts'" in reason_for(AwqConfig(), kind="experts", shape=(4, 64, 128))
    assert "no whole number of groups of 96" in reason_for(AwqConfig(group_size=96))
    assert "packs 8 outputs" in reason_for(AwqConfig(group_size=32), shape=(60, 128))
    assert "packs 4 outputs and 64 inputs" in reason_for(AwqConfig(group_size=32, format="gemv_fast"), shape=(64, 96))
    assert "groups of 16, 32, 64" in reason_for(AwqConfig(group_size=96, format="gemv"), shape=(64, 192))
    assert "'dynamic' leaves it dense" in reason_for(AwqConfig(group_size=32, dynamic={"-:.*up_proj": {}}))


OPTIONS: dict[str, dict[str, Any]] = {
    "gemm": {"group_size": 32},
    "gemm, symmetric": {"group_size": 64, "zero_point": False},
    "gemm, 3 bits": {"bits": 3, "group_size": 32},
    "gemm, 8 bits": {"bits": 8, "group_size": 32},
    "gemv": {"group_size": 32, "version": "gemv"},
    "gemv_fast": {"group_size": -1, "version": "gemv_fast"},
    "llm-awq": {"group_size": 64, "backend": "llm-awq"},
    "mixed": {"group_size": 32, "dynamic": {"+:.*down_proj": {"bits": 8}}, "modules_to_not_convert": ["k_proj"]},
}  # fmt: skip


@pytest.mark.parametrize("case", OPTIONS)
def test_a_checkpoint_made_here_loads_with_the_same_numbers(case: str, llama: Path, tmp_path: Path) -> None:
    config = AwqConfig(**OPTIONS[case])
    anybit.quantize(llama, tmp_path / "made", config)
    stored, dense = load_file(tmp_path / "made" / "model.safetensors"), load_file(llama / "model.safetensors")
    names = [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]
    assert len(names) == (12 if case == "mixed" else 14)
    quantizer = AwqQuantizer(config, pre_quantized=False)
    for name in names:
        weight = dense[f"{name}.weight"]
        layout: Any = quantizer.layout_for(ModuleInfo(name, "linear", tuple(weight.shape), "bfloat16"))
        for part, tensor in layout.encode(rtn.quantize(weight, layout.scheme(), **layout.algorithm_options())).items():
            assert torch.equal(raw(stored[f"{name}.{part}"]), raw(tensor)), f"{name}.{part}"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    loading = AutoModelForCausalLM.from_pretrained(llama, quantization_config=AwqConfig(**OPTIONS[case]))
    assert torch.equal(logits(model), logits(loading))
    twin = transformers.LlamaForCausalLM.from_pretrained(llama)
    for name in names:
        twin.get_submodule(name).weight.data = model.get_submodule(name).dequantize(torch.bfloat16)
    assert (logits(model) - logits(twin)).abs().max() < 0.05  # bfloat16 products, accumulated differently
