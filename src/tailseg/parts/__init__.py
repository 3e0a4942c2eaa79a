"""What methods are composed of; each part is useful on its own."""
