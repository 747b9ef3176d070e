"""Where named tensors lie in files: bounded reading of what others wrote, atomic writing of what we write.

    with Checkpoint.open(folder) as checkpoint:
        checkpoint.tensors["lm_head.weight"]        # TensorInfo: dtype, shape, bytes, file; from headers alone, without torch
        checkpoint.read("lm_head.weight")           # a torch.Tensor that owns its memory

`safetensors.py`, `gguf.py` and `pickles.py` read one file each, `locating.py` chooses the files of a folder, `writer.py` writes.
"""

from anybit.containers.checkpoint import Checkpoint
from anybit.containers.info import TensorInfo

__all__ = ["Checkpoint", "TensorInfo"]
