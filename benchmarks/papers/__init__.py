"""One script for each source document: its tables and figures, made anew with pyens."""
