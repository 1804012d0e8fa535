"""Resolve the extras cu12 and cu13 as a plain resolver does, and see that each comes out as one CUDA.

    make resolve

uv reads the metadata of packages only: nothing is installed, and no CUDA is needed. What this machine is configured to
take packages from is left aside.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PYTHONS = ("3.11", "3.14")
SHOWN = ("torch", "pandas", "dask", "pyarrow")
# What a name or a version of the packages below says of CUDA: its major version.
OF_CUDA = re.compile(
    r"^(?:(?:nvidia|cudf|cuml|rmm|pylibcudf|dask-cudf|cupy)-[a-z0-9-]*?(?:cu|cuda)(\d\d)x?==|cuda-bindings==(\d+))"
)
# Of torch, which has no such name: the first versions whose wheels are of the next CUDA.
TORCH_OF_13 = (2, 11)


def resolved(extra: str, python: str) -> dict[str, str]:
    """Versions by package, as uv resolves them for Linux on x86-64."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("UV_", "PIP_"))}
    options = [
        "--no-config",
        "--quiet",
        "--no-header",
        "--no-annotate",
        "--python-platform",
        "x86_64-unknown-linux-gnu",
    ]
    command = [Path(sys.executable).parent / "uv", "pip", "compile", *options, "--python-version", python]
    found = subprocess.run(
        [*command, "--extra", extra, "setup.cfg"], cwd=ROOT, env=clean, capture_output=True, text=True
    )
    if found.returncode:
        raise SystemExit(f"[{extra}] on Python {python} cannot be resolved:\n{found.stderr}")
    pins = (line.split(";")[0].strip().partition("==") for line in found.stdout.splitlines() if "==" in line)
    return {name: version for name, _, version in pins}


def cuda_versions(packages: dict[str, str]) -> dict[str, str]:
    """The major version of CUDA that each package is of, of those that are of one."""
    found = {}
    for name, version in packages.items():
        if match := OF_CUDA.match(f"{name}=={version}"):
            found[name] = match[1] or match[2]
    release = tuple(map(int, packages["torch"].split(".")[:2]))
    return found | {"torch": "13" if release >= TORCH_OF_13 else "12"}


def main() -> None:
    """Print a line for each extra and Python, and fail for one that mixes versions of CUDA."""
    mixed = []
    for extra in ("cu12", "cu13"):
        for python in PYTHONS:
            packages = resolved(extra, python)
            versions = cuda_versions(packages)
            cudf = packages[f"cudf-{extra}"]
            rest = ", ".join(f"{name} {packages[name]}" for name in SHOWN)
            print(f"[{extra}] Python {python}: CUDA {', '.join(sorted(set(versions.values())))}; cuDF {cudf}, {rest}")
            if set(versions.values()) != {extra.removeprefix("cu")}:
                mixed.append(f"[{extra}] on Python {python} mixes versions of CUDA: {versions}")
    if mixed:
        raise SystemExit("\n".join(mixed))


if __name__ == "__main__":
    main()
