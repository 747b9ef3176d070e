"""How far each named scheme moves the bundled model: the table behind the quality classes of `anybit recommend`.

    python benchmarks/scheme_quality.py            writes src/anybit/engine/_scheme_quality.json
    python benchmarks/scheme_quality.py --again '^gguf-'

Each scheme is made by its own rule, without calibration, while the model loads; those that cannot be made so ("calibrated") see
24 rows of 256 tokens of examples/data/calibration.txt. KL(dense || quantized) in nats per token on the first tokens of
examples/data/evaluation.txt, windows of 256. A scheme that changes nothing in this model is left out. Schemes that are in the
file already keep their numbers, unless their names match --again; those that are gone are dropped.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import anybit
from anybit import AutoTokenizer
from anybit.cli.schemes import schemes
from anybit.errors import AnybitError, CalibrationNeeded

ROOT = Path(__file__).parents[1]
MODEL, TEXT = ROOT / "examples" / "tiny-llama", ROOT / "examples" / "data" / "evaluation.txt"
TARGET = ROOT / "src" / "anybit" / "engine" / "_scheme_quality.json"
DATA = TEXT.with_name("calibration.txt")
TOKENS, CONTEXT = 2550, 256


def made_with_data(config: Any) -> Any:
    """The model, quantized file to file with the method's own calibrated algorithm."""
    with tempfile.TemporaryDirectory() as folder:
        anybit.quantize(MODEL, Path(folder) / "made", config, calibration=DATA, samples=24, sequence_length=256)
        return anybit.load(Path(folder) / "made")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", default="", help="of the schemes that have no numbers yet, those that match")
    options.add_argument("--again", default="$^", help="measure the schemes that match once more")
    given = options.parse_args()
    known = schemes()
    found: dict[str, dict[str, Any]] = json.loads(TARGET.read_text()) if TARGET.is_file() else {}
    found = {name: own for name, own in found.items() if name in known or name == "dense"}
    dense, tokenizer = anybit.load(MODEL), AutoTokenizer.from_pretrained(MODEL)
    for name, (cls, own) in known.items():
        if not re.search(given.again if name in found else given.only, name):
            continue
        begin = time.time()
        calibrated = False
        try:
            try:
                model = anybit.load(MODEL, cls(**own))
            except CalibrationNeeded:
                calibrated, model = True, made_with_data(cls(**own))
        except AnybitError as error:
            print(f"{name}: cannot be made: {str(error).splitlines()[0][:100]}", file=sys.stderr)
            continue
        if model.anybit_plan.coverage == 0:
            print(f"{name}: quantizes nothing here", file=sys.stderr)
            continue
        result = anybit.evaluate(
            model, TEXT, reference=dense, tokenizer=tokenizer, context=CONTEXT, max_tokens=TOKENS, batch_size=5
        )
        if not math.isfinite(result.kl or math.inf):
            print(f"{name}: KL is {result.kl}", file=sys.stderr)
            continue
        found[name] = {"kl": float(f"{result.kl:.3g}"), "perplexity": round(result.perplexity, 2)}
        if calibrated:
            found[name]["calibrated"] = True
        found["dense"] = {"kl": 0.0, "perplexity": round(result.reference_perplexity, 2)}
        print(f"{name}: {found[name]} in {time.time() - begin:.1f} s", flush=True)
        TARGET.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
