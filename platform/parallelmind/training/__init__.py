"""Training of one worker: loss, optimizer step, loop and checkpoints. No Ray."""
