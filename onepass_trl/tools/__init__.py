"""What checks and measures one-pass training, beside the training itself."""
