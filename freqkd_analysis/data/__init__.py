"""Pairs of visible and infrared images: records, decoding, layouts, synthetic scenes, verification."""
