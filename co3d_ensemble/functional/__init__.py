"""Floor 0: pure functions on tensors. Imports torch and the standard library only."""
