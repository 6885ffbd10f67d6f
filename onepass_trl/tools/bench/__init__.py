"""One-pass training timed against its alternatives: attention and whole training steps."""
