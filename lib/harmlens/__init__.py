"""harmlens: why do language models generate harmful content? The library behind the book."""

__version__ = "0.1.0"
