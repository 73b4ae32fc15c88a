#!/usr/bin/env bash
# MDTv2-S/2, masked, with the 6 decoder blocks of the published run: 400,000 steps of 256 images.
# From the repository root: docs/recipes.md
set -euo pipefail
exec ${LAUNCH:-torchrun --nproc_per_node=8} train_mask_adan.py --model MDTv2-S/2 --global-batch-size 256 \
    --decode-layer 6 --init-lr 1e-3 --epochs 81 \
    --ema-decay 0.9999 --feature-path "${FEATURES:?the latent store}" \
    --results-dir "${RESULTS:-results}" --resume auto "$@"
