"""Runs as Ray jobs: what is sent, what is refused before, and jobs on a real head with a real dashboard."""

import asyncio
import http.server
import re
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import yaml
from ray._private import ray_constants
from ray._private.runtime_env.packaging import create_package
from ray.job_submission import JobDetails, JobStatus, JobType

from cluster import submit as module
from cluster.preflight.run_folder import finished_checkpoints
from cluster.submit import Jobs, exit_status, show_log, show_status, stop, submit
from cluster.working_dir import check_inputs, check_size, config_path, sent_files
from contracts import loading as configuration
from contracts.config import ConfigError
from contracts.waiting import NoAnswer
from tests.cluster.test_train import steps, write_config, write_project
from tests.command import Command, rows
from tests.head import RAY, free_ports, ray_head

# What a run does on SIGTERM, without the run: it finishes something that takes longer than Ray's own 3 s.
SLOW_TO_STOP = """
import signal, sys, time
def finish(number, frame):
    time.sleep(5)
    print("stopped after step 7; continue with: headrace train config.yaml resume=true", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, finish)
print(sys.argv[1:], "step 0/9", flush=True)
print("step 7/9  reward 0.5", flush=True)
print("\u00e9" * 30, flush=True)
time.sleep(300)
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory, the current one, with a configuration whose model is nowhere."""
    folder = tmp_path / "project"
    folder.mkdir()
    config = write_project(folder, Path("/nowhere/model")) | {"output_dir": str(tmp_path / "runs" / "first")}
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    monkeypatch.chdir(folder)
    return folder


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def test_what_is_measured_is_what_ray_packs(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    write(folder, a="a" * 1000, data__b="b" * 50, data__deep__c="c", cache__x="x", data__deep__skip="s", runs__r="r")
    write(folder, **{".venv__lib": "l", "é": "name", "node__deep__n.bin": "n"})
    (folder / ".gitignore").write_text("runs/\n")
    (folder / ".rayignore").write_text("cache\n")
    (folder / "data" / "deep" / ".gitignore").write_text("skip\n")
    files = sent_files(folder, ["*.bin"])
    names = {"a", "data/b", "data/deep/c", "é", ".gitignore", ".rayignore", "data/deep/.gitignore"}
    assert {str(name) for name in files} == names
    excludes = [*ray_constants.get_runtime_env_default_excludes(), "*.bin"]
    create_package(str(folder), tmp_path / "package.zip", include_gitignore=True, excludes=excludes)
    with ZipFile(tmp_path / "package.zip") as package:
        assert {name for name in package.namelist() if not name.endswith("/")} == names
        folders = [name for name in package.namelist() if name.endswith("/")]  # Ray sends empty ones along
    records = sum(76 + 2 * len(name) for name in folders)
    assert sum(files.values()) + records + 22 == (tmp_path / "package.zip").stat().st_size


def test_too_large_a_folder_is_refused_with_what_is_large(tmp_path: Path) -> None:
    write(tmp_path, big__one="x" * (3 << 20), big__two="x" * (2 << 20), small__s="x" * (1 << 20), file="x" * (1 << 19))
    files = sent_files(tmp_path, [])
    check_size(tmp_path, files, 7 << 20)
    with pytest.raises(ConfigError) as refused:
        check_size(tmp_path, files, 6 << 20)
    assert str(refused.value).startswith(f"{tmp_path} is 6.5 MiB, and Ray takes at most 6.0 MiB; ")
    assert "largest: big/ 5.0 MiB, small/ 1.0 MiB, file 0.5 MiB; " in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("change", "ignored", "message"),
    [
        ({}, "", ""),
        ({"output_dir": "runs/mine"}, "", "output_dir: runs/mine is relative, and a job's working directory"),
        ({"prompts.path": "none.jsonl"}, "", "prompts.path: none.jsonl does not exist in "),
        ({"prompts.path": "/mnt/elsewhere.jsonl"}, "", ""),
        (
            {"serving.start": "true", "serving.gate.prompts": "gate.jsonl"},
            "",
            "serving.gate.prompts: gate.jsonl does not",
        ),
        ({"serving.start": "true", "serving.keys": "keys"}, "", "serving.keys: keys does not exist in "),
        ({"serving.keys": "keys"}, "", ""),
        ({}, "held_out*", "prompts.eval_path: held_out.jsonl is not taken along: .rayignore, .gitignore or --exclude"),
        ({"model.path": "model"}, "model/", "model.path: model is not taken along"),
        ({"model.path": "org/model"}, "", ""),
        ({}, "*.py", "rewards.letter.function: judges_of_test.py is not taken along"),
        ({}, "config.yaml", "CONFIG: config.yaml is not taken along"),
    ],
)
def test_what_the_run_reads_has_to_be_sent(project: Path, change: dict[str, str], ignored: str, message: str) -> None:
    write(project, model__weights="w")
    settings = configuration.load("config.yaml", [f"{key}={value}" for key, value in change.items()])
    files = sent_files(project, [ignored] if ignored else [])

    def check() -> None:
        assert config_path(project / "config.yaml", project, files) == Path("config.yaml")
        check_inputs(settings, project, files)

    if not message:
        check()
        return
    with pytest.raises(ConfigError, match=re.escape(message)):
        check()


def test_a_configuration_from_elsewhere_is_refused(project: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not in .* submit from its folder"):
        config_path(Path("../other.yaml").resolve(), project, sent_files(project, []))


@pytest.fixture
def web_server() -> Iterator[str]:
    """Something else than a Ray dashboard."""
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_addresses_that_are_none(web_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", web_server)  # Ray's client would ask there
    closed = f"http://127.0.0.1:{free_ports(1)[0]}"
    for address, message in (
        ("127.0.0.1:6379", "the URL of a cluster's dashboard is expected"),
        ("auto", "the URL of a cluster's dashboard is expected"),
        (closed, f"no Ray dashboard answers there: Failed to connect to Ray at address: {closed}"),
        (web_server, "no Ray dashboard answers there: 501"),
        ("http://", "no Ray dashboard answers there"),
    ):
        with pytest.raises(ConfigError) as refused:
            asyncio.run(Jobs.connect(address))
        assert str(refused.value).startswith(f"--address {address}: {message}")
        assert "\n" not in str(refused.value)


def test_an_address_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ANSWER_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"at {address} did not answer within 0.5 s.*say its version"):
            asyncio.run(Jobs.connect(address))


def ended(status: JobStatus, code: int | None = None) -> JobDetails:
    return JobDetails(type=JobType.SUBMISSION, entrypoint="", status=status, driver_exit_code=code)


def test_the_exit_status_is_that_of_the_run() -> None:
    assert exit_status(ended(JobStatus.SUCCEEDED, 0)) == 0
    assert exit_status(ended(JobStatus.STOPPED)) == 143
    assert [exit_status(ended(JobStatus.FAILED, code)) for code in (1, 2, 130, -9, None)] == [1, 2, 130, 1, 1]


def test_a_dashboard_that_stays_away_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOST_S", 0.5)
    monkeypatch.setattr(module, "_POLL_S", 0.1)

    class Away:
        def get_job_info(self, job: str) -> JobDetails:
            raise ConnectionError("refused")

    jobs: Any = Jobs("http://head:8265", Away())  # type: ignore[arg-type]
    with pytest.raises(NoAnswer, match=r"at http://head:8265 has not answered for 0.5 s \(refused\); j goes on.*"):
        asyncio.run(jobs.ended("j"))


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with ray_head(tmp_path_factory.mktemp("head"), num_cpus=8) as url:
        yield url


def test_a_stop_waits_for_the_checkpoint(head: str, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ray would kill after 3 s: the job's own environment makes it wait. Meanwhile the log is read again and again."""
    (project / "cluster").mkdir()
    (project / "cluster" / "__init__.py").touch()
    (project / "cluster" / "cli.py").write_text(SLOW_TO_STOP, encoding="utf-8")

    async def all_of_it() -> tuple[int, JobDetails, str]:
        overrides = ["steps=9", "prompts.system=it's a 'quoted' $HOME"]
        assert await submit(Path("config.yaml"), overrides, head, excludes=["*.py~"], grace_s=60, wait=False) == 0
        job = capsys.readouterr().out.strip()
        assert re.fullmatch(r"first-[0-9a-f]{8}", job)
        jobs = await Jobs.connect(head)
        shown: list[str] = []
        following = asyncio.create_task(jobs.follow(job, shown.append))
        while "\u00e9" * 30 not in "".join(shown):
            assert not following.done(), "".join(shown)
            await asyncio.sleep(0.1)
        await show_status(job, head)
        status = await stop(job, head)
        details = await following
        assert await stop(job, head) == 0
        return status, details, "".join(shown)

    status, details, shown = asyncio.run(asyncio.wait_for(all_of_it(), 120))
    out, err = capsys.readouterr()
    assert (status, exit_status(details)) == (0, 143), err
    command = ["train", "config.yaml", "steps=9", "prompts.system=it's a 'quoted' $HOME", "ray.address=auto"]
    assert f"{command} step 0/9\n" in shown
    assert shown.count("step 7/9") == shown.count("stopped after step 7") == 1
    assert re.search(r"^state +RUNNING for \d+ s$", out, re.MULTILINE)
    assert f"output_dir  {project.parent}/runs/first\nlast step   step 7/9  reward 0.5\n" in out
    assert out.endswith("stopped after step 7; continue with: headrace train config.yaml resume=true\n")
    assert "Ray kills it after 60 s" in err
    assert "has ended already: STOPPED after" in err


@pytest.mark.slow
def test_a_run_that_the_cluster_refuses_ends_with_its_status(
    head: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = asyncio.run(submit(Path("config.yaml"), ["steps=3"], head, excludes=[], grace_s=600, wait=True))
    out, err = capsys.readouterr()
    assert status == 2, out + err
    job, *log = out.splitlines()
    assert [line for line in log if "/nowhere/model" in line]
    assert re.search(rf"^{job}: FAILED after \d+ s, exit status 2$", err, re.MULTILINE)
    with pytest.raises(ConfigError, match="job nobody is not known at "):
        asyncio.run(show_log("nobody", head, follow=False))


@pytest.mark.slow
def test_a_run_is_left_stopped_and_submitted_again(head: str, tiny_model: Path, tmp_path: Path) -> None:
    run_dir, folder = tmp_path / "runs" / "tiny", tmp_path / "project"
    folder.mkdir()
    # Far more than are taken: on a busy machine a step in the log may be many steps behind.
    write_config(folder, write_project(folder, tiny_model) | {"output_dir": str(run_dir), "steps": 400})
    with Command("submit", "config.yaml", "--address", head, cwd=folder) as command:
        command.until(lambda: "step 1/400" in command.output, "step 1 in the log")
        command.ctrl_c()
        assert command.status() == 130, command.output
        job = re.findall(r"^  stop:   headrace stop (\S+) --address", command.output, re.MULTILINE)[0]
        assert f"{job} goes on\n  follow: headrace logs {job} --address {head} --follow\n" in command.output
        assert "Traceback" not in command.output
    left_at = steps(run_dir)
    with Command("logs", job, "--follow", "--address", head, cwd=folder) as follower:
        follower.until(lambda: steps(run_dir) > left_at, "another step")
        with Command("stop", job, "--address", head, cwd=folder) as stopping:
            assert stopping.status() == 0
            assert re.search(r"^stopped after step \d+; continue with", stopping.output, re.MULTILINE)
        assert follower.status() == 143
        assert f"{job}: STOPPED after" in follower.output
    done = steps(run_dir)
    assert finished_checkpoints(run_dir)[-1] == done < 400

    more = ("resume=true", f"steps={done + 1}")
    with Command("submit", "config.yaml", *more, "--address", head, cwd=folder) as again:
        assert again.status() == 0, again.output
    assert [row["step"] for row in rows(run_dir / "metrics.jsonl")] == list(range(1, done + 2))


@pytest.mark.slow
def test_ray_job_submit_works_as_documented(head: str, tiny_model: Path, tmp_path: Path) -> None:
    folder, run_dir = tmp_path / "project", tmp_path / "run"
    folder.mkdir()
    config = write_project(folder, tiny_model) | {"output_dir": str(run_dir), "ray": {"address": "auto"}, "steps": 1}
    write_config(folder, config)
    train = ["--", "python", "-m", "cluster.cli", "train", "config.yaml"]
    submitted = subprocess.run(
        [str(RAY), "job", "submit", "--address", head, "--working-dir", ".", *train],
        cwd=folder,
        timeout=480,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert submitted.returncode == 0, submitted.stdout
    assert steps(run_dir) == 1
