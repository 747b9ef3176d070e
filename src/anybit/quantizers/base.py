"""The contract of every quantizer class: transformers' names for users, and a few questions that the engine asks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from anybit.errors import CalibrationNeeded, ConfigError, InvalidOption, NotRepresentable, did_you_mean
from anybit.quantizers.config import QuantizationConfigMixin, QuantizationMethod

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor

    from anybit.quantizers.bundle import Bundle, Bundled
    from anybit.quantizers.measurement import Measurement
    from anybit.weight import Layout, ModuleInfo


class HfQuantizer:
    """One method, for one checkpoint or one quantization.

    requires_calibration: it cannot be created from weights alone. layouts_available: this class reads the method's tensors;
    False refuses every load in `validate_environment`. default_algorithm: how codes are chosen when the user names no
    algorithm; the name of a file in `anybit/algorithms`, None for the layout's own. calibrated_algorithm: the same, when there
    is calibration data. pickled_packages: whose objects a torch.save file of this method mentions; they are read as
    class names and fields, for `spelled_out` to make tensors of.
    """

    requires_calibration: ClassVar[bool] = False
    layouts_available: ClassVar[bool] = False
    default_algorithm: ClassVar[str | None] = None
    calibrated_algorithm: ClassVar[str | None] = None
    pickled_packages: ClassVar[tuple[str, ...]] = ()
    is_trainable: bool = True
    is_qat_trainable: bool = False
    is_compileable: bool = True
    calibrated: bool = False  # there are data to choose codes by; the engine says so before `begin`

    quantization_config: Any

    def __init__(self, quantization_config: QuantizationConfigMixin, *, pre_quantized: bool = True, **kwargs: Any):
        for name in kwargs:
            closest = did_you_mean(name, ("quantization_config", "pre_quantized")) or "."
            raise InvalidOption(
                f"{type(self).__name__} has no option {name!r}{closest} Options of the method belong into its configuration"
            )
        self.quantization_config = quantization_config
        self.pre_quantized = pre_quantized
        self.modules_to_not_convert: list[str] = []
        self.skip_reasons: dict[str, str] = {}
        self.attached: set[str] = set()
        self.folds: dict[str, Callable[[Any], Any]] = {}
        self.decisions: dict[str, list[str]] = {}
        if not pre_quantized and self.requires_calibration:
            raise CalibrationNeeded(
                f"{self.method_name} cannot be created from a dense checkpoint at load: its codes are fitted to calibration "
                "data. Load a checkpoint that is already quantized with it, or choose a method that needs no data, "
                "e.g. BitsAndBytesConfig(load_in_4bit=True)"
            )

    # --- what users know from transformers ---

    @property
    def method_name(self) -> str:
        """The configuration's `quant_method` as text."""
        method = self.quantization_config.quant_method
        return str(getattr(method, "value", method))

    @property
    def quant_method(self) -> QuantizationMethod | str:
        """The configuration's `quant_method`."""
        method: QuantizationMethod | str = self.quantization_config.quant_method
        return method

    @classmethod
    def is_available(cls) -> bool:
        """Whether this installation can load the method. No vendor's package is ever needed."""
        return cls.layouts_available

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Called before any weight is read. No device is refused; a method whose tensors cannot be read is."""
        if not self.layouts_available:
            raise ConfigError(
                f"anybit can read the configuration of {self.method_name!r} ({type(self.quantization_config).__name__}) but "
                "not yet its tensors, and never loads a quantized checkpoint as a dense one. Use a newer anybit, or convert "
                "the checkpoint with the tool that wrote it. `anybit methods` lists what loads"
            )

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype the rest of the model gets."""
        return dtype

    def update_device_map(self, device_map: Any) -> Any:
        """The device map to use; every method runs everywhere, so it is the given one."""
        return device_map

    def adjust_max_memory(self, max_memory: dict[Any, Any]) -> dict[Any, Any]:
        """The memory limits to plan with; sizes are exact, so they are the given ones."""
        return max_memory

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a parameter of a prepared model is, or will be, stored packed."""
        path, _, own = param_name.rpartition(".")
        try:
            module = model.get_submodule(path)
        except AttributeError:
            return False
        return own.startswith("_packed_") or (own == "weight" and getattr(module, "is_packed", False))

    def preprocess_model(self, model: Any, **kwargs: Any) -> None:
        """Mark the model before weights are loaded, then `_process_model_before_weight_loading`."""
        model.is_quantized = True
        model.quantization_method = self.quant_method
        self._process_model_before_weight_loading(model, **kwargs)

    def postprocess_model(self, model: Any, **kwargs: Any) -> Any:
        """Attach configuration and quantizer after loading, then `_process_model_after_weight_loading`."""
        model.config.quantization_config = self.quantization_config
        model.hf_quantizer = self
        return self._process_model_after_weight_loading(model, **kwargs)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        return model

    # set by the engine on the quantizer of a loaded model: (model, dtype) -> model
    dequantizer: Callable[[Any, Any], Any] | None = None

    def dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """Make every weight dense, in `dtype` or the model's, and remove the marks of quantization."""
        if self.dequantizer is None:
            raise ConfigError(
                f"this {type(model).__name__} was not loaded by anybit, so there is nothing packed to dequantize"
            )
        model = self.dequantizer(model, dtype)
        self.remove_quantization_config(model)
        return model

    def remove_quantization_config(self, model: Any) -> None:
        """Forget that the model was quantized."""
        for owner, name in (
            (model, "hf_quantizer"),
            (model.config, "quantization_config"),
            (model, "quantization_method"),
        ):
            if name in owner.__dict__:
                delattr(owner, name)
        model.is_quantized = False

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Whether `save_pretrained` writes the packed model."""
        return self.layouts_available

    @staticmethod
    def get_modules_to_not_convert(
        model: Any,
        skip_modules: Sequence[str] | None = None,
        keep_in_fp32_modules: Sequence[str] | None = None,
        add_default_skips: bool = False,
    ) -> list[str]:
        """Names left dense: the given ones; without any (or when asked) also output layer, tied weights and last module."""
        names: dict[str, None] = {}
        if skip_modules is None or add_default_skips:
            names.update(dict.fromkeys(keys_to_not_convert(model)))
        names.update(dict.fromkeys(skip_modules or ()))
        names.update(dict.fromkeys(keep_in_fp32_modules or ()))
        return list(names)

    # --- what the engine asks ---

    reads_bundles: bool = False  # whether some files of the method carry the whole model

    def unbundle(self, checkpoint: Any) -> Bundle | None:
        """For files that carry the whole model (configuration, tokenizer, names of their own): what is in them, else None.

        `checkpoint`: its `.tensors` by name, `.values`, `.path` and `.read(name)`. Called once, right after it was opened.
        """
        return None

    def bundled(
        self, settings: Mapping[str, Any], specs: Mapping[str, Any], read: Callable[[str], bytes | None], name: str
    ) -> Bundled | None:
        """For formats whose one file carries the whole model: that file for a new checkpoint; None for safetensors.

        `settings`: of the model's configuration. `specs`: (dtype, shape) of the checkpoint's tensors. `read`: a file of the
        checkpoint's folder (tokenizer and the like) by its name. `name`: of the model. Raises ConfigError for a model that the
        file cannot hold.
        """
        return None

    def importance_names(self, modules: Sequence[str]) -> list[str]:
        """What an importance file calls the weights that these modules of a checkpoint are in; valid after `begin`."""
        raise NotRepresentable(f"{self.method_name} has no files that say how much the inputs of a layer weigh")

    def importance_file(
        self, file: str, found: Mapping[str, tuple[Tensor, Tensor]], chunks: int, length: int
    ) -> tuple[Bundled, dict[str, Tensor]]:
        """Such a file, and its tensors. `found`: by `importance_names` sums of squares [experts, in] and tokens [experts] that
        `chunks` texts of `length` tokens brought."""
        raise NotRepresentable(f"{self.method_name} has no files that say how much the inputs of a layer weigh")

    def other_names(self, stored: str) -> Sequence[str]:
        """What transformers' own checkpoints may call a tensor that this format stores under a name of its own.

        For a stack of experts under one name, "*" stands for the expert's number. Both names end alike.
        """
        return ()

    def model_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """config.json of a checkpoint made with this quantizer, from that of the dense model."""
        return {**config, "quantization_config": self.quantization_config.to_dict()}

    def file_metadata(self, layouts: Mapping[str, Layout], names: Iterable[str]) -> dict[str, str]:
        """What the headers of a new checkpoint's files say. `layouts`: of its packed weights by their names in it;
        `names`: of all its tensors."""
        return {"format": "pt"}

    def made_files(self, layouts: Mapping[str, Layout]) -> Mapping[str, bytes]:
        """Further files of a checkpoint made with this quantizer, by name. `layouts`: of its packed weights by their names."""
        return {}

    def skipped_modules(self) -> Sequence[str] | None:
        """Patterns of modules the configuration leaves dense; None for the default ones."""
        skipped: Sequence[str] | None = getattr(self.quantization_config, "modules_to_not_convert", None)
        return skipped

    def begin(self, model: Any, slots: Sequence[Any]) -> None:
        """Once, with the model on the meta device, before any question about its modules.

        `slots`: the packable weights; each has `.module` (its path). Fills `modules_to_not_convert` and `skip_reasons`.
        """
        from anybit.quantizers.matching import matching_pattern

        kept = list(getattr(model, "_keep_in_fp32_modules", None) or [])
        self.modules_to_not_convert = self.get_modules_to_not_convert(model, self.skipped_modules(), kept)
        self.skip_reasons, self.decisions = {}, {}
        for slot in slots:
            pattern = matching_pattern(slot.module, self.modules_to_not_convert)
            if pattern is not None:
                self.skip_reasons[slot.module] = f"{pattern!r} is among the modules not to convert"

    def weights_in(self, location: Path) -> Path:
        """What to open of a checkpoint: the folder or file itself, or a file of it that this format keeps its weights in."""
        return location

    def spelled_out(self, checkpoint: Any) -> Any:
        """The checkpoint as the engine is to see it: what some files keep beside their tensors, as tensors.

        Once, before anything is planned. What is given back has the same `.tensors` (TensorInfo by name), `.read(name)`,
        `.release()`, `.metadata` and `.path`.
        """
        return checkpoint

    def attach(self, model: Any, checkpoint: Any, path_of: Callable[[str], str | None]) -> None:
        """Once, before the names of the model's tensors are taken: hooks, and buffers for what is stored beside weights.

        `checkpoint`: its `.tensors` by name and `.read(name)`. `path_of`: a module's name in the checkpoint -> its path in the
        model. Fills `attached`, the state dict keys of buffers that mean nothing to a dense model, and `folds`: what makes a
        dense weight or bias, by key, do without the hooks; float32 in and out. See `quantizers.attachments`.
        """

    def should_convert(self, module: ModuleInfo) -> bool:
        """False when configuration or defaults leave the module dense; valid after `begin`."""
        return module.name not in self.skip_reasons

    def decide(self, what: str, module: str) -> None:
        """Say in the plan what was decided for a module against, or without, the configuration's word."""
        modules = self.decisions.setdefault(what, [])
        if module not in modules[-1:]:
            modules.append(module)

    def layout_of(self, module: ModuleInfo, stored: Mapping[str, Any], peek: Callable[[str], Any]) -> Layout | None:
        """The layout these stored tensors have; None when they are a dense weight.

        `stored`: relative name -> TensorInfo (dtype, shape, bytes; no data). `peek(name)` reads one small tensor that the
        choice depends on. Raises ShapeMismatch or MissingTensor when tensors and configuration contradict each other.
        """
        return None

    def layout_for(self, module: ModuleInfo) -> Layout | None:
        """The layout a dense module gets when it is quantized; None to leave it dense (then say why in `skip_reasons`)."""
        return None

    def measurements(self, model: Any) -> Mapping[str, Measurement]:
        """What is measured on calibration data beside the inputs of layers, by the module's path: scales of a cache, say."""
        return {}

    def calibration_options(self) -> dict[str, Any]:
        """Options of `calibrated_algorithm` that the configuration sets."""
        return {}

    def calibration_size(self) -> tuple[int | None, int | None]:
        """(rows, tokens of a row) of calibration text that the configuration asks for; None where it does not say."""
        return None, None

    def rotate_inputs(self, modules: Sequence[str], size: int) -> None:
        """The inputs of these modules are to be multiplied by Hadamard matrices of `size` at run time; their weights are.

        Called before `attach`, of a quantizer that makes a checkpoint. ConfigError where its files cannot say so.
        """
        raise ConfigError(
            f"{self.method_name} checkpoints cannot say that {modules[0]} has a rotated input (r4). Leave r4 out, or use "
            "compressed-tensors; higgs and fp_quant rotate the input of every layer by themselves"
        )

    def claims(self, tensor_name: str) -> str | None:
        """Why a stored tensor that belongs to no weight may be ignored; None when it may not."""
        return None


def keys_to_not_convert(model: Any) -> list[str]:
    """Modules that stay dense by default, as in transformers: tied weights, the output layer and the last module."""
    keys: dict[str, None] = {}
    for target, source in dict(getattr(model, "all_tied_weights_keys", None) or {}).items():
        keys.update({target: None, source: None})
    keys.update(dict.fromkeys([name for name, _ in model.named_parameters()][-1:]))
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if output is not None:
        keys.update({name: None for name, module in model.named_modules() if module is output})
    return list(dict.fromkeys(key.removesuffix(".weight") for key in keys))
