"""Floor 0: what every room needs once and only once, such as the precision policy. Imports nothing of the package."""
