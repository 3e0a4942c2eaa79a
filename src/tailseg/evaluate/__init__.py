"""From images to label files, and from label files to numbers that say what they mean."""
