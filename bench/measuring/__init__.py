"""Time, memory and surroundings of calls, and the files and tables that they go to."""
