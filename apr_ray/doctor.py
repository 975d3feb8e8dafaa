"""What a machine has, and what is missing for what. Every line is looked up, none is assumed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
from pathlib import Path

Row = tuple[str, str, str]

REQUIRED = ("torch", "transformers", "ray", "deepspeed", "mlflow", "pyarrow", "tokenizers")
OPTIONAL = {
    "sglang": "engine.name=sglang (pip install 'apr-ray[sglang]')",
    "vllm": "engine.name=vllm (pip install 'apr-ray[vllm]')",
}
NEEDED_DISK_GB = 5
NEEDED_SHM_GB = 1


def examine(root: Path = Path(".")) -> list[Row]:
    """(part, state, what for); a state that begins with "missing" keeps the quickstart from running."""
    rows: list[Row] = [("python", sys.version.split()[0], "3.11 or newer")]
    for name in REQUIRED:
        rows.append((name, _version(name) or "missing: pip install apr-ray", "every command"))
    for name, purpose in OPTIONAL.items():
        rows.append((name, _version(name) or _version(f"{name}-cpu") or "not installed", purpose))
    rows.append(("GPU", _gpu(), "optional"))
    rows.append(("bfloat16 on the CPU", _bf16(), "optional: sft.precision=auto takes it where it is fast"))
    rows.append(("compiler", shutil.which("g++") or "none", "optional: nothing here compiles at run time"))
    rows.append(("cores", str(os.cpu_count()), "2 for the quickstart's times"))
    free = shutil.disk_usage(root).free / 2**30
    rows.append(("disk", f"{'missing: ' if free < NEEDED_DISK_GB else ''}{free:.0f} GB free", "runs and checkpoints"))
    if Path("/dev/shm").is_dir():
        shm = shutil.disk_usage("/dev/shm").free / 2**30
        state = f"{'small: ' if shm < NEEDED_SHM_GB else ''}{shm:.1f} GB free"
        rows.append(("/dev/shm", state, "Ray's object store (slow on disk if too small)"))
    return rows


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _bf16() -> str:
    if importlib.util.find_spec("torch") is None:
        return "unknown without torch"
    import torch

    from apr_ray.learner.device import multiplies_bf16

    return "has instructions" if multiplies_bf16(torch.device("cpu")) else "no instructions: fp32 is faster"


def _gpu() -> str:
    if importlib.util.find_spec("torch") is None:
        return "unknown without torch"
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
