#!/usr/bin/env bash
# Prints the GPUs of this machine the way Spark asks a discovery script to: {"name": "gpu", "addresses": ["0", "1"]}.
# The addresses are nvidia-smi's indexes, which are CUDA's numbers where CUDA_DEVICE_ORDER is PCI_BUS_ID.
set -euo pipefail
indexes=$(nvidia-smi --query-gpu=index --format=csv,noheader)
if [ -z "$indexes" ]; then
    echo "gpus.sh: expected a GPU, nvidia-smi lists none" >&2
    exit 1
fi
printf '{"name": "gpu", "addresses": ["%s"]}\n' "${indexes//$'\n'/'", "'}"
