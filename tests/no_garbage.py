"""Imported first by the server of tests/processes.py: to search for garbage takes a third of its imports' time."""

import gc

gc.disable()
