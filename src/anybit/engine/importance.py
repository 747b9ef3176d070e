"""Importance matrices: the mean squares of every layer's inputs on calibration text, in llama.cpp's file format."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anybit.containers.atomic import write_failed
from anybit.containers.gguf_writer import GgufWriter
from anybit.engine.budget import budget
from anybit.engine.calibration import LENGTH, SAMPLES, SEED, Calibrator, Observed, calibration_tokens
from anybit.engine.hidden_states import Work
from anybit.engine.load import Progress, prepare
from anybit.engine.plan import Entry
from anybit.errors import ConfigError
from anybit.quantizers.registry import config_classes


def importance_matrix(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    calibration: Any,
    *,
    samples: int = SAMPLES,
    sequence_length: int = LENGTH,
    seed: int = SEED,
    device: torch.device | str = "cpu",
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write the importance matrix of the dense model `src` to the new file `dst` (.gguf); returns it.

    The weights of the blocks are in it, one decoder block at a time in memory; embeddings and head are not, as they are rounded
    without. `calibration`, `samples`, `sequence_length` and `seed` as for `quantize`. llama.cpp's tools read it, and
    `GgufConfig(imatrix=)`. Raises ConfigError for a model whose files have no GGUF names, FileExistsError without `force`.
    """
    target = Path(dst)
    if target.suffix.lower() != ".gguf":
        raise ConfigError(f"the importance matrix {target} must be named *.gguf, as it is such a file")
    if target.exists() and not force:
        raise FileExistsError(f"{target} exists. Choose another output or pass force=True to replace it")
    method = next(cls for cls in config_classes() if cls.importance_options is not None)
    config = method(**(method.importance_options or {}))
    ready = prepare(src, config, device_map=device, calibrated=True)
    assert ready.quantizer is not None
    tokens = calibration_tokens(calibration, ready.folder, samples=samples, length=sequence_length, seed=seed)
    calibrator = Calibrator(ready, tokens, torch.device(device), budget(ready, tokens, None).batch, Work())
    names_of = ready.quantizer.importance_names
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def note(entry: Entry, observed: Mapping[int | None, Observed] | None) -> Tensor:
        """Nothing is rounded: the weight stays what it is."""
        for name in names_of([part.prefix for part in entry.parts]) if observed is not None else ():
            assert observed is not None
            sums = [seen.hessian.diagonal().cpu() / 2 * seen.tokens for seen in observed.values()]
            found[name] = torch.stack(sums), torch.tensor([float(seen.tokens) for seen in observed.values()])
        return calibrator.model.get_parameter(entry.slot.parameter).detach()

    for number in range(len(calibrator.blocks)):
        calibrator.run(number, note)
        if progress is not None:
            progress(calibrator.names(number), number + 1, len(calibrator.blocks))
    ready.checkpoint.release()
    new = target.with_name(f".{target.stem}.anybit-new.gguf")
    new.unlink(missing_ok=True)
    file, numbers = ready.quantizer.importance_file(new.name, found, *tokens.shape)
    with GgufWriter(new.parent, file) as writer:
        for name, tensor in numbers.items():
            writer.write(name, tensor)
    try:
        os.replace(new, target)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise write_failed(error, str(target)) from error
    return target
