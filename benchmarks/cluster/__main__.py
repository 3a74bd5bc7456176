"""What a run does on a cluster that changes: nodes come with the work, are taken away; and how long a start takes.

    python -m benchmarks.cluster autoscale             # about 14 minutes; processes are idle most of the time
    python -m benchmarks.cluster preemption [--minutes 10]
    python -m benchmarks.cluster startup RUN_DIR       # of a run that was made before

Ray, its nodes and its autoscaler are real, all on this machine and on loopback, and so are the driver's loop, the pool,
leases, queue and scaling. Engines and the learner are paced: they take the time that the options say, and no core, so
that two cores do not hide what is measured. Prints Markdown; status 1 where a trajectory was lost.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from tests.nodes import prepare


def main() -> None:
    with tempfile.TemporaryDirectory(
        prefix="hrb-", dir=os.environ.get("RAY_TMPDIR"), ignore_cleanup_errors=True
    ) as name:
        folder = Path(name)
        prepare(folder)  # before anything imports Ray
        root = str(Path(__file__).parents[2])
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        raise SystemExit(measured(folder))


def measured(folder: Path) -> int:
    from benchmarks.cluster import following, preempted, startup
    from cluster.doctor.software import versions

    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    for name, module in (("autoscale", following), ("preemption", preempted), ("startup", startup)):
        command = commands.add_parser(name, help=(module.__doc__ or "").splitlines()[0])
        module.add_arguments(command)
        command.set_defaults(measure=module.measure)
    arguments = parser.parse_args()
    print(", ".join(f"{name} {value}" for name, value in versions().items()))
    print(f"\n`python -m benchmarks.cluster {' '.join(sys.argv[1:])}`, {os.cpu_count()} cores\n", flush=True)
    return arguments.measure(arguments, folder) or 0


if __name__ == "__main__":
    main()
