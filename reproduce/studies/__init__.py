"""One question each, with its own table and plot."""
