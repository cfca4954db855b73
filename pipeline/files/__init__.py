"""Files of OUT and of the store: whole or absent, locked by processes that live, and a clear message when a disk is full.

Used from outside: `disk` (`write_whole`, `room_for`, `explain`), `ownership` (`locked`, `owner_mark`, `is_abandoned`).
"""
