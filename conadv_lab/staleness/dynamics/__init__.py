"""What stale attacks do to training: accuracy, sharpness, and how much of the attack is lost."""
