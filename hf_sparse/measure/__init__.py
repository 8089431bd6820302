"""What sparse attention costs on real models and texts: perplexity, attention error and retrieval across lengths."""
