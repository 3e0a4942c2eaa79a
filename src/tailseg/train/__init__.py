"""The training loop and what it stands on; it knows no method."""
