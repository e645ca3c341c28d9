"""What was trained, used: run folders and checkpoints opened again, images and films of them, actions for others to call."""
