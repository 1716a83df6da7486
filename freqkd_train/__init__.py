"""Frequency-decoupled distillation from visible to infrared features, driven by what the analysis measured."""
