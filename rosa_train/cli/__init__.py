"""The options of the command line, and the tables that it prints."""
