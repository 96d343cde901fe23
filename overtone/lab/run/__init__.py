"""A grid of edits, made by one or several processes, that goes on where it was killed."""
