#!/usr/bin/env bash
# SiT-XL/2 with MEDIATORS (64) mediators in the first 4 blocks: 400,000 steps of 256 images. Plain SiT: MEDIATORS=0.
# From the repository root: docs/recipes.md
set -euo pipefail
mediators=(--mediator-num "${MEDIATORS:-64}" --mediator-layers 4)
[ "${MEDIATORS:-64}" != 0 ] || mediators=()
exec ${LAUNCH:-torchrun --nproc_per_node=8} attention_mediator/train.py --model SiT-XL/2 --global-batch-size 256 \
    --epochs 80 --ema-decay 0.9999 --feature-path "${FEATURES:?the latent store}" \
    --results-dir "${RESULTS:-results/sit_xl_m${MEDIATORS:-64}}" --resume auto "${mediators[@]}" "$@"
