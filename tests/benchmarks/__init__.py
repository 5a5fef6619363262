"""Measurements that are quoted, never asserted; each module runs on its own with ``python -m``."""
