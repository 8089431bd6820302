"""Other ways of attending to fewer keys, on the same tokens."""
