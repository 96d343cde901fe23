"""How good an edit is, and what it costs the rest."""
