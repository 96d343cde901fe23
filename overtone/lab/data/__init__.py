"""Published editing data as corpora."""
