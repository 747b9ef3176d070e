"""GPTQ. Columns share a scale and a zero point per group; with act-order, `g_idx` names the group of each column."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from anybit.errors import InvalidOption
from anybit.quantizers.base import HfQuantizer
from anybit.quantizers.config import QuantizationConfigMixin
from anybit.quantizers.options import check_choice, check_group_size, check_type, refuse
from anybit.quantizers.registry import register_quantization_config, register_quantizer

# transformers takes 2, 3, 4 and 8; gptqmodel also writes 5, 6 and 7 (planar)
BITS = (2, 3, 4, 5, 6, 7, 8)
DATASETS = ("wikitext2", "c4", "c4-new")
# run-time repackings that old files name as their method
REPACKED = ("marlin", "bitblas")


@register_quantization_config("gptq")
@dataclass(eq=False, repr=False)
class GPTQConfig(QuantizationConfigMixin):
    """`bits` and `group_size` of the stored codes; the other options tell how they were, or are to be, chosen."""

    bits: int
    tokenizer: Any = None
    dataset: list[str] | str | None = None
    group_size: int = 128
    damp_percent: float = 0.1
    desc_act: bool = False
    act_group_aware: bool = True
    sym: bool = True
    true_sequential: bool = True
    format: str = "gptq"
    meta: dict[str, Any] | None = None
    backend: str | None = None
    model_seqlen: int | None = None
    block_name_to_quantize: str | None = None
    module_name_preceding_first_block: list[str] | None = None
    batch_size: int = 1
    pad_token_id: int | None = None
    max_input_length: int | None = None
    cache_block_outputs: bool = True
    modules_in_block_to_quantize: list[list[str]] | None = None
    checkpoint_format: str | None = None

    method: ClassVar[str] = "gptq"
    aliases: ClassVar[Mapping[str, str]] = {"w_bit": "bits", "wbits": "bits", "q_group_size": "group_size"}
    side_files: ClassVar[tuple[str, ...]] = ("quantize_config.json",)
    loading_attributes: ClassVar[tuple[str, ...]] = ("max_input_length", "backend")

    def __post_init__(self) -> None:
        checkpoint_format = self.__dict__.pop("checkpoint_format", None)  # the older name of `format` wins
        self.format = checkpoint_format if checkpoint_format is not None else self.format
        super().__post_init__()

    def post_init(self) -> None:
        check_choice(self, "bits", BITS)
        check_group_size(self)
        if not (isinstance(self.damp_percent, (int, float)) and 0 < self.damp_percent < 1):
            raise refuse(self, "damp_percent", "it must lie between 0 and 1")
        if isinstance(self.dataset, str):
            check_choice(self, "dataset", DATASETS)
        check_type(self, "dataset", str, list, None)
        check_type(self, "format", str)
        self.format = self.format.lower()
        self.backend = self.backend.lower() if isinstance(self.backend, str) else self.backend or "auto"
        if self.desc_act:
            self.act_group_aware = False  # they exclude each other

    @classmethod
    def recognizes(cls, config_dict: Mapping[str, Any]) -> bool:
        if config_dict.get("quant_method") is not None:
            return config_dict["quant_method"] in REPACKED
        if {"zero_point", "version"} & set(config_dict):
            return False
        return any(name in config_dict for name in ("bits", "w_bit", "wbits")) and bool(
            {"desc_act", "damp_percent", "sym", "true_sequential"} & set(config_dict)
        )

    @classmethod
    def modernize(cls, config_dict: dict[str, Any]) -> dict[str, Any]:
        repacked = config_dict.get("quant_method")
        if repacked in REPACKED:
            config_dict.setdefault("checkpoint_format", repacked)
        # optional settings that tools write as null mean the default
        for name in ("damp_percent", "act_group_aware", "format", "group_size", "sym", "desc_act", "true_sequential"):
            if name in config_dict and config_dict[name] is None:
                del config_dict[name]
        return _without_foreign_dataset(config_dict)

    def own_dict(self) -> dict[str, Any]:
        tokenizer = self.tokenizer if isinstance(self.tokenizer, str) else getattr(self.tokenizer, "name_or_path", None)
        own = {name: value for name, value in self.__dict__.items() if name not in ("tokenizer", "extra_fields")}
        return {**_copied(own), "tokenizer": tokenizer, "checkpoint_format": self.format}

    def to_dict_optimum(self) -> dict[str, Any]:
        """The dictionary optimum expects; the same."""
        return self.to_dict()

    @classmethod
    def from_dict_optimum(cls, config_dict: Mapping[str, Any]) -> Any:
        """From optimum's dictionary; the same."""
        return cls.from_dict(config_dict)


def _without_foreign_dataset(config_dict: dict[str, Any]) -> dict[str, Any]:
    """A finished checkpoint may name any calibration set; only a choice to be run is checked."""
    if isinstance(config_dict.get("dataset"), str) and config_dict["dataset"] not in DATASETS:
        config_dict["dataset"] = [config_dict["dataset"]]
    return config_dict


@register_quantizer("gptq")
class GptqHfQuantizer(HfQuantizer):
    """GPTQ's layouts."""
