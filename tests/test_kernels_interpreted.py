"""Runs the kernel tests on the Triton source, through Triton's interpreter, where there is no GPU to run it on.

In a process of its own, because Triton chooses between compiler and interpreter when it is first imported.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

NAMES = (
    "reverse_kl", "linear", "student_loss", "top_loss", "student_product", "products", "sample", "decode_attention",
    "decode_linear", "decode_write", "record_draw", "prefix_attention", "contract", "accuracy",
)  # fmt: skip
FILES = tuple(f"test_kernels_{name}.py" for name in NAMES)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the same tests run on the GPU itself")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the tests themselves are interpreted")
@pytest.mark.parametrize("file", FILES)
def test_triton_source(file):
    path = Path(__file__).with_name(file)
    command = [sys.executable, "-m", "pytest", "-q", "-k", "interpreted", str(path)]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=path.parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
