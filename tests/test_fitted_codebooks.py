"""Checkpoints of SpQR, AQLM and VPTQ that anybit makes: errors of outputs against plain rounding, what is written, refusals."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import anybit
from anybit import GPTQConfig, algorithms
from anybit.errors import CalibrationNeeded, ConfigError, NotRepresentable
from anybit.methods.aqlm import AqlmConfig
from anybit.methods.spqr import SpQRConfig
from anybit.methods.vptq import VptqConfig
from anybit.quantizers import AutoHfQuantizer
from anybit.weight import ModuleInfo
from anybit.weight.weight import same

TINY = Path(__file__).parent.parent / "examples" / "tiny-llama"
NAME = "model.layers.2.self_attn.q_proj"


def vptq(entries: int = 256, residuals: int = -1, **more: Any) -> VptqConfig:
    own = {"vector_lens": [-1, 8], "num_centroids": [-1, entries], "num_res_centroids": [-1, residuals], **more}
    return VptqConfig(shared_layer_config={"*": own})


@pytest.fixture(scope="module")
def layer() -> tuple[torch.Tensor, torch.Tensor]:
    """A trained layer, and the second moment of inputs that differ in size and go together."""
    weight = load_file(TINY / "model.safetensors")[f"{NAME}.weight"].float()
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(256, 256, generator=generator) * 0.05 + torch.diag(torch.logspace(-1, 1, 256))
    x = torch.randn(4096, 256, generator=generator) @ mixed
    return weight, 2 / len(x) * x.T @ x


def made(config: Any, dense: torch.Tensor, hessian: torch.Tensor, **options: Any) -> tuple[Any, Any]:
    """(layout, weight) of one layer, by the method's calibrated algorithm."""
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    layout = quantizer.layout_for(ModuleInfo(NAME, "linear", tuple(dense.shape), "float16"))
    assert layout is not None, quantizer.skip_reasons
    assert quantizer.calibrated_algorithm is not None
    weight = algorithms.get(quantizer.calibrated_algorithm)(dense, layout.scheme(), hessian=hessian, **options)
    stored = layout.encode(weight)
    assert same(layout.decode(stored), weight)  # nothing is rounded when it is stored
    return layout, weight


def loss(weight: torch.Tensor, dense: torch.Tensor, hessian: torch.Tensor) -> float:
    """Squared error of the layer's outputs, relative."""
    error = weight - dense
    return float((error @ hessian * error).sum() / (dense @ hessian * dense).sum())


def rounded(dense: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Plain rounding with a scale and a zero point for each group."""
    groups = dense.view(len(dense), -1, group)
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    step = (high - low) / (2**bits - 1)
    return (((groups - low) / step).round() * step + low).view(dense.shape)


def test_spqr_beats_rounding_with_the_same_groups(layer: tuple[torch.Tensor, torch.Tensor]) -> None:
    dense, hessian = layer
    dense = dense.clone()
    places = torch.randperm(dense.numel(), generator=torch.Generator().manual_seed(1))[:200]
    dense.view(-1)[places] *= 20  # outliers
    layout, weight = made(SpQRConfig(), dense, hessian)
    ours = loss(weight.to_dense("float32"), dense, hessian)
    assert ours < 0.45 * loss(rounded(dense, 3, 16), dense, hessian)  # scales of 16 bits, and it is still worse
    without = algorithms.get("spqr")(dense, replace(layout, outliers=0).scheme(), hessian=hessian)
    assert ours < 0.6 * loss(without.to_dense("float32"), dense, hessian)
    assert layout.specs()["col_vals"][1] == (round(0.01 * dense.numel()),)


def test_spqr_is_for_heavy_tails(layer: tuple[torch.Tensor, torch.Tensor]) -> None:
    """At the size of four bits: better than GPTQ where weights have heavy tails, worse where they have none (see spqr.py)."""
    dense, hessian = layer
    torch.manual_seed(0)
    tails = torch.distributions.StudentT(3.0).sample(dense.shape) * 0.02  # type: ignore[no-untyped-call]
    quantizer = AutoHfQuantizer.from_config(GPTQConfig(bits=4, group_size=128), pre_quantized=False)
    grid: Any = quantizer.layout_for(ModuleInfo(NAME, "linear", tuple(dense.shape), "float16"))

    def bits(layout: Any) -> float:
        sizes = [math.prod(shape) * getattr(torch, dtype).itemsize for dtype, shape in layout.specs().values()]
        return 8 * sum(sizes) / dense.numel()

    found = {}
    for name, weight in (("tails", tails), ("none", torch.randn(dense.shape) * 0.02)):
        layout, _ = made(SpQRConfig(), weight, hessian)
        sparse = replace(layout, outliers=round(0.003 * dense.numel()))
        made_by_spqr = algorithms.get("spqr")(weight, sparse.scheme(), hessian=hessian)
        by_gptq = algorithms.get("gptq")(weight, grid.scheme(), hessian=hessian)
        assert bits(sparse) < 1.01 * bits(grid)
        found[name] = loss(made_by_spqr.to_dense("float32"), weight, hessian) / loss(
            by_gptq.to_dense("float32"), weight, hessian
        )
    assert found["tails"] < 0.9
    assert found["none"] > 1.2


@pytest.mark.parametrize(
    "config", [vptq(16), vptq(16, 16), vptq(16, outlier_size=16, vector_lens=[4, 8], num_centroids=[64, 16])]
)
def test_vptq_beats_its_own_codebooks_without_passing_errors_on(
    config: VptqConfig, layer: tuple[torch.Tensor, torch.Tensor]
) -> None:
    dense, hessian = layer
    _, weight = made(config, dense, hessian)
    flat = torch.diag(hessian.diagonal())  # inputs that do not go together: nothing can be passed on
    _, alone = made(config, dense, flat)
    assert loss(weight.to_dense("float32"), dense, hessian) < 0.96 * loss(alone.to_dense("float32"), dense, hessian)


def test_two_bits_of_vectors_beat_two_bits_of_numbers(layer: tuple[torch.Tensor, torch.Tensor]) -> None:
    dense, hessian = layer
    plain = loss(rounded(dense, 2, 64), dense, hessian)  # 2.5 bits with scales and zero points
    _, additive = made(AqlmConfig(num_codebooks=2, nbits_per_codebook=8), dense, hessian, passes=2)
    _, vector = made(vptq(256, 256), dense, hessian)
    assert loss(additive.to_dense("float32"), dense, hessian) < 0.2 * plain
    assert loss(vector.to_dense("float32"), dense, hessian) < 0.25 * plain


@pytest.mark.parametrize(
    "config", [AqlmConfig(num_codebooks=2, nbits_per_codebook=7), vptq(128, 128)], ids=["aqlm", "vptq"]
)
def test_data_helps_and_both_beat_rounding(config: Any, layer: tuple[torch.Tensor, torch.Tensor]) -> None:
    dense, hessian = layer
    _, calibrated = made(config, dense, hessian)
    _, blind = made(config, dense, torch.eye(len(hessian)))  # inputs of which nothing is known
    found = [loss(own.to_dense("float32"), dense, hessian) for own in (calibrated, blind)]
    assert found[0] < 0.75 * found[1]
    assert found[1] < 0.75 * loss(
        rounded(dense, 2, 64), dense, hessian
    )  # 2.5 bits a weight, these 2.25 with their tables


@pytest.mark.parametrize(("books", "bits", "high", "wide"), [(1, 6, 1, 8), (3, 4, 2, 4), (2, 5, 4, 2)])
def test_aqlm_of_any_shape_improves_on_where_it_starts(
    books: int, bits: int, high: int, wide: int, layer: tuple[torch.Tensor, torch.Tensor]
) -> None:
    dense, hessian = layer
    config = AqlmConfig(wide, high, books, bits)
    _, start = made(config, dense, hessian, passes=0, damp=0.01)
    _, end = made(config, dense, hessian, passes=2, damp=0.01)
    assert loss(end.to_dense("float32"), dense, hessian) < 0.8 * loss(start.to_dense("float32"), dense, hessian)


@pytest.mark.parametrize(
    "config",
    [SpQRConfig(), AqlmConfig(num_codebooks=2, nbits_per_codebook=4), vptq(16, 16)],
    ids=["spqr", "aqlm", "vptq"],
)
def test_the_same_seed_gives_the_same_bytes(config: Any, layer: tuple[torch.Tensor, torch.Tensor]) -> None:
    dense, hessian = (part[:64] if part is layer[0] else part for part in layer)
    _, one = made(config, dense, hessian)
    _, two = made(config, dense, hessian)
    assert same(one, two)


@pytest.mark.parametrize("config", [SpQRConfig(), AqlmConfig(num_codebooks=1, nbits_per_codebook=4), vptq(16)])
def test_inputs_that_are_never_seen_and_rows_of_zeros(config: Any, layer: tuple[torch.Tensor, torch.Tensor]) -> None:
    dense, hessian = layer[0][:64].clone(), layer[1].clone()
    dense[5], hessian[7], hessian[:, 7] = 0, 0, 0
    _, weight = made(config, dense, hessian)
    assert torch.isfinite(weight.to_dense("float32")).all()
    _, unseen = made(config, dense, torch.zeros_like(hessian))  # a layer that no token reached
    assert torch.isfinite(unseen.to_dense("float32")).all()
    with pytest.raises(NotRepresentable, match="not finite"):
        made(config, dense, hessian / 0)


# --- file to file ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights, small enough for every method to be quick."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        dtype="float16", attention_bias=True,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("dense")
    transformers.LlamaForCausalLM(config).half().save_pretrained(folder)
    return folder


IDS = torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (SpQRConfig(), 0.05),
        (AqlmConfig(num_codebooks=3, nbits_per_codebook=6), 0.5),
        (vptq(64, 64, outlier_size=0), 0.5),
    ],
    ids=["spqr", "aqlm", "vptq"],
)
def test_a_checkpoint_is_made_loads_and_names_what_it_left_dense(
    config: Any, limit: float, small: Path, tmp_path: Path
) -> None:
    given = config.to_dict()
    plan = anybit.quantize(small, tmp_path / "made", config, calibration=IDS, dtype="float16")
    assert config.to_dict() == given  # it can be used again
    packed = {entry.slot.module for entry in plan.entries if entry.action == "quantize"}
    assert len(packed) == 7
    model: Any = anybit.load(tmp_path / "made", dtype="float32")
    dense: Any = anybit.load(small, dtype="float32")
    for name in packed:
        wanted = dense.get_submodule(name).weight
        error = (model.get_submodule(name).dequantize(torch.float32) - wanted).norm() / wanted.norm()
        assert error < limit**0.5, name
    settings = json.loads((tmp_path / "made" / "config.json").read_text())["quantization_config"]
    left = settings.get("linear_weights_not_to_quantize") or settings.get("modules_to_not_convert")
    if settings["quant_method"] == "vptq":
        assert settings["config_for_layers"].keys() == packed
        assert settings["shared_layer_config"] == {}
    else:
        assert {"lm_head", "lm_head.weight"} <= set(left)
    if settings["quant_method"] == "spqr":
        stored = load_file(tmp_path / "made" / "model.safetensors")
        assert settings["shapes"] == {
            f"{name}.shape": len(tensor)
            for name, tensor in stored.items()
            if name.rpartition(".")[0] in packed and "bias" not in name
        }
    model.save_pretrained(tmp_path / "saved")
    assert (
        load_file(tmp_path / "saved" / "model.safetensors").keys()
        == load_file(tmp_path / "made" / "model.safetensors").keys()
    )


@pytest.mark.parametrize("config", [SpQRConfig(), AqlmConfig(), vptq(16)], ids=["spqr", "aqlm", "vptq"])
def test_without_calibration_they_are_refused(config: Any, small: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationNeeded, match=r"fitted to calibration data\. Pass calibration="):
        anybit.quantize(small, tmp_path / "out", config)
    with pytest.raises(CalibrationNeeded, match=r"fitted to calibration data\. Pass calibration="):
        anybit.load(small, config)
    assert not (tmp_path / "out").exists()


def test_vptq_without_settings_says_how_to_give_them(small: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="shared_layer_config="):
        anybit.quantize(small, tmp_path / "out", VptqConfig(), calibration=IDS)
