"""What is edited: true texts, edits of them, and the probes that judge an edit. Nothing here needs torch."""
