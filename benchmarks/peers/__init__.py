"""Other implementations of the same work. Each module is a process that takes one JSON argument and prints one JSON line."""
