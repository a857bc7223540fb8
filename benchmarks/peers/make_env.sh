#!/usr/bin/env bash
# An environment of its own for a peer: bash benchmarks/peers/make_env.sh swift
set -euo pipefail
cd "$(dirname "$0")/../.."
name=${1:?a peer: swift or llamafactory}
folder=.venv-peers/$name
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/pip" install --quiet --disable-pip-version-check \
  -r "benchmarks/peers/requirements/$name.txt"
# Their operators don't match a torch that was built for CPUs alone.
"$folder/bin/pip" uninstall --quiet --yes torchvision torchaudio
"$folder/bin/python" -c "import torch, transformers; print(torch.__version__, transformers.__version__)"
