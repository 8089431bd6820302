"""What sparse attention costs on real models and real texts: perplexity and attention error across lengths."""
