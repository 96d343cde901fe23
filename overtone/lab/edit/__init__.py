"""Editing methods: which weights an edit moves, and how."""
