"""overtone: a plug-in token-level loss for editing knowledge in language models (OverTone, ICML 2025)."""
