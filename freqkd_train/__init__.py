"""Frequency-decoupled distillation from RGB to infrared: the part of freqkd that is still to come."""
