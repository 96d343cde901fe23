"""What a run leaves on disk: one record an edit, one file a sequence of edits."""
