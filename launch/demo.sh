#!/usr/bin/env bash
# Trains a small GPT on 2 ranks with FSDP2 while distavg keeps an EMA and an SWA of it, then resumes
# the checkpoint on 3 ranks with FSDP2, on 2 with DDP and on 1, and compares what was loaded.
#
#   bash launch/demo.sh           in a temporary folder
#   bash launch/demo.sh FOLDER    keeps the checkpoint and the logs in FOLDER, which must be new
set -euo pipefail
steps=${STEPS:-300}

if [ $# -gt 0 ]; then
    mkdir "$1" && work=$(cd "$1" && pwd)
else
    work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
fi
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" examples
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
[ "$gpus" = 0 ] && echo "demo: no GPU, so on CPUs" || echo "demo: on $gpus GPUs, with NCCL"
cores=$(getconf _NPROCESSORS_ONLN)

checksums() {
    sed -n 's/^\([a-z]*\) .* \(checksum [0-9a-f]*\);.*/\1 \2/p' "$work/log"
}

run() { # name, ranks, arguments of the example
    local name=$1 ranks=$2
    shift 2
    if [ "$gpus" != 0 ] && [ "$ranks" -gt "$gpus" ]; then
        echo "demo: '$name' wants $ranks GPUs, there are $gpus: left out"
        return
    fi
    printf '\n=== %s\n' "$name"
    export OMP_NUM_THREADS=$((cores > ranks ? cores / ranks : 1))
    python -m torch.distributed.run --standalone --nproc-per-node "$ranks" \
        examples/train_gpt.py --steps "$steps" "$@" | tee "$work/log"
    if [ ! -e "$work/saved" ]; then
        checksums > "$work/saved"
    elif checksums | diff "$work/saved" -; then
        echo "demo: every average is bit-equal to the saved one"
    else
        echo "demo: the averages differ from the saved ones" >&2
        exit 1
    fi
}

first=2
[ "$gpus" = 1 ] && first=1 && echo "demo: one GPU, so it trains on one rank"
run "train on $first ranks, fsdp2" "$first" --checkpoints "$work/gpt"
run "resume on 3 ranks, fsdp2" 3 --checkpoints "$work/gpt"
run "resume on 2 ranks, ddp" 2 --parallel ddp --checkpoints "$work/gpt"
run "resume on 1 rank" 1 --checkpoints "$work/gpt"

printf '\n=== the checkpoint\n'
distavg inspect "$work/gpt/step-$steps"
distavg verify "$work/gpt/step-$steps"
