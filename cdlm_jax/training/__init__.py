"""Training: losses, optimizer, the train step and its loop, checkpoints, the teacher."""
