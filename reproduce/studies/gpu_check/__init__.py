"""Is a machine with a GPU right, and how fast is it? The acceptance of a machine, in one command."""
