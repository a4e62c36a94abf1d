"""What each part of the recipe is worth: rows of switches, their cells as independent runs, and the table of them."""
