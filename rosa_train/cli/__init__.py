"""The command line: its options, and the tables that it prints."""
