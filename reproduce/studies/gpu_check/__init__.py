"""The acceptance of a machine with a GPU: is it right, and how fast is it?"""
