"""A machine's equipment, and what each missing part is needed for. Every line is looked up, none is assumed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

Row = tuple[str, str, str]

REQUIRED = ("torch", "transformers", "ray", "deepspeed", "mlflow", "pyarrow", "tokenizers")
OPTIONAL = {
    "sglang": "engine.name=sglang (pip install 'apr-ray[sglang]')",
    "vllm": "engine.name=vllm (pip install 'apr-ray[vllm]')",
}
DOCTOR_TOKENS = 1024
"""Padded tokens of the micro-batch that is timed, as in the preset quickstart."""
NEEDED_DISK_GB = 5
NEEDED_SHM_GB = 1
NEEDED_FILES = 4096


def examine(root: Path = Path(".")) -> list[Row]:
    """(part, state, what for); a state that begins with "missing" keeps the quickstart from running."""
    linux = sys.platform == "linux"
    rows: list[Row] = [
        ("system", sys.platform if linux else f"missing: {sys.platform}", "training needs Linux"),
        ("python", sys.version.split()[0], "3.11 to 3.13"),
    ]
    for name in REQUIRED:
        rows.append((name, _version(name) or "missing: pip install apr-ray", "every command"))
    for name, purpose in OPTIONAL.items():
        rows.append((name, _version(name) or _version(f"{name}-cpu") or "not installed", purpose))
    rows.append(("GPU", _gpu(), "optional"))
    rows.append(("precision on the CPU", _precision(), "sft.precision=auto takes the faster one"))
    rows.append(("compiler", shutil.which("g++") or "none", "optional: nothing here compiles at run time"))
    rows.append(("cores", _cores(), "2 for the quickstart's times"))
    rows.append(("home", _writable(Path.home()), "Ray's token, caches"))
    rows.append(("temporary files", _writable(Path(tempfile.gettempdir())), "Ray's sockets and logs"))
    rows.append(("open files", _open_files(), f"{NEEDED_FILES:,} for Ray and many trees"))
    free = shutil.disk_usage(root).free / 2**30
    rows.append(("disk", f"{'missing: ' if free < NEEDED_DISK_GB else ''}{free:.0f} GB free", "runs and checkpoints"))
    if Path("/dev/shm").is_dir():
        shm = shutil.disk_usage("/dev/shm").free / 2**30
        state = f"{'small: ' if shm < NEEDED_SHM_GB else ''}{shm:.1f} GB free"
        rows.append(("/dev/shm", state, "Ray's object store (slow on disk if too small)"))
    return rows


def _cores() -> str:
    """Those that this process may use; a container may have fewer than its host."""
    usable, all_of_them = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0, os.cpu_count() or 1
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return f"{usable or all_of_them}{f' of {all_of_them}' if usable and usable < all_of_them else ''}{load}"


def _writable(folder: Path) -> str:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return f"{folder} is writable"
    except OSError as error:
        return f"missing: not writable: {folder} ({error.strerror})"


def _open_files() -> str:
    import resource

    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY or limit >= NEEDED_FILES:
        return f"{limit:,}"
    return f"small: {limit:,} (ulimit -n {min(NEEDED_FILES, most) if most > 0 else NEEDED_FILES})"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _precision() -> str:
    """Timed on one thread, at the default policy's shape; which instructions the processor has says little."""
    if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers", "tokenizers")):
        return "unknown without torch and transformers"
    import torch

    from apr_ray.config import ModelConfig, TaskConfig
    from apr_ray.learner.precision import time_precisions
    from apr_ray.model.llama import new_policy
    from apr_ray.tasks.registry import load_task

    torch.set_num_threads(1)
    policy = new_policy(ModelConfig(), load_task(TaskConfig()).tokenizer(), seed=0)
    return str(time_precisions(policy, DOCTOR_TOKENS, torch.device("cpu")))


def _gpu() -> str:
    if importlib.util.find_spec("torch") is None:
        return "unknown without torch"
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
