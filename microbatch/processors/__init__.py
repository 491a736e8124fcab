"""Processors that ship with the library: one driver, one module, imported by nobody but the user."""
