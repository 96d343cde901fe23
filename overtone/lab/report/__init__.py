"""From a results folder alone to tables, figures and a document."""
