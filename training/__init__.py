"""What every training script shares: data, step, EMA, optimizer, checkpoints, logging and the loop around them."""
