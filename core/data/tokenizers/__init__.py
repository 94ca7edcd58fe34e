"""Text to ids and back: kinds of tokenizers, training them, reading those of others."""
