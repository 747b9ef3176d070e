"""Four Over Six where the goldens cannot see it: every dtype, rule and block against the package, overrides, master weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import anybit
from anybit.algorithms import four_over_six
from anybit.containers.info import TensorInfo
from anybit.errors import CheckpointError, CorruptFile, InvalidOption, ShapeMismatch
from anybit.kernels.reference import multiply
from anybit.methods import _fouroversix_layouts as layouts
from anybit.methods.fouroversix import FourOverSixConfig
from anybit.weight import ModuleInfo, Weight
from anybit.weight.weight import same

GOLDEN = Path(__file__).parent / "golden" / "fouroversix"
VECTORS = load_file(Path(__file__).parent / "golden" / "fouroversix_vectors" / "vectors.safetensors")
NAMES = sorted(name.removesuffix(".y") for name in VECTORS if name.endswith(".y"))


def linear(rows: int, columns: int, name: str = "a") -> ModuleInfo:
    return ModuleInfo(name, "linear", (rows, columns), "bfloat16")


def config_of(name: str, **options: Any) -> FourOverSixConfig:
    dtype, rule, two = name.split(".")
    return FourOverSixConfig(dtype=dtype, scale_rule=rule, weight_scale_2d=two == "2d", **options)


def made(layout: Any, dense: torch.Tensor) -> Weight:
    return four_over_six.quantize(dense, layout.scheme(), **layout.algorithm_options())


def infos(tensors: dict[str, torch.Tensor]) -> dict[str, TensorInfo]:
    return {
        name: TensorInfo(f"a.{name}", str(tensor.dtype)[6:], tuple(tensor.shape), tensor.nbytes, "f")
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_codes_and_scales_are_the_packages(name: str) -> None:
    dense = VECTORS["weight"]
    layout: Any = layouts.layout_for(config_of(name), linear(*dense.shape))
    stored = layout.encode(made(layout, dense))
    scales = layout._matrix(stored[layouts.SCALES].view(torch.uint8))
    rows, columns = dense.shape
    assert torch.equal(stored[layouts.VALUES][:rows, : columns // 2], VECTORS[f"{name}.values"])
    assert torch.equal(scales[:rows, : -(-columns // layout.group)], VECTORS[f"{name}.scales"])
    assert torch.equal(stored[layouts.AMAX].float(), VECTORS[f"{name}.amax"])
    assert not stored[layouts.VALUES][rows:].any()
    assert not stored[layouts.VALUES][:, columns // 2 :].any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("master", [False, True])
def test_products_are_the_packages(name: str, master: bool) -> None:
    dense, x, wanted = VECTORS["weight"], VECTORS["x"], VECTORS[f"{name}.y"]
    layout: Any = layouts.layout_for(config_of(name, keep_master_weights=master), linear(*dense.shape))
    y = multiply(made(layout, dense), x.float(), None)
    # the package rounds codes times scales to half precision, which for if4 is not exact
    limit = 2e-3 if name.startswith("if4") else 1e-5
    assert (y - wanted).abs().max() <= limit * wanted.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_every_form_survives_storing(name: str) -> None:
    dense = VECTORS["weight"]
    layout: Any = layouts.layout_for(config_of(name), linear(*dense.shape))
    weight = made(layout, dense)
    stored = layout.encode(weight)
    found = layouts.layout_of(config_of(name), linear(*dense.shape), infos(stored), stored.__getitem__)
    assert found == layout
    assert same(layout.decode(stored), weight)


def test_scales_of_if4_tell_integers_from_floats() -> None:
    name = "if4.mse.1d"
    integers = VECTORS[f"{name}.scales"] >= 0x80
    assert integers.any()
    assert not integers.all()
    layout: Any = layouts.layout_for(config_of(name), linear(*VECTORS["weight"].shape))
    weight = made(layout, VECTORS["weight"])
    dense = weight.to_dense(torch.float32)
    assert torch.equal(weight.tree.region(slice(3, 9), slice(5, 40)), dense[3:9, 5:40])
    amax, row, block = VECTORS[f"{name}.amax"], *torch.nonzero(integers)[0].tolist()
    scale = (VECTORS[f"{name}.scales"][row, block] & 0x7F).view(torch.float8_e4m3fn).float()
    codes = dense[row, 16 * block : 16 * block + 16] / (scale * amax * 6 / 7 / 2688)
    assert torch.allclose(codes, codes.round(), atol=1e-4)


def test_codes_saturate_where_the_package_overflows() -> None:
    # a block whose scale is rounded down in E4M3's subnormal range: 7.54 became -0.0
    blocks = torch.tensor([[1.256 / 512 / 448 * 1000] * 16])
    codes, scales = four_over_six.encode(blocks, "nvfp4", "static_6", torch.tensor(1000.0))
    found = four_over_six.decode(codes, scales, "nvfp4", "static_6", torch.tensor(1000.0))
    assert (found > 0).all()
    assert set(codes[0].tolist()) == {7}


def test_an_empty_weight_is_zeros() -> None:
    for name in ("nvfp4.mse.1d", "if4.mse.1d", "nvint4.static_6.1d", "mxfp4.static_6.1d"):
        layout: Any = layouts.layout_for(config_of(name), linear(8, 64))
        weight = made(layout, torch.zeros(8, 64))
        assert not weight.to_dense(torch.float32).any(), name
        assert torch.equal(multiply(weight, torch.zeros(0, 64), None), torch.zeros(0, 8))


# --- configuration ----------------------------------------------------------------------------------------------------------


def test_overrides_replace_the_whole_configuration() -> None:
    config = FourOverSixConfig(
        dtype="mxfp4", scale_rule="static_6", module_config_overrides={"a.b": {"scale_rule": "mae"}}
    )
    assert layouts.settings_of(config, "a.c") == layouts.Settings("mxfp4", "static_6", "mxfp4", "static_6")
    assert layouts.settings_of(config, "a.b") == layouts.Settings("nvfp4", "mae", "nvfp4", "mae")


@pytest.mark.parametrize(
    ("options", "named"),
    [({"dtype": "mxfp4"}, "static_6"), ({"dtype": "nvfp6_e2m3"}, "nvfp6_e2m3"), ({"weight_dtype": "if4", "scale_rule": "static_6"}, "abs_max")],
)  # fmt: skip
def test_combinations_nothing_writes_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidOption, match=named):
        layouts.layout_for(FourOverSixConfig(**options), linear(8, 64))


def test_names_of_modules_are_compared_whole(tmp_path: Path) -> None:
    anybit.dequantize(GOLDEN / "nvfp4_static6", tmp_path / "dense")
    config = FourOverSixConfig(modules_to_not_convert=["lm_head", "k_proj", "model.layers.0.mlp.up_proj"])
    plan = anybit.quantize(tmp_path / "dense", tmp_path / "made", config)
    dense = {entry.slot.module for entry in plan.entries if entry.action == "dense"}
    assert dense == {"lm_head", "model.embed_tokens", "model.layers.0.mlp.up_proj"}


def test_master_weights_and_overrides_are_saved_and_loaded(tmp_path: Path) -> None:
    anybit.dequantize(GOLDEN / "nvfp4_static6", tmp_path / "dense", dtype="bfloat16")
    config = FourOverSixConfig(
        keep_master_weights=True,
        module_config_overrides={"model.layers.0.mlp.down_proj": {"dtype": "mxfp4", "scale_rule": "static_4"}},
    )
    anybit.quantize(tmp_path / "dense", tmp_path / "made", config)
    model: Any = anybit.load(tmp_path / "made")
    mlp = model.model.layers[0].mlp
    assert mlp.up_proj.form.startswith("layout=MasterLayout")
    assert mlp.down_proj.form.startswith("layout=FourOverSixLayout")
    dense = load_file(tmp_path / "dense" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(mlp.up_proj.dequantize(), dense)
    packed: Any = layouts.layout_for(FourOverSixConfig(), linear(*dense.shape))
    x = torch.randn(3, dense.shape[1], dtype=torch.bfloat16)
    assert torch.equal(mlp.up_proj(x), multiply(made(packed, dense), x, None))
    model.save_pretrained(tmp_path / "saved")
    kept = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert kept["module_config_overrides"] == config.module_config_overrides
    assert torch.equal(anybit.load(tmp_path / "saved").model.layers[0].mlp.up_proj(x), mlp.up_proj(x))


def test_a_scalar_amax_and_short_metadata_are_read() -> None:
    layout: Any = layouts.layout_for(FourOverSixConfig(), linear(40, 104))
    stored = layout.encode(made(layout, VECTORS["weight"]))
    stored[layouts.AMAX] = stored[layouts.AMAX].reshape(())
    stored[layouts.METADATA] = stored[layouts.METADATA].int()
    found = layouts.layout_of(FourOverSixConfig(), linear(40, 104), infos(stored), stored.__getitem__)
    assert found is not None
    assert torch.equal(found.decode(stored).to_dense(), made(layout, VECTORS["weight"]).to_dense())
    assert found.specs()[layouts.AMAX] == ("float32", ())


def test_other_dtypes_than_the_configurations_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "lying"
    folder.mkdir()
    for file in (GOLDEN / "nvfp4_static6").glob("*"):
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update({"dtype": "mxfp4"})
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ShapeMismatch, match="float8_e4m3fn"):
        anybit.load(folder)
    config["quantization_config"].update({"dtype": "nvfp4"})
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    name = f"model.layers.0.mlp.up_proj.{layouts.METADATA}"
    save_file(
        {**tensors, name: tensors[name].clone().index_fill_(0, torch.tensor([4]), 0)}, folder / "model.safetensors"
    )
    with pytest.raises(CorruptFile, match="packed"):
        anybit.load(folder)
    del tensors[f"model.layers.0.mlp.up_proj.{layouts.VALUES}"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=layouts.VALUES):
        anybit.load(folder)
