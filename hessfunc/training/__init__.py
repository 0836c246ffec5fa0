"""Training loop with first- and second-order steps, adaptive batch sizes and checkpoints."""
