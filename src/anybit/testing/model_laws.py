"""Laws about whole models: logits against the vendor's, 11 and 12."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch
from safetensors import safe_open

from anybit.errors import CalibrationNeeded, NotRepresentable
from anybit.modules import PackedWeight
from anybit.testing.goldens import Golden, prepared
from anybit.testing.memory import enlarge, enlarged_checkpoint, peak_of_load
from anybit.testing.stored_laws import raw
from anybit.weight import Layout

if TYPE_CHECKING:
    from torch import Tensor

# law 11 allows what Python and the allocator need beside weights
SLACK_BYTES = 300 << 20


class ModelLaws:
    """Checkpoint -> model -> checkpoint."""

    method: ClassVar[str]
    load_options: ClassVar[dict[str, Any]] = {}
    creation_error: ClassVar[float] = (
        0.25  # largest relative error of a weight; a method of two bits may allow itself more
    )

    def logits_of_reference(self, golden: Golden) -> tuple[Tensor, float, dict[str, Any]]:
        """(vendor's logits, allowed difference, load options that give the same arithmetic). Hook for odd fixtures."""
        fixture, reference = golden.fixture, golden.reference
        if "logits_w8a8" in reference:  # with inputs quantized; "logits" are those of plain ones
            return reference["logits_w8a8"], fixture["w8a8_logits_atol"], {}
        for name, tolerance in (("logits_fp32", "logits_fp32_atol"), ("logits_dense", "logits_dense_atol")):
            if name in reference:
                return reference[name], fixture[tolerance], {"dtype": torch.float32}
        in_float32 = "float32" in f"{fixture.get('logits_note')} {fixture.get('logits_peer')}"
        return reference["logits"], fixture["logits_atol"], {"dtype": torch.float32} if in_float32 else {}

    def test_logits_are_the_vendors(self, golden: Golden) -> None:
        from anybit.engine.load import load

        wanted, tolerance, options = self.logits_of_reference(golden)
        model: Any = load(golden.checkpoint, **{"allow_pickle": True, **options, **self.load_options})
        assert any(isinstance(module, PackedWeight) for module in model.modules()), "nothing stayed packed"
        if golden.fixture.get("logits_include_activation_quant") is False:
            _leave_inputs(model)
        with torch.no_grad():
            logits = model(golden.reference["input_ids"]).logits.float()
        error = (logits - wanted).abs().max().item()
        assert error <= tolerance, f"logits differ by {error:.4g}, allowed {tolerance:.4g}"

    def test_single_layers_give_the_vendors_outputs(self, golden: Golden) -> None:
        """The sharp test where inputs are quantized: a whole model's logits are chaotic then."""
        from anybit.engine.load import load

        reference = golden.reference
        inputs = {name.removeprefix("x."): tensor for name, tensor in reference.items() if name.startswith("x.")}
        if not inputs:
            pytest.skip("the reference holds no inputs and outputs of single layers")
        model: Any = load(golden.checkpoint, **{"allow_pickle": True, **self.load_options})
        for module, x in inputs.items():
            wanted = next(reference[name + module] for name in ("y_w8a8.", "y.") if name + module in reference)
            with torch.no_grad():
                error = (model.get_submodule(module)(x).float() - wanted).abs().max().item()
            limit = golden.fixture["layer_rtol"] * wanted.abs().max().item()
            assert error <= limit, f"{module}: output differs by {error:.4g}, allowed {limit:.4g}"

    def test_creation_from_dense_weights(self, golden: Golden, tmp_path: Path) -> None:
        """The golden's weights, made dense and quantized again with its own configuration, stay what they are, roughly.

        Static scales are measured on the golden's tokens. Skipped where codes are fitted to data, or everything is left dense.
        """
        from anybit.engine.dequantize import dequantize
        from anybit.engine.load import load
        from anybit.engine.quantize import quantize
        from anybit.quantizers import AutoHfQuantizer, AutoQuantizationConfig

        config = AutoQuantizationConfig.from_pretrained(golden.checkpoint)
        try:
            quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
            dequantize(golden.checkpoint, tmp_path / "dense", dtype="float32", allow_pickle=True)
            try:
                plan = quantize(tmp_path / "dense", tmp_path / "made", config)
            except CalibrationNeeded:
                if quantizer.requires_calibration:
                    raise
                ids = golden.reference["input_ids"]
                plan = quantize(tmp_path / "dense", tmp_path / "made", config, calibration=ids)
        except (CalibrationNeeded, NotRepresentable) as error:
            pytest.skip(str(error))
        made = [entry for entry in plan.entries if entry.action == "quantize"]
        if not made:
            pytest.skip(f"nothing is quantized: {sorted({entry.reason for entry in plan.entries})}")
        model: Any = load(tmp_path / "made")
        dense: Any = load(tmp_path / "dense")
        for entry in made:
            layer = model
            for name in entry.slot.module.split("."):
                layer = getattr(layer, name)
            wanted = dense.state_dict()[entry.slot.parameter].float()
            ours = layer.dequantize(torch.float32)
            ours = ours.T if ours.shape != wanted.shape else ours
            relative = ((ours - wanted).norm() / wanted.norm()).item()
            assert relative < self.creation_error, f"{entry.slot.module}: relative error {relative:.3f}"
        with torch.no_grad():
            assert torch.isfinite(model(golden.reference["input_ids"]).logits).all()

    # --- 11 ---

    def enlarge(self, layout: Layout, shape: tuple[int, ...], extras: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Hook: stored tensors of a weight of another shape, for formats whose extras or parameters depend on it."""
        return enlarge(layout, shape, extras)

    def test_law_11_peak_memory_of_a_load(self, tmp_path: Path) -> None:
        golden = self.all_goldens()[0]  # type: ignore[attr-defined]
        checkpoint = enlarged_checkpoint(golden, tmp_path / "large", stored_as=self.enlarge)
        peak, packed, largest = peak_of_load(checkpoint.path)
        limit = packed + largest + SLACK_BYTES
        assert checkpoint.dense_bytes > limit, "the model is too small to tell a packed load from a dense one"
        assert peak < limit, (
            f"load took {peak >> 20} MB, allowed {limit >> 20} MB (packed {packed >> 20} MB, largest module {largest >> 20} MB)"
        )

    # --- 12 ---

    def test_law_12_load_and_save_give_back_the_bytes(self, golden: Golden, tmp_path: Path) -> None:
        from anybit.engine.load import load

        model: Any = load(golden.checkpoint, **{"allow_pickle": True, **self.load_options})
        model.save_pretrained(tmp_path / "saved")
        ours, stored = (
            _all_tensors(tmp_path / "saved"),
            {info: prepared(golden).checkpoint.read(info) for info in prepared(golden).checkpoint.tensors},
        )
        ignored = prepared(golden).plan.ignored
        assert set(ours) | set(ignored) == set(stored), (
            f"only saved: {sorted(set(ours) - set(stored))}, only stored: {sorted(set(stored) - set(ours) - set(ignored))}"
        )
        for name, tensor in ours.items():
            assert (tensor.dtype, tensor.shape) == (stored[name].dtype, stored[name].shape), name
            assert raw(tensor) == raw(stored[name]), f"bytes of {name} changed"
        config = json.loads((tmp_path / "saved" / "config.json").read_text())
        ready = prepared(golden)
        before = ready.stored_config() or {}
        if ready.bundle is not None and ready.quantizer is not None:  # its file said what it is without a configuration
            before["quantization_config"] = ready.quantizer.quantization_config.to_dict()
        assert config.get("quantization_config") == before.get("quantization_config")


def _all_tensors(folder: Path) -> dict[str, Tensor]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
    return found


def _leave_inputs(model: torch.nn.Module) -> None:
    """Multiply inputs as they are: some vendors' quantization of inputs runs on their GPUs only, and so not in references."""
    for module in model.modules():
        if isinstance(module, PackedWeight):
            module._prepare(replace(module.quantized_weight, activation=None))
