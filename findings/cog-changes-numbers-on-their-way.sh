#!/usr/bin/env bash
# Cog 0.23.1: a prediction gets other numbers than its client sent, floats of 16 and 17 digits by one unit in the last
# place, whole numbers beyond 64 bits as floats.
#
# Behaviour: Cog's runtime reads the request's JSON into doubles by a fast conversion that is not always the nearest one,
# and hands what it read on to the Python worker. 123456789.12345679, which is the shortest text of its double, arrives
# as the double above it, as does one in nine such numbers. 18446744073709551617 arrives as a float, so
# that an input that holds ids (in a `dict`, such as a JSON schema's `enum`) holds other ids. Nothing is said. Python's
# json, JavaScript and Go read the nearest double. Texts arrive as they are: send exact numbers as strings.
#
# Output seen with Python 3.11, cog 0.23.1, on 2026-11-28:
#   sent    123456789.12345679, arrived 123456789.1234568
#   sent    18446744073709551617, arrived 1.8446744073709552e+19
#   of 1,000 random floats of 17 digits 110 arrived as another one
set -euo pipefail
folder=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q cog==0.23.1
cd "$folder"
cat > predict.py <<'PY'
from cog import BasePredictor


class Predictor(BasePredictor):
    def predict(self, numbers: dict) -> str:
        return repr(numbers["sent"])
PY
PATH="$folder/env/bin:$PATH" PORT=18977 COG_PREDICT_TYPE_STUB=predict.py:Predictor LOG_FORMAT=console \
  python -m cog.server.http --host 127.0.0.1 >server.log 2>&1 &
python3 - <<'PY'
import json
import random
import time
import urllib.error
import urllib.request

URL = "http://127.0.0.1:18977"


def ask(path: str, body: bytes | None = None) -> dict:
    request = urllib.request.Request(URL + path, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as reply:
        return json.load(reply)


def arrived(text: str) -> list:
    body = '{"input": {"numbers": {"sent": [%s]}}}' % text
    return json.loads(ask("/predictions", body.encode())["output"])


deadline = time.monotonic() + 60
while True:
    try:
        if ask("/health-check")["status"] == "READY":
            break
    except (urllib.error.URLError, ConnectionError):
        pass
    assert time.monotonic() < deadline, "the server is not ready"
    time.sleep(0.1)
for text in ("123456789.12345679", "18446744073709551617"):
    print(f"sent    {text}, arrived {arrived(text)[0]!r}")
    assert arrived(text) != [json.loads(text)]
chance = random.Random(0)
floats = [chance.uniform(0, 1e9) for _ in range(1000)]
changed = sum(one != other for one, other in zip(floats, arrived(", ".join(map(repr, floats))), strict=True))
print(f"of 1,000 random floats of 17 digits {changed} arrived as another one")
assert changed > 10
PY
