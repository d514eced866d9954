"""How fast is each part, beside its peer? One comparison a file."""
