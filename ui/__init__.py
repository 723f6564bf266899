"""The web UI: a client of the runs folder. It writes configurations, starts detached processes and reads files."""
