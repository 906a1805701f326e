"""Imported before hivemind: its processes inherit open pipes, so they must be forked; spawned ones fail."""

import multiprocessing

if multiprocessing.get_start_method(allow_none=True) is None:
    multiprocessing.set_start_method("fork")
