"""One-pass training timed beside its peers: attention and whole training steps."""
