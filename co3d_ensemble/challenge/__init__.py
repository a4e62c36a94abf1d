"""Floor 4: CO3D challenge submissions - writing, checking and scoring them."""
