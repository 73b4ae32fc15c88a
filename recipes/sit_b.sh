#!/usr/bin/env bash
# SiT-B/2 with MEDIATORS (64) mediators in every block: 400,000 steps of 256 images. Plain SiT: MEDIATORS=0.
# From the repository root: docs/recipes.md
set -euo pipefail
mediators=(--mediator-num "${MEDIATORS:-64}")
[ "${MEDIATORS:-64}" != 0 ] || mediators=()
exec ${LAUNCH:-torchrun --nproc_per_node=8} attention_mediator/train.py --model SiT-B/2 --global-batch-size 256 \
    --epochs 80 --ema-decay 0.9999 --feature-path "${FEATURES:?the latent store}" \
    --results-dir "${RESULTS:-results/sit_b_m${MEDIATORS:-64}}" --resume auto "${mediators[@]}" "$@"
