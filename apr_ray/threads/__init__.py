"""Running one thread tree on any engine: spawn, children side by side, join, go on."""
