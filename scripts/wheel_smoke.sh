#!/usr/bin/env bash
# Build the wheel, install it in a new environment, use it from a folder outside the repository.
# The new environment borrows the dependencies of .venv, but not the editable rlflow.
set -euo pipefail
cd "$(dirname "$0")/.."
repo=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

rm -rf build/lib build/bdist.* # setuptools would ship modules deleted since the last build
"$repo/.venv/bin/python" -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$work" .
wheel=$(echo "$work"/rlflow_torch-*.whl)
"$repo/.venv/bin/python" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --no-index "$wheel"

# dependencies after the wheel on sys.path, by a plain path entry: .pth files in it (the editable install) are not read
site=$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
"$repo/.venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' > "$site/borrowed.pth"

cd "$work"
export RLFLOW_REPO=$repo PYTHONPATH=
"$work/venv/bin/python" - "$wheel" <<'PYTHON'
"""Every module imports, every data file of the tree is in the wheel and nothing comes from the repository."""
import importlib
import os
import pkgutil
import sys
import zipfile
from importlib.resources import files
from pathlib import Path

repo = Path(os.environ["RLFLOW_REPO"])
shipped = {name for name in zipfile.ZipFile(sys.argv[1]).namelist() if name.startswith("rlflow/")}
homes = {"rlflow": "rlflow", "envs": "rlflow/envs", "rewards": "rlflow/rewards", "configs": "rlflow/configs"}
tree = {
    f"{home}/{path.relative_to(repo / folder).as_posix()}"
    for folder, home in homes.items()
    for path in (repo / folder).rglob("*")
    if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
}
if shipped != tree:
    sys.exit(f"wheel and tree differ\n  not in the wheel: {sorted(tree - shipped)}\n  only in the wheel: {sorted(shipped - tree)}")

import rlflow

package = Path(rlflow.__file__).parent
if package.is_relative_to(repo):
    sys.exit(f"rlflow came from the repository: {package}")
modules = [m.name for m in pkgutil.walk_packages([str(package)], "rlflow.") if not m.name.endswith("__main__")]
missing = {}
for name in modules:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:  # an extra that is not installed here; never a module of our own
        missing[name] = error.name or ""
        if missing[name].startswith("rlflow"):
            raise
data = [name for name in shipped if not name.endswith(".py")]
for name in data:
    if not files("rlflow").joinpath(*name.split("/")[1:]).is_file():
        sys.exit(f"{name} is not found by importlib.resources")
print(f"{len(modules) - len(missing)} modules import, {len(data)} data files found; need an extra: {missing or 'none'}")
PYTHON
"$work/venv/bin/rlflow" --help > /dev/null
"$work/venv/bin/rlflow" list recipes
"$work/venv/bin/rlflow" list tables
"$work/venv/bin/rlflow" sweep fast --run sweep --dry
echo "wheel smoke test passed: $(basename "$wheel"), $(du -h "$wheel" | cut -f1)"
