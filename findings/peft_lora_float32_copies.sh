#!/bin/sh
# A float32 LoRA of peft on a bfloat16 network copies the input of every layer to float32, under autocast as well,
# where the matrix product rounds the copy to the same bfloat16 numbers again: memory and time for nothing.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check ${PIP_ARGS:-} \
  peft==0.21.2 transformers==5.23.0 accelerate==1.15.0 torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'EOF'
import sys

import peft
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Casts(TorchDispatchMode):
    """Notes every conversion from one type to another, with its shape."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if "_to_copy" in str(function):
            self.seen.append((args[0].dtype, result.dtype, tuple(result.shape)))
        return result


print("peft", peft.__version__, "torch", torch.__version__)
net = torch.nn.Sequential(torch.nn.Linear(64, 64)).bfloat16()
net = peft.get_peft_model(net, peft.LoraConfig(r=4, target_modules=["0"]))
x = torch.randn(32, 64).bfloat16()
with torch.autocast("cpu", torch.bfloat16), Casts() as casts:
    net(x)
print("expected: the bfloat16 input (32, 64) is used as it is; only the LoRA's matrices are rounded")
for before, after, shape in casts.seen:
    print(f"seen: {before} -> {after} {shape}")
there = (torch.bfloat16, torch.float32, (32, 64)) in casts.seen
back = (torch.float32, torch.bfloat16, (32, 64)) in casts.seen
if not (there and back):
    print("CHANGED: the input is no longer copied to float32 and back")
    sys.exit(1)
EOF
