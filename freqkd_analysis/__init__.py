"""Spectral divergence of RGB and infrared features, layer by layer. The command line is `freqkd-analyze`."""

__version__ = "0.1.0"
