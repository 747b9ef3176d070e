"""How far each named scheme moves the bundled model: the table behind the quality classes of `anybit recommend`.

    python benchmarks/scheme_quality.py            writes src/anybit/engine/_scheme_quality.json

Each scheme is made by its own rule, without calibration, while the model loads. KL(dense || quantized) in nats per token on the
first tokens of examples/data/evaluation.txt, windows of 256. A scheme that changes nothing in this model is left out.
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path

import anybit
from anybit.cli.schemes import schemes
from anybit.errors import AnybitError

ROOT = Path(__file__).parents[1]
MODEL, TEXT = ROOT / "examples" / "tiny-llama", ROOT / "examples" / "data" / "evaluation.txt"
TARGET = ROOT / "src" / "anybit" / "engine" / "_scheme_quality.json"
TOKENS, CONTEXT = 2550, 256


def main() -> None:
    dense = anybit.load(MODEL)
    found: dict[str, dict[str, float]] = {}
    for name, (cls, options) in schemes().items():
        begin = time.time()
        try:
            model = anybit.load(MODEL, cls(**options))
        except AnybitError as error:
            print(f"{name}: not made from weights alone: {str(error).splitlines()[0][:100]}", file=sys.stderr)
            continue
        if model.anybit_plan.coverage == 0:
            print(f"{name}: quantizes nothing here", file=sys.stderr)
            continue
        result = anybit.evaluate(model, TEXT, reference=dense, context=CONTEXT, max_tokens=TOKENS, batch_size=5)
        if not math.isfinite(result.kl or math.inf):
            print(f"{name}: KL is {result.kl}", file=sys.stderr)
            continue
        found[name] = {"kl": float(f"{result.kl:.3g}"), "perplexity": round(result.perplexity, 2)}
        print(f"{name}: {found[name]} in {time.time() - begin:.1f} s", flush=True)
        found["dense"] = {"kl": 0.0, "perplexity": round(result.reference_perplexity, 2)}
    TARGET.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
