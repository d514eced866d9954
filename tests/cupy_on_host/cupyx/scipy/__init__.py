"""Chainer imports it, and needs nothing of it here."""
