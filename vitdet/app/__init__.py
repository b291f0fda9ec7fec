"""Room 5: programs for people. Nothing imports this room."""
