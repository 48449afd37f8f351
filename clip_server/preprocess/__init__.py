"""Images to pixels and texts to token ids, equal to open_clip's."""
