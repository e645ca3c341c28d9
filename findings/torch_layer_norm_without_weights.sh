#!/bin/sh
# On a CPU a layer norm without weights takes longer than one with weights of 1 and biases of 0, for the same bits.
# elementwise_affine=False, as diffusion transformers have it before their modulation, saves parameters and no time.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check ${PIP_ARGS:-} torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'EOF'
import sys
import time

import torch
from torch.nn.functional import layer_norm

torch.set_num_threads(1)


def best(function):
    times = []
    for _ in range(40):
        begin = time.perf_counter()
        for _ in range(20):
            function()
        times.append(time.perf_counter() - begin)
    return min(times)


print("torch", torch.__version__)
print("expected: leaving weights and biases out is no slower than multiplying by 1 and adding 0")
ratios = []
for rows, width in ((256, 256), (2560, 256), (64, 1024)):
    x, one, zero = torch.randn(rows, width), torch.ones(width), torch.zeros(width)
    if not torch.equal(layer_norm(x, (width,)), layer_norm(x, (width,), one, zero)):
        print("CHANGED: the two differ")
        sys.exit(1)
    without = best(lambda: layer_norm(x, (width,)))
    ratios.append(without / best(lambda: layer_norm(x, (width,), one, zero)))
    print(f"seen: {rows} rows of {width}: without them {ratios[-1]:.2f} times as long, the same bits")
if max(ratios) < 1.2:
    print("CHANGED: it costs nothing to leave them out")
    sys.exit(1)
EOF
