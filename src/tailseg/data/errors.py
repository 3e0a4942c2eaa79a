"""What a person is told of data that cannot be used: every text names the file, the rule and the way out."""


class ImageError(ValueError):
    """A scan or label file that cannot be used."""


class DataError(ValueError):
    """A data set that cannot be used."""
