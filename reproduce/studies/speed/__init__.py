"""How fast is each part, compared with its peer? One comparison per file."""
