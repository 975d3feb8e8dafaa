"""What a newcomer's machine may be like: its Python, its .venv, its Ray, its home."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from apr_ray import doctor
from apr_ray.config import parse_config
from apr_ray.core.errors import AprError, ConfigError
from apr_ray.training import session

ROOT = Path(__file__).parents[1]
OUTSIDE = {name: value for name, value in os.environ.items() if not name.startswith("MAKE") and name != "PYTHON"}
"""The environment without that of `make test`, which a make inside it would obey."""


def planned(folder: Path, *arguments: str) -> str:
    """The commands that `make venv` would run there."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    done = subprocess.run(
        ["make", "-n", "venv", *arguments], cwd=folder, env=OUTSIDE, capture_output=True, text=True, check=True
    )
    return done.stdout


def a_python(folder: Path, version: str) -> str:
    """A program that says that it is a Python of some version, and makes environments of that version."""
    major, minor = version.split(".")
    fake = folder / f"python{version}"
    fake.write_text(
        f'#!/bin/sh\ncase "$*" in\n  *print*) echo {version};;\n'
        f"  *sys.exit*) {sys.executable} -c 'import sys; sys.exit(not (3, 11) <= ({major}, {minor}) <= (3, 13))';;\n"
        f"  --version) echo Python {version};;\nesac\n"
    )
    fake.chmod(0o755)
    return str(fake)


def whole_venv(folder: Path, version: str) -> None:
    """What `make` looks at of a .venv that is complete."""
    (folder / ".venv" / "bin").mkdir(parents=True)
    shutil.move(a_python(folder, version), folder / ".venv" / "bin" / "python")


def test_make_remakes_a_venv_that_is_half_made(tmp_path: Path) -> None:
    """Faults 15: `.venv/bin/pip: No such file`, for ever."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / ".venv")], check=True)
    (tmp_path / ".venv" / ".ready").touch()
    assert "rm -rf .venv" in planned(tmp_path)


def test_make_keeps_a_whole_venv_and_remakes_it_for_another_python(tmp_path: Path) -> None:
    whole_venv(tmp_path, "3.12")
    planned(tmp_path)  # copies what the .venv must not be older than
    (tmp_path / ".venv" / ".ready").touch()
    assert "rm -rf" not in planned(tmp_path)
    assert "rm -rf" not in planned(tmp_path, f"PYTHON={a_python(tmp_path, '3.12')}")
    assert "rm -rf .venv" in planned(tmp_path, f"PYTHON={a_python(tmp_path, '3.13')}")


@pytest.mark.parametrize("version", ["3.10", "3.14", "2.7"])
def test_make_refuses_a_python_before_it_downloads_anything(version: str, tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    done = subprocess.run(
        ["make", "venv", f"PYTHON={a_python(tmp_path, version)}"],
        cwd=tmp_path,
        env=OUTSIDE,
        capture_output=True,
        text=True,
    )
    assert done.returncode
    assert f"is Python {version}. Name another: make PYTHON=python3.12" in done.stderr
    assert not (tmp_path / ".venv").exists()


# --- Ray --------------------------------------------------------------------------------------------------------------


class Busy:
    """In Ray's place on a machine where it does not start in time, at first."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.starts = 0

    def init(self, *arguments: Any, **options: Any) -> None:
        self.starts += 1
        if self.starts <= self.failures:
            raise Exception("The current node timed out during startup. This could happen because …")

    def is_initialized(self) -> bool:
        return False

    def shutdown(self) -> None:
        pass


@contextmanager
def a_session(failures: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Busy]:
    busy = Busy(failures)
    monkeypatch.setattr(session, "ray", busy)
    monkeypatch.setattr(session, "kill_marked", lambda mark: True)
    with session._private_ray(parse_config({})):
        yield busy


def test_ray_is_started_again_on_a_busy_machine(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Faults 14d: its limit of 30 s ended in a traceback and "please report it"."""
    caplog.set_level(logging.WARNING)
    with a_session(2, monkeypatch) as busy:
        assert busy.starts == 3
    assert "the machine is busy; trying again" in caplog.text
    with (
        pytest.raises(AprError, match=r"Ray did not start in 3 attempts: The current node .*load \d+ on"),
        a_session(3, monkeypatch),
    ):
        pass


def test_another_system_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Faults 22: the process guard reads /proc."""
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(AprError, match="apr-ray trains on Linux, this is darwin"):
        session.require_startable(parse_config({}))
    assert any(part == "system" and state.startswith("missing") for part, state, _ in doctor.examine())


def test_a_root_that_mlflows_database_cannot_lie_in_is_refused(tmp_path: Path) -> None:
    """Faults 18."""
    config = parse_config({"run": {"root": str(tmp_path / "a?b")}})
    with pytest.raises(ConfigError, match="holds a '\\?', which ends the path"):
        session.require_startable(config)
    session.require_startable(config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": "x"})}))


def test_an_ipv6_address_is_looked_for_where_it_is() -> None:
    with pytest.raises(ConfigError, match=r"no Ray cluster at ray\.address") as caught:
        session._require_answer("[::1]:1")
    assert "Name or service not known" not in str(caught.value)


@pytest.mark.parametrize(("home", "state"), [("/proc/none", "missing: not writable"), ("", "writable")])
def test_the_doctor_looks_at_the_home(home: str, state: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Faults 26: with `docker run --user` it was /, where Ray could not write its token."""
    monkeypatch.setenv("HOME", home or str(tmp_path))
    rows = {part: found for part, found, _ in doctor.examine()}
    assert state in rows["home"]
