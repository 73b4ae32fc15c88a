#!/usr/bin/env bash
# DiT-S/2: 400,000 steps of 256 images.
# From the repository root: docs/recipes.md
set -euo pipefail
exec ${LAUNCH:-torchrun --nproc_per_node=8} train_mask_adan.py --model DiT-S/2 --global-batch-size 256 \
    --epochs 80 --optimizer adamw --init-lr 1e-4 --lr-decay-steps 0 --timestep-sampler uniform --min-snr-gamma 0 \
    --ema-decay 0.9999 --feature-path "${FEATURES:?the latent store}" \
    --results-dir "${RESULTS:-results}" --resume auto "$@"
