"""What is edited in: small models trained on a corpus, models by name, and what either knows."""
