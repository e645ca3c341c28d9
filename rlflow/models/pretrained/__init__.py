"""Published models at our border: diffusers' text-to-image families, their LoRA, LeRobot's policies."""
