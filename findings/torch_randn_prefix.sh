#!/bin/sh
# The first numbers of a seeded torch.randn on the CPU depend on how many are asked for.
# Whoever draws noise for fewer rows (a smaller batch, a share of a process) gets other noise for the same rows.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check ${PIP_ARGS:-} torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'EOF'
import sys

import torch


def draw(size):
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


print("torch", torch.__version__)
print("expected: a generator of one seed begins with the same numbers, however many are drawn")
whole = draw(16)
changed = {}
for size in (8, 15, 16, 17, 24, 31, 32, 33, 48):
    prefix = draw(size)[:16]
    changed[size] = int((prefix != whole[: len(prefix)]).sum())
    print(f"seen: torch.randn({size})[:16] differs from torch.randn(16) in {changed[size]} of {len(prefix)} numbers")
same = {size for size, count in changed.items() if count == 0}
if same != {16, 32, 33, 48}:
    print(f"CHANGED: the sizes that begin alike are now {sorted(same)}")
    sys.exit(1)
EOF
