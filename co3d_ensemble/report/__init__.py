"""Floor 4: what a person looks at - pictures and plots."""
