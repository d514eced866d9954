"""Methods of Chainer's functions that another implementation replaces: all of one, or none."""

from __future__ import annotations

import functools

_current: dict = {}  # {(class, name): method}, of the implementation in place
_originals: dict = {}  # (class, name): what the class had itself, or None if it inherited it


def put(methods: dict):
    """Replaces methods. Another implementation's are undone first.

    Args:
        methods (dict): {(class, name): method}. A method takes what the class's own takes. Where it
            returns NotImplemented, and for arrays in a layout of cuDNN, the class's own computes.
    """
    global _current
    if _current is methods:
        return
    undo()
    _current = methods
    for (cls, name), method in methods.items():
        _originals[cls, name] = vars(cls).get(name)
        setattr(cls, name, _or_chainers(method, getattr(cls, name)))


def undo(methods: dict | None = None):
    """Gives the classes their own methods again.

    Args:
        methods (dict): Only if :func:`put` has put these in place; None for any.
    """
    global _current
    if methods is not None and _current is not methods:
        return
    for (cls, name), method in _originals.items():
        if method is None:
            delattr(cls, name)
        else:
            setattr(cls, name, method)
    _originals.clear()
    _current = {}


def _or_chainers(method, original):
    @functools.wraps(original)
    def replaced(node, *arguments):
        layouts = node.input_layouts
        if layouts.count(None) < len(layouts):
            return original(node, *arguments)
        result = method(node, *arguments)
        return original(node, *arguments) if result is NotImplemented else result

    return replaced
