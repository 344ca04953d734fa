"""The OpenAPI schema of predict.py and train.py, as `cog build` would write it, without the Cog CLI.

    python -m deploy.schema        writes .cog/openapi_schema.json, which the runtime reads at start

The runtime validates inputs against this file. Inputs and outputs come from the SDK's own inspection (private, so the
version is pinned and a test holds it); whether a predictor streams is read from its source, as Cog does.
"""

import ast
from pathlib import Path
from typing import Any

from cog import _adt as adt
from cog import _inspector as inspector

from alpaca.files.atomic import write_json

ROOT = Path(__file__).resolve().parent.parent

PREDICTOR = "predict.py:Predictor"
TRAINER = "train.py:train"
_DONE = {"responses": {"200": {"description": "Successful Response"}}}
SCHEMA_FILE = ROOT / ".cog" / "openapi_schema.json"


def build_schema(predictor: str = PREDICTOR, trainer: str | None = TRAINER) -> dict[str, Any]:
    """The schema of a predictor and, where given, a training function ("file.py:name", relative to the project)."""
    schemas: dict[str, Any] = {}
    paths: dict[str, Any] = {}
    targets = [("predictions", "", predictor)] + ([("trainings", "Training", trainer)] if trainer else [])
    for route, prefix, reference in targets:
        module, name = reference.split(".py:")
        info = inspector.create_predictor(module.replace("/", "."), name)
        schemas[f"{prefix}Input"] = _inputs(info.inputs, f"{prefix}Input")
        schemas[f"{prefix}Output"] = {**info.output.json_type(), "title": f"{prefix}Output"}
        streams = _is_streaming(ROOT / f"{module}.py", name)
        paths |= _paths(route, prefix, streams=streams)
        schemas |= _envelope(prefix or "Prediction", prefix)
    return {
        "openapi": "3.0.2",
        "info": {"title": "Cog", "version": "0.1.0"},
        "paths": paths | {"/health-check": {"get": {"summary": "Healthcheck", "operationId": "healthcheck", **_DONE}}},
        "components": {"schemas": schemas},
    }


def _inputs(fields: dict[str, adt.InputField], title: str) -> dict[str, Any]:
    properties = {name: _property(field) for name, field in fields.items()}
    required = [name for name, field in fields.items() if _is_required(field)]
    schema: dict[str, Any] = {"title": title, "type": "object", "properties": properties}
    return schema | ({"required": required} if required else {})


def _property(field: adt.InputField) -> dict[str, Any]:
    entry: dict[str, Any] = {"title": field.name.replace("_", " ").title(), "x-order": field.order}
    entry |= field.type.json_type()
    if field.description:
        entry["description"] = field.description
    if field.default is not None:
        entry["default"] = field.default
    if _is_optional(field):
        entry["nullable"] = True
    if field.deprecated:
        entry["deprecated"] = True
    for key, value in (("minimum", field.ge), ("maximum", field.le), ("enum", field.choices)):
        if value is not None:
            entry[key] = value
    return entry


def _is_optional(field: adt.InputField) -> bool:
    return field.type.repetition in (adt.Repetition.OPTIONAL, adt.Repetition.OPTIONAL_REPEATED)


def _is_required(field: adt.InputField) -> bool:
    return field.default is None and not _is_optional(field)


def _is_streaming(file: Path, name: str) -> bool:
    """Whether the class's run or the function itself carries Cog's `@streaming`."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    target = next(node for node in tree.body if getattr(node, "name", None) == name)
    functions = [target] if not isinstance(target, ast.ClassDef) else target.body
    return any(
        "streaming" in ast.unparse(decorator)
        for function in functions
        if getattr(function, "name", "") in ("run", "predict", name)
        for decorator in function.decorator_list
    )


def _paths(route: str, prefix: str, *, streams: bool) -> dict[str, Any]:
    name = prefix or "Prediction"
    body = {"content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}Request"}}}}
    reply = {"content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}Response"}}}}
    post: dict[str, Any] = {
        "operationId": route.removesuffix("s"),
        "requestBody": body,
        "responses": {"200": {**_DONE["responses"]["200"], **reply}},
    }
    if streams:
        post["x-cog-streaming"] = True
    name_of_one = {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
    cancel = {"operationId": f"cancel_{route}", "parameters": [name_of_one], **_DONE}
    return {f"/{route}": {"post": post}, f"/{route}/{{id}}/cancel": {"post": cancel}}


def _envelope(name: str, prefix: str) -> dict[str, Any]:
    reference = {kind: {"$ref": f"#/components/schemas/{prefix}{kind}"} for kind in ("Input", "Output")}
    text = {"type": "string"}
    request = {"id": text, "input": reference["Input"], "webhook": text}
    response = {"id": text, "status": text, "error": text, "logs": text, "metrics": {"type": "object"}}
    return {
        f"{name}Request": {"type": "object", "properties": request},
        f"{name}Response": {
            "type": "object",
            "properties": {**response, "input": reference["Input"], "output": reference["Output"]},
        },
    }


def write_schema() -> Path:
    """Write the project's schema where the runtime looks for it."""
    SCHEMA_FILE.parent.mkdir(exist_ok=True)
    write_json(SCHEMA_FILE, build_schema())
    return SCHEMA_FILE


if __name__ == "__main__":
    print(write_schema().relative_to(ROOT))
