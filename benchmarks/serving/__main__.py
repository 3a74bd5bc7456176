"""The served policy measured: against vLLM's own server, while versions roll over, over its capacity, on broken input.

    python -m benchmarks.serving throughput             # tokens/s, first tokens, where the rest goes
    python -m benchmarks.serving rollover               # 2,000 requests, 50 versions, one replica killed
    python -m benchmarks.serving overload               # five times what it can do, for a minute
    python -m benchmarks.serving fuzz                   # schemathesis, and requests that are none

Each starts the real `headrace serve` on this machine, asks it over HTTP as a client would, and ends it again.
`--model` names what is served; `tiny` is the model of tests/tiny.py, for a quick look at the benchmark itself. Prints
Markdown, and writes everything as JSON where `--json` names a file. Status 1 where an answer was wrong or lost, or a
process died.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.nodes import prepare


def main() -> None:
    with tempfile.TemporaryDirectory(
        prefix="hrs-", dir=os.environ.get("RAY_TMPDIR"), ignore_cleanup_errors=True
    ) as name:
        folder = Path(name)
        prepare(folder)  # before anything imports Ray
        root = str(Path(__file__).parents[2])
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        raise SystemExit(measured(folder))


def measured(folder: Path) -> int:
    from benchmarks.serving import fuzz, overload, rollover, throughput
    from cluster.doctor.software import versions

    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    for name, module in (("throughput", throughput), ("rollover", rollover), ("overload", overload), ("fuzz", fuzz)):
        command = commands.add_parser(
            name,
            help=(module.__doc__ or "").splitlines()[0],
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        command.add_argument("--model", default="bundled:smollm2-135m-instruct", help="path as in model.path, or tiny")
        command.add_argument("--json", type=Path, help="file to write what was measured to")
        module.add_arguments(command)
        command.set_defaults(measure=module.measure)
    arguments = parser.parse_args()
    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # busy replicas are slow to say how long their queues are
    print(", ".join(f"{name} {value}" for name, value in versions().items()))
    print(f"\n`python -m benchmarks.serving {' '.join(sys.argv[1:])}`, {os.cpu_count()} cores\n", flush=True)
    found: dict[str, Any] = {}
    status: int = arguments.measure(arguments, folder, found)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": versions(), "command": sys.argv[1:]} | found, indent=1))
    return status


if __name__ == "__main__":
    main()
