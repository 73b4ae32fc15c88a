#!/usr/bin/env bash
# EDT-B/2, masked: 400,000 steps of 256 images; the paper's longer run: --epochs 200.
# From the repository root: docs/recipes.md
set -euo pipefail
exec ${LAUNCH:-torchrun --nproc_per_node=8} train_mask_adan.py --model EDT-B/2 --global-batch-size 256 \
    --init-lr 1e-3 --epochs 81 \
    --ema-decay 0.9999 --feature-path "${FEATURES:?the latent store}" \
    --results-dir "${RESULTS:-results}" --resume auto "$@"
