"""Floor 4: the one training loop and the tasks it runs."""
