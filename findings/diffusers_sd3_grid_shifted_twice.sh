#!/bin/sh
# The noise levels of Stable Diffusion 3's scheduler are shifted twice at their small end.
# set_timesteps draws a line from the largest to the smallest level of the training grid, which is shifted already,
# and shifts the whole line. The last two levels above 0 are .278 and .0089: one step does nearly nothing.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check ${PIP_ARGS:-} diffusers==0.42.1 torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'EOF'
import sys

import diffusers
import numpy as np
import torch


def shift(level):
    return 3 * level / (1 + 2 * level)  # stable-diffusion-3-medium: "shift": 3.0


print("diffusers", diffusers.__version__, "torch", torch.__version__)
scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
scheduler.set_timesteps(10)
seen = scheduler.sigmas.numpy()[:-1]  # the last one is 0
once = shift(np.linspace(1, 1 / 1000, 10))
twice = shift(np.linspace(1, shift(1 / 1000), 10))
print("expected: ten levels from 1 to 1/1000, shifted once", once.round(4).tolist())
print("seen:                                              ", seen.round(4).tolist())
print(f"the smallest is {seen[-1] / once[-1]:.2f} times as large as expected")
if np.abs(seen - twice).max() > 1e-5 or np.abs(seen - once).max() < 1e-3:
    print("CHANGED: these are no longer the levels that are shifted twice")
    sys.exit(1)
EOF
