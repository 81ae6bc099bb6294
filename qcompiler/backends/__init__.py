"""Engines: emit and run; the only place that imports one."""
