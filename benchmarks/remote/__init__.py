"""Calls that run, and are timed, in processes of their own; nothing here but `process` needs torch."""
