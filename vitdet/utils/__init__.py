"""Room 0: errors a user can repair, environment and seeds, process groups."""
