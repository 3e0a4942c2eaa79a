"""From a folder of scans to patches: reading, splits, preparation, the store and the stream; and a made-up data set."""
