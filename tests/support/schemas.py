"""The schema of benchmarks/results, as far as it uses JSON schema's words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SCHEMA = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "schema.json").read_text("utf-8"))
KEYWORDS = {"$schema", "$defs", "title", "description", "type", "required", "properties", "items", "enum", "const",
            "additionalProperties"}  # fmt: skip


def objections(value: Any, schema: dict[str, Any], where: str = "") -> Iterator[str]:
    """Return the faults of a value under a schema, by the keywords that ours uses."""
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool,
             "null": type(None)}  # fmt: skip
    if "$ref" in schema:
        schema = SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]]
    assert set(schema) <= KEYWORDS
    wanted = schema.get("type", [])
    named = [wanted] if isinstance(wanted, str) else wanted
    if named and not any(isinstance(value, kinds[kind]) for kind in named):
        yield f"{where} is {value!r}, not {named}"
        return
    if value not in schema.get("enum", [value]) or value != schema.get("const", value):
        yield f"{where} is {value!r}"
    if isinstance(value, dict):
        yield from (f"{where} has no {name}" for name in schema.get("required", []) if name not in value)
        for name, inner in value.items():
            found = schema.get("properties", {}).get(name, schema.get("additionalProperties"))
            if found is None and "properties" in schema:
                yield f"{where}.{name} is not in the schema"
            elif found is not None:
                yield from objections(inner, found, f"{where}.{name}")
    if isinstance(value, list) and "items" in schema:
        for number, inner in enumerate(value):
            yield from objections(inner, schema["items"], f"{where}[{number}]")
