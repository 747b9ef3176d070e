"""What gguf-py makes of small dense weights: ties, zeros, one sign, tiny, large and equal numbers among them.

    python3 -m venv venv && venv/bin/pip install gguf==0.19.0 && venv/bin/python make.py

Writes created.npz: dense, and the blocks of each type. blocks.safetensors beside it is llama.cpp's own (see fixture.json).
"""

import numpy as np
from gguf import GGMLQuantizationType, quants

rng = np.random.default_rng(0)
x = rng.standard_normal((12, 128)).astype(np.float32) * 0.1
x[1] = 0
x[2, :32] = 0
x[3] = np.round(x[3] * 20) / 20
x[4, 0] = -x[4].max()
x[5] = np.abs(x[5])
x[6] = -np.abs(x[6])
x[7] *= 1e-6
x[8] *= 1e4
x[9] = 0.25
x[10, ::2] = 0.5
x[10, 1::2] = -0.5
x[11] = (rng.integers(-127, 128, 128) / 2).astype(np.float32)
made = {name: quants.quantize(x, GGMLQuantizationType[name]) for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")}
np.savez("created.npz", dense=x, **made)
