"""Others that do the same work: each module is a process that takes one JSON argument and prints one JSON line."""
