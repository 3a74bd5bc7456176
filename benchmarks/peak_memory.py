"""Wall time and peak memory of a command with everything it starts, Ray's daemons and engines included (Linux).

    python -m benchmarks.peak_memory -- headrace train examples/quickstart.yaml

Sums the proportional set sizes (shared pages counted once) of the command and all its descendants every two
seconds; prints the largest sum and who held it.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil

_PERIOD_S = 2.0


def main() -> None:
    if "--" not in sys.argv or sys.argv[-1] == "--":
        raise SystemExit(__doc__)
    command = sys.argv[sys.argv.index("--") + 1 :]
    begun = time.monotonic()
    process = subprocess.Popen(command)
    peak_kib, holders = 0, dict[str, int]()
    while process.poll() is None:
        sizes = sizes_of_tree(process.pid)
        if sum(sizes.values()) > peak_kib:
            peak_kib, holders = sum(sizes.values()), sizes
        time.sleep(_PERIOD_S)
    print(f"\nwall {(time.monotonic() - begun) / 60:.1f} min, peak memory {peak_kib / 2**20:.1f} GiB (PSS), of it:")
    for name, kib in sorted(holders.items(), key=lambda item: -item[1])[:10]:
        print(f"  {kib / 2**20:5.2f} GiB  {name}")
    raise SystemExit(process.returncode)


def sizes_of_tree(pid: int) -> dict[str, int]:
    """PSS in KiB by process title; processes that end meanwhile are left out."""
    sizes: dict[str, int] = {}
    try:
        root = psutil.Process(pid)
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return sizes
    for process in processes:
        folder = Path("/proc", str(process.pid))
        try:
            title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()[:60]
            rollup = (folder / "smaps_rollup").read_text(encoding="utf-8")
        except OSError:
            continue
        kib = next((int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")), 0)
        sizes[title] = sizes.get(title, 0) + kib
    return sizes


if __name__ == "__main__":
    main()
