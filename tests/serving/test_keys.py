"""API keys: kept as hashes, found again, refused where a line is wrong."""

import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.cli import app
from contracts.config import ConfigError
from serving.keys import ENVIRONMENT, SCOPES, is_local, key_hash, load_keys, make_key


def test_a_key_is_found_again_and_only_its_hash_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    anna, _ = make_key("anna", "chat,feedback", file)
    ben, _ = make_key("ben", "admin", file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    text = file.read_text()
    assert anna not in text
    assert ben not in text
    keys = load_keys(file, {})
    found = keys.find(anna)
    assert found is not None
    assert (found.name, found.scopes) == ("anna", {"chat", "feedback"})
    assert keys.find(ben).name == "ben"  # type: ignore[union-attr]
    for wrong in (anna[:-1], anna + "x", "", found.hash, "\udcff"):
        assert keys.find(wrong) is None


def test_the_environment_and_the_file_together(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# of the team\n\n")
    make_key("anna", "chat", file)
    other, kept = make_key("ben", "chat", None)
    keys = load_keys(file, {ENVIRONMENT: f"{kept.line}; "})
    assert len(keys) == 2
    assert keys.find(other).name == "ben"  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="two keys 'anna'"):
        load_keys(file, {ENVIRONMENT: f"anna chat sha256:{key_hash('x')}"})
    assert len(load_keys(None, {})) == 0


@pytest.mark.parametrize("line", ["anna chat hr-plain", "anna sha256:00", "anna root sha256:" + "0" * 64, "chat"])
def test_a_wrong_line_is_named_without_its_content(tmp_path: Path, line: str) -> None:
    file = tmp_path / "keys"
    file.write_text(f"\n{line}\n")
    with pytest.raises(ConfigError, match="line 2") as refused:
        load_keys(file, {})
    assert "hr-plain" not in str(refused.value)


def test_a_file_without_keys_lets_nobody_in_by_mistake(tmp_path: Path) -> None:
    for file in (tmp_path / "none", tmp_path / "empty"):
        (tmp_path / "empty").write_text("# later\n")
        with pytest.raises(ConfigError, match=r"serving\.keys"):
            load_keys(file, {})


def test_the_command_prints_the_key_once(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    run = CliRunner().invoke(app, ["key", "anna", "--scopes", "chat,score", "--file", str(file)])
    assert run.exit_code == 0
    secret = run.stdout.strip()
    assert load_keys(file, {}).find(secret).scopes == {"chat", "score"}  # type: ignore[union-attr]
    for arguments in (["anna", "--file", str(file)], ["ben", "--scopes", "root"], ["b b"]):
        refused = CliRunner().invoke(app, ["key", *arguments])
        assert isinstance(refused.exception, ConfigError), arguments
    printed = CliRunner().invoke(app, ["key", "ben"]).output
    assert f"ben {','.join(SCOPES[:3])} sha256:" in printed


@pytest.mark.parametrize(
    ("client", "headers", "local"),
    [
        ("127.0.0.1", {"host": "localhost:8000"}, True),
        ("::1", {"host": "[::1]:8000"}, True),
        ("::1", {"host": "[::1]"}, True),
        ("127.0.0.1", {}, True),
        ("10.0.0.1", {"host": "localhost"}, False),
        (None, {"host": "localhost"}, False),
        ("", {}, False),
        ("127.0.0.1", {"host": "evil.example:8000"}, False),
        ("127.0.0.1", {"host": "127.0.0.1", "x-forwarded-for": "127.0.0.1"}, False),
    ],
)
def test_who_is_on_this_machine(client: str | None, headers: dict[str, str], local: bool) -> None:
    assert is_local(client, headers) is local
