"""The embedded testbed: an invented world, a small model that knows it, edits of it, and measures of the damage."""
