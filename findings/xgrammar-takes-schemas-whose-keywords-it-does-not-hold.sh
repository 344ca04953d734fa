#!/usr/bin/env bash
# xgrammar 0.2.9: some JSON schema keywords are taken without a word and constrain nothing.
#
# Behaviour: GrammarCompiler.compile_json_schema compiles schemas with `uniqueItems`, `contains`, `dependentRequired`,
# `not` and `if`, says nothing, and the matcher then takes answers that the schema forbids. Others (`maxItems`, `enum`) it
# holds. So an answer that was "constrained by the schema" may not validate; whoever promises that has to refuse these
# keywords by himself. llguidance 1.9.1 refuses all five with an error that names the keyword.
#
# Output seen with Python 3.11, torch 2.13.0 (CPU), on 2026-11-28:
#   maxItems: takes [1, 1, 1]: False
#   uniqueItems: takes [1, 1]: True
#   contains: takes [1, 1]: True
#   dependentRequired: takes {"a": 1}: True
#   not: takes 1: True
#   if: takes {"a": 1}: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0
"$folder/env/bin/pip" install -q numpy xgrammar==0.2.9
"$folder/env/bin/python" - <<'PY'
import json

import xgrammar

numbers = {"type": "array", "items": {"type": "integer"}}
both = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}
cases = {  # a schema, and an answer that it forbids
    "maxItems": ({**numbers, "maxItems": 2}, "[1, 1, 1]"),
    "uniqueItems": ({**numbers, "uniqueItems": True}, "[1, 1]"),
    "contains": ({**numbers, "contains": {"const": 2}}, "[1, 1]"),
    "dependentRequired": ({**both, "dependentRequired": {"a": ["b"]}}, '{"a": 1}'),
    "not": ({"type": "integer", "not": {"const": 1}}, "1"),
    "if": ({**both, "if": {"required": ["a"]}, "then": {"required": ["b"]}}, '{"a": 1}'),
}
vocabulary = [bytes([byte]) for byte in range(256)] + [b""]
info = xgrammar.TokenizerInfo(vocabulary, xgrammar.VocabType.RAW, stop_token_ids=[256])
compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
found = {}
for name, (schema, answer) in cases.items():
    matcher = xgrammar.GrammarMatcher(compiler.compile_json_schema(json.dumps(schema)))
    found[name] = all(matcher.accept_token(byte) for byte in answer.encode()) and matcher.accept_token(256)
    print(f"{name}: takes {answer}: {found[name]}")
assert found == {name: name != "maxItems" for name in cases}, found
PY
