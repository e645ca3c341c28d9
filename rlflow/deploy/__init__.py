"""What was trained, used: run folders opened again, images and films of them, actions for others to call."""
