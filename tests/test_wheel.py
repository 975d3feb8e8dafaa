"""The wheel, installed by itself and used away from the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import apr_ray

ROOT = Path(__file__).parents[1]
DIST_INFO = f"apr_ray-{apr_ray.__version__}.dist-info"
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "NOTICE", "apr_ray")


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments], check=True)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what the wheel installs and nothing else. Built from copies: a `build/` left in the
    repository would find its way into the wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            (folder / "source").mkdir(exist_ok=True)
            shutil.copy(ROOT / name, folder / "source" / name)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(folder / "source"))
    (wheel,) = folder.glob("*.whl")
    pip("install", "--no-deps", "--no-index", "--target", str(folder / "site"), str(wheel))
    shutil.rmtree(folder / "source")
    return folder / "site"


def run(installed: Path, *command: str) -> str:
    """Run a command that finds the wheel's package first, in an empty folder."""
    away = installed.parent / "away"
    away.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=away, env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list(away.iterdir())
    return done.stdout


def test_the_wheel_holds_the_package_its_presets_policies_and_licence_alone(installed: Path) -> None:
    assert {p.name for p in installed.iterdir()} == {"apr_ray", "bin", DIST_INFO}
    package = ROOT / "apr_ray"
    sources = {p.relative_to(ROOT) for p in package.rglob("*") if p.suffix in (".py", ".yaml", ".typed")}
    sources |= {p.relative_to(ROOT) for p in (package / "policies").rglob("*") if p.is_file()}
    files = {p.relative_to(installed) for p in (installed / "apr_ray").rglob("*") if p.is_file()}
    assert {f for f in files if f.suffix != ".pyc"} == sources
    assert {p.name for p in (installed / DIST_INFO / "licenses").iterdir()} == {"LICENSE", "NOTICE"}


def test_the_command_runs_from_the_wheel(installed: Path) -> None:
    command = str(installed / "bin" / "apr-ray")
    assert "quickstart" in run(installed, command, "--help")
    assert "problems_per_step: 24" in run(installed, command, "config", "show", "-c", "quickstart")
    assert "torch" in run(installed, command, "doctor")


def test_a_checkpoint_is_used_from_the_wheel(installed: Path, checkpoint: Path) -> None:
    code = (
        "import apr_ray\n"
        f"solution = apr_ray.solve('3 5 7 -> 22', {str(checkpoint)!r})\n"
        "assert solution.tree.calls and not solution\n"
        "print(apr_ray.__file__)\n"
    )
    assert run(installed, sys.executable, "-c", code).strip() == str(installed / "apr_ray" / "__init__.py")
