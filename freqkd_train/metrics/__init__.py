"""What a detector or a segmenter is worth: one figure a module, each checked against something not written here."""
