"""Each study answers one question, with its own table and plot."""
