"""What checks and measures one-pass training."""
