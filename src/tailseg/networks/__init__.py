"""One network per file; the file's name is the network's name."""
