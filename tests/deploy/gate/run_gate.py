"""Runs the gate in front of the fake runtime: `python -m tests.deploy.gate.run_gate LOG RULES BOUNDS COMPANION`.

RULES, BOUNDS and COMPANION are JSON. BOUNDS: other values for constants of these modules, so that a test need not wait
for a minute. COMPANION: the command of a program that runs beside; none where it is left out.
"""

import json
import os
import sys

from deploy.gate import bodies, connections, places, room
from deploy.gate.main import serve
from deploy.gate.rules import Rules

if __name__ == "__main__":
    command = [sys.executable, "-m", "tests.deploy.gate.fake_runtime", sys.argv[1]]
    given = {
        name: tuple(value) if isinstance(value, list) else value for name, value in json.loads(sys.argv[2]).items()
    }
    for name, value in json.loads(sys.argv[3]).items():
        (module,) = (module for module in (bodies, connections, places, room) if hasattr(module, name))
        setattr(module, name, type(getattr(module, name))(value))
    beside = json.loads(sys.argv[4]) if len(sys.argv) > 4 else ()
    sys.exit(serve(command, dict(os.environ), Rules(**given), host="127.0.0.1", port=0, companion=beside))
