"""The model card: README.md with the metadata that the hub understands, and the report's figures."""

from __future__ import annotations

import json
import math
from pathlib import Path

from anybit.errors import WriteError
from anybit.reporting.facts import Facts, as_json


def write_card(facts: Facts, folder: Path, force: bool = False) -> Path:
    """Write `folder`/README.md. Raises WriteError if there is one that anybit did not write, without `force`."""
    path = folder / "README.md"
    if path.exists() and not force and "- anybit\n" not in path.read_text(encoding="utf-8", errors="replace")[:2000]:
        raise WriteError(f"{path} exists and is not a card of anybit's; replace it with force (--force), or move it")
    path.write_text(card(facts), encoding="utf-8")
    return path


def card(facts: Facts) -> str:
    """YAML metadata, then what was measured and how to use and repeat it."""
    name = Path(facts.path).resolve().name
    base = _hub_id(facts.reference)
    metadata = ["library_name: transformers", "tags:", "- anybit", f"- {facts.method}"]
    if base is not None:
        metadata += [f"base_model: {base}", "base_model_relation: quantized"]
    metadata += _results(name, facts)
    rows = [
        ("method", facts.method),
        ("bits per packed weight", f"{facts.bits_per_weight:.2f}"),
        ("weights that are packed", f"{facts.plan['coverage']:.1%}"),
        (
            "bytes on disk",
            f"{facts.plan['bytes_on_disk']:,}" + (f" (before: {facts.dense_bytes:,})" if facts.dense_bytes else ""),
        ),
    ]
    found = facts.evaluation
    if found is not None:
        before = f" (before: {found.reference_perplexity:.3f})" if found.reference_perplexity is not None else ""
        rows.append(("perplexity", f"{found.perplexity:.3f}{before}"))
        if found.kl is not None and found.top1 is not None:
            rows += [("KL, nats per token", f"{found.kl:.4f}"), ("same first choice as before", f"{found.top1:.1%}")]
    table = "\n".join(f"| {label} | {value} |" for label, value in rows)
    protocol = f"\nMeasured: {found.protocol}.\n" if found is not None else ""
    recipe = f"\nThe recipe:\n\n```json\n{as_json(facts.recipe)}\n```\n" if facts.recipe is not None else ""
    return f"""---
{chr(10).join(metadata)}
---

# {name}

Quantized with anybit {facts.versions["anybit"]}.

| | |
|---|---|
{table}
{protocol}
```python
from anybit import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({json.dumps(name)})
```

To do it again:

```
{facts.command}
```
{recipe}"""


def _results(name: str, facts: Facts) -> list[str]:
    """`model-index`, as the hub reads it: what was measured, on which text."""
    found = facts.evaluation
    if found is None:
        return []
    metrics = [("perplexity", found.perplexity), ("kl", found.kl), ("top1_agreement", found.top1)]
    lines = [
        "model-index:", f"- name: {json.dumps(name)}", "  results:", "  - task:", "      type: text-generation",
        "    dataset:", f"      name: {json.dumps(facts.text or 'a text of its maker')}", "      type: text", "    metrics:",
    ]  # fmt: skip
    for kind, value in metrics:
        if value is not None and math.isfinite(value):
            lines += [f"    - type: {kind}", f"      value: {value:.6g}"]
    return lines


def _hub_id(reference: str | None) -> str | None:
    """`owner/name`, if that is what the reference was given as: a folder on somebody's disk is no metadata."""
    if reference is None or Path(reference).exists() or reference.count("/") != 1:
        return None
    return reference
